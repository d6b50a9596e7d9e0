"""Data sets, augmentation and loaders.

VOC's XML, shapes  ─► VOCDetection ──┬─► AugmentedDataset  ─┬─► loaders
COCO JSON, shapes  ─► CocoDetection ─┤                      │
YOLO text labels   ─► YOLODetection ─┘                      │
image folders      ─► ImageClasses ─────────────────────────┘
"""

from detmix.data.augment import (
    AlbumentationsTransform,
    AugmentedDataset,
    detection_transforms,
)
from detmix.data.coco.dataset import CocoDetection, CocoReport
from detmix.data.detection import SkippedImage
from detmix.data.image_folder import ImageClasses
from detmix.data.loaders import (
    EpochBatchSampler,
    MixCollate,
    collate,
    eval_loader,
    init_worker,
    train_loader,
)
from detmix.data.shapes import SHAPE_CLASSES, write_shape_crops, write_shapes
from detmix.data.shapes_coco import write_shapes_coco
from detmix.data.voc.dataset import VOC_CLASSES, VOCDetection, VOCReport
from detmix.data.voc.devkit import VOCAnnotation, VOCObject, read_annotation, write_annotation
from detmix.data.yolo import YOLODetection

__all__ = [
    "SHAPE_CLASSES",
    "VOC_CLASSES",
    "AlbumentationsTransform",
    "AugmentedDataset",
    "CocoDetection",
    "CocoReport",
    "EpochBatchSampler",
    "ImageClasses",
    "MixCollate",
    "SkippedImage",
    "VOCAnnotation",
    "VOCDetection",
    "VOCObject",
    "VOCReport",
    "YOLODetection",
    "collate",
    "detection_transforms",
    "eval_loader",
    "init_worker",
    "read_annotation",
    "train_loader",
    "write_annotation",
    "write_shape_crops",
    "write_shapes",
    "write_shapes_coco",
]
