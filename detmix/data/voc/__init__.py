"""Data in the layout of the Pascal VOC devkit."""
