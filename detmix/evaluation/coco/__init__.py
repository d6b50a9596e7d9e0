"""Average precision by the rule of COCO."""
