"""Rotated boxes through the mixers, and conversions between formats of boxes."""

from __future__ import annotations

import pytest
import torch
from mixing_oracle import make_image
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import convert_bounding_box_format
from torchvision.tv_tensors import BoundingBoxes

from detmix import cutmix, mixup
from detmix.mixing.target import box_format, converted, plain, typed_as, xyxy

SIZES = ((20, 30), (24, 18))  # of A and of B
FORMATS = ["XYXY", "XYWH", "CXCYWH"]
BOXES = ([[1.0, 2, 11, 12], [10, 5, 30, 20]], [[0.0, 0, 12, 12], [4, 6, 18, 24], [3, 3, 9, 9]])


def make_boxes(rows, size, kind):
    """Boxes (x1, y1, x2, y2) as a plain tensor or in a format."""
    boxes = torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)
    if kind is None:
        return boxes
    typed = BoundingBoxes(boxes, format="XYXY", canvas_size=size)
    return convert_bounding_box_format(typed, new_format=tv_tensors.BoundingBoxFormat[kind])


def make_sample(side, kind, rows=None, **extra):
    size, rows = SIZES[side], BOXES[side] if rows is None else rows
    boxes = make_boxes(rows, size, kind)
    target = {"boxes": boxes, "labels": torch.arange(len(boxes)) + 10 * side, "image_id": side}
    return make_image(*size, seed=side), {**target, **extra}


def rotated(side, format="CXCYWHR"):
    rows = torch.tensor([[10.0, 9, 8, 6, 30], [12, 12, 5, 4, -20]])
    boxes = BoundingBoxes(rows[: side + 1], format=format, canvas_size=SIZES[side])
    return make_image(*SIZES[side]), {"boxes": boxes, "labels": torch.arange(side + 1)}


@pytest.mark.skipif(not hasattr(tv_tensors, "KeyPoints"), reason="torchvision rotates no boxes")
@pytest.mark.parametrize("flip", [False, True])
def test_rotated_boxes_are_refused(flip):
    pair = (rotated(1), make_sample(0, "XYWH"))
    pair = pair[::-1] if flip else pair
    where = "sample b" if flip else "sample a"
    for mix_pair, how in ((mixup, 0.5), (cutmix, (0, 0, 5, 5))):
        with pytest.raises(ValueError, match=f"{where}: 'boxes' must not be rotated.*CXCYWHR"):
            mix_pair(*pair[0], *pair[1], how)


class TestConversion:
    @pytest.mark.parametrize("kind", FORMATS)
    def test_there_and_back(self, kind):
        boxes = make_boxes(BOXES[1], SIZES[1], kind)
        assert xyxy(boxes).tolist() == BOXES[1]
        assert type(xyxy(boxes)) is type(plain(boxes)) is torch.Tensor
        back = typed_as(xyxy(boxes), boxes, (50, 60))
        assert (box_format(back), back.canvas_size) == (box_format(boxes), (50, 60))
        assert torch.equal(plain(back), plain(boxes))

    def test_plain_stays_plain(self):
        boxes = torch.tensor(BOXES[0])
        assert plain(boxes) is boxes
        assert typed_as(boxes, torch.zeros(2), (3, 4)) is boxes
        assert typed_as(boxes, None, (3, 4)) is boxes
        assert box_format(boxes).value == "XYXY"
        assert converted(boxes, box_format(boxes), box_format(boxes)) is boxes
