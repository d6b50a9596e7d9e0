"""Data sets, augmentation and loaders.

VOC devkit, shapes ─► VOCDetection ─► AugmentedDataset  ─┬─► loaders
image folders, tar ─► ImageClasses ─► TransformedImages ─┘
"""

from detmix.data.augment import (
    AlbumentationsTransform,
    AugmentedDataset,
    detection_transforms,
)
from detmix.data.image_classes import ImageClasses
from detmix.data.image_transforms import TransformedImages, classification_transforms
from detmix.data.loaders import (
    EpochBatchSampler,
    MixCollate,
    collate,
    eval_loader,
    init_worker,
    train_loader,
)
from detmix.data.object_crops import write_object_crops
from detmix.data.shapes import SHAPE_CLASSES, write_shapes
from detmix.data.voc import VOC_CLASSES, VOCDetection, VOCReport
from detmix.data.voc_annotation import VOCAnnotation, VOCObject, read_annotation, write_annotation

__all__ = [
    "SHAPE_CLASSES",
    "VOC_CLASSES",
    "AlbumentationsTransform",
    "AugmentedDataset",
    "EpochBatchSampler",
    "ImageClasses",
    "MixCollate",
    "TransformedImages",
    "VOCAnnotation",
    "VOCDetection",
    "VOCObject",
    "VOCReport",
    "classification_transforms",
    "collate",
    "detection_transforms",
    "eval_loader",
    "init_worker",
    "read_annotation",
    "train_loader",
    "write_annotation",
    "write_object_crops",
    "write_shapes",
]
