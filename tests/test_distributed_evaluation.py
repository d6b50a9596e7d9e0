"""Every image counts once, whatever the number of processes; these are real ones, over gloo."""

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


class Scenes:
    """Images that hold their index, all a detector below needs; every fifth has no object."""

    def __init__(self, num):
        self.names = [f"{index}.png" for index in range(num)]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        image = torch.full((3, *SIZE), index, dtype=torch.uint8)
        return image, {"image_id": torch.tensor(7 + 3 * index)}  # ids that are not indices

    def index_of(self, image_id):
        return (image_id - 7) // 3

    def image_size(self, index):
        return 2 * SIZE[0], 2 * SIZE[1]

    def target(self, index):
        rng, num = np.random.default_rng(index), 0 if index % 5 == 4 else 1 + index % 3
        low = rng.integers(0, 20, (num, 2))
        boxes = torch.tensor(np.concatenate([low, low + rng.integers(8, 24, (num, 2))], axis=1))
        return {
            "image_id": 7 + 3 * index,
            "boxes": boxes.float(),
            "labels": 1 + torch.arange(num) % 2,
            "difficult": torch.arange(num) % 3 == 2,
            "masks": masks_of(boxes, self.image_size(index)),
        }


def masks_of(boxes, size):
    y, x = torch.meshgrid(*map(torch.arange, size), indexing="ij")
    x1, y1, x2, y2 = boxes[:, :, None, None].unbind(1)
    return ((x >= x1) & (x < x2) & (y >= y1) & (y < y2)).to(torch.uint8)


class Detector(torch.nn.Module):
    """Finds each object up to three times, not quite, with few different scores."""

    def forward(self, images):
        return [self.find(round(float(image[0, 0, 0]) * 255)) for image in images]

    def find(self, index):
        generator = torch.Generator().manual_seed(index)
        target = Scenes(0).target(index)
        rows = torch.arange(len(target["boxes"])).repeat(index % 4)  # of every fourth image none
        boxes = target["boxes"][rows] / 2
        boxes += torch.randint(0, 2, boxes.shape, generator=generator)
        scores = torch.randint(1, 4, (len(rows),), generator=generator) / 4
        masks = masks_of(boxes, SIZE)[:, None] * 0.9
        return {"boxes": boxes, "labels": target["labels"][rows], "scores": scores, "masks": masks}


def new_evaluators():
    return [VOCEvaluator(CLASSES), COCOEvaluator(CLASSES, iou_types=("bbox", "segm"))]


def results_of(evaluators):
    voc, coco = evaluators
    results = [voc.compute("all-point"), voc.compute("11point")]
    results += [coco.compute("bbox"), coco.compute("segm")]
    return [str(result.as_dict()) for result in results], [result.mean_ap for result in results]


def run(num, padded):
    """Detect and evaluate as tools do; everything that comes of it."""
    accelerator, scenes = Accelerator(cpu=True), Scenes(num)
    processes, rank = accelerator.num_processes, accelerator.process_index
    if padded:  # as torch shares a data set out: the last processes see the first images once more
        sampler = DistributedSampler(scenes, processes, rank, shuffle=False)
        loader = DataLoader(scenes, batch_size=2, sampler=sampler, collate_fn=collate)
    else:
        loader = eval_loader(scenes, 2, workers=0, num_processes=processes, rank=rank)
    found = detect(Detector(), loader, accelerator, truth=scenes)
    parts, whole = new_evaluators(), new_evaluators()
    score(found, parts, scenes)
    evaluate(Detector(), loader, whole, accelerator, truth=scenes)
    assert results_of(parts)[0] == results_of(whole)[0]
    seen = sum(len(targets) for _, targets in loader)
    return {"found": found, "results": results_of(parts)[0], "seen": seen}


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


def test_counts_by_hand_whatever_the_order_and_however_often(fresh_accelerator):
    scenes, accelerator = Scenes(7), Accelerator(cpu=True)
    order = [3, 0, 1, 3, 2, 6, 5, 4, 0, 0]
    loader = DataLoader(scenes, batch_size=2, sampler=order, collate_fn=collate)
    found = detect(Detector(), loader, accelerator, truth=scenes)
    assert_same(found, run(7, padded=False)["found"])
    objects, times = [1, 2, 3, 1, 0, 3, 1], [0, 1, 2, 3, 0, 1, 2]
    assert [len(each["boxes"]) for _, each in found] == np.multiply(objects, times).tolist()
    evaluators = new_evaluators()
    score(found, evaluators, scenes)
    assert all(0.1 < mean_ap < 0.9 for mean_ap in results_of(evaluators)[1])
