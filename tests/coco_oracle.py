"""Random COCO data, files of it, and pycocotools called by hand to compare with."""

import contextlib
import copy
import io
import json
import math

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from voc_oracle import fed, image
from voc_oracle import random_case as voc_case

from detmix.evaluation import COCOEvaluator

CLASSES = ("cat", "dog", "cow")
CATEGORY_IDS = (90, 7, 31)  # neither contiguous nor in order
IOU_TYPES = ("bbox", "segm", "keypoints")
SIZE = (60, 80)  # of the images with masks, height and width
DETECTION_STATS = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)
KEYPOINT_STATS = (
    *("ap", "ap50", "ap75", "ap_medium", "ap_large"),
    *("ar", "ar50", "ar75", "ar_medium", "ar_large"),
)


def by_hand(ground_truth, results, iou_type="bbox", sigmas=None):
    """The evaluation of pycocotools' own demo: its statistics, and AP and AP50 by category id."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(ground_truth)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(only(results, iou_type)), iou_type)
        if sigmas is not None:
            evaluation.params.kpt_oks_sigmas = np.asarray(sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = KEYPOINT_STATS if iou_type == "keypoints" else DETECTION_STATS
    stats, precision = (  # -1 where there is nothing to find
        np.where(values == -1, math.nan, values)
        for values in (evaluation.stats, evaluation.eval["precision"][:, :, :, 0, -1])
    )
    by_class = {
        category: (precision[:, :, k].ravel().mean(), precision[0, :, k].ravel().mean())
        for k, category in enumerate(evaluation.params.catIds)
    }
    return dict(zip(names, stats, strict=True)), by_class


def check_by_hand(result, ground_truth, results, iou_type, sigmas=None, atol=0.0):
    """All numbers of a result, whose classes are `CLASSES`, are those of `by_hand`."""
    stats, by_class = by_hand(ground_truth, results, iou_type, sigmas)
    for name, value in stats.items():
        np.testing.assert_allclose(getattr(result, name), value, rtol=0, atol=atol, err_msg=name)
    pairs = [*zip(result.ap_by_class.values(), result.ap50_by_class.values(), strict=True)]
    expected = [by_class[category["id"]] for category in ground_truth["categories"]]
    np.testing.assert_allclose(pairs, expected, rtol=0, atol=atol)
    assert result.iou_type == iou_type
    assert result.classes == CLASSES


def random_case(seed, num_images, num_classes=3, *, limit=300.0, **options):
    """Pascal VOC's, with crowds and areas of their own in place of difficult objects, and ids."""
    predictions, targets = voc_case(seed, num_images, num_classes, limit=limit, **options)
    rng = np.random.default_rng(seed)
    ids = rng.permutation(10 * num_images)[:num_images].tolist()
    for image_id, found, target in zip(ids, predictions, targets, strict=True):
        num = len(target["labels"])
        found["boxes"][:, 2:] = np.maximum(found["boxes"][:, :2], found["boxes"][:, 2:])
        target["image_id"] = image_id
        if target.pop("difficult", None) is not None:
            target["iscrowd"] = (rng.random(num) < 0.2).astype(np.int64)
        if rng.random() < 0.5:
            target["area"] = np.exp(rng.uniform(4, 11, num)).astype(np.float32)
    return predictions, targets


def add_masks(predictions, targets):
    """Ellipses in the boxes: probabilities for predictions, uint8 for targets."""
    rng = np.random.default_rng(0)
    for prediction, target in zip(predictions, targets, strict=True):
        target["masks"] = ellipses(target["boxes"]).astype(np.uint8)
        inside = ellipses(prediction["boxes"])[:, None]
        noise = rng.uniform(0, 0.49, inside.shape)
        prediction["masks"] = np.where(inside, 1 - noise, noise).astype(np.float32)


def ellipses(boxes):
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    x1, y1, x2, y2 = boxes.astype(float).T[:, :, None, None]
    across = (x - (x1 + x2) / 2) / np.maximum((x2 - x1) / 2, 0.5)
    along = (y - (y1 + y2) / 2) / np.maximum((y2 - y1) / 2, 0.5)
    return across**2 + along**2 <= 1


def add_keypoints(predictions, targets, num=17, noise=1):
    """The same places of every box, with noise; some objects have no labelled keypoint."""
    rng = np.random.default_rng(0)
    places = rng.random((num, 2))
    for record in (*predictions, *targets):
        low, high = record["boxes"][:, None, :2], record["boxes"][:, None, 2:]
        points = low + places * (high - low) + rng.normal(0, noise, (len(low), num, 2))
        if "scores" in record:
            visible = np.ones((len(low), num, 1))
        else:
            visible = rng.integers(0, 3, (len(low), num, 1)) * (rng.random((len(low), 1, 1)) < 0.8)
        record["keypoints"] = np.concatenate([points, visible], axis=2).astype(np.float32)


