"""What both evaluators promise: any batches and kinds of input, one result; errors that name."""

import copy
import math

import numpy as np
import pytest
import torch
from coco_oracle import CATEGORY_IDS, CLASSES, IOU_TYPES, evaluator_of, full_case, truth
from torchvision import tv_tensors
from voc_oracle import INTERPOLATIONS, evaluate, fed, image

from detmix.evaluation import COCOEvaluator, VOCEvaluator, encode_masks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOX = [0, 0, 10, 10]


def new_evaluator(kind):
    if kind == "voc":
        return VOCEvaluator(CLASSES)
    return COCOEvaluator(CLASSES, category_ids=CATEGORY_IDS, iou_types=IOU_TYPES)


def numbers(evaluator):
    rules = INTERPOLATIONS if isinstance(evaluator, VOCEvaluator) else IOU_TYPES
    return [evaluator.compute(rule).as_dict() for rule in rules]


# ---------------------------------------------------------------------------- the same in all forms


def tensors(records):
    """Boxes are whole numbers, which all precisions hold."""
    found = [{k: torch.as_tensor(v) for k, v in record.items()} for record in records]
    for index, record in enumerate(found):
        dtype = (torch.bfloat16, torch.float32, torch.float64)[index % 3]
        record["boxes"] = record["boxes"].to(DEVICE, dtype).requires_grad_()
    return found


def subclasses(targets):
    """Of tensors, and flags and ids of several kinds."""
    size = {"format": "XYXY", "canvas_size": (99, 99)}
    return [
        target
        | {"boxes": tv_tensors.BoundingBoxes(target["boxes"], **size)}
        | {"image_id": (torch.tensor([n := target["image_id"]]), np.int64(n), np.array([n]))[n % 3]}
        | {key: target[key].astype(np.uint8) for key in ("iscrowd", "difficult") if key in target}
        for target in targets
    ]


def encoded(records):
    return [record | {"masks": encode_masks(record["masks"])} for record in records]


def after_others(evaluator, predictions, targets):
    fed(evaluator, *full_case(seed=1, num_images=5), 5)
    evaluator.reset()
    assert evaluator.compute().num_images == 0
    return fed(evaluator, predictions, targets, 7)


def changed_afterwards(evaluator, predictions, targets):
    predictions, targets = copy.deepcopy((predictions, targets))
    fed(evaluator, predictions, targets, 7)
    for record in (*predictions, *targets):
        for key in ("boxes", "masks", "keypoints"):
            record[key][:] = 0
    return evaluator


FORMS = {
    "image by image, from behind": lambda e, p, t: fed(e, p[::-1], t[::-1], 1),
    "repeated, found anew": lambda e, p, t: fed(e, [*p, *p[1:5], p[3]], [*t, *t[:4], t[3]], 7),
    "repeated in a batch": lambda e, p, t: fed(e, [*p, *p[1:5], p[3]], [*t, *t[:4], t[3]], 99),
    "images of nothing": lambda e, p, t: fed(e, [image([], []), *p], [truth([], 10_001), *t], 7),
    "tensors and arrays": lambda e, p, t: fed(e, [*p[:9], *tensors(p[9:])], tensors(t), 99),
    "subclasses": lambda e, p, t: fed(e, p, subclasses(t), 7),
    "masks encoded early": lambda e, p, t: fed(e, encoded(p), encoded(t), 7),
    "after others": after_others,
    "changed afterwards": changed_afterwards,
}


@pytest.fixture(scope="module")
def case():
    """Without equal scores, which count in the order in which they come, by VOC's rule."""
    predictions, targets = full_case(levels=None, grid=1)
    for target in targets[::2]:
        target["difficult"] = np.arange(len(target["labels"])) % 3 == 0
    return predictions, targets


@pytest.fixture(scope="module", params=["voc", "coco"])
def kind_and_numbers(request, case):
    return request.param, numbers(fed(new_evaluator(request.param), *case, 7))


@pytest.mark.parametrize("form", FORMS)
def test_the_same_in_another_form(form, kind_and_numbers, case):
    kind, expected = kind_and_numbers
    evaluator = FORMS[form](new_evaluator(kind), *case)
    num_images = len(case[0]) + (form == "images of nothing")
    assert numbers(evaluator) == [result | {"num_images": num_images} for result in expected]


def test_category_ids_in_place_of_labels(case):
    """As of detectors pretrained on COCO, some of categories that nobody asked for."""
    expected = numbers(fed(new_evaluator("coco"), *case, 7))
    found = []
    for prediction, stranger in zip(case[0], full_case(seed=7)[0], strict=True):
        unknown = np.resize([1, 91, 0], len(stranger["labels"]))
        labels = unknown, np.array([0, *CATEGORY_IDS])[prediction["labels"]]
        both = {key: np.concatenate([stranger[key], prediction[key]]) for key in prediction}
        found.append(both | {"labels": np.concatenate(labels)})
    options = {"iou_types": IOU_TYPES, "prediction_labels": "category_id"}
    assert numbers(evaluator_of(found, case[1], **options)) == expected


def test_images_without_id_always_count():
    """Of Pascal VOC; ids may be names there."""
    found, there = image([BOX], [0.5]), image([BOX])
    targets = [there, there, there | {"image_id": "000005"}, there | {"image_id": "000005"}]
    assert evaluate([found] * 4, targets).compute().num_images == 3


# ----------------------------------------------------------------------------- errors, the table

