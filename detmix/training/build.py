"""From a configuration to a mixer and a detector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from detmix.detectors import build_detector
from detmix.detectors.config import STATISTICS
from detmix.detectors.new_head import norm_epsilon
from detmix.losses import weight_losses
from detmix.mixing import DetectionCutMix, DetectionMixer, DetectionMixUp, RandomChoice
from detmix.training.config import TrainConfig
from detmix.training.resume import load_newest

__all__ = ["build_mixer", "build_model", "start_model"]


def build_mixer(config: TrainConfig) -> DetectionMixer | None:
    """Build the mixer, or None where nothing is mixed."""
    mixing = config.mixing
    names = [] if mixing.name == "none" else mixing.name.split("+")
    # On the device images are already scaled to [0, 1].
    fill = mixing.fill / 255.0 if mixing.place == "device" else mixing.fill
    schedule = {"epochs": config.epochs, "off_epochs": mixing.off_epochs}
    mixers: list[DetectionMixer] = []
    if "mixup" in names:
        mixers.append(DetectionMixUp(mixing.alpha, mixing.p, fill, **schedule))
    if "cutmix" in names:
        mixers.append(
            DetectionCutMix(mixing.cutmix_alpha, mixing.p, mixing.min_visibility, **schedule)
        )
    if len(mixers) > 1:
        return RandomChoice(mixers)
    return mixers[0] if mixers else None


def start_model(config: TrainConfig) -> tuple[nn.Module, TrainConfig]:
    """Build the detector that a training starts with, and complete the configuration by it.

    The mean and deviation that images are normalised with belong to the pretrained weights, and so
    does the epsilon of frozen batch norm. They go into ``detector.options`` and
    ``backbone.norm_eps``, so that the run's checkpoints are whole without the file it started from;
    a run that is resumed needs that file, or a network, no more.

    Args:
        config: The training's configuration.

    Returns:
        The detector, with its pretrained weights, and the completed configuration.

    Raises:
        ValueError: If a checkpoint to go on from has a configuration of no detector; and as
            `build_detector` does.
    """
    resume = config.resume == "auto"
    newest = load_newest(config.run_dir, config.as_dict()) if resume else None
    if newest is not None:
        saved = newest.state["config"]
        try:
            options = saved.get("detector", {}).get("options", {})
            backbone = saved.get("backbone", {})
            config = _note(config, options, backbone.get("norm_eps"))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"the configuration in {newest.path}: {error}") from error
    model: Any = build_model(config, load_weights=newest is None)
    used = {name: list(getattr(model.transform, name)) for name in STATISTICS}
    return model, _note(config, used, norm_epsilon(model))


def _note(config: TrainConfig, statistics: Mapping[str, Any], eps: float | None) -> TrainConfig:
    """Note the statistics and the epsilon where the configuration leaves them open."""
    detector, backbone = config.detector, config.backbone
    if backbone.norm_eps is None:
        backbone = replace(backbone, norm_eps=eps)
    given = {name: value for name, value in detector.options.items() if value is not None}
    noted = {name: statistics[name] for name in STATISTICS if name in statistics}
    detector = replace(detector, options={**noted, **given})
    return replace(config, detector=detector, backbone=backbone)


def build_model(config: TrainConfig, *, load_weights: bool = True) -> nn.Module:
    """Build the detector with the losses that ``config.loss`` asks for.

    Args:
        config: The training's configuration; the classes of its data must be known.
        load_weights: Whether to load pretrained weights; not when a checkpoint of the whole
            detector follows.
    """
    keypoints = config.data.num_keypoints
    model = build_detector(
        config.detector,
        config.backbone,
        len(config.data.class_names) + 1,  # with background
        load_weights=load_weights,
        **({} if keypoints is None else {"num_keypoints": keypoints}),
    )
    if config.loss is None:
        return model
    return weight_losses(model, config.loss.background_weight, config.loss.normalizer)
