"""Samples, predictions and results as pictures.

All take the path to write to, whose ending chooses the format, and return it.
"""

from detmix.pictures.charts import (
    plot_box_weights,
    plot_errors,
    plot_learning_curve,
    plot_precision_recall,
)
from detmix.pictures.images import plot_batch, plot_predictions

__all__ = [
    "plot_batch",
    "plot_box_weights",
    "plot_errors",
    "plot_learning_curve",
    "plot_precision_recall",
    "plot_predictions",
]
