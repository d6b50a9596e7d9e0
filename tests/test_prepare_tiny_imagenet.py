"""The command that fetches Tiny-ImageNet, given small archives in the official one's layout."""

from __future__ import annotations

import hashlib
import http.server
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detmix.data import ImageClasses

TOOL = Path(__file__).parents[1] / "tools" / "prepare_tiny_imagenet.py"
TOP = "tiny-imagenet-200"
CLASSES = ("n01443537", "n01629819", "n12267677")
NUM_TRAIN, NUM_VAL = 4, 2  # images of each class


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def jpeg(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def official_members():
    """Return the content of a small archive, and the images as they must end up."""
    members = {f"{TOP}/wnids.txt": b"\n".join(name.encode() for name in CLASSES)}
    images = {}
    for c, name in enumerate(CLASSES):
        for k in range(NUM_TRAIN):
            data, file_name = jpeg(100 * c + k), f"{name}_{k}.JPEG"
            members[f"{TOP}/train/{name}/images/{file_name}"] = data
            images[f"train/{name}/{file_name}"] = data
        members[f"{TOP}/train/{name}/{name}_boxes.txt"] = b"\t0\t0\t7\t7\n"
    lines = []
    for k in range(NUM_VAL * len(CLASSES)):
        data, name = jpeg(1000 + k), CLASSES[k % len(CLASSES)]
        members[f"{TOP}/val/images/val_{k}.JPEG"] = data
        images[f"val/{name}/val_{k}.JPEG"] = data
        lines.append(f"val_{k}.JPEG\t{name}\t0\t0\t7\t7")
    members[f"{TOP}/val/val_annotations.txt"] = ("\n".join(lines) + "\n").encode()
    members[f"{TOP}/test/images/test_0.JPEG"] = jpeg(2000)
    return members, images


def write_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return hashlib.md5(path.read_bytes()).hexdigest()


def written_files(root):
    """Return the bytes of all files below train/ and val/ by their path."""
    files = (path for split in ("train", "val") for path in (root / split).rglob("*"))
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in files if p.is_file()}


@pytest.fixture
def tool(monkeypatch):
    spec = importlib.util.spec_from_file_location("prepare_tiny_imagenet", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    numbers = {"train": NUM_TRAIN * len(CLASSES), "val": NUM_VAL * len(CLASSES)}
    monkeypatch.setattr(module, "IMAGES", numbers)
    monkeypatch.setattr(module, "CLASSES", len(CLASSES))
    monkeypatch.setattr(module, "URL", "http://127.0.0.1:9/nobody-answers.zip")
    monkeypatch.setenv("no_proxy", "*")
    return module


@pytest.fixture
def place(tool, monkeypatch, tmp_path):
    """Return a function that puts an archive with given members in a new root."""

    def put(members):
        root = tmp_path / "root"
        root.mkdir()
        monkeypatch.setattr(tool, "MD5", write_zip(root / tool.ARCHIVE, members))
        return root

    return put


@pytest.fixture
def website(tool, monkeypatch, tmp_path):
    """Serve the small archive and return the requests that came in."""
    folder = tmp_path / "website"
    folder.mkdir()
    monkeypatch.setattr(tool, "MD5", write_zip(folder / tool.ARCHIVE, official_members()[0]))
    requests = []

    class Handler(QuietHandler):
        def do_GET(self):
            requests.append(self.path)
            super().do_GET()

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Handler, directory=str(folder))
    ) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(tool, "URL", f"http://127.0.0.1:{server.server_port}/{tool.ARCHIVE}")
        yield requests
        server.shutdown()


def test_downloads_then_finds_everything_there(tool, website, tmp_path, capsys):
    root = tmp_path / "data" / "tiny"
    assert tool.main(["--root", str(root)]) == 0
    assert written_files(root) == official_members()[1]
    assert sorted(os.listdir(root)) == [tool.ARCHIVE, "train", "val"]
    assert (
        "complete; next: python tools/pretrain.py "
        f"--config configs/pretrain/tiny_imagenet_resnet18.yaml --data.root {root}\n"
    ) in capsys.readouterr().out
    num_requests = len(website)
    assert num_requests >= 1
    (root / tool.ARCHIVE).unlink()  # not needed any more
    assert tool.main(["--root", str(root)]) == 0
    assert len(website) == num_requests