def as_entries(predictions, targets, category_ids, names):
    """Ground truth and results in COCO's formats, written without detmix."""
    annotations, results = [], []
    for prediction, target in zip(predictions, targets, strict=True):
        for row in range(len(target["boxes"])):
            entry = one_entry(target, row, target["image_id"], category_ids)
            entry["id"] = len(annotations) + 1
            entry["iscrowd"] = int(target["iscrowd"][row]) if "iscrowd" in target else 0
            entry["area"] = entry["bbox"][2] * entry["bbox"][3]
            for key in ("masks", "area"):
                if key in target:
                    entry["area"] = float(target[key][row].sum())
            if "keypoints" in target:
                entry["num_keypoints"] = int((target["keypoints"][row, :, 2] > 0).sum())
            annotations.append(entry)
        for row in range(len(prediction["boxes"])):
            entry = one_entry(prediction, row, target["image_id"], category_ids)
            results.append(entry | {"score": float(prediction["scores"][row])})
    ground_truth = {
        "images": [{"id": t["image_id"], "height": SIZE[0], "width": SIZE[1]} for t in targets],
        "categories": [{"id": i, "name": n} for i, n in zip(category_ids, names, strict=True)],
        "annotations": annotations,
    }
    return ground_truth, results


def one_entry(record, row, image_id, category_ids):
    x1, y1, x2, y2 = map(float, record["boxes"][row])
    entry = {
        "image_id": image_id,
        "category_id": category_ids[int(record["labels"][row]) - 1],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
    }
    if "masks" in record:
        mask = record["masks"][row].reshape(SIZE) > 0.5
        entry["segmentation"] = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        entry["segmentation"]["counts"] = entry["segmentation"]["counts"].decode()
    if "keypoints" in record:
        entry["keypoints"] = [float(value) for value in record["keypoints"][row].ravel()]
    return entry


def only(results, iou_type):
    """Results as ``loadRes`` needs them for one IoU type: the area must not be the box's."""
    key = {"segm": "segmentation"}.get(iou_type, iou_type)
    keys = ("image_id", "category_id", "score", key)
    return [{name: entry[name] for name in keys} for entry in results]


# ------------------------------------------------------------------- cases, evaluators and files


def full_case(seed=0, num_images=25, levels=12, **options):
    """With masks and keypoints."""
    predictions, targets = random_case(seed, num_images, limit=60.0, levels=levels, **options)
    add_masks(predictions, targets)
    add_keypoints(predictions, targets)
    return predictions, targets


def evaluator_of(predictions, targets, batch_size=7, classes=CLASSES, **options):
    options = {"category_ids": CATEGORY_IDS, **options}
    return fed(COCOEvaluator(classes, **options), predictions, targets, batch_size)


def plain_evaluator(predictions, targets, **options):
    """Of one class only."""
    options = {"classes": ["cat"], "category_ids": None, **options}
    return evaluator_of(predictions, targets, **options)


def truth(boxes, image_id=1, **more):
    return image(boxes, image_id=image_id, **more)


def foreign_files(folder, iou_type="bbox", change=None):
    """Predictions, and annotations with polygons and crowds as uncompressed runs, as COCO's are."""
    predictions, targets = full_case(seed=2)
    ground_truth, results = as_entries(predictions, targets, CATEGORY_IDS, CLASSES)
    for entry in ground_truth["annotations"]:
        if entry["iscrowd"]:
            mask = coco_mask.decode(entry["segmentation"])
            entry["segmentation"] |= {"counts": uncompressed(mask)}
        else:
            entry["segmentation"] = box_polygon(entry["bbox"])
    results = only(results, iou_type)
    if change is not None:
        change(ground_truth, results)
    return write_json(folder / "p.json", results), write_json(folder / "gt.json", ground_truth)


def box_polygon(bbox):
    x, y, width, height = bbox
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def uncompressed(mask):
    """Lengths of the runs of zeros and ones, column by column, zeros first."""
    flat = np.concatenate([[0], mask.T.ravel().astype(int), [2]])
    return np.diff(np.flatnonzero(np.diff(flat)), prepend=0).tolist()


def write_json(path, value):
    path.write_text(json.dumps(value))
    return path
