"""The report of a run: its scores, its errors, its course and its mixing, in one HTML file.

Styles are in the file and pictures are embedded: it opens from disk, can be moved and mailed, and
loads nothing.
"""

from base64 import b64encode
from collections.abc import Sequence
from itertools import chain, islice
from mimetypes import guess_type
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from detmix import pictures
from detmix.evaluation import ImageErrors, worst_images
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
_NUM_WEIGHED = 512


def write_run_report(
    folder: Path,
    evaluation: FullEvaluation,
    found: Sequence[tuple[int, Prediction]],
    dataset: DetectionData,
    config: TrainConfig,
    checkpoint: Path,
) -> Path:
    """Write ``report.html``, and its charts as PNG files beside it."""
    loader = PackageLoader("detmix.training", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"number": ap_text, "uri": _uri}
    setup = {"versions": versions(), **config.as_dict()}
    with TemporaryDirectory() as scratch:  # for photographs: as JPEG a fifth of the size of PNG
        html = environment.get_template("report.html.jinja").render(
            title=checkpoint.parent.name or checkpoint.stem,
            subtitle=f"{config.detector.name}, {checkpoint.name}, on {_data(config, dataset)}",
            evaluation=evaluation,
            curves=pictures.plot_precision_recall(evaluation.voc, folder / "precision_recall.png"),
            errors=pictures.plot_errors(evaluation.errors, folder / "errors.png"),
            worst=[
                _worst(errors, evaluation, *found[errors.image], dataset, Path(scratch))
                for errors in worst_images(evaluation.errors, _NUM_WORST)
            ],
            course=_course(checkpoint.parent / "metrics.jsonl", folder),
            mixing=_mixing(config, folder, Path(scratch)),
            setup=yaml.safe_dump(setup, sort_keys=False, allow_unicode=True),
        )
    write_text(folder / "report.html", html)
    return folder / "report.html"


def _worst(
    errors: ImageErrors,
    evaluation: FullEvaluation,
    index: int,
    prediction: Prediction,
    dataset: DetectionData,
    photos: Path,
) -> tuple[Path, str, ImageErrors]:
    """Draw an image's errors; also return its name."""
    # The matching's rows come image by image.
    first = evaluation.errors.matching.det_images.searchsorted(errors.image)
    rows = (errors.detections - first).tolist()
    shown: dict[str, Any] = {
        key: [value[row] for row in rows] if isinstance(value, list) else value[rows]
        for key, value in prediction.items()
    }
    image, target = dataset[index]
    # Crowds are drawn, but are no objects to the matching.
    missed = torch.zeros(len(target["boxes"]), dtype=torch.bool)
    missed[~target.get("iscrowd", missed).bool()] = torch.from_numpy(errors.is_missed)
    name = dataset.names[index]
    path = pictures.plot_predictions(
        [image],
        [shown | {"outcomes": errors.outcomes}],
        [target | {"missed": missed, "name": name}],
        evaluation.voc.classes,
        photos / f"worst_{index}.jpg",
        score_threshold=0.0,
    )
    return path, name, errors


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


def _data(config: TrainConfig, dataset: DetectionData) -> str:
    limit = config.data.test_limit
    first = "" if limit is None or limit >= len(dataset) else f"the first {limit:,} images of "
    if config.data.split in ("named", "hash"):
        return f"{first}{config.data.root}"
    if config.data.format == "coco":
        return f"{first}{config.data.coco.test_annotations}"
    return first + " and ".join(f"VOC {year} {split}" for year, split in config.data.test)


def _uri(path: Path) -> str:
    """A picture itself, as an address."""
    data = b64encode(path.read_bytes()).decode()
    return f"data:{guess_type(path.name)[0]};base64,{data}"