def test_the_result_is_read_with_the_right_labels(tool, place):
    root = place(official_members()[0])
    assert tool.main(["--root", str(root)]) == 0
    train = ImageClasses(root, "train")
    val = ImageClasses(root, "val", classes=train.classes)
    assert train.classes == CLASSES
    for dataset in (train, val):
        for index, name in enumerate(dataset.names):
            assert name.split("/")[1] == CLASSES[dataset.labels[index]]
    k = val.names.index(f"val/{CLASSES[1]}/val_4.JPEG")
    expected = np.asarray(Image.open(io.BytesIO(jpeg(1004))))
    assert torch.equal(val[k][0], torch.from_numpy(expected.copy()).permute(2, 0, 1))


def test_an_archive_in_place_needs_no_network(tool, place, capsys):
    root = place(official_members()[0])
    assert tool.main(["--root", str(root)]) == 0  # its address leads nowhere
    assert written_files(root) == official_members()[1]
    assert "complete" in capsys.readouterr().out


def test_a_wrong_checksum_is_not_unpacked(tool, place, capsys):
    root = place(official_members()[0])
    with open(root / tool.ARCHIVE, "ab") as file:
        file.write(b"more")  # still a readable zip file
    assert tool.main(["--root", str(root)]) == 1
    assert f"{tool.ARCHIVE} could not be downloaded" in capsys.readouterr().err
    assert written_files(root) == {}


def test_a_download_with_a_wrong_checksum_is_refused(tool, website, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tool, "MD5", "0" * 32)
    assert tool.main(["--root", str(tmp_path / "root")]) == 1
    assert "corrupted" in capsys.readouterr().err
    assert written_files(tmp_path / "root") == {}


