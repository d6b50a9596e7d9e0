"""Previews: the images of an epoch, and of every object the image that it is from."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from tiny import tiny_config

from detmix.data.shapes_coco import write_shapes_coco
from detmix.mixing import box_weights
from detmix.training.build import open_dataset
from detmix.training.preview import join_weights, mixed_pair, mixed_samples

# Without augmentation a mixed object lies where it lies on disk.
STILL = ("augment.flip=0", "augment.crop=0", "augment.photometric=0", "mixing.p=1")


def check_sources(image_id, target, data):
    """Every object is one of its source's, as far as it is seen; the sources are named."""
    assert target["source"].dtype == torch.int64
    assert next(iter(target["sources"])) == data.index_of(image_id)
    assert set(target["source"].tolist()) <= target["sources"].keys()
    for box, label, source in zip(
        target["boxes"], target["labels"], target["source"].tolist(), strict=True
    ):
        original = data.target(source)
        low, high = original["boxes"].split(2, dim=1)
        holds = ((low <= box[:2] + 0.01) & (high >= box[2:] - 0.01)).all(1)
        assert bool((holds & (original["labels"] == label)).any())
    for source, name in target["sources"].items():
        assert name == data.names[source]


@pytest.mark.parametrize(
    ("name", "place"),
    [("mixup", "batch"), ("cutmix", "dataset"), ("mixup+cutmix", "device"), ("none", "batch")],
)
def test_objects_keep_their_source(shapes_root, tmp_path, place, name):
    config = tiny_config(
        shapes_root, tmp_path, *STILL, f"mixing.name={name}", f"mixing.place={place}"
    )
    data = open_dataset(config, train=True)
    targets = [target for _, target in islice(mixed_samples(config, epoch=1), 12)]
    for target in targets:
        check_sources(target["image_id"], target, data)
        assert len(target["sources"]) == (1 if name == "none" else 2)
        if name == "mixup":
            for source in target["sources"]:
                weights = target["box_weights"][target["source"] == source]
                assert bool((weights == weights[:1]).all())
    weights = join_weights(islice(mixed_samples(config, epoch=1), 12))
    assert weights.tolist() == [w for t in targets for w in box_weights(t).tolist()]
    assert weights.dtype == torch.float32
    assert bool((weights < 1).any()) == (name != "none")
    with pytest.raises(ValueError, match=r"epoch must be in 0..1, got 2"):
        next(mixed_samples(config, epoch=2))


@pytest.mark.parametrize("place", ["batch", "dataset"])
def test_a_partner_without_objects_is_known(tmp_path, place):
    """The pixels tell: they are those of both sources, whichever of them has objects."""
    root = write_shapes_coco(tmp_path / "coco", 8, 2, 64)
    config = tiny_config(
        root, tmp_path, *STILL, "epochs=3", "data.format=coco", "data.coco.empty=keep",
        "data.classes=[star]", f"mixing.place={place}", "mixing.name=mixup",
    )  # fmt: skip
    data = open_dataset(config, train=True)
    half = 0
    for epoch in range(3):
        for image, target in islice(mixed_samples(config, epoch), 8):
            check_sources(target["image_id"], target, data)
            sources = target["source"].unique().tolist()
            if len(sources) != 1:
                continue
            half += 1
            lam = float(target["box_weights"][0])
            lam = lam if sources == [data.index_of(target["image_id"])] else 1 - lam
            first, second = (data[s][0].double() for s in target["sources"])
            height, width = map(min, first.shape[1:], second.shape[1:])
            seen, first, second = (x[:, :height, :width] for x in (image, first, second))
            assert (seen - (lam * first + (1 - lam) * second)).abs().max() <= 1
    assert half > 0


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_pairs_name_their_sources(shapes_root, tmp_path, name):
    config = tiny_config(shapes_root, tmp_path, *STILL, f"mixing.name={name}")
    data = open_dataset(config, train=True)
    images, targets = mixed_pair(config, 5, 2, lam=0.6)
    assert len(images) == len(targets) == 3
    assert [list(target["sources"]) for target in targets] == [[5], [2], [5, 2]]
    for image_id, target in zip((5, 2, 5), targets, strict=True):
        check_sources(image_id, target, data)


BAD_PAIRS = [
    ("none", (0, 1), "mixing.name is none"),
    ("mixup", (24, 0), r"24 and 0: expected two of 0\.\.23"),
    ("cutmix", (2, 2), "2 and 2"),
]


@pytest.mark.parametrize(("name", "indices", "message"), BAD_PAIRS)
def test_pairs_that_cannot_be_mixed(shapes_root, tmp_path, name, indices, message):
    config = tiny_config(shapes_root, tmp_path, *STILL, f"mixing.name={name}")
    with pytest.raises(ValueError, match=message):
        mixed_pair(config, *indices, lam=0.6)
