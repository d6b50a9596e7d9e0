"""Pascal VOC average precision, its result table and the pictures of a run.

Importing this package is light: matplotlib is loaded when the first picture is drawn.
"""

from detmix.evaluation.boxes import draw_boxes
from detmix.evaluation.pictures import plot_batch, plot_predictions
from detmix.evaluation.plots import plot_learning_curve, plot_precision_recall
from detmix.evaluation.voc_ap import Interpolation, average_precision
from detmix.evaluation.voc_evaluator import VOCEvaluator
from detmix.evaluation.voc_result import PrecisionRecallCurve, VOCResult

__all__ = [
    "Interpolation",
    "PrecisionRecallCurve",
    "VOCEvaluator",
    "VOCResult",
    "average_precision",
    "draw_boxes",
    "plot_batch",
    "plot_learning_curve",
    "plot_precision_recall",
    "plot_predictions",
]
