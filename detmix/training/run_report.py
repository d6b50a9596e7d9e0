"""The report of a run: its scores, its errors, its course and its mixing, in one HTML file.

Styles are in the file and pictures are embedded: it opens from disk, can be moved and mailed, and
loads nothing.
"""

from base64 import b64encode
from collections.abc import Sequence
from datetime import datetime
from itertools import chain, islice
from mimetypes import guess_type
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from jinja2 import Environment, PackageLoader, StrictUndefined

from detmix import pictures
from detmix.data import VOCDetection
from detmix.evaluation import ErrorAnalysis, ImageErrors, worst_images
from detmix.evaluation.results import ap_text
from detmix.files import write_text
from detmix.training.build import DetectionData
from detmix.training.config import TrainConfig
from detmix.training.full_evaluation import FullEvaluation
from detmix.training.inference import Prediction
from detmix.training.preview import join_weights, mixed_samples
from detmix.training.run_folder import versions

_NUM_WORST = 12
_NUM_MIXED = 8
_NUM_WEIGHED = 256
_MOST_CONFUSED = 20  # classes; a table of more fits no screen


def write_run_report(
    folder: Path,
    evaluation: FullEvaluation,
    found: Sequence[tuple[int, Prediction]],
    dataset: DetectionData,
    config: TrainConfig,
    checkpoint: Path,
    accelerator: Accelerator,
    took: str,
) -> Path:
    """Write ``report.html``, and its charts as PNG files beside it."""
    loader = PackageLoader("detmix.training", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"number": ap_text, "uri": _uri}
    setup = {"versions": versions(), **config.as_dict()}
    # Its tensors stay in the file.
    position = torch.load(checkpoint, "cpu", mmap=True, weights_only=True).get("position")
    epochs = f", after {position['epoch']} of {config.epochs} epochs" if position else ""
    device = accelerator.device
    facts = {
        "data": _data(config, dataset, len(found)),
        "checkpoint": f"{checkpoint}{epochs}",
        "detector": config.detector.name,
        "evaluated": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}, in {took}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
    }
    with TemporaryDirectory() as scratch:  # for photographs: as JPEG a fifth of the size of PNG
        html = environment.get_template("report.html.jinja").render(
            title=checkpoint.parent.name or checkpoint.stem,
            facts=facts,
            evaluation=evaluation,
            curves=pictures.plot_precision_recall(evaluation.voc, folder / "precision_recall.png"),
            errors=pictures.plot_errors(evaluation.errors, folder / "errors.png"),
            confusion=_confusion(evaluation.errors),
            worst=[
                _worst(errors, evaluation.errors, found[errors.image][0], dataset, Path(scratch))
                for errors in worst_images(evaluation.errors, _NUM_WORST)
            ],
            course=_course(checkpoint.parent / "metrics.jsonl", folder),
            mixing=_mixing(config, folder, Path(scratch)),
            setup=yaml.safe_dump(setup, sort_keys=False, allow_unicode=True),
        )
    write_text(folder / "report.html", html)
    return folder / "report.html"


def _data(config: TrainConfig, dataset: DetectionData, num: int) -> str:
    """Where the images are from, and how many of them."""
    parts = [str(config.data.coco.test_annotations)]
    if config.data.split in ("named", "hash"):
        parts = [f"{config.data.format}, split {config.data.split}"]
    elif isinstance(dataset, VOCDetection):
        parts = [f"VOC{year} {split}" for year, split in dict.fromkeys(dataset.image_sets)]
    number = f"{num:,}" if num == len(dataset) else f"the first {num:,} of {len(dataset):,}"
    return f"{config.data.root}: {' and '.join(parts)}, {number} images"


def _confusion(errors: ErrorAnalysis) -> list[tuple[str, int, list[int]]]:
    """The rows of the confusion matrix, with their sums; of many classes the most confused ones."""
    counts, names = errors.confusion, (*errors.matching.classes, "background")
    between = counts[:-1, :-1] * ~np.eye(len(names) - 1, dtype=bool)
    order = np.argsort(-between.sum(axis=0) - between.sum(axis=1), kind="stable")
    shown = [*sorted(order[:_MOST_CONFUSED].tolist()), -1]
    return [(names[row], counts[row].sum(), counts[row, shown].tolist()) for row in shown]


def _worst(
    errors: ImageErrors, analysis: ErrorAnalysis, index: int, dataset: DetectionData, photos: Path
) -> tuple[Path, str, ImageErrors]:
    """Draw an image's errors; also return its name."""
    matching, rows, missed = analysis.matching, errors.detections, errors.objects[errors.is_missed]
    shown = {
        "boxes": np.concatenate([matching.det_boxes[rows], matching.gt_boxes[missed]]),
        "labels": np.concatenate([matching.det_labels[rows], matching.gt_labels[missed]]),
        "scores": np.concatenate([matching.det_scores[rows], np.zeros(len(missed))]),
        "outcomes": [*errors.outcomes, *("missed" for _ in missed)],
    }
    path = photos / f"worst_{index}.jpg"
    classes, images = matching.classes, [dataset[index][0]]
    pictures.plot_predictions(images, [shown], None, classes, path, score_threshold=0.0)
    return path, dataset.names[index], errors


def _course(metrics: Path, folder: Path) -> Path | str:
    """Draw the training's course, or say why not."""
    try:
        return pictures.plot_learning_curve(metrics, folder / "learning_curve.png")
    except (OSError, ValueError) as error:  # a killed run leaves its last line half-written
        return str(error)


def _mixing(config: TrainConfig, folder: Path, photos: Path) -> list[Path | str]:
    """Draw the weights of mixed boxes and some mixed images, or say why not."""
    if config.mixing.name == "none":
        return ["nothing is mixed"]
    try:
        samples = islice(mixed_samples(config), _NUM_WEIGHED)
        shown = list(islice(samples, _NUM_MIXED))
        weights = join_weights(chain(shown, samples))
    except (OSError, ValueError) as error:  # evaluated elsewhere than trained
        return [f"the training images are not at hand: {error}"]
    alpha = config.mixing.alpha if config.mixing.name == "mixup" else None
    histogram = pictures.plot_box_weights(weights, folder / "box_weights.png", alpha=alpha)
    paths = [photos / f"mixed_{number}.jpg" for number in range(len(shown))]
    for (image, target), path in zip(shown, paths, strict=True):
        pictures.plot_batch([image], [target], config.data.class_names, path)
    return [histogram, *paths]


def _uri(path: Path) -> str:
    """A picture itself, as an address."""
    data = b64encode(path.read_bytes()).decode()
    return f"data:{guess_type(path.name)[0]};base64,{data}"
