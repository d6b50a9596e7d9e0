"""Write a detector as one file that runs without detmix, once that file finds what it should.

detmix export runs/voc2007_cpu/best.pt --format onnx
detmix export torchvision:fasterrcnn_resnet50_fpn --format torchscript --out detector.pt

The file takes one image of any size, float32 (3, height, width), RGB in [0, 1]; shrinking as in
training, normalization and resizing are inside. It gives what torchvision's detector gives, by
name: boxes in pixels of that image, labels, scores, and masks or keypoints with keypoints_scores.
Its metadata (ONNX) or extra files (TorchScript) have the input, and the classes, from label 1 on.
"""

# TorchScript reads no strings: annotations are not postponed.

import argparse
import io
import json
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from detmix.data.images import read_upright
from detmix.data.shapes import render_scene
from detmix.files import write_atomically
from detmix.training import load
from detmix.training.stopping import one_line

Found = dict[str, Tensor]
Exported = tuple[bytes, Callable[[Tensor], Found]]  # a file, and what it finds in an image

_INPUT = "one image, float32 (3, height, width), RGB in [0, 1]"
_TOLERANCE = 1e-4  # of each output, relative to its largest number where that is above 1
_NUM_DRAWN, _DRAWN_SIZE = 16, 256
_USE = {
    "onnx": """\
import numpy, onnxruntime, PIL.Image
image = numpy.float32(PIL.Image.open("photo.jpg").convert("RGB")).transpose(2, 0, 1) / 255
{names} = onnxruntime.InferenceSession({path!r}).run(None, {{"image": image}})""",
    "torchscript": """\
import PIL.Image, torch, torchvision.transforms.functional
image = torchvision.transforms.functional.to_tensor(PIL.Image.open("photo.jpg").convert("RGB"))
found = torch.jit.load({path!r})(image)  # a dictionary: {names}""",
}


