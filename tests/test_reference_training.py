"""The mixers in torchvision's own training code, after `wrap_dataset_for_transforms_v2`."""

from __future__ import annotations

import json

import pytest
import torch
from builders import build
from mixing_oracle import DEVICES
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, tv_tensors
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes

from detmix import DetectionCutMix, DetectionMixUp, MixedDataset, RandomChoice, weight_losses
from detmix.data import write_shapes_coco

WITHOUT = 3  # the id of an image without annotations


@pytest.fixture(scope="module")
def coco_root(tmp_path_factory):
    """Return six images of shapes; one has no annotations, the next a crowd besides."""
    root = write_shapes_coco(tmp_path_factory.mktemp("coco"), 6, 1, image_size=96)
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    kept = [row for row in content["annotations"] if row["image_id"] != WITHOUT]
    next(row for row in kept if row["image_id"] == WITHOUT + 1)["iscrowd"] = 1
    for row in kept:
        row["category_id"] = 1 + row["category_id"] % 4  # the detector's labels, without gaps
    path.write_text(json.dumps({**content, "annotations": kept}))
    return root


KEYS = {"boxes", "labels", "masks", "image_id", "iscrowd", "area"}
TYPED = [v2.ToImage(), v2.RandomHorizontalFlip(0.5), v2.ToDtype(torch.float32, scale=True)]
TRANSFORMS = {
    "tv_tensors": v2.Compose(TYPED),
    # as in torchvision's references, which leave out images without annotations before
    "pure": v2.Compose(
        [
            *TYPED,
            v2.ConvertBoundingBoxFormat(tv_tensors.BoundingBoxFormat.XYXY),
            v2.SanitizeBoundingBoxes(),
            v2.ToPureTensor(),
        ]
    ),
}


def load_coco(root, transforms, all_images=True):
    annotations = root / "annotations" / "instances_train2017.json"
    dataset = datasets.CocoDetection(root / "train2017", annotations, transforms=transforms)
    dataset = datasets.wrap_dataset_for_transforms_v2(dataset, target_keys=sorted(KEYS))
    if all_images:
        return dataset
    return Subset(dataset, [i for i, image_id in enumerate(dataset.ids) if image_id != WITHOUT])


def reference_collate(batch):
    return tuple(zip(*batch, strict=True))


CHOICE = RandomChoice([DetectionMixUp(p=1.0), DetectionCutMix(p=1.0)])


def loaded(root, transforms, place):
    """Return a mixed batch of all images."""
    torch.manual_seed(0)
    dataset = load_coco(root, TRANSFORMS[transforms], all_images=transforms != "pure")
    if place == "MixedDataset":
        dataset = MixedDataset(dataset, CHOICE, seed=0)
    collate = CHOICE if place == "collate_fn" else reference_collate
    images, targets = next(iter(DataLoader(dataset, batch_size=6, collate_fn=collate)))
    return CHOICE(images, targets) if place == "after utils.collate_fn" else (images, targets)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("place", ["collate_fn", "after utils.collate_fn", "MixedDataset"])
@pytest.mark.parametrize("transforms", TRANSFORMS)
def test_a_step_of_the_reference_engine(coco_root, transforms, place, device):
    """Which does this with a batch, in torchvision's references/detection/engine.py."""
    is_typed = transforms == "tv_tensors"
    images, targets = loaded(coco_root, transforms, place)
    for image, target in zip(images, targets, strict=True):
        count = len(target["boxes"])
        per_object = (KEYS & target.keys()) - {"image_id"} | {"labels", "box_weights"}
        assert all(len(target[key]) == count for key in per_object)
        assert target["masks"].shape == (count, *image.shape[-2:])
        assert isinstance(target["image_id"], int)
        assert isinstance(image, tv_tensors.Image) == is_typed
        assert isinstance(target["boxes"], BoundingBoxes) == is_typed
    images = [image.to(device) for image in images]
    targets = [
        {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in target.items()}
        for target in targets
    ]
    model = weight_losses(build("maskrcnn_resnet50_fpn")).to(device)
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert losses["loss_mask"] > 0
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert any(p.grad is not None and p.grad.norm() > 0 for p in model.parameters())


def test_ground_truth_is_that_of_the_annotations(coco_root):
    dataset = load_coco(coco_root, v2.Compose([v2.ToImage()]))
    file = coco_root / "annotations" / "instances_train2017.json"
    annotations = json.loads(file.read_text())["annotations"]
    _, targets = next(iter(DataLoader(dataset, batch_size=6, collate_fn=DetectionMixUp(p=1.0))))
    for target in targets:
        own = [row for row in annotations if row["image_id"] == target["image_id"]]
        for key in ("iscrowd", "area"):
            assert list(target[key])[: len(own)] == [row[key] for row in own]
        assert target["masks"][: len(own)].sum((1, 2)).tolist() == [row["area"] for row in own]
    assert sum(len(target["boxes"]) for target in targets) == 2 * len(annotations)


def test_what_does_not_fit_is_refused_with_the_remedy(coco_root):
    dataset = load_coco(coco_root, v2.Compose([v2.RandomHorizontalFlip(0.5)]))  # images of PIL
    with pytest.raises(ValueError, match=r"sample 0 \(image_id 1\).*v2\.ToImage\(\)"):
        next(iter(DataLoader(dataset, batch_size=2, collate_fn=DetectionMixUp())))
    # SanitizeBoundingBoxes drops boxes and labels, but not lists that it does not know of
    dataset = load_coco(coco_root, TRANSFORMS["pure"], all_images=False)
    image, target = next(sample for sample in dataset if len(sample[1]["boxes"]) == 2)
    target = {**target, **{key: target[key][:1] for key in ("boxes", "labels", "masks")}}
    with pytest.raises(ValueError, match=r"'area' .* 1 .*list of length 2"):
        DetectionMixUp()([(image, target)])
