"""What mixers and epochs say of themselves."""

from __future__ import annotations

import copy

import pytest

from detmix import DetectionCutMix, DetectionMixUp, RandomChoice
from detmix.mixing import SharedEpoch


@pytest.mark.parametrize(
    ("mix", "text"),
    [
        (
            DetectionMixUp(alpha=2.0, p=0.25, fill=(1, 2, 3), epochs=5, off_epochs=2),
            "DetectionMixUp(alpha=2.0, fill=(1, 2, 3), p=0.25, epochs=5, off_epochs=2)",
        ),
        (
            DetectionCutMix(alpha=2.0, p=0.25, min_visibility=0.2, epochs=5, off_epochs=2),
            "DetectionCutMix(alpha=2.0, min_visibility=0.2, p=0.25, epochs=5, off_epochs=2)",
        ),
    ],
)
def test_a_mixer_says_its_settings(mix, text):
    assert repr(mix) == text


def test_a_choice_says_its_mixers():
    text = repr(RandomChoice([DetectionMixUp(), DetectionCutMix()], (1, 3)))
    assert "probabilities=(0.25, 0.75)" in text
    assert "DetectionMixUp(alpha=1.5" in text
    assert "DetectionCutMix(alpha=1.0" in text


def test_shared_epoch_says_its_number():
    epoch = SharedEpoch(3)
    assert repr(epoch) == "SharedEpoch(3)"
    assert copy.deepcopy(epoch).value == 3