BAD = [
    ("predictions", "scores", None),
    ("predictions", "scores", torch.rand(2)),
    ("predictions", "scores", torch.tensor([math.nan])),
    ("predictions", "labels", torch.tensor([4])),
    ("predictions", "labels", torch.tensor([0])),
    ("predictions", "labels", torch.tensor([1.0])),
    ("predictions", "boxes", torch.zeros(1, 5)),
    ("targets", "labels", None),
    ("targets", "boxes", torch.tensor([[0, 0, 1, math.inf]])),
    ("targets", "boxes", torch.tensor([[9.0, 9, 5, 20]])),
    ("targets", "difficult", torch.tensor([0.5])),
    ("targets", "iscrowd", torch.tensor([0, 1])),
    ("targets", "image_id", 0.5),
]
BAD_FOR_COCO = [
    *(("targets", "image_id", value) for value in (None, True)),
    ("targets", "area", [-1.0]),
    ("targets", "file_name", 3),
    ("targets", "masks", None),
    ("targets", "keypoints", torch.ones(1, 17, 2)),
    ("targets", "keypoints", torch.full((1, 17, 3), math.inf)),
    ("predictions", "boxes", [[5.0, 0, 4, 9]]),
    ("predictions", "masks", torch.ones(2, 1, 9, 9)),
    ("predictions", "keypoints", None),
    # Others than the prediction's, or than those of the images before.
    ("targets", "masks", torch.ones(1, 8, 8)),
    ("targets", "keypoints", torch.ones(1, 16, 3)),
    ("predictions", "keypoints", torch.ones(1, 18, 3)),
]


@pytest.mark.parametrize(
    ("kind", "side", "key", "value"),
    [(kind, *row) for kind in ("voc", "coco") for row in BAD]
    + [("coco", *r) for r in BAD_FOR_COCO],
)
def test_bad_input_is_named_and_nothing_of_it_is_kept(kind, side, key, value):
    shapes = {"masks": torch.ones(1, 1, 9, 9), "keypoints": torch.ones(1, 17, 3)}
    found, there = image([BOX], [0.5], **shapes), truth([BOX], **shapes)
    # Without objects it is this prediction that says the number of keypoints.
    evaluator = fed(new_evaluator(kind), [found], [truth([])], 1)
    before = numbers(evaluator)
    good = {"predictions": [found, found], "targets": [there | {"image_id": i} for i in (5, 42)]}
    changed = {k: v for k, v in (good[side][1] | {key: value}).items() if v is not None}
    with pytest.raises(ValueError, match=rf"{side}\[1\].*{key}") as caught:
        evaluator.update(**(good | {side: [good[side][0], changed]}))
    assert key == "image_id" or "image_id 42" in str(caught.value)
    assert numbers(evaluator) == before
    evaluator.update(**good)  # no id is remembered either
    assert evaluator.compute().num_images == 3


@pytest.mark.parametrize("kind", ["voc", "coco"])
@pytest.mark.parametrize(
    ("predictions", "message"), [([], "0 predictions and 1 targets"), ([None], "NoneType")]
)
def test_bad_lists(kind, predictions, message):
    with pytest.raises(ValueError, match=message):
        new_evaluator(kind).update(predictions, [truth([BOX])])


BAD_SETTINGS = [
    (VOCEvaluator, {"classes": []}, r"classes is \[\]"),
    (VOCEvaluator, {"classes": ["a", "b", "a"]}, "classes.* a "),
    (VOCEvaluator, {"classes": "cat"}, "'cat'"),
    (VOCEvaluator, {"iou_threshold": 1.0}, "iou_threshold is 1.0"),
    (VOCEvaluator, {"interpolation": "101point"}, "'101point'"),
    (COCOEvaluator, {"classes": []}, r"classes is \[\]"),
    (COCOEvaluator, {"category_ids": [1]}, r"category_ids is \[1\]"),
    (COCOEvaluator, {"category_ids": [1, 1, 2]}, r"category_ids is \[1, 1, 2\]"),
    (COCOEvaluator, {"iou_types": "bbox"}, "iou_types is 'bbox'"),
    (COCOEvaluator, {"iou_types": ["box"]}, "iou_type is 'box'"),
    (COCOEvaluator, {"prediction_labels": "category_id"}, "category_ids"),
    (COCOEvaluator, {"backend": "coco"}, "backend is 'coco'"),
]


@pytest.mark.parametrize(("evaluator", "options", "message"), BAD_SETTINGS)
def test_bad_settings(evaluator, options, message):
    with pytest.raises(ValueError, match=message):
        evaluator(**{"classes": CLASSES, **options})


@pytest.mark.parametrize("evaluator", [COCOEvaluator(CLASSES), VOCEvaluator(CLASSES)])
def test_table(evaluator):
    boxes, labels = [[0, 0, 9, 9], [9, 9, 30, 30], [30, 0, 50, 9]], [1, 2, 2]
    evaluator.update([image(boxes, [0.5] * 3, labels)], [truth(boxes[:2], labels=labels[:2])])
    result = evaluator.compute()
    header, _, cat, dog, cow, _, mean = (line.split() for line in str(result).splitlines()[:7])
    assert header[-2:] == ["objects", "detections"]
    assert [cat[1], cat[-2], cat[-1]] == ["1.0000", "1", "1"]
    assert [dog[-2:], cow[1], cow[-2:]] == [["1", "2"], "n/a", ["0", "0"]]
    assert f"{result.mean_ap:.4f}" in mean
    assert mean[-2:] == ["2", "3"]
