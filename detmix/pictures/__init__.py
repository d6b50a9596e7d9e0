"""Pictures of samples, predictions and results, and the report that gathers them.

Importing this package is light: matplotlib is loaded when the first picture is drawn.
"""

from detmix.pictures.boxes import draw_boxes
from detmix.pictures.curves import plot_box_weights, plot_learning_curve, plot_precision_recall
from detmix.pictures.errors import plot_errors
from detmix.pictures.images import plot_batch, plot_predictions
from detmix.pictures.report import write_report

__all__ = [
    "draw_boxes",
    "plot_batch",
    "plot_box_weights",
    "plot_errors",
    "plot_learning_curve",
    "plot_precision_recall",
    "plot_predictions",
    "write_report",
]
