"""Pascal VOC and COCO average precision, kinds of errors, result tables and files.

Importing this package is light: pycocotools is loaded when the first mask is encoded or the first
COCO result computed.
"""

from detmix.evaluation.coco.evaluator import COCOEvaluator
from detmix.evaluation.coco.files import score_predictions
from detmix.evaluation.coco.masks import encode_masks
from detmix.evaluation.errors.analysis import analyze_errors
from detmix.evaluation.errors.result import ErrorAnalysis, ImageErrors, worst_images
from detmix.evaluation.results import COCOResult, VOCResult
from detmix.evaluation.voc.ap import (
    Interpolation,
    OperatingPoint,
    PrecisionRecallCurve,
    average_precision,
)
from detmix.evaluation.voc.devkit_files import read_voc_results, write_voc_results
from detmix.evaluation.voc.evaluator import VOCEvaluator
from detmix.evaluation.voc.matching import VOCMatching

__all__ = [
    "COCOEvaluator",
    "COCOResult",
    "ErrorAnalysis",
    "ImageErrors",
    "Interpolation",
    "OperatingPoint",
    "PrecisionRecallCurve",
    "VOCEvaluator",
    "VOCMatching",
    "VOCResult",
    "analyze_errors",
    "average_precision",
    "encode_masks",
    "read_voc_results",
    "score_predictions",
    "worst_images",
    "write_voc_results",
]
