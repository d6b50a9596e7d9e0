"""Data in the format of COCO."""
