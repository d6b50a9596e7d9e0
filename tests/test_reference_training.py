"""The mixers in torchvision's own training code, after `wrap_dataset_for_transforms_v2`."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from builders import small
from mixing_oracle import DEVICES, on
from torch.utils.data import DataLoader, Subset
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
PURE = v2.Compose(
    [
        TYPED,
        v2.ConvertBoundingBoxFormat(BoundingBoxFormat.XYXY),
        v2.SanitizeBoundingBoxes(),
        v2.ToPureTensor(),
    ]
)


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
@pytest.mark.parametrize("place", ["collate_fn", "MixedDataset", "after utils.collate_fn"])
def test_a_step_of_the_reference_engine(coco, place, device):
    """Which does this with a batch, in torchvision's references/detection/engine.py."""
    is_typed = place != "after utils.collate_fn"
    dataset = coco(TYPED if is_typed else PURE)
    if not is_typed:
        dataset = Subset(dataset, [i for i, name in enumerate(dataset.ids) if name != WITHOUT])
    if place == "MixedDataset":
        dataset = MixedDataset(dataset, MIX, seed=0)
    torch.manual_seed(0)
    collate = MIX if place == "collate_fn" else lambda batch: tuple(zip(*batch, strict=True))
    images, targets = next(iter(DataLoader(dataset, batch_size=6, collate_fn=collate)))
    if not is_typed:
        images, targets = MIX(images, targets)
    for target in targets:
        count = len(target["boxes"])
        per_object = (KEYS & target.keys()) - {"image_id"} | {"labels", "box_weights"}
        assert all(len(target[key]) == count for key in per_object)
        assert isinstance(target["boxes"], BoundingBoxes) == is_typed
    model = weight_losses(copy.deepcopy(small("maskrcnn"))).to(device)
    samples = [on(device, sample) for sample in zip(images, targets, strict=True)]
    losses = model(*zip(*samples, strict=True))
    sum(losses.values()).backward()
    assert losses["loss_mask"] > 0
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert any(p.grad is not None and p.grad.norm() > 0 for p in model.parameters())
