"""Bad data as inner functions see it; what is left out of training is in the contract."""

from __future__ import annotations

import errno

import pytest

from detmix.data import SHAPE_CLASSES, VOCDetection, write_shapes
from detmix.data.coco.file import read_keypoints


@pytest.fixture
def root(tmp_path):
    return write_shapes(tmp_path / "shapes", num_train=3, num_test=1, image_size=64)


def test_an_error_of_the_machine_raises(root, monkeypatch):
    """A disk that fails for a moment must not change what is trained on."""

    def fail(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("detmix.data.images.read_file", fail)
    with pytest.raises(OSError, match=r"Input/output error.*jpg"):
        VOCDetection(root, classes=SHAPE_CLASSES, on_error="skip")


@pytest.mark.parametrize("value", [10**400, 1e39, -1e39, float("nan"), float("inf")])
def test_keypoints_that_no_float32_holds(value):
    with pytest.raises(ValueError, match="keypoints must be finite numbers, got "):
        read_keypoints([1, value, 2], 1)
