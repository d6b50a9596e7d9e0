"""Write a detector as one ONNX or TorchScript file, once that file finds what the detector does.

detmix export runs/voc2007_cpu/best.pt --format onnx
"""

import argparse
import io
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn  # TorchScript reads annotations: here they are not postponed
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from detmix.data.images import read_upright
from detmix.data.shapes import render_scene
from detmix.files import write_atomically
from detmix.training import load

_ONNX = "onnxruntime", "onnxruntime.InferenceSession({!r}).run(None, {{'image': image}})"
_TORCHSCRIPT = "torch, torchvision", "torch.jit.load({!r})([torch.tensor(image)])[1][0]"
Target = dict[str, Tensor] | None


def main(args: Sequence[str]) -> None:
    """Export a detector, compare what it finds, write the file."""
    parser = argparse.ArgumentParser(description="Write a detector as a file that runs by itself.")
    parser.add_argument("checkpoint", help="best.pt or last.pt of a run, or torchvision:NAME")
    parser.add_argument("--format", choices=("onnx", "torchscript"), default="onnx", help="or onnx")
    parser.add_argument("--out", type=Path, help="by default beside the checkpoint")
    parser.add_argument("--image", type=Path, help="to compare on; by default one is drawn")
    parsed = parser.parse_args(args)
    out = parsed.out or Path(parsed.checkpoint.removeprefix("torchvision:"))
    out = out.with_suffix(f".{parsed.format}")
    detector = load(parsed.checkpoint, "cpu")
    takes = f"RGB in [0, 1], float32 (3, height, width), longest side: {detector.size or 'any'}"
    about = {"classes": "\n".join(detector.classes), "image": takes}
    drawn = (torch.tensor(render_scene(0, 1, n, 256).image.transpose(2, 0, 1)) for n in range(16))
    images = (each / 255 for each in ([read_upright(parsed.image)] if parsed.image else drawn))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what tracing might miss: the comparison tells
        image = next((each for each in images if len(detector.model([each])[0]["boxes"])), None)
        if image is None:
            raise ValueError("found nothing to compare: expected an --image that has objects")
        try:
            data, difference = _export(detector.model, image, parsed.format, about)
        except Exception as error:  # an exporter fails in any way
            needed = f"torch {torch.__version__} and, for ONNX, pip install 'detmix[onnx]'"
            raise ValueError(f"not exported with {needed}: {error}"[:500]) from error
    if not difference < 1e-4:
        raise ValueError(f"{out} is not written: it differs from the detector by {difference:.1e}")
    write_atomically(out, lambda file: file.write(data))
    modules, run = _ONNX if parsed.format == "onnx" else _TORCHSCRIPT
    print(f"""wrote {out}, {len(data) / 1e6:.1f} MB; differs from the detector by {difference:.1e}
and takes {takes}. In Python:
import numpy, PIL.Image, {modules}
image = numpy.float32(PIL.Image.open("photo.jpg").convert("RGB")).transpose(2, 0, 1) / 255
found = {run.format(str(out))}""")


def _export(model: Any, image: Tensor, kind: str, about: dict[str, str]) -> tuple[bytes, float]:
    """Return a file, and the largest difference in an output, relative to its largest number."""
    file: Any = io.BytesIO()
    (expected,) = model([image])
    if model.transform.fixed_size is None:
        model.transform.__class__ = _Transform
    if kind == "torchscript":
        torch.jit.save(torch.jit.script(model), file, _extra_files=about)
        found = torch.jit.load(io.BytesIO(file.getvalue()))([image])[1][0]  # type: ignore[no-untyped-call]
    else:
        onnx, runtime = map(import_module, ("onnx", "onnxruntime"))
        names: Any = {"input_names": ["image"], "output_names": list(expected)}
        axes = {"image": {1: "height", 2: "width"}}
        torch._C._jit_onnx_log = lambda *_: None  # beside an error, hundreds of lines
        # Of another size. And torch.export, dynamo=True, cannot follow numbers of objects.
        torch.onnx.export(model, ([image[:, ::2]],), file, dynamo=False, dynamic_axes=axes, **names)
        exported = onnx.load_from_string(file.getvalue())
        onnx.helper.set_model_props(exported, about)
        file = io.BytesIO(exported.SerializeToString())
        outputs = runtime.InferenceSession(file.getvalue()).run(None, {"image": image.numpy()})
        found = dict(zip(expected, map(torch.from_numpy, outputs), strict=True))
    # In another order than by scores, of which nearly equal ones may change places.
    order, other = [(each["boxes"].sum(1) + each["labels"]).argsort() for each in (expected, found)]
    pairs = [(expected[name][order], found[name][other]) for name in expected]
    apart = [((one - two) / one.abs().max().clamp(min=1)).abs().max() for one, two in pairs]
    return file.getvalue(), float(max(apart))


class _Transform(GeneralizedRCNNTransform):  # type: ignore[misc]
    """Torchvision's own, when exported, makes half of all images a pixel smaller: by float32."""

    def resize(self, image: Tensor, target: Target = None) -> tuple[Tensor, Target]:
        size = torch._shape_as_tensor(image)[1:].double()
        limits = torch.tensor([self.min_size[-1], self.max_size], dtype=torch.float64)
        size = (size * (limits / size.sort()[0]).min()).long()
        sides = [int(size[0]), int(size[1])] if torch.jit.is_scripting() else [*size]  # type: ignore[attr-defined]
        return nn.functional.interpolate(image[None], sides, mode="bilinear")[0], target
