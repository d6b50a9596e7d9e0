"""What a sample of a detection data set must look like, plain or of torchvision's tv_tensors.

A sample is checked where it enters the mixers, by `checked_samples`; what comes after trusts it.

Arithmetic on a tv_tensor mostly returns a plain tensor, and where it does not it keeps a canvas
size that is no longer true. So everything is computed on plain tensors, and typed at the end.

Shapes: N objects in a target; (H, W) an image or the canvas.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence, Set, Sized
from typing import Any
from zlib import crc32

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import convert_bounding_box_format
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, TVTensor

Target = dict[str, Any]
"""An image's objects as torchvision's detectors take them, ``boxes`` ``(N, 4)`` and ``labels``
``(N,)`` from 1, with ``box_weights`` ``(N,)`` once mixed, and what else `union` joins."""
Sample = tuple[Tensor, Target]
"""An image ``(C, H, W)``, uint8 or floating point, and its target."""
Size = tuple[int, int]
Keys = frozenset[str]
#: a key, each target's values, what they must be, and the rule for each row of them
Column = tuple[str, list[Tensor], str, Callable[[Tensor], Tensor]]

# What belongs to the objects is known by name, or declared by the user as ``keys``: a length says
# nothing when it happens to equal the number of objects.
NEEDED_KEYS = frozenset({"boxes", "labels", "box_weights"})  # by every detector
KNOWN_KEYS = NEEDED_KEYS | {"difficult", "iscrowd", "area", "masks", "keypoints"}
ZERO_BY_DEFAULT = frozenset({"difficult", "iscrowd"})
PER_IMAGE_KEYS = frozenset({"image_id", "orig_size", "size"})


def has_rows(sample: Sample, key: str) -> bool:
    """Tell whether a tensor or list, or a default, has one entry for each box."""
    image, target = sample
    value, count = target.get(key), len(target["boxes"])
    if value is None:
        return key in ZERO_BY_DEFAULT or not count
    if isinstance(value, Tensor) and not count:
        return value.numel() == 0  # of whatever shape, as keypoints of (17, 0, 3)
    if key == "masks":
        return isinstance(value, Tensor) and value.shape == (count, *image_size(image))
    if not isinstance(value, (Tensor, list)) or (isinstance(value, Tensor) and value.ndim == 0):
        return False
    return len(value) == count and (key != "box_weights" or torch.as_tensor(value).ndim == 1)


def box_weights(target: Target) -> Tensor:
    """Return ``target["box_weights"]``, or ones where there are none: ``(N,)`` float32."""
    weights, boxes = target.get("box_weights"), target["boxes"]
    if weights is None:
        return torch.ones(len(boxes), dtype=torch.float32, device=boxes.device)
    return torch.as_tensor(weights, dtype=torch.float32, device=boxes.device)


def with_objects(target: Target, device: torch.device | None = None) -> Target:
    """Return the target, or a copy with ``boxes`` and ``labels`` where it holds none."""
    if target.get("boxes") is not None:
        return target
    boxes = torch.zeros((0, 4), device=device)
    return {**target, "boxes": boxes, "labels": boxes.new_zeros(0, dtype=torch.int64)}


def key_names(keys: Collection[str]) -> Keys:
    """Return declared ``keys`` as a set; a single name would be taken letter by letter."""
    if isinstance(keys, str):
        raise ValueError(f"keys must be a list of names, got {keys!r}")
    return frozenset(keys)


def sample_name(number: int, sample: Any) -> str:
    """Name a sample for errors; raise ValueError for what is none."""
    if not isinstance(sample, (tuple, list)) or len(sample) != 2:
        raise ValueError(f"sample {number} must be (image, target), got {describe(sample)}")
    image_id = sample[1].get("image_id") if isinstance(sample[1], dict) else None
    return f"sample {number}" if image_id is None else f"sample {number} (image_id {image_id})"


def checked_samples(
    samples: Sequence[Sample],
    keys: Keys,
    names: Sequence[str] = ("sample a", "sample b"),
    told: Tensor | None = None,
) -> list[Sample]:
    """Return samples that keep the contract, with targets completed and all of the same keys."""
    for (image, target), name in zip(samples, names, strict=True):
        check_sample(image, target, name, NEEDED_KEYS | keys)
    samples = [(image, with_objects(target, image.device)) for image, target in samples]
    check_rows(names, [target for _, target in samples])
    held = {key for _, target in samples for key, value in target.items() if value is not None}
    optional = (held & KNOWN_KEYS) - NEEDED_KEYS - keys
    left_out = {key for key in optional if not all(has_rows(sample, key) for sample in samples)}
    what = "left out of the targets, as not every object has an entry. Declared in keys=, such a"
    _tell(told, left_out, f"{what} key is an error that names the image")
    if len(samples) > 1:  # nothing is joined to a single one
        tell_of_own(told, samples, keys)
    return [(image, _completed(image, target, keys, left_out)) for image, target in samples]


def told_keys() -> Tensor:
    """Return an empty table of keys that were warned of; all of a loader's workers share it."""
    return torch.zeros(4096, dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call,no-any-return]


