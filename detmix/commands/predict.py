"""Find objects in your own images: pictures, COCO's result file, a table.

detmix predict runs/voc2007_cpu/best.pt photo.jpg holidays/ 'more/**/*.png' --out found
detmix predict torchvision:fasterrcnn_resnet50_fpn holidays/ --score 0.8

Writes the picture of a/b.jpg to b.jpg.png, within OUT as the images lie within their common folder,
and predictions.json, COCO's result format with file_name and category_name.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from detmix.data.images import read_upright
from detmix.files import write_text
from detmix.pictures import plot_predictions
from detmix.training import Detections, load


def main(args: Sequence[str]) -> None:
    """Predict, draw, write; exit with 1 if images could not be read, after all others are done."""
    parsed = _parse(args)
    files = _find_images(parsed.images)
    detector = load(parsed.checkpoint, parsed.device)
    parsed.out.mkdir(parents=True, exist_ok=True)  # what cannot be written to is told before work
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    width = max(len(str(file)) for file in files)
    ids, entries, num = _image_ids(files), [], 0
    with tqdm(total=len(files), desc="predicting", unit="image", disable=None) as bar:
        for start in range(0, len(files), parsed.batch_size):
            chunk = files[start : start + parsed.batch_size]
            images = {}
            for file in chunk:
                try:
                    images[file] = read_upright(file)
                except (ValueError, OSError) as error:
                    bar.write(f"left out: {error}", file=sys.stderr)
            found = detector.predict(list(images.values()), parsed.score)
            for (file, image), objects in zip(images.items(), found, strict=True):
                bar.write(f"{file!s:{width}}  {objects}")
                about = {"image_id": ids[file], "file_name": file.as_posix()}
                entries += [about | entry for entry in _entries(objects)]
                shown = {key: value for key, value in vars(objects).items() if value is not None}
                picture = parsed.out / f"{os.path.relpath(os.path.abspath(file), folder)}.png"
                plot_predictions([image], [shown], None, detector.classes, picture, parsed.score)
            num += len(images)
            bar.update(len(chunk))
    write_text(parsed.out / "predictions.json", json.dumps(entries, allow_nan=False) + "\n")
    if not entries:
        print(f"nothing has a score of {parsed.score:g} or more: a lower --score shows the rest")
    print(f"{len(entries)} objects in {num} images: pictures and predictions.json in {parsed.out}")
    if num < len(files):
        print(f"error: {len(files) - num} of {len(files)} images left out", file=sys.stderr)
        sys.exit(1)


def _find_images(given: Sequence[str]) -> list[Path]:
    """Return the files that files, folders and patterns name, each once."""
    found: dict[str, Path] = {}
    for text in given:
        names = [text]
        if not os.path.isfile(text):
            pattern = os.path.join(glob.escape(text), "*") if os.path.isdir(text) else text
            names = sorted(glob.glob(pattern, recursive=True))
            names = [name for name in names if name.lower().endswith(IMG_EXTENSIONS)]
        if not names:
            raise FileNotFoundError(f"{text}: no image there, of {', '.join(IMG_EXTENSIONS)}")
        for name in names:
            found.setdefault(os.path.abspath(name), Path(name))
    return list(found.values())


def _image_ids(files: Sequence[Path]) -> dict[Path, int]:
    """Return the images' ids; the numbers that they are called by, as in COCO, where they are."""
    stems = [file.stem for file in files]
    ids = [int(stem) for stem in stems if stem.isascii() and stem.isdecimal()]
    if len(set(ids)) < len(files):
        ids = list(range(1, len(files) + 1))
    return dict(zip(files, ids, strict=True))


def _entries(found: Detections) -> Iterator[dict[str, Any]]:
    """Yield objects as COCO's result files have them, with their names."""
    boxes = found.boxes.double()
    boxes[:, 2:] -= boxes[:, :2]
    columns = found.labels.tolist(), found.names, boxes.tolist(), found.scores.tolist()
    for row, (label, name, bbox, score) in enumerate(zip(*columns, strict=True)):
        entry = {"category_id": label, "category_name": name, "bbox": bbox, "score": score}
        if found.masks is not None:
            entry["segmentation"] = found.masks[row]
        if found.keypoints is not None:
            entry["keypoints"] = found.keypoints[row].flatten().tolist()
        yield entry


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Find objects in your own images.")
    add = parser.add_argument
    add("checkpoint", help="best.pt or last.pt of a run, or torchvision:NAME of a detector")
    add("images", nargs="+", help="files, folders, or patterns such as 'photos/**/*.jpg'")
    add("--score", type=float, default=0.5, help="leave out what has a lower one; 0.5 by default")
    add("--out", type=Path, default=Path("predictions"), help="folder to write to")
    add("--device", help="such as cpu or cuda:1; by default a GPU where there is one")
    add("--batch_size", type=int, default=4, help="most images of one size to detect in together")
    parsed = parser.parse_args(args)
    if not 0 <= parsed.score <= 1 or parsed.batch_size < 1:
        got = f"{parsed.score:g} and {parsed.batch_size}"
        parser.error(f"expected a --score in [0, 1] and a --batch_size from 1 on, got {got}")
    return parsed
