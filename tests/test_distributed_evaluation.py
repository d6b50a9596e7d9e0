"""Every image counts once, whatever the number of processes; these are real ones, over gloo."""

import json
import os
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator
from torch.utils.data import DataLoader, DistributedSampler

from detmix.data.loaders import collate, eval_loader
from detmix.evaluation import COCOEvaluator, VOCEvaluator
from detmix.training.inference import detect, evaluate, score

CLASSES = ("cat", "dog")
SIZE = (24, 32)  # as loaded; on disk twice as high and wide


class Truth:
    """Ground truth with ids that are not indices; every fifth image has no object."""

    def __init__(self, num):
        rng = np.random.default_rng(0)
        self.names = [f"{index}.png" for index in range(num)]
        self._boxes = []
        for index in range(num):
            low = rng.integers(0, 20, (0 if index % 5 == 4 else 1 + index % 3, 2))
            self._boxes.append(np.concatenate([low, low + rng.integers(8, 24, low.shape)], axis=1))

    def index_of(self, image_id):
        return (image_id - 7) // 3

    def image_size(self, index):
        return 2 * SIZE[0], 2 * SIZE[1]

    def target(self, index):
        boxes = torch.tensor(self._boxes[index], dtype=torch.float32)
        num = len(boxes)
        return {
            "image_id": 7 + 3 * index,
            "boxes": boxes,
            "labels": 1 + torch.arange(num) % 2,
            "difficult": torch.arange(num) % 3 == 2,
            "masks": masks_of(boxes, self.image_size(index)),
        }


def masks_of(boxes, size):
    y, x = torch.meshgrid(*map(torch.arange, size), indexing="ij")
    x1, y1, x2, y2 = boxes[:, :, None, None].unbind(1)
    return ((x >= x1) & (x < x2) & (y >= y1) & (y < y2)).to(torch.uint8)


class Images:
    """Each image holds its index, all the detector below needs to know."""

    def __init__(self, truth):
        self.truth = truth

    def __len__(self):
        return len(self.truth.names)

    def __getitem__(self, index):
        image = torch.full((3, *SIZE), index, dtype=torch.uint8)
        return image, {"image_id": torch.tensor(7 + 3 * index)}


class Detector(torch.nn.Module):
    """Finds each object up to three times, not quite, with few different scores."""

    def __init__(self, truth):
        super().__init__()
        self.truth = truth

    def forward(self, images):
        return [self.find(round(float(image[0, 0, 0]) * 255)) for image in images]

    def find(self, index):
        generator = torch.Generator().manual_seed(index)
        target = self.truth.target(index)
        rows = torch.arange(len(target["boxes"])).repeat(index % 4)  # of every fourth image none
        boxes = target["boxes"][rows] / 2
        boxes += torch.randint(0, 2, boxes.shape, generator=generator)
        scores = torch.randint(1, 4, (len(rows),), generator=generator) / 4
        masks = masks_of(boxes, SIZE)[:, None] * 0.9
        return {"boxes": boxes, "labels": target["labels"][rows], "scores": scores, "masks": masks}


def padded_loader(dataset, num_processes, rank):
    """As torch shares a data set out: the last processes see the first images once more."""
    sampler = DistributedSampler(dataset, num_processes, rank, shuffle=False)
    return DataLoader(dataset, batch_size=2, sampler=sampler, collate_fn=collate)


def results_of(evaluators):
    voc, coco = evaluators
    results = [voc.compute(name).as_dict() for name in ("all-point", "11point")]
    results += [coco.compute(iou_type).as_dict() for iou_type in ("bbox", "segm")]
    return json.loads(json.dumps(results))


def run(num, padded):
    """Detect and evaluate as tools do; everything that comes of it."""
    accelerator = Accelerator(cpu=True)
    share = {"num_processes": accelerator.num_processes, "rank": accelerator.process_index}
    truth = Truth(num)
    model, images = Detector(truth), Images(truth)
    if padded:
        loader = padded_loader(images, **share)
    else:
        loader = eval_loader(images, 2, workers=0, **share)
    found = detect(model, loader, accelerator, truth=truth)
    parts, whole = (
        [VOCEvaluator(CLASSES), COCOEvaluator(CLASSES, iou_types=("bbox", "segm"))]
        for _ in range(2)
    )
    score(found, parts, truth)
    evaluate(model, loader, whole, accelerator, truth=truth)
    assert results_of(parts) == results_of(whole)
    seen = sum(len(targets) for _, targets in loader)
    return {"found": found, "results": results_of(parts), "seen": seen}


def work(rank, num_processes, cases, folder):
    """Be one of the processes; save what it knows in the end."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # wanted, though not used
    dist.init_process_group(
        "gloo",
        init_method=(folder / "store").as_uri(),
        rank=rank,
        world_size=num_processes,
        timeout=timedelta(seconds=60),
    )
    torch.save([run(*case) for case in cases], folder / f"{rank}.pt")
    dist.destroy_process_group()


def assert_same(found, expected):
    assert [index for index, _ in found] == [index for index, _ in expected]
    for (_, one), (_, other) in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert one["masks"] == other["masks"]
        for key in ("boxes", "labels", "scores"):
            assert one[key].dtype == other[key].dtype
            assert torch.equal(one[key], other[key])


@pytest.mark.parametrize(
    ("num_processes", "nums"),
    [(2, [7, 1]), pytest.param(3, [11, 7, 2, 1], marks=pytest.mark.slow)],
)
def test_as_one_process(num_processes, nums, tmp_path, fresh_accelerator):
    """Numbers of images that the processes do not divide, and fewer than there are processes."""
    cases = [(num, padded) for num in nums for padded in (False, True)]
    # Not forked: the threads that other tests have left in this process would hang that.
    mp.start_processes(work, (num_processes, cases, tmp_path), num_processes, start_method="spawn")
    of_process = [torch.load(tmp_path / f"{rank}.pt") for rank in range(num_processes)]
    for case, (num, padded) in enumerate(cases):
        expected = run(num, padded=False)
        seen = [outcomes[case]["seen"] for outcomes in of_process]
        assert (sum(seen) > num) == padded
        assert (min(seen) == 0) == (num < num_processes and not padded)
        for outcomes in of_process:
            assert_same(outcomes[case]["found"], expected["found"])
            assert outcomes[case]["results"] == expected["results"]


def test_an_image_seen_twice_counts_once(fresh_accelerator):
    truth = Truth(6)
    model, images, accelerator = Detector(truth), Images(truth), Accelerator(cpu=True)
    order = [3, 0, 1, 3, 2, 5, 4, 0, 0]
    loader = DataLoader(images, batch_size=2, sampler=order, collate_fn=collate)
    expected = detect(model, eval_loader(images, 3, workers=0), accelerator, truth=truth)
    found = detect(model, loader, accelerator, truth=truth)
    assert [index for index, _ in found] == list(range(6))
    assert_same(found, expected)


def test_counts_by_hand(fresh_accelerator):
    outcome = run(7, padded=False)
    objects, times = [1, 2, 3, 1, 0, 3, 1], [0, 1, 2, 3, 0, 1, 2]
    all_point, _, boxes, masks = outcome["results"]
    for result in (all_point, boxes, masks):
        assert result["num_images"] == 7
        assert sum(result["num_detections"].values()) == np.dot(objects, times)
        assert 0.1 < result["mean_ap" if "mean_ap" in result else "ap"] < 0.9
