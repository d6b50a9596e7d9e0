"""Evaluation against inference alone: its time, and its memory."""

import time
import tracemalloc

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from detmix.data import VOC_CLASSES
from detmix.data.loaders import eval_loader
from detmix.evaluation import COCOEvaluator, VOCEvaluator
from detmix.training import inference

SIZE = (375, 500)  # height and width of most images of VOC


def boxes_of(rng, num):
    side = np.exp(rng.uniform(np.log(15), np.log(370), (num, 2)))
    low = rng.random((num, 2)) * np.maximum(SIZE[::-1] - side, 1)
    return np.concatenate([low, low + side], axis=1)


class Truth:
    """As many objects as VOC has, three in an image, of which a sixth is difficult."""

    def __init__(self, num):
        rng = np.random.default_rng(0)
        self.names = [f"{index:06d}" for index in range(num)]
        self._targets = []
        for index, count in enumerate(rng.geometric(1 / 3, num)):
            target = {
                "boxes": torch.tensor(boxes_of(rng, count), dtype=torch.float32),
                "labels": torch.tensor(rng.integers(1, 21, count)),
                "difficult": torch.tensor(rng.random(count) < 1 / 6),
                "image_id": index,
            }
            self._targets.append(target)

    def index_of(self, image_id):
        return image_id

    def image_size(self, index):
        return SIZE

    def target(self, index):
        return self._targets[index]


class Images:
    """Noise."""

    def __init__(self, num):
        self.num = num

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(256, (3, 320, 320), dtype=torch.uint8, generator=generator)
        return image, {"image_id": index}


def found_in(truth, per_image):
    """Half of the detections near objects, half anywhere, as a detector's scores rank them."""
    rng = np.random.default_rng(1)
    found = []
    for index in range(len(truth.names)):
        target, near = truth.target(index), per_image // 2
        rows = rng.integers(0, len(target["labels"]), near)
        boxes = target["boxes"].numpy()[rows] + rng.normal(0, 10, (near, 4))
        boxes = np.sort(boxes.reshape(-1, 2, 2), axis=1).reshape(-1, 4)
        boxes = np.concatenate([boxes, boxes_of(rng, per_image - near)])
        labels = rng.integers(1, 21, per_image)
        labels[:near] = target["labels"].numpy()[rows]
        scores = np.concatenate([rng.beta(2, 2, near), rng.beta(1, 8, per_image - near)])
        prediction = {
            "boxes": torch.tensor(boxes, dtype=torch.float32),
            "labels": torch.tensor(labels),
            "scores": torch.tensor(scores, dtype=torch.float32),
        }
        found.append((index, prediction))
    return found


def filled(evaluator, num, per_image):
    truth = Truth(num)
    inference.score(found_in(truth, per_image), [evaluator], truth)
    return evaluator


@pytest.mark.slow
def test_at_most_a_twentieth_slower_than_inference_alone(monkeypatch, fresh_accelerator):
    """In processor time of one pass, so that what else runs on the machine does not matter."""
    torch.manual_seed(0)
    model = ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=21, score_thresh=0, detections_per_img=100
    )
    truth, loader = Truth(96), eval_loader(Images(96), 8, workers=0)
    evaluators = [VOCEvaluator(VOC_CLASSES), COCOEvaluator(VOC_CLASSES)]
    inside = 0.0
    predict = inference.predict

    def timed(*args, **kwargs):
        nonlocal inside
        batches = predict(*args, **kwargs)
        while True:
            start = time.process_time()
            batch = next(batches, None)
            inside += time.process_time() - start
            if batch is None:
                return
            yield batch

    monkeypatch.setattr(inference, "predict", timed)
    filled(COCOEvaluator(VOC_CLASSES), 2, 5).compute()  # whatever is imported late
    start = time.process_time()
    inference.evaluate(model, loader, evaluators, Accelerator(cpu=True), truth=truth)
    voc, coco = evaluators
    results = [voc.compute("all-point"), voc.compute("11point"), coco.compute()]
    ratio = (time.process_time() - start) / inside
    assert {sum(result.num_detections.values()) for result in results} == {96 * 100}
    print(
        f"{1000 * inside / 96:.1f} ms an image without, {ratio:.4f} times as long with evaluation"
    )
    assert ratio <= 1.05


def test_memory_is_linear():
    peaks = []
    for num in (200, 800):
        evaluator = filled(COCOEvaluator(VOC_CLASSES), num, 50)
        tracemalloc.start()
        evaluator.compute()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 5 * peaks[0]