def tell_of_own(told: Tensor | None, samples: Sequence[Sample], keys: Keys) -> None:
    """Warn of undeclared keys that have an entry for each box wherever they are held."""
    if not any(len(target["boxes"]) for _, target in samples):
        return
    known = KNOWN_KEYS | PER_IMAGE_KEYS | keys
    held = [(s, key) for s in samples for key in s[1].keys() - known if s[1][key] is not None]
    of_image = {key for sample, key in held if not has_rows(sample, key)}
    what = "kept as the image's, though there is an entry for each box. Declare in keys= what"
    _tell(told, {key for _, key in held} - of_image, f"{what} belongs to the objects")
    _tell(told, of_image)  # not where they happen to fit another time


def _tell(told: Tensor | None, keys: Set[str], what: str = "") -> None:
    """Warn of keys that are not in the table ``told``, or say nothing, and put them there."""
    names = sorted(map(str, keys))
    if told is not None and names:
        places = [crc32(name.encode()) % len(told) for name in names]  # by their hashes
        is_told = told[places].tolist()
        told[places] = True
        names = [name for name, was_told in zip(names, is_told, strict=True) if not was_told]
    if what and names:
        warnings.warn(f"{', '.join(map(repr, names))}: {what}", UserWarning, stacklevel=2)


def _completed(image: Tensor, target: Target, keys: Keys, left_out: set[str]) -> Target:
    """Return a copy with ``box_weights``, without keys left out, with no rows for no boxes."""
    target = {key: value for key, value in target.items() if key not in left_out}
    target["box_weights"] = box_weights(target)
    for key in () if len(target["boxes"]) else (KNOWN_KEYS | keys) & target.keys():
        value = target[key]
        if isinstance(value, Tensor):
            shape = (0, *(image_size(image) if key == "masks" else value.shape[1:]))
            # labels of torch.tensor([]) are float, and would stay so where both images have none
            dtype = torch.int64 if key == "labels" and value.is_floating_point() else value.dtype
            empty = plain(value).reshape(shape).to(dtype)
            target[key] = wrap_like(empty, value, image_size(image))
    return target


def check_sample(image: Any, target: Any, name: str, keys: Keys) -> None:
    """Raise ValueError for a broken sample; ``keys`` must have an entry for each box if held."""
    if not isinstance(image, Tensor) or image.ndim != 3:
        is_pil = isinstance(image, Image.Image)
        remedy = ": put torchvision.transforms.v2.ToImage() among the transforms" if is_pil else ""
        raise ValueError(f"{name}: image must be a (C, H, W) tensor, got {describe(image)}{remedy}")
    if not isinstance(target, dict):
        raise ValueError(f"{name}: target must be a dict, got {describe(target)}")
    held = {key for key, value in target.items() if value is not None}
    if held <= PER_IMAGE_KEYS:  # an image without objects
        return
    boxes = target.get("boxes")
    if boxes is None:
        raise ValueError(f"{name}: target has no 'boxes', only {', '.join(sorted(map(str, held)))}")
    if not isinstance(boxes, Tensor) or boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(
            f"{name}: 'boxes' must be an (N, 4) tensor (of a rotated object, the smallest upright "
            f"box around it), got {describe(boxes)}"
        )
    for key in sorted(keys & held):
        if not has_rows((image, target), key):
            expected = f"tensor or list of {len(boxes)} entries, one for each box"
            if key == "masks":
                expected = f"{(len(boxes), *image_size(image))} tensor, the image's size"
            raise ValueError(f"{name}: {key!r} must be a {expected}, got {describe(target[key])}")


