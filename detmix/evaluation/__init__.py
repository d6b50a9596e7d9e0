"""Pascal VOC and COCO average precision, kinds of errors, result tables, pictures and reports.

Importing this package is light: matplotlib is loaded when the first picture is drawn, pycocotools
when the first mask is encoded or the first COCO result computed.
"""

from detmix.evaluation.boxes import draw_boxes
from detmix.evaluation.coco_evaluator import COCOEvaluator
from detmix.evaluation.coco_json import score_predictions
from detmix.evaluation.coco_masks import encode_masks
from detmix.evaluation.coco_result import COCOResult
from detmix.evaluation.error_plots import plot_errors
from detmix.evaluation.error_result import ErrorAnalysis
from detmix.evaluation.errors import analyze_errors
from detmix.evaluation.image_errors import ImageErrors, worst_images
from detmix.evaluation.pictures import plot_batch, plot_predictions
from detmix.evaluation.plots import (
    plot_box_weights,
    plot_learning_curve,
    plot_precision_recall,
)
from detmix.evaluation.report import write_report
from detmix.evaluation.voc_ap import Interpolation, average_precision
from detmix.evaluation.voc_evaluator import VOCEvaluator
from detmix.evaluation.voc_files import read_voc_results, write_voc_results
from detmix.evaluation.voc_matching import VOCMatching
from detmix.evaluation.voc_result import OperatingPoint, PrecisionRecallCurve, VOCResult

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
    "draw_boxes",
    "encode_masks",
    "plot_batch",
    "plot_box_weights",
    "plot_errors",
    "plot_learning_curve",
    "plot_precision_recall",
    "plot_predictions",
    "read_voc_results",
    "score_predictions",
    "worst_images",
    "write_report",
    "write_voc_results",
]
