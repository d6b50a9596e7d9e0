"""Write api.md, the page of all that detmix exports, from its signatures and docstrings.

python docs/make_api.py
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

PAGE = Path(__file__).with_name("api.md")
INTRO = """# API

All that detmix exports, by subject; `python docs/make_api.py` makes this page of the docstrings. In
shapes, N stands for the objects of an image, D for its detections, C for the classes without the
background, `(H, W)` for its size; boxes are `x1, y1, x2, y2` in pixels. The fields of
configurations are the options of `detmix train` and `detmix pretrain`, as in `--mixing.p 0.3`; a
`Share` is a number from 0 to 1. `detmix.__version__` is the version.
"""
# Title; package; names. What a package exports besides is put into its last section.
SECTIONS = """
Mixing; mixing; mixup cutmix DetectionMixUp DetectionCutMix RandomChoice MixedDataset set_epoch
Parts of mixing; mixing; Target Sample union box_weights blend DetectionMixer
Weighted losses; losses; weight_losses unweight_losses LossWeighting
Predicting; training; load Detector Detections
Data sets; data; VOCDetection VOCReport CocoDetection CocoReport YOLODetection ImageClasses
    SkippedImage
VOC annotations; data; VOC_CLASSES read_annotation write_annotation VOCAnnotation VOCObject
Synthetic shapes; data; SHAPE_CLASSES write_shapes write_shapes_coco write_shape_crops
Augmentation and loaders; data; detection_transforms AlbumentationsTransform AugmentedDataset
    train_loader eval_loader collate MixCollate
Building detectors; detectors; build_detector DetectorConfig BackboneConfig build_backbone
Evaluation by Pascal VOC; evaluation; VOCEvaluator VOCResult read_voc_results write_voc_results
    VOCMatching PrecisionRecallCurve OperatingPoint average_precision Interpolation
Kinds of errors; evaluation; analyze_errors ErrorAnalysis worst_images ImageErrors
Evaluation by COCO; evaluation; COCOEvaluator COCOResult score_predictions encode_masks
Configurations; training; TrainConfig DataConfig CocoConfig AugmentConfig MixingConfig OptimConfig
    ScheduleConfig PretrainConfig ImageDataConfig ImageAugmentConfig ImageMixingConfig parse_args
Training; training; DetectorTrainer ClassifierTrainer ClassificationResult load_detector predict
Pictures; pictures; plot_batch plot_predictions
"""


@cache
def sections() -> dict[str, dict[str, str]]:
    """Return the exported names under each title, with the package to import each from."""
    rows = [row.split("; ") for row in re.split(r"\n(?! )", SECTIONS.strip())]
    named = {name for *_, names in rows for name in names.split()}
    found = {title: dict.fromkeys(names.split(), f"detmix.{place}") for title, place, names in rows}
    for package, title in {package: title for title, package, _ in rows}.items():
        exported = import_module(f"detmix.{package}").__all__
        found[title] |= {name: f"detmix.{package}" for name in exported if name not in named}
    return found


def head(function: Any) -> str:
    """Return a function's signature as it stands in the source, without ``self``."""
    source = dedent(inspect.getsource(function))
    node: Any = ast.parse(source).body[0]
    lines = source.splitlines()[node.lineno - 1 : node.body[0].lineno - 1]
    text = "\n".join(lines).removeprefix("def ").removesuffix(":")
    return re.sub(r"\b(self|cls)(,\s*|(?=\)))", "", text)


def constructor(path: str, bases: list[type]) -> str:
    """Return the arguments of a class, or the fields of a dataclass, as the source has them."""
    sources = [inspect.getsource(base) for base in bases]
    for base, source in zip(bases, sources, strict=True):
        if "    def __init__(" in source:
            init = head(vars(base)["__init__"]).removesuffix(" -> None")
            return init.replace("__init__", f"class {path}", 1)
    field = r'(?m)^((?: {4}#.*\n)*) {4}([a-z]\w*)(: .+\n(?: {4}""".*\n)?)'
    found = re.findall(field, "".join(reversed(sources)))
    fields = {name: f"{above}    {name}{rest}" for above, name, rest in found}
    return f"class {path}:\n{''.join(fields.values())}".replace("#: ", "# ")


