"""Average precision by the rule of the Pascal VOC devkit."""
