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
from detmix.training.inference import detect, score

SIZE = (375, 500)  # height and width of most images of VOC


class Scenes:
    """Noise with as many objects as VOC has: three in an image, a sixth of them difficult."""

    def __init__(self, num):
        self.names = [f"{index:06d}" for index in range(num)]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(256, (3, 320, 320), dtype=torch.uint8, generator=generator)
        return image, {"image_id": index}

    def index_of(self, image_id):
        return image_id

    def image_size(self, index):
        return SIZE

    def target(self, index):
        rng = np.random.default_rng(index)
        num = rng.geometric(1 / 3)
        return {"image_id": index, "difficult": rng.random(num) < 1 / 6, **random_rows(rng, num)}

    def found(self, per_image):
        """Half of the detections near objects, half anywhere, as a detector's scores rank them."""
        rng = np.random.default_rng(1)
        for index in range(len(self)):
            target, near = self.target(index), per_image // 2
            found = random_rows(rng, per_image)
            rows = rng.integers(0, len(target["labels"]), near)
            found["boxes"][:near] = target["boxes"][rows] + rng.normal(0, 5, (near, 1))
            found["labels"][:near] = target["labels"][rows]
            scores = np.concatenate([rng.beta(2, 2, near), rng.beta(1, 8, per_image - near)])
            yield index, found | {"scores": scores.astype(np.float32)}


def random_rows(rng, num):
    side = np.exp(rng.uniform(np.log(15), np.log(370), (num, 2)))
    low = rng.random((num, 2)) * np.maximum(SIZE[::-1] - side, 1)
    boxes = np.concatenate([low, low + side], axis=1).astype(np.float32)
    return {"boxes": boxes, "labels": rng.integers(1, 21, num)}


@pytest.mark.slow
def test_at_most_a_twentieth_of_inference(fresh_accelerator):
    """In processor time, so that what else runs on the machine does not matter."""
    torch.manual_seed(0)
    model = ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=21, score_thresh=0, detections_per_img=100
    )
    scenes, accelerator = Scenes(96), Accelerator(cpu=True)
    voc, coco = VOCEvaluator(VOC_CLASSES), COCOEvaluator(VOC_CLASSES)
    COCOEvaluator(VOC_CLASSES).compute()  # whatever is imported late
    times = [time.process_time()]
    found = detect(model, eval_loader(scenes, 8, workers=0), accelerator, truth=scenes)
    times.append(time.process_time())
    score(found, [voc, coco], scenes)
    results = [voc.compute("all-point"), voc.compute("11point"), coco.compute()]
    times.append(time.process_time())
    assert {sum(result.num_detections.values()) for result in results} == {96 * 100}
    inference, evaluation = np.diff(times)
    print(f"{1000 * inference / 96:.1f} ms an image, evaluation {evaluation / inference:.4f} of it")
    assert evaluation <= 0.05 * inference


def test_memory_is_linear():
    peaks = []
    for num in (50, 200):
        scenes, evaluator = Scenes(num), COCOEvaluator(VOC_CLASSES)
        score(list(scenes.found(50)), [evaluator], scenes)
        tracemalloc.start()
        evaluator.compute()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 5 * peaks[0]
