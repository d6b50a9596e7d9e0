"""Weights that were trained before: read from anywhere, matched tensor by tensor."""

from detmix.pretrained.match_state import LoadReport, load_backbone_weights

__all__ = ["LoadReport", "load_backbone_weights"]