def methods(bases: list[type], others: list[type]) -> Iterator[str]:
    """Yield the methods and properties that ``others`` do not have, as points of a list."""
    found = {name: value for base in reversed(bases) for name, value in vars(base).items()}
    for name, value in found.items():
        function = getattr(value, "fget", getattr(value, "func", getattr(value, "__func__", value)))
        known = name == "extra_repr" or any(hasattr(other, name) for other in others)
        if inspect.isfunction(function) and re.match("[a-z]|__call__", name) and not known:
            text = re.sub(r",? (?=\))|(?<=\() ", "", re.sub(r"\s+", " ", head(function)))
            is_value = isinstance(value, (property, cached_property))
            text = text.replace("()", "", 1) if is_value else text
            yield f"- `{text}`\n\n{indent(markdown(value.__doc__ or ''), '  ')}"
    for other in others:
        yield f"- all of {link(other.__name__)}\n\n"


def link(text: str) -> str:
    """Return code, as a link where it names something on the page."""
    exported = {name for names in sections().values() for name in names}
    for name in text.split("."):
        if name in exported:
            return f"[`{text}`](#{name.lower()})"
    return f"`{text}`"


def markdown(doc: str) -> str:
    """Return a docstring with its sections as lists, and links to what else is on the page."""
    doc = re.sub(r"(?<!`)`([\w.]+)`(?!`)", lambda found: link(found[1]), inspect.cleandoc(doc))
    text, *parts = re.split(r"(?m)^([A-Z][a-z]+):\n(?= )", doc.replace("``", "`"))
    for title, body in zip(parts[::2], parts[1::2], strict=True):
        body = dedent(body).strip()
        if title in ("Args", "Attributes", "Raises"):
            body = re.sub(r"(?m)^(\S.*?): ", r"- `\1`: ", body)
        elif title == "Example":
            body = f"```python\n{body}\n```"
        text += f"**{title}**\n\n{body}\n\n"
    return text.strip() + "\n\n"


def entry(name: str, package: str) -> str:
    """Return all that the page says of a name."""
    item, points = getattr(import_module(package), name), []
    path = f"detmix.{name}" if name in import_module("detmix").__all__ else f"{package}.{name}"
    if inspect.isclass(item):
        bases = [each for each in inspect.getmro(item) if each.__module__.startswith("detmix")]
        others = [b for b in bases[1:] if any(b.__name__ in names for names in sections().values())]
        code, doc = constructor(path, bases), item.__doc__
        points = [*methods([base for base in bases if base not in others], others)]
    elif inspect.isfunction(item):
        code, doc = head(item).replace(name, path, 1), item.__doc__
    else:
        files = [file for name, file in sys.modules.items() if name.startswith(f"{package}.")]
        assignment = rf'\n({name} = .*(?:\n[ )].*)*)\n"""((?:.|\n)*?)"""'
        found = re.search(assignment, "".join(map(inspect.getsource, files)))
        if found is None:
            raise LookupError(f"{path} has no docstring below its assignment")
        code, doc = found.groups()
    text = f"### {name}\n\n```python\n{code.strip()}\n```\n\n{markdown(doc)}"
    return text + ("**Methods**\n\n" if points else "") + "".join(points)


def page() -> str:
    """Return the whole page."""
    text = INTRO
    for title, names in sections().items():
        links = ", ".join(map(link, names))
        text += f"\n**[{title}](#{title.lower().replace(' ', '-')})**: {links}\n"
    for title, names in sections().items():
        text += f"\n## {title}\n\n" + "".join(entry(*each) for each in names.items())
    return re.sub(r"\n{3,}", "\n\n", text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
