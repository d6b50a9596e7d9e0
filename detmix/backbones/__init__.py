"""Classifiers that stand under a feature pyramid: torchvision's ResNets, and timm's."""
