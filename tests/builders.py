"""Torchvision's own detectors at their smallest, a batch for them, a step, and weights in files.

The networks are the real ones with random weights; only images, proposals and samples are few.
"""

from __future__ import annotations

import copy
from functools import cache, partial

import torch
from torch import nn
from torchvision.models import detection, get_model, list_models
from torchvision.ops import FrozenBatchNorm2d

from detmix.detectors import BackboneConfig, DetectorConfig, build_detector

NAMES = list_models(module=detection)
assert len(NAMES) >= 12
# A two-stage and a one-stage detector, for what would take too long with all of them.
FASTEST = ("fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large")
FAMILIES = ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet", "fcos", FASTEST[1])
CLASSES = 5  # with background
KEYPOINTS = 3

NO_WEIGHTS = {"weights": None, "weights_backbone": None}
DOWNLOAD = "torchvision.models._api.load_state_dict_from_url"

_RCNN = {
    "rpn_pre_nms_top_n_train": 60,
    "rpn_pre_nms_top_n_test": 20,
    "rpn_post_nms_top_n_train": 30,
    "rpn_post_nms_top_n_test": 5,
    "box_batch_size_per_image": 8,
    "box_detections_per_img": 3,
    "box_score_thresh": 0.0,
}
_ONE_STAGE = {"score_thresh": 0.0, "topk_candidates": 20, "detections_per_img": 5}

# Image height and width, and the objects of two images of different sizes.
_IMAGES = (
    ((60, 75), [[4.0, 4.0, 40.0, 50.0], [10.0, 20.0, 70.0, 58.0]]),
    ((96, 64), [[1.0, 1.0, 30.0, 33.0], [20.0, 40.0, 60.0, 90.0], [5.0, 50.0, 34.0, 92.0]]),
)
# Which of the images keep their objects.
BATCHES = {"objects": (True, True), "half": (False, True), "none": (False, False)}
# Binary fractions would hide a rounding that torchvision does not do.
WEIGHTS = ([0.3, 0.9], [0.15, 1.0, 0.6])


def build(name):
    """Build the detector of this name for training."""
    options = NO_WEIGHTS | (_RCNN if "rcnn" in name else _ONE_STAGE)
    if "ssd" not in name:
        options |= {"min_size": 48, "max_size": 64}
    if "keypoint" in name:
        # Its head takes most of the time, in proportion to the samples.
        options |= {"num_keypoints": KEYPOINTS, "box_batch_size_per_image": 4}
    torch.manual_seed(0)
    return get_model(name, num_classes=CLASSES, **options).train()


@cache
def small(name):
    """Build the smallest detector of a family, without weighted losses. Change twins of it only."""
    if name == FASTEST[1]:
        return with_known_features(build(name))
    torch.manual_seed(0)
    settings = {"options": _ONE_STAGE}
    if "rcnn" in name:
        options = {"rpn_post_nms_top_n_train": 30, "box_score_thresh": 0.0}
        settings = {"options": options, "head_dim": 32}
    config = DetectorConfig(name, 64, 96, anchor_sizes=(16, 32, 64), **settings)
    body = BackboneConfig("resnet18", fpn_channels=32, levels=(1, 2), norm="group")
    return build_detector(config, body, CLASSES, num_keypoints=KEYPOINTS)


def batch(kind="objects", weights=None):
    """Make two images of different sizes with boxes, labels, masks and keypoints.

    ``kind`` is one of `BATCHES`; ``weights`` are each image's ``box_weights``, or one for all.
    """
    generator = torch.Generator().manual_seed(3)
    images, targets = [], []
    for index, ((height, width), boxes) in enumerate(_IMAGES):
        images.append(torch.rand(3, height, width, generator=generator))
        chosen = boxes if BATCHES[kind][index] else []
        target = _target(torch.tensor(chosen).reshape(-1, 4), height, width)
        if isinstance(weights, float):
            target["box_weights"] = torch.full((len(chosen),), weights)
        elif weights is not None:
            target["box_weights"] = torch.tensor(weights[index][: len(chosen)])
        targets.append(target)
    return images, targets