def check_rows(names: Sequence[str], targets: Sequence[Target], *more: Column) -> None:
    """Raise ValueError for the first weight or box, or row of more, that breaks its rule."""
    weights = [box_weights(target) for target in targets]
    boxes = [plain(target["boxes"]) for target in targets]
    columns: list[Column] = [
        ("box_weights", weights, "finite and not negative", lambda w: torch.isfinite(w) & (w >= 0)),
        ("boxes", boxes, "finite", lambda boxes: torch.isfinite(boxes).all(1)),
        *more,
    ]
    filled = [([own for own in values if own.numel()], rule) for _, values, _, rule in columns]
    valid = [rule(torch.cat(values)) for values, rule in filled if values]
    if not valid or bool(torch.cat(valid).all()):  # asked once, as it waits for the device
        return
    for key, values, expected, rule in columns:
        for name, own in zip(names, values, strict=True):
            for row in (~rule(own)).nonzero()[:, 0].tolist():
                got = own[row].tolist()
                raise ValueError(f"{name}: {key!r}[{row}] must be {expected}, got {got}")


def describe(value: object) -> str:
    """Say what a value is, for an error."""
    if isinstance(value, Tensor):
        kind = f"{value.format.value} boxes" if isinstance(value, BoundingBoxes) else "a tensor"
        return f"{kind} of shape {tuple(value.shape)}"
    if isinstance(value, Sized):
        return f"{type(value).__name__} of length {len(value)}"
    return repr(value)


def check_share(name: str, value: float) -> None:
    """Raise ValueError unless an argument is in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def check_pair(image_a: Tensor, image_b: Tensor) -> None:
    """Raise ValueError for images that cannot be mixed."""
    for name, a, b in (
        ("dtype", image_a.dtype, image_b.dtype),
        ("device", image_a.device, image_b.device),
        ("number of channels", len(image_a), len(image_b)),
    ):
        if a != b:
            raise ValueError(f"images to mix must have the same {name}, got {a} and {b}")


def image_size(image: Tensor) -> Size:
    """Return (H, W) of one image or a batch of them."""
    return image.shape[-2], image.shape[-1]


def plain(tensor: Tensor) -> Tensor:
    """Return the same values without the type of a tv_tensor; anything else as it is."""
    # only where needed: it makes a new tensor object, which takes longer than the question
    return tensor.as_subclass(Tensor) if isinstance(tensor, TVTensor) else tensor


def box_format(boxes: Tensor) -> BoundingBoxFormat:
    """Return the format of `BoundingBoxes`; that of plain boxes is (x1, y1, x2, y2)."""
    return boxes.format if isinstance(boxes, BoundingBoxes) else BoundingBoxFormat.XYXY


def converted(boxes: Tensor, old: BoundingBoxFormat, new: BoundingBoxFormat) -> Tensor:
    """Convert plain boxes from one format to another; of the same format they stay as they are."""
    if old == new:
        return boxes
    if BoundingBoxFormat.CXCYWH in (old, new) and not boxes.is_floating_point():
        boxes = boxes.float()  # whole centres may have corners at halves, and the other way round
    result: Tensor = convert_bounding_box_format(boxes, old, new)
    return result


def xyxy(boxes: Tensor) -> Tensor:
    """Return boxes of any format as plain (x1, y1, x2, y2), ``(N, 4)``."""
    return converted(plain(boxes), box_format(boxes), BoundingBoxFormat.XYXY)


def wrap_like(values: Tensor, like: Any, size: Size) -> Tensor:
    """Give plain values the type of another tensor, on a canvas of their own."""
    if not isinstance(like, TVTensor):
        return values
    typed: Tensor = tv_tensors.wrap(values, like=like, canvas_size=size)  # where it has a canvas
    return typed