def main(args: Sequence[str]) -> None:
    """Export a detector, compare what it finds, write the file."""
    parsed = _parser().parse_args(args)
    source = Path(parsed.checkpoint.removeprefix("torchvision:"))
    out: Path = parsed.out or source.with_suffix(f".{parsed.format}")
    if out.resolve() == source.resolve():
        raise ValueError(f"--out {out} is the checkpoint: choose another name")
    detector = load(parsed.checkpoint, "cpu")
    model = _OneImage(detector.model, detector.size or 0).eval()
    about = {"classes": json.dumps(detector.classes), "input": _INPUT}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what tracing might miss: the comparison tells
        image, expected = _image_with_objects(model, parsed.image)
        traced = image[:, : 1 + image.shape[1] // 2]  # another size than the one compared
        export = {"onnx": _to_onnx, "torchscript": _to_torchscript}[parsed.format]
        try:
            data, run = export(model, traced, list(expected), about)
            found = run(image)
        except ImportError:
            raise
        except Exception as error:  # exporters fail in any way
            raise ValueError(
                f"torch {torch.__version__} cannot export {parsed.checkpoint} as {parsed.format}: "
                f"{type(error).__name__}: {one_line(error)[:300]}"
            ) from error
    difference = _difference(expected, found)
    height, width = image.shape[1:]
    told = (
        f"{len(found['boxes'])} objects in an image of {width} x {height} pixels, the model "
        f"{len(expected['boxes'])}; largest difference {difference:.1e}"
    )
    if difference > _TOLERANCE:
        raise ValueError(f"{out} is not written: it finds {told}, expected {_TOLERANCE:.0e} or less")
    write_atomically(out, lambda file: file.write(data))
    use = _USE[parsed.format].format(path=str(out), names=", ".join(expected))
    print(f"wrote {out}, {len(data) / 1e6:.1f} MB: it finds {told}\n\n# {_INPUT}\n{use}")


class _OneImage(nn.Module):
    """A detector as it is exported: of one image ``(3, H, W)``, which it shrinks as in training."""

    def __init__(self, model: nn.Module, longest: int) -> None:
        super().__init__()
        self.model = model
        model.transform.__class__ = _Transform
        model.transform.longest = longest  # type: ignore[assignment]

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        found = self.model([image])
        if torch.jit.is_scripting():
            return found[1][0]  # type: ignore[no-any-return]
        return found[0]  # type: ignore[no-any-return]


class _Transform(GeneralizedRCNNTransform):  # type: ignore[misc]
    """Resizes to the very size, for which torchvision's, exported, has too few digits.

    In float32 half of all sizes come out a pixel smaller by TorchScript, up to a fifth by ONNX.
    """

    longest: int

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        size = torch._shape_as_tensor(image)[1:].double()
        if self.longest > 0:
            limit = torch.tensor(self.longest, dtype=torch.float64)
            shrunk = (size * (limit / size.max()).clamp(max=1)).round().clamp(min=1)
            rows, columns = _shares(size[0], shrunk[0]), _shares(size[1], shrunk[1])
            image, size = rows @ image @ columns.transpose(0, 1), shrunk
        limits = torch.tensor([self.min_size[-1], self.max_size], dtype=torch.float64)
        wanted = (size * (limits / torch.stack([size.min(), size.max()])).min()).floor()
        fixed = self.fixed_size
        if fixed is not None:
            wanted = torch.tensor([fixed[1], fixed[0]])
        wanted = wanted.to(torch.int64)
        if torch.jit.is_scripting():
            numbers = [int(wanted[0]), int(wanted[1])]
        else:
            numbers = [wanted[0], wanted[1]]
        return F.interpolate(image[None], numbers, mode="bilinear", align_corners=False)[0], target


def _shares(length: Tensor, shrunk: Tensor) -> Tensor:
    """Return the share ``(shrunk, length)`` that each pixel has in each of a shrunk image."""
    step = length / shrunk
    start = torch.arange(shrunk, dtype=torch.float64)[:, None] * step
    pixel = torch.arange(length, dtype=torch.float64)
    covered = torch.minimum(start + step, pixel + 1) - torch.maximum(start, pixel)
    return (covered.clamp(min=0) / step).float()


def _image_with_objects(model: nn.Module, path: Path | None) -> tuple[Tensor, Found]:
    """Return an image, given or drawn, and what the detector finds in it."""
    for number in range(_NUM_DRAWN if path is None else 1):
        if path is None:
            drawn = torch.from_numpy(render_scene(0, 1, number, _DRAWN_SIZE).image)
            pixels = drawn.permute(2, 0, 1).contiguous()
        else:
            pixels = read_upright(path)
        found: Found = model(pixels / 255)
        if len(found["boxes"]):
            return pixels / 255, found
    raise ValueError(
        f"the detector finds nothing in {path or 'drawn images'}, so that nothing can be compared: "
        "expected an --image with objects"
    )


def _to_onnx(model: nn.Module, image: Tensor, names: list[str], about: dict[str, str]) -> Exported:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"{error}: --format onnx needs pip install 'detmix[onnx]'") from error
    file = io.BytesIO()
    axes = {"image": {1: "height", 2: "width"}, **{name: {0: "objects"} for name in names}}
    options = {"input_names": ["image"], "output_names": names, "dynamic_axes": axes}
    # dynamo=True, torch.export, cannot follow numbers of objects through torchvision's code.
    torch.onnx.export(model, (image,), file, dynamo=False, opset_version=17, **options)
    exported = onnx.load_from_string(file.getvalue())
    onnx.helper.set_model_props(exported, about)
    data = exported.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> Found:
        outputs = session.run(names, {"image": image.numpy()})
        return dict(zip(names, map(torch.from_numpy, outputs), strict=True))

    return data, run


def _to_torchscript(model: nn.Module, _: Tensor, __: list[str], about: dict[str, str]) -> Exported:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file, _extra_files=about)
    data = file.getvalue()
    return data, torch.jit.load(io.BytesIO(data))


def _difference(expected: Found, found: Found) -> float:
    """Return the largest difference; detections of nearly equal scores may have changed places."""

    def rows(these: Found) -> Tensor:
        keys = ("boxes", "labels", "scores")
        return torch.cat([these[key].reshape(len(these["boxes"]), -1) for key in keys], 1)

    if any(found[key].shape != value.shape for key, value in expected.items()):
        return math.inf
    nearest = torch.cdist(rows(expected), rows(found), p=math.inf).argmin(1)
    if len(nearest.unique()) < len(nearest):
        return math.inf
    return max(
        float((value - found[key][nearest]).abs().max() / value.abs().max().clamp(min=1))
        for key, value in expected.items()
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Write a detector as one file that runs without detmix."
    )
    add = parser.add_argument
    add(
        "checkpoint",
        help="best.pt or last.pt of a run, or a detector of torchvision's such as "
        "torchvision:fasterrcnn_resnet50_fpn",
    )
    add("--format", choices=_USE, default="onnx", help="onnx by default")
    add("--out", type=Path, help="file to write; by default beside the checkpoint")
    add("--image", type=Path, help="with objects, to compare on; by default one is drawn")
    return parser