def _target(boxes, height, width):
    """Fill the left half of each box with its mask; every second object hides a keypoint."""
    count, centre = len(boxes), (boxes[:, :2] + boxes[:, 2:]) / 2
    x, y = torch.arange(width) + 0.5, torch.arange(height)[:, None] + 0.5
    x1, y1, _, y2 = boxes[:, :, None, None].unbind(1)
    inside = (x > x1) & (x < centre[:, 0, None, None]) & (y > y1) & (y < y2)
    points = torch.stack([boxes[:, :2] + 2, centre, boxes[:, 2:] - 3], dim=1)
    visible = torch.ones(count, KEYPOINTS, 1)
    visible[::2, -1] = 0
    return {
        "boxes": boxes,
        "labels": torch.arange(count) % (CLASSES - 1) + 1,
        "masks": inside.to(torch.uint8),
        "keypoints": torch.cat([points, visible], dim=2),
    }


def step(model, data):
    """Return the losses, the gradients and the random state after one training step."""
    losses = losses_of(model, data)
    model.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {key: loss.detach() for key, loss in losses.items()}, grads, torch.get_rng_state()


def losses_of(model, data):
    """Return the losses of one forward pass, always from the same random state."""
    torch.manual_seed(7)
    return model(*data)


# Bit for bit, in dicts and sequences as deep as need be.
assert_identical = partial(torch.testing.assert_close, rtol=0, atol=0)


def twin(model):
    """Copy everything of a model but its parameters, which both then have in common."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


class KnownFeatures(nn.Module):
    """In a backbone's place, what it made of these images: what comes after it may train them."""

    def __init__(self, backbone, images):
        super().__init__()
        self.images = images
        with torch.no_grad():
            self.features = nn.ParameterDict(backbone(images))

    def forward(self, images):
        """Return the feature maps of the images, perhaps several times over, and of no others."""
        times = (len(images) // len(self.images), 1, 1, 1)
        # a GPU resizes with other roundings
        assert images.is_cuda or torch.equal(images, self.images.repeat(times))
        return {name: value.repeat(times) for name, value in self.features.items()}


def with_known_features(model):
    """Return a twin whose backbone knows the features of any `batch`."""
    changed = twin(model)
    images, _ = changed.transform(batch()[0])
    changed.backbone = KnownFeatures(changed.backbone, images.tensors)
    return changed


def shake(module, seed=0):
    """Give every tensor of a module values of its own, so that one that is not loaded shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if not value.is_floating_point():
                value.fill_(7)
            elif name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            else:
                scale = value.std() if value.dim() > 1 else 0.1
                noise = scale * torch.randn(value.shape, generator=generator)
                value.copy_(noise if value.dim() > 1 else value + noise)
    return module


def random_resnet(name="resnet18", seed=0, **options):
    return shake(get_model(name, weights=None, **options), seed)


def pretraining_checkpoint(model, *, name="resnet18", stem="standard", data=None, **more):
    """Return what ``tools/pretrain.py`` saves for a model, as far as a detector reads it."""
    config = {"model": {"name": name, "stem": stem, "norm": "batch"}, "data": data or {}}
    state = {"format": 1, "model": model.state_dict(), "ema": None, "config": config}
    return {**state, "classes": ["a", "b"], **more}


def assert_equal_tensors(found, expected, keys):
    """Compare tensors by key and say how many there were."""
    assert_identical({key: found[key] for key in keys}, {key: expected[key] for key in keys})
    return len(keys)


def on_meta(build):
    """Build without any memory: what has no values is not compared by value."""
    with torch.device("meta"):
        return build()


def structure(model):
    """Return what two models of one architecture have in common."""
    shapes = [(key, value.shape) for key, value in model.state_dict().items()]
    training = {module.training for module in model.modules()}
    return [repr(model), shapes, trained(model), training, plain_settings(model)]


def plain_settings(model):
    """Return what the modules of a model are set to, by name: all attributes of plain values."""
    plain, of_modules = (int, float, str, bool, tuple, dict, list), vars(nn.Module()).keys()
    return {
        f"{name}.{key}": repr(value)
        for name, part in model.named_modules()
        for key, value in vars(part).items()
        if key not in of_modules and isinstance(value, plain)
    }


def trained(model):
    return {name for name, value in model.named_parameters() if value.requires_grad}


def epsilons(model):
    return {part.eps for part in model.modules() if isinstance(part, FrozenBatchNorm2d)}


def statistics(model):
    return [list(model.transform.image_mean), list(model.transform.image_std)]