def test_a_download_cut_off_is_done_again(tool, website, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    whole = (tmp_path / "website" / tool.ARCHIVE).read_bytes()
    (root / tool.ARCHIVE).write_bytes(whole[: len(whole) // 2])
    assert tool.main(["--root", str(root)]) == 0
    assert written_files(root) == official_members()[1]


def test_shards_are_not_shadowed_by_folders(tool, place, capsys):
    root = place(official_members()[0])
    (root / "train-00.tar").write_bytes(b"part of it")
    assert tool.main(["--root", str(root)]) == 1
    assert f"Move {root / 'train-00.tar'} away" in capsys.readouterr().err
    assert not (root / "train").exists()


def test_without_a_network_it_says_what_to_do(tmp_path):
    """The command as it is, with a proxy that does not answer."""
    dead = "http://127.0.0.1:9"
    environment = {**os.environ, "http_proxy": dead, "https_proxy": dead, "no_proxy": ""}
    done = subprocess.run(
        [sys.executable, str(TOOL), "--root", str(tmp_path / "new")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    assert done.returncode == 1
    assert "tiny-imagenet-200.zip could not be downloaded" in done.stderr
    assert f"put the archive, as it is, into {tmp_path / 'new'};" in done.stderr
    assert "Traceback" not in done.stderr


def test_check_only_downloads_nothing(tool, website, tmp_path, capsys):
    assert tool.main(["--root", str(tmp_path / "root"), "--check-only"]) == 1
    streams = capsys.readouterr()
    assert "train: " in streams.err
    assert "val: " in streams.err
    assert "complete" not in streams.out
    assert website == []
    assert not (tmp_path / "root").exists()


def test_missing_images_are_told_and_nothing_is_overwritten(tool, place, capsys):
    root = place(official_members()[0])
    assert tool.main(["--root", str(root)]) == 0
    (root / "train" / CLASSES[0] / f"{CLASSES[0]}_1.JPEG").unlink()
    before = written_files(root)
    told = f"train: {root} has 11 images of 3 classes, expected 12 images of 3 classes"
    for arguments in (["--check-only"], []):
        capsys.readouterr()
        assert tool.main(["--root", str(root), *arguments]) == 1
        streams = capsys.readouterr()
        assert told in streams.err
        assert "complete" not in streams.out
    assert f"Move {root / 'train'} away" in streams.err
    assert written_files(root) == before


def test_a_missing_class_is_told(tool, place, capsys):
    """As many images as expected, but one class less: unzipped by hand, say."""
    root = place(official_members()[0])
    assert tool.main(["--root", str(root)]) == 0
    for path in sorted((root / "val" / CLASSES[0]).iterdir()):
        path.rename(root / "val" / CLASSES[1] / path.name)
    (root / "val" / CLASSES[0]).rmdir()
    assert tool.main(["--root", str(root), "--check-only"]) == 1
    assert "6 images of 2 classes, expected 6 images of 3 classes" in capsys.readouterr().err


def test_an_interruption_leaves_no_half_split_and_is_carried_on(tool, place, monkeypatch, capsys):
    root = place(official_members()[0])
    read = zipfile.ZipFile.read

    def interrupted(self, name, *args):
        if name == f"{TOP}/val/images/val_3.JPEG":
            raise KeyboardInterrupt
        return read(self, name, *args)

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "read", interrupted)
        assert tool.main(["--root", str(root)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert sorted(os.listdir(root)) == [tool.ARCHIVE, "train"]
    first = root / "train" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG"
    before = first.stat()
    assert tool.main(["--root", str(root)]) == 0
    after = first.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert written_files(root) == official_members()[1]


def test_names_that_lead_outside_are_not_written(tool, place, tmp_path):
    members, images = official_members()
    data = jpeg(0)
    for name in (
        f"{TOP}/train/../../images/out.JPEG",
        f"{TOP}/train/{CLASSES[0]}/images/../../../../out.JPEG",
        f"{TOP}/train/{CLASSES[0]}/images/..\\out.JPEG",
        "/train/images/out.JPEG",
        "../out.JPEG",
    ):
        members[name] = data
    root = place(members)
    assert tool.main(["--root", str(root)]) == 0
    assert written_files(root) == images
    assert os.listdir(tmp_path) == ["root"]
    assert sorted(os.listdir(root)) == [tool.ARCHIVE, "train", "val"]


def test_a_class_that_leads_outside_is_refused(tool, place, tmp_path, capsys):
    members, _ = official_members()
    key = f"{TOP}/val/val_annotations.txt"
    members[key] = members[key].replace(CLASSES[2].encode(), b"../../../out")
    root = place(members)
    assert tool.main(["--root", str(root)]) == 1
    assert f"val_2.JPEG has no class in {key}" in capsys.readouterr().err
    assert not list(tmp_path.rglob("out*"))
    assert not (root / "val").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda members: members.pop(f"{TOP}/val/val_annotations.txt"), "val_annotations.txt"),
        (lambda members: members.update({f"{TOP}/val/images/new.JPEG": b""}), "new.JPEG has no"),
    ],
)
def test_another_layout_is_told(tool, place, capsys, change, message):
    members, _ = official_members()
    change(members)
    root = place(members)
    assert tool.main(["--root", str(root)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert str(root / tool.ARCHIVE) in error


def test_what_is_no_zip_archive_is_told(tool, monkeypatch, tmp_path, capsys):
    (tmp_path / tool.ARCHIVE).write_bytes(b"no archive")
    monkeypatch.setattr(tool, "MD5", hashlib.md5(b"no archive").hexdigest())
    assert tool.main(["--root", str(tmp_path)]) == 1
    assert "cannot unpack train: File is not a zip file" in capsys.readouterr().err
    assert os.listdir(tmp_path) == [tool.ARCHIVE]


def test_a_full_disk_is_told(tool, place, monkeypatch, capsys):
    root = place(official_members()[0])

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert tool.main(["--root", str(root)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert os.listdir(root) == [tool.ARCHIVE]


def test_a_deleted_split_is_unpacked_again(tool, place):
    root = place(official_members()[0])
    assert tool.main(["--root", str(root)]) == 0
    shutil.rmtree(root / "val")
    assert tool.main(["--root", str(root)]) == 0
    assert written_files(root) == official_members()[1]
