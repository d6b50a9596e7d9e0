"""Files made to do harm: every one is refused, by an error that names it."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fuzz import XML, limits, time_limit
from PIL import EpsImagePlugin, Image
from tiny import tiny_config

from detmix.data import SHAPE_CLASSES, VOCDetection, read_annotation
from detmix.data.coco.masks import read_polygons
from detmix.data.images import decode_image_bytes, read_image_size, read_jpeg
from detmix.pretrained.match_state import SourceWeights, load_matching
from detmix.pretrained.read_state import read_weight_file
from detmix.training import TrainConfig, parse_args
from detmix.training.build import start_model

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")


def jpeg(width=60, height=40, **options):
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.fixture
def devkit(tmp_path):
    folder = tmp_path / "devkit" / "VOC2007"
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    (folder / "Annotations/a.xml").write_bytes(XML)
    (folder / "JPEGImages/a.jpg").write_bytes(jpeg())
    (folder / "ImageSets/Main/trainval.txt").write_text("a\n")
    return folder


class TestXML:
    @pytest.mark.parametrize("inner", [b"<a>" * 200_000, b"<a>" * 200_000 + b"</a>" * 200_000])
    def test_deep_nesting_does_not_exhaust_the_stack(self, devkit, inner):
        path = devkit / "Annotations/a.xml"
        path.write_bytes(XML.replace(b"<segmented>", inner + b"<segmented>"))
        with limits(), time_limit():
            if b"</a>" in inner:
                assert len(read_annotation(path).objects) == 2
            else:
                with pytest.raises(ValueError, match=r"a\.xml: not well-formed"):
                    read_annotation(path)

    @pytest.mark.parametrize("width", ["1e300", "99999999999999999999", "2147483649"])
    def test_sizes_that_no_image_has(self, devkit, width):
        path = devkit / "Annotations/a.xml"
        path.write_bytes(XML.replace(b"<width>60", f"<width>{width}".encode()))
        with pytest.raises(ValueError, match=r"a\.xml, <size>: expected whole pixels, got "):
            VOCDetection(devkit.parent)


class TestNames:
    @pytest.mark.parametrize("data", [b"\xff\xfea\0", b"caf\xe9\n", b"\x80" * 10])
    def test_a_list_that_is_not_utf8_is_named(self, devkit, data):
        (devkit / "ImageSets/Main/trainval.txt").write_bytes(data)
        with pytest.raises(ValueError, match=r"trainval\.txt: expected a list .*UTF-8"):
            VOCDetection(devkit.parent)


def with_size(data, width, height):
    """Have the head of a JPEG claim another size."""
    start = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


class TestImages:
    @pytest.mark.parametrize("progressive", [False, True])
    @pytest.mark.parametrize("before", [b"", b"\xff\xfe\0\x08\xff\xc0\0\x0b\x08\0"])
    def test_a_jpeg_bomb(self, tmp_path, progressive, before):
        """12.9 GB of pixels in a few thousand bytes; a comment that looks like a frame is none."""
        data = with_size(jpeg(progressive=progressive), 65_500, 65_500)
        data = data[:2] + before + data[2:]
        (tmp_path / "a.jpg").write_bytes(data)
        message = r"a\.jpg: refused: Image size \(4290250000 pixels\) exceeds limit"
        with limits(), time_limit(), pytest.raises(ValueError, match=message):
            read_jpeg(tmp_path / "a.jpg")

    def test_large_images_are_decoded_if_pillow_is_told_to(self, monkeypatch):
        data = jpeg(80, 60)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2399)
        with pytest.raises(ValueError, match=r"x: refused: .*4800 pixels\) exceeds limit of 4798"):
            decode_image_bytes(data, "x")
        for limit in (2400, None):
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
            assert decode_image_bytes(data, "x").shape == (3, 60, 80)

    @pytest.mark.parametrize("options", [{"progressive": True}, {"restart_marker_blocks": 1}, {}])
    @pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
    def test_good_images_are_not_refused(self, options, mode):
        file = io.BytesIO()
        picture = Image.effect_noise((47, 33), 80).convert(mode)
        thumbnail = with_size(jpeg(16, 16), 65_500, 65_500)
        picture.save(file, "JPEG", comment=thumbnail, **options)
        assert decode_image_bytes(file.getvalue(), "x").shape == (3, 33, 47)

    @pytest.mark.parametrize(
        "data",
        [b"\xff\xd8" + more for more in (b"", b"junk", b"\xff", b"\xff\xe0\0", b"\xff\xc0")],
    )
    def test_a_head_cut_off(self, data):
        with pytest.raises(ValueError, match=r"x: broken JPEG file of .*: Image is incomplete"):
            decode_image_bytes(data, "x")

    def test_a_png_bomb(self, tmp_path):
        import zlib

        head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
        chunk = b"IHDR" + head
        data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
        data += struct.pack(">I", zlib.crc32(chunk)) + struct.pack(">I", 0) + b"IDAT" + b"\0" * 4
        (tmp_path / "a.png").write_bytes(data)
        with limits(), time_limit():
            with pytest.raises(ValueError, match=r"a\.png: refused: .*bomb"):
                decode_image_bytes(data, tmp_path / "a.png")
            with pytest.raises(
                ValueError, match=r"a\.png: the image's size cannot be read: .*bomb"
            ):
                read_image_size(tmp_path / "a.png")

    def test_no_postscript_is_run(self, tmp_path, monkeypatch):
        """Pillow hands an EPS file to Ghostscript, an interpreter."""

        def run(*args, **kwargs):
            raise AssertionError("Ghostscript was called")

        monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
        data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
        (tmp_path / "a.png").write_bytes(data)
        with pytest.raises(ValueError, match="x: not an image of a known format"):
            decode_image_bytes(data, "x")
        with pytest.raises(ValueError, match=r"a\.png: .* not an image of a known format"):
            read_image_size(tmp_path / "a.png")
        with Image.open(io.BytesIO(data)) as image, pytest.raises(AssertionError):
            image.load()


class TestPolygons:
    """pycocotools keeps every fifth of a pixel of every edge: 2 GB for 20 points far apart."""

    @pytest.mark.parametrize(("right", "is_refused"), [(4e5, False), (4e5 + 1, True)])
    def test_the_bound(self, right, is_refused):
        """By hand: three edges whose longer sides are two times `right` and 200,000."""
        polygon = [0, 0, right, 0, right, 2e5]
        if is_refused:
            with pytest.raises(ValueError, match="have 1000002 pixels of outline"):
                read_polygons([polygon])
        else:
            assert read_polygons([polygon])[0].tolist() == polygon

    def test_a_fine_outline_is_good(self):
        angles = np.linspace(0, 2 * np.pi, 50_000, endpoint=False)
        polygon = np.stack([4000 + 3000 * np.cos(angles), 4000 + 3000 * np.sin(angles)], 1)
        assert len(read_polygons([polygon.ravel().tolist()])[0]) == 100_000


class TestCheckpoints:
    def test_averaged_weights_that_are_none(self, tmp_path):
        state = {"format": 1, "model": {"a": torch.zeros(2)}, "config": {}, "classes": []}
        torch.save(state | {"ema": torch.zeros(2)}, tmp_path / "last.pt")
        with pytest.raises(ValueError, match=r"last\.pt holds no state dict"):
            read_weight_file(tmp_path / "last.pt")
        torch.save(state | {"ema": None}, tmp_path / "last.pt")
        assert read_weight_file(tmp_path / "last.pt").state.keys() == {"a"}

    @pytest.mark.parametrize("kind", [torch.complex64, torch.int64])
    def test_other_kinds_of_numbers_to_start_from(self, kind):
        layer = torch.nn.Linear(2, 2)
        state = {name: tensor.to(kind) for name, tensor in layer.state_dict().items()}
        with pytest.raises(ValueError, match=r"x does not .* numbers: weight \w+, expected real"):
            load_matching(layer, SourceWeights("x", state), model="y", heads=(), head="")

    @pytest.mark.parametrize(
        "config", [{"detector": "x"}, {"backbone": None}, {"detector": {"options": 5}}]
    )
    def test_to_go_on_from(self, tmp_path, config):
        now = tiny_config(tmp_path, tmp_path, "resume=auto")
        config = {**now.as_dict(), **config}
        state = {"format": 1, "model": {}, "config": config, "classes": list(SHAPE_CLASSES)}
        torch.save(state, tmp_path / "last.pt")
        with pytest.raises(ValueError, match=r"last\.pt(: | is of another kind of training)"):
            start_model(now)


class TestArchives:
    """A file of weights is as large in memory as on the disk."""

    def test_entries_that_share_their_bytes(self, tmp_path):
        torch.save(
            {str(i): torch.zeros(1000 if i else 2**20) for i in range(99)}, tmp_path / "a.pt"
        )
        with zipfile.ZipFile(tmp_path / "a.pt", "a") as archive:
            first, *others = [i for i in archive.infolist() if "/data/" in i.filename]
            for info in others:
                info.header_offset = first.header_offset
                info.file_size = info.compress_size = first.file_size
            archive.writestr(zipfile.ZipInfo("b"), "")  # has the directory written again
        with pytest.raises(ValueError, match=r"a\.pt is broken: its entries are larger than the"):
            read_weight_file(tmp_path / "a.pt")


class TestConfigs:
    @needs_pipes
    def test_a_configuration_is_no_path(self, tmp_path, monkeypatch):
        """Also where there is a file whose name is its text."""
        monkeypatch.chdir(tmp_path)
        Path("conf.yaml").write_text("epochs: 3")
        Path("epochs: 3").write_text("epochs: 4")
        os.mkfifo("{epochs: 5}")
        with time_limit():
            assert parse_args(TrainConfig, ["--config", "conf.yaml"]).epochs == 3
            assert parse_args(TrainConfig, ["--config", "epochs: 3"]).epochs == 3
            assert parse_args(TrainConfig, ["--config", "{epochs: 5}"]).epochs == 5

    def test_numbers_too_large_for_a_float(self, tmp_path):
        (tmp_path / "a.yaml").write_text(f"optim: {{lr: {'9' * 400}}}\n")
        with pytest.raises(ValueError, match=r"too large .*a\.yaml"):
            parse_args(TrainConfig, ["--config", str(tmp_path / "a.yaml")])


RUN = {
    "config.yaml": yaml.safe_dump(TrainConfig().as_dict()),
    "versions.json": '{"python": "3.11"}',
    "metrics.jsonl": '{"event": "train", "step": 1, "epoch": 1, "loss": 1, "lr": 1}\n',
}
