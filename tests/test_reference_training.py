"""The mixers in torchvision's own training code, after `wrap_dataset_for_transforms_v2`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from builders import build
from mixing_oracle import DEVICES
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, tv_tensors
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes

from detmix import DetectionCutMix, DetectionMixUp, MixedDataset, RandomChoice, weight_losses

COLORS = [(200, 40, 40), (40, 200, 40), (40, 40, 200)]


def rle(mask):
    """COCO's uncompressed run lengths: down the columns, background first."""
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}


@pytest.fixture(scope="module")
def coco_root(tmp_path_factory):
    """Six images of rectangles; the third has no annotations, the fourth a crowd besides."""
    root, rng = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    images, annotations = [], []
    for index in range(6):
        height, width = 64 + 8 * (index % 3), 96 - 8 * (index % 2)
        pixels = rng.integers(90, 140, (height, width, 3), dtype=np.uint8)
        image_id, name = 100 + index, f"{index}.png"
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for number in range(0 if index == 2 else 1 + index % 3):
            x, y, w, h = 6 + 28 * number, 5 + 4 * index, 24, 20 + number
            pixels[y : y + h, x : x + w] = COLORS[number]
            crowd = int(index == 3 and number == 0)
            mask = np.zeros((height, width), np.uint8)
            mask[y : y + h, x : x + w] = 1
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": number + 1,
                    "bbox": [float(x), float(y), float(w), float(h)],
                    "area": float(w * h),
                    "iscrowd": crowd,
                    "segmentation": rle(mask) if crowd else [list(map(float, corners))],
                }
            )
        Image.fromarray(pixels).save(root / name)
    categories = [{"id": number, "name": f"class {number}"} for number in (1, 2, 3)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "instances.json").write_text(json.dumps(content))
    return root


KEYS = ["boxes", "labels", "masks", "image_id", "iscrowd", "area"]
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
    pytest.importorskip("pycocotools")
    dataset = datasets.CocoDetection(root, root / "instances.json", transforms=transforms)
    dataset = datasets.wrap_dataset_for_transforms_v2(dataset, target_keys=KEYS)
    if all_images:
        return dataset
    return Subset(dataset, [i for i, image_id in enumerate(dataset.ids) if image_id != 102])


def reference_collate(batch):
    return tuple(zip(*batch, strict=True))


MIXERS = {
    "mixup": lambda: DetectionMixUp(p=1.0),
    "cutmix": lambda: DetectionCutMix(p=1.0),
    "choice": lambda: RandomChoice([DetectionMixUp(p=1.0), DetectionCutMix(p=1.0)]),
}


def engine_step(model, optimizer, images, targets, device):
    """Do what torchvision's references/detection/engine.py does with a batch."""
    images = [image.to(device) for image in images]
    targets = [
        {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in target.items()}
        for target in targets
    ]
    losses = model(images, targets)
    total = sum(losses.values())
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    return {key: loss.item() for key, loss in losses.items()}


class TestReferenceTraining:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("place", ["collate_fn", "after utils.collate_fn", "MixedDataset"])
    @pytest.mark.parametrize("transforms", TRANSFORMS)
    @pytest.mark.parametrize("name", MIXERS)
    def test_a_step_of_mask_rcnn(self, coco_root, name, transforms, place, device):
        torch.manual_seed(0)
        dataset = load_coco(coco_root, TRANSFORMS[transforms], all_images=transforms != "pure")
        mixer = MIXERS[name]()
        if place == "MixedDataset":
            dataset = MixedDataset(dataset, mixer, seed=0)
        collate = mixer if place == "collate_fn" else reference_collate
        images, targets = next(iter(DataLoader(dataset, batch_size=6, collate_fn=collate)))
        if place == "after utils.collate_fn":
            images, targets = mixer(images, targets)
        for image, target in zip(images, targets, strict=True):
            count = len(target["boxes"])
            assert all(len(target[key]) == count for key in ("labels", "box_weights"))
            assert all(
                len(target[key]) == count for key in KEYS if key in target and key != "image_id"
            )
            assert target["masks"].shape == (count, *image.shape[-2:])
            assert isinstance(target["image_id"], int)
            assert isinstance(image, tv_tensors.Image) == (transforms == "tv_tensors")
            assert isinstance(target["boxes"], BoundingBoxes) == (transforms == "tv_tensors")
        model = weight_losses(build("maskrcnn_resnet50_fpn")).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        before = [p.detach().clone() for p in model.parameters()]
        losses = engine_step(model, optimizer, images, targets, device)
        assert losses["loss_mask"] > 0
        assert all(np.isfinite(loss) for loss in losses.values())
        assert any(
            not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)
        )

    def test_ground_truth_is_that_of_the_annotations(self, coco_root):
        plain_transform = v2.Compose([v2.ToImage()])
        dataset = load_coco(coco_root, plain_transform)
        annotations = json.loads((coco_root / "instances.json").read_text())["annotations"]
        by_image = {}
        for row in annotations:
            by_image.setdefault(row["image_id"], []).append(row)
        loader = DataLoader(dataset, batch_size=6, collate_fn=DetectionMixUp(p=1.0))
        _, targets = next(iter(loader))
        for target in targets:
            own = by_image.get(target["image_id"], [])
            crowds, areas = list(target["iscrowd"]), list(target["area"])
            assert crowds[: len(own)] == [row["iscrowd"] for row in own]
            assert areas[: len(own)] == [row["area"] for row in own]
            assert target["masks"][: len(own)].sum((1, 2)).tolist() == [row["area"] for row in own]
            assert len(crowds) == len(areas) == len(target["boxes"])
        assert sum(len(target["boxes"]) for target in targets) == 2 * len(annotations)

    def test_pil_images_are_refused_with_the_remedy(self, coco_root):
        dataset = load_coco(coco_root, v2.Compose([v2.RandomHorizontalFlip(0.5)]))
        with pytest.raises(ValueError, match=r"sample 0 \(image_id 100\): image .*v2\.ToImage\(\)"):
            next(iter(DataLoader(dataset, batch_size=2, collate_fn=DetectionMixUp())))

    def test_entries_that_no_longer_fit_the_boxes_are_refused(self, coco_root):
        # SanitizeBoundingBoxes drops boxes and labels, but not lists that it does not know of
        dataset = load_coco(coco_root, TRANSFORMS["pure"], all_images=False)
        image, target = dataset[1]
        target = {**target, **{key: target[key][:1] for key in ("boxes", "labels", "masks")}}
        with pytest.raises(ValueError, match=r"'area' must be .* of 1 entries.*list of length 2"):
            DetectionMixUp()([(image, target)])
