"""The mixers in torchvision's own training code, and after each of its augmentation presets."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from builders import small
from mixing_oracle import DEVICES, assert_same_batch, on, seeded
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from detmix import DetectionCutMix, DetectionMixUp, MixedDataset, RandomChoice, weight_losses
from detmix.data import write_shapes_coco

WITHOUT = 3  # the id of an image without annotations
KEYS = {"boxes", "labels", "masks", "image_id", "iscrowd", "area"}
MIX = RandomChoice([DetectionMixUp(p=1.0), DetectionCutMix(p=1.0)])
TYPED = v2.Compose(
    [v2.ToImage(), v2.RandomHorizontalFlip(0.5), v2.ToDtype(torch.float32, scale=True)]
)
# as in torchvision's references, which leave out images without annotations before
LAST = (
    v2.ConvertBoundingBoxFormat(BoundingBoxFormat.XYXY),
    v2.SanitizeBoundingBoxes(),
    v2.ToPureTensor(),
)
# those of references/detection/presets.py on smaller images
PRESETS = {
    "hflip": [],
    "lsj": [v2.ScaleJitter((96, 96)), v2.RandomCrop(96, pad_if_needed=True)],
    "multiscale": [v2.RandomShortestSize([64, 80, 96], max_size=133)],
    "ssd": [v2.RandomPhotometricDistort(), v2.RandomZoomOut(), v2.RandomIoUCrop()],
    "ssdlite": [v2.RandomIoUCrop()],
}


def as_v1(name, transform):
    """Move what the old transforms of a preset move, and leave the rest as long as it was.

    The crop of ``ssd`` and ``ssdlite`` takes rows of boxes and labels only, that of ``lsj`` of
    masks too; the other presets drop no objects.
    """
    moved = {"boxes", "labels", *(() if name.startswith("ssd") else ("masks",))}

    def apply(image, target):
        image, part = transform(image, {key: target[key] for key in moved})
        rest = {"area": torch.tensor(target["area"]), "iscrowd": torch.tensor(target["iscrowd"])}
        return image, {"masks": target["masks"].as_subclass(torch.Tensor)} | part | rest

    return apply


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Open six images of shapes; one has no annotations."""
    root = write_shapes_coco(tmp_path_factory.mktemp("coco"), 6, 1, image_size=96)
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    rows = [row for row in content["annotations"] if row["image_id"] != WITHOUT]
    for row in rows:
        row["category_id"] = 1 + row["category_id"] % 4  # the detector's labels, without gaps
    path.write_text(json.dumps({**content, "annotations": rows}))

    def load(transforms):
        dataset = datasets.CocoDetection(root / "train2017", path, transforms=transforms)
        return datasets.wrap_dataset_for_transforms_v2(dataset, target_keys=sorted(KEYS))

    return load


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("place", ["collate_fn", "MixedDataset"])
def test_a_step_of_the_reference_engine(coco, place, device):
    """Which does this with a batch, in torchvision's references/detection/engine.py."""
    dataset = coco(TYPED)
    if place == "MixedDataset":
        dataset = MixedDataset(dataset, MIX, seed=0)
    torch.manual_seed(0)
    collate = MIX if place == "collate_fn" else lambda batch: tuple(zip(*batch, strict=True))
    images, targets = next(iter(DataLoader(dataset, batch_size=6, collate_fn=collate)))
    for target in targets:
        count = len(target["boxes"])
        per_object = (KEYS & target.keys()) - {"image_id"} | {"labels", "box_weights"}
        assert all(len(target[key]) == count for key in per_object)
        assert isinstance(target["boxes"], BoundingBoxes)
    model = weight_losses(copy.deepcopy(small("maskrcnn"))).to(device)
    samples = [on(device, sample) for sample in zip(images, targets, strict=True)]
    losses = model(*zip(*samples, strict=True))
    sum(losses.values()).backward()
    assert losses["loss_mask"] > 0
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert any(p.grad is not None and p.grad.norm() > 0 for p in model.parameters())


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset(coco, name, version):
    """What does not fit the boxes is left out and told; all else is mixed as without it."""
    torch.manual_seed(0)
    transform = v2.Compose([v2.ToImage(), *PRESETS[name], TYPED, *LAST])
    dataset = coco(as_v1(name, transform) if version == "v1" else transform)
    mix = RandomChoice([DetectionMixUp(p=1.0), DetectionCutMix(p=1.0)])
    indices = [index for index, image_id in enumerate(dataset.ids) if image_id != WITHOUT]
    left_out = set()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        for seed in range(4):
            samples = [dataset[index] for index in indices]
            unfit = {
                key
                for image, target in samples
                for key in KEYS & target.keys() - {"image_id"}
                if len(target[key]) != len(target["boxes"])
                or (key == "masks" and target[key].shape[1:] != image.shape[1:])
            }
            fitting = [
                (image, {key: value for key, value in target.items() if key not in unfit})
                for image, target in samples
            ]
            images, targets = mix(samples, generator=seeded(seed))
            assert_same_batch((images, targets), mix(fitting, generator=seeded(seed)))
            left_out |= unfit
    # torchvision's own v2 transforms keep masks with the boxes, but not area and iscrowd
    cut = {"area", "iscrowd"} if name in ("lsj", "ssd", "ssdlite") else set()
    assert left_out == cut | ({"masks"} if (name[:3], version) == ("ssd", "v1") else set())
    messages = [str(warning.message) for warning in told if "left out" in str(warning.message)]
    assert all(sum(f"'{key}'" in message for message in messages) == 1 for key in left_out)
    assert len(messages) <= min(len(left_out), 2)
    losses = weight_losses(copy.deepcopy(small("fasterrcnn")))(images, targets)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
