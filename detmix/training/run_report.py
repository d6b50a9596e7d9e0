"""The report of a run: its scores, its errors, its course and its mixing, in one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml

from detmix.evaluation import ImageErrors, worst_images
from detmix.evaluation.errors.result import KINDS, SIZES, label_of
from detmix.pictures import (
    plot_batch,
    plot_box_weights,
    plot_errors,
    plot_learning_curve,
    plot_precision_recall,
    plot_predictions,
    write_report,
)
from detmix.pictures.report import Block, Code, Facts, Gallery, Picture, Section, Table, Text
from detmix.training.build import DetectionData
from detmix.training.config import TrainConfig
from detmix.training.full_evaluation import FullEvaluation
from detmix.training.inference import Prediction
from detmix.training.preview import mixed_batch, sample_box_weights
from detmix.training.run_folder import versions

_NUM_WORST = 12
_NUM_MIXED = 8


def write_run_report(
    folder: Path,
    evaluation: FullEvaluation,
    found: Sequence[tuple[int, Prediction]],
    dataset: DetectionData,
    config: TrainConfig,
    checkpoint: Path,
) -> Path:
    """Write ``report.html``, which opens from disk by itself, and its charts as PNG files."""
    with TemporaryDirectory() as scratch:  # for photographs: as JPEG a fifth of the size of PNG
        photos = Path(scratch)
        sections = [
            Section("Result", _result(evaluation, folder)),
            Section("Where it fails", _errors(evaluation, folder)),
            Section("Worst images", _worst(evaluation, found, dataset, folder, photos)),
            Section("Training", _training(checkpoint.parent / "metrics.jsonl", folder)),
            Section("Mixing", _mixing(config, folder, photos)),
            Section("How it ran", _setup(config)),
        ]
        return write_report(
            folder / "report.html",
            checkpoint.parent.name or checkpoint.stem,
            sections,
            subtitle=f"{config.detector.name}, {checkpoint.name}, on {_data(config, dataset)}",
        )


def _result(evaluation: FullEvaluation, folder: Path) -> list[Block]:
    voc = evaluation.voc
    facts = {
        f"mAP, all-point, IoU > {voc.iou_threshold:g}": voc.mean_ap,
        f"mAP, 11-point, IoU > {voc.iou_threshold:g}": evaluation.voc07.mean_ap,
    }
    for iou_type, result in evaluation.coco.items():
        what = {"bbox": "", "segm": ", masks", "keypoints": ", keypoints"}[iou_type]
        facts |= {f"COCO AP{what}": result.ap, f"COCO AP50{what}": result.ap50}
    counts = {"images": voc.num_images, "objects": sum(voc.num_objects.values())}
    header, rows, mean = evaluation.class_table()
    table = Table(
        header,
        rows,
        "AP by class: all-point, 11-point (VOC 2007) and COCO's; precision and recall at the score "
        "of the class's best F1. Difficult objects count neither way.",
        footer=mean,
    )
    curves = Picture(
        plot_precision_recall(voc, folder / "precision_recall.png"),
        f"Precision over recall for each class; mean AP {voc.mean_ap:.3f}.",
        "Precision over recall as the score threshold is lowered, all-point AP in the legend.",
    )
    return [Facts({**facts, **counts}), table, curves, *_coco_tables(evaluation)]


def _coco_tables(evaluation: FullEvaluation) -> list[Block]:
    ends = {"": "all", "50": "IoU 0.50", "75": "IoU 0.75"}
    ends |= {"_small": "small", "_medium": "medium", "_large": "large"}
    tables: list[Block] = []
    for result in evaluation.coco.values():
        rows = [
            (name.upper(), *(getattr(result, name + end) for end in ends)) for name in ("ap", "ar")
        ]
        what = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints"}[result.iou_type]
        caption = f"COCO's average precision and recall of {what}, by IoU and by area of the object"
        tables.append(Table(["", *ends.values()], rows, caption))
    return tables


def _errors(evaluation: FullEvaluation, folder: Path) -> list[Block]:
    errors = evaluation.errors
    chart = Picture(
        plot_errors(errors, folder / "errors.png"),
        "Detections of each class by kind, AP that each kind of error costs, missed objects.",
        "The N detections of highest score of each class, N being its objects; what mAP would gain "
        "if one kind of error were gone; objects missed by size.",
    )
    totals = [errors.totals(scope) for scope in ("top_n", "best_f1", "all")]
    kinds = Table(
        ["detections", "top N", "at best F1", "all", "AP gain"],
        [
            (label_of(name), *(counts[name] for counts in totals), errors.ap_gain.get(name, ""))
            for name in ("correct", *KINDS, "ignored")
        ],
        "What detections are, after Hoiem et al. (2012) and TIDE (2020), by VOC's matching. AP "
        "gain: what mAP would rise by if there were no errors of that kind.",
    )
    missed = Table(
        ["objects", "number", "missed", "share", "missed at best F1", "share at best F1"],
        [
            (size + suffix, m.objects, m.missed, m.share, m.missed_at_best_f1, m.share_at_best_f1)
            for suffix, by_size in (("", errors.missed), (", difficult", errors.missed_difficult))
            if not suffix or by_size["all"].objects
            for size in (*SIZES, "all")
            for m in (by_size[size],)
        ],
        "Objects that no detection has found, and none from the score of its class's best F1 on. "
        "Small: below 32 × 32 square pixels, large: from 96 × 96 on.",
        digits=3,
    )
    return [chart, kinds, missed]


def _worst(
    evaluation: FullEvaluation,
    found: Sequence[tuple[int, Prediction]],
    dataset: DetectionData,
    folder: Path,
    photos: Path,
) -> list[Block]:
    worst = worst_images(evaluation.errors, _NUM_WORST)
    if not worst:
        return [Text("No image has an error at the scores of best F1.")]
    note = Text(
        "Ground truth beside predictions from the score of their class's best F1 on; the image of "
        "the lowest F1 first. Blue is right, vermillion is wrong or missed, grey does not count."
    )
    drawn = [_drawn(errors, evaluation, *found[errors.image], dataset) for errors in worst]

    def draw(some: Sequence[dict[str, Any]], path: Path) -> Path:
        lists: dict[str, Any] = {key: [each[key] for each in some] for key in some[0]}
        return plot_predictions(
            **lists, classes=evaluation.voc.classes, path=path, score_threshold=0.0
        )

    draw(drawn[:_NUM_MIXED], folder / "worst.png")
    pictures = [
        Picture(
            draw([each], photos / f"worst_{number}.jpg"),
            f"Ground truth and predictions of {each['titles']}",
            f"F1 {errors.f1:.2f}: {errors.num_correct} correct, {errors.num_false} false, "
            f"{errors.num_missed} missed",
        )
        for number, (errors, each) in enumerate(zip(worst, drawn, strict=True))
    ]
    return [note, Gallery(pictures)]


def _drawn(
    errors: ImageErrors,
    evaluation: FullEvaluation,
    index: int,
    prediction: Prediction,
    dataset: DetectionData,
) -> dict[str, Any]:
    """What `plot_predictions` takes of an image."""
    # The matching's rows come image by image.
    first = int(evaluation.errors.matching.det_images.searchsorted(errors.image))
    rows = (errors.detections - first).tolist()
    image, target = dataset[index]
    # Crowds are drawn, but are no objects to the matching.
    is_object = ~target.get("iscrowd", torch.zeros(len(target["boxes"]))).bool().numpy()
    missed = np.zeros(len(is_object), dtype=bool)
    missed[is_object] = errors.is_missed
    return {
        "images": image,
        "predictions": {
            key: [value[row] for row in rows] if isinstance(value, list) else value[rows]
            for key, value in prediction.items()
        },
        "targets": target,
        "outcomes": errors.outcomes,
        "missed": missed.tolist(),
        "titles": dataset.names[index],
    }


def _training(metrics: Path, folder: Path) -> list[Block]:
    if not metrics.is_file():
        return [Text(f"Not shown: no {metrics.name} lies beside the checkpoint.")]
    try:
        chart = plot_learning_curve(metrics, folder / "learning_curve.png")
    except ValueError as error:  # a killed run leaves its last line half-written
        return [Text(f"Not shown: {error}")]
    return [Picture(chart, "Training loss, learning rate and mAP over the optimizer steps.")]


def _mixing(config: TrainConfig, folder: Path, photos: Path) -> list[Block]:
    if config.mixing.name == "none":
        return [Text("Nothing is mixed.")]
    try:
        images, targets = mixed_batch(config, num_images=_NUM_MIXED)
        weights = sample_box_weights(config)
    except (OSError, ValueError) as error:  # evaluated elsewhere than trained
        return [Text(f"Not shown, as the training images are not at hand: {error}")]
    classes = config.data.class_names
    plot_batch(images, targets, classes, folder / "mixed_batch.png")
    alpha = config.mixing.alpha if config.mixing.name == "mixup" else None
    histogram = Picture(
        plot_box_weights(weights, folder / "box_weights.png", alpha=alpha),
        "Histogram of the weights of boxes.",
        f"Weights of {len(weights):,} boxes, those of the images that an epoch begins with.",
    )
    pictures = [
        Picture(
            plot_batch([image], [target], classes, photos / f"mixed_{number}.jpg"),
            f"Image {number} of a mixed batch, each box with its weight",
        )
        for number, (image, target) in enumerate(zip(images, targets, strict=True), 1)
    ]
    note = Text("The first images of the first epoch. Boxes of one image share a colour.")
    return [histogram, note, Gallery(pictures)]


def _setup(config: TrainConfig) -> list[Block]:
    text = yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True)
    packages = Table(["package", "version"], list(versions().items()), "What evaluated it")
    return [packages, Code(text, "The whole configuration")]


def _data(config: TrainConfig, dataset: DetectionData) -> str:
    limit = config.data.test_limit
    first = "" if limit is None or limit >= len(dataset) else f"the first {limit:,} images of "
    if config.data.format == "coco":
        return f"{first}{config.data.coco.test_annotations}"
    return first + " and ".join(f"VOC {year} {split}" for year, split in config.data.test)
