"""Weights that were trained before: read from anywhere, matched tensor by tensor."""

from detmix.detectors.backbone_weights import load_backbone_weights
from detmix.pretrained.match_state import LoadReport

__all__ = ["LoadReport", "load_backbone_weights"]
