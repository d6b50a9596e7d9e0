"""Pascal VOC and COCO average precision, their result tables and the pictures of a run.

Importing this package is light: matplotlib is loaded when the first picture is drawn, pycocotools
when the first mask is encoded or the first COCO result computed.
"""

from detmix.evaluation.boxes import draw_boxes
from detmix.evaluation.coco_evaluator import COCOEvaluator
from detmix.evaluation.coco_json import score_predictions
from detmix.evaluation.coco_masks import encode_masks
from detmix.evaluation.coco_result import COCOResult
from detmix.evaluation.pictures import plot_batch, plot_predictions
from detmix.evaluation.plots import plot_learning_curve, plot_precision_recall
from detmix.evaluation.voc_ap import Interpolation, average_precision
from detmix.evaluation.voc_evaluator import VOCEvaluator
from detmix.evaluation.voc_result import PrecisionRecallCurve, VOCResult

__all__ = [
    "COCOEvaluator",
    "COCOResult",
    "Interpolation",
    "PrecisionRecallCurve",
    "VOCEvaluator",
    "VOCResult",
    "average_precision",
    "draw_boxes",
    "encode_masks",
    "plot_batch",
    "plot_learning_curve",
    "plot_precision_recall",
    "plot_predictions",
    "score_predictions",
]
