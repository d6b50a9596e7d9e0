"""Find the images of a classification split: in folders, or in tar archives without unpacking.

The layout is that of torchvision's ``ImageFolder``, as files or as members of archives::

    root/train/n02124075/a.jpg        root/train.tar, root/train-00.tar, root/train-01.tar, ...
    root/val/n02124075/b.jpg          root/val.tar
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from detmix.data.image_file import MAX_IMAGE_BYTES
from detmix.regular_file import open_regular_file, read_regular_file

__all__ = ["StoredImage", "list_images", "read_image_bytes"]

_COMPRESSED_STARTS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


@dataclass(frozen=True, slots=True)
class StoredImage:
    """Where the bytes of one image lie.

    Attributes:
        class_name: Its class.
        name: Its name in the data set, such as ``"train/n02124075/a.jpg"``.
        path: The image file, or the archive that holds it.
        offset: Where the image begins in an archive, in bytes; None for an image file.
        size: Its length in an archive, in bytes.
    """

    class_name: str
    name: str
    path: str
    offset: int | None = None
    size: int = 0

    @property
    def where(self) -> str:
        """Names the image in errors: its file, or its archive and member."""
        return self.path if self.offset is None else f"{self.path}: {self.name}"


def list_images(root: str | Path, split: str) -> list[StoredImage]:
    """List the images of a split, sorted by class, then by folder, then by file name.

    Args:
        root: The folder of the splits.
        split: Names the folder ``root/<split>`` or the archives ``root/<split>.tar`` and
            ``root/<split>-*.tar``.

    Raises:
        FileNotFoundError: There is neither.
        ValueError: There are no classes or no images in it, a class has none, an archive is
            compressed, broken or no tar archive, or a member of one is a link, in no folder or
            has a name that leads outside.
    """
    root = Path(root)
    if (root / split).is_dir():
        return _list_folder(root / split)
    shards = _find_shards(root, split)
    images = [image for shard in shards for image in _list_shard(shard, split)]
    if not images:
        raise ValueError(f"{', '.join(map(str, shards))}: no member is an image")
    return sorted(images, key=lambda image: (image.class_name, *os.path.split(image.name)))


def read_image_bytes(image: StoredImage) -> bytes:
    """Read one image's bytes; every call opens the file anew, so any process may.

    Raises:
        FileNotFoundError: The file or the archive is gone; names it.
        ValueError: The archive is shorter than it was, or the image larger than 1 GiB.
    """
    try:
        if image.offset is None:
            return read_regular_file(image.path, MAX_IMAGE_BYTES)
        if image.size > MAX_IMAGE_BYTES:
            raise ValueError(
                f"{image.where}: refused: {image.size} bytes, expected at most {MAX_IMAGE_BYTES}"
            )
        with open_regular_file(image.path) as file:
            file.seek(image.offset)
            data = file.read(image.size)
    except FileNotFoundError:
        raise FileNotFoundError(f"{image.where}: there is no such file any more") from None
    if len(data) < image.size:
        raise ValueError(f"{image.where}: expected {image.size} bytes, only {len(data)} are left")
    return data


def _list_folder(folder: Path) -> list[StoredImage]:
    entries = (entry.name for entry in os.scandir(folder) if entry.is_dir())
    classes = sorted(name for name in entries if not _is_hidden(name))
    if not classes:
        raise ValueError(f"{folder}: holds no class folder; expected <class>/<image> in it")
    start = len(str(folder)) + 1
    images: list[StoredImage] = []
    for name in classes:
        num_before = len(images)
        for parent, files in sorted(_walk(str(folder / name))):
            for path in (os.path.join(parent, file) for file in sorted(files)):
                if _is_image(path[start:].split(os.sep)):
                    stored = Path(folder.name, path[start:]).as_posix()
                    images.append(StoredImage(name, stored, path))
        if len(images) == num_before:
            raise ValueError(f"{folder / name}: the class has no image")
    return images


def _walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Yield every folder and its files, as ``os.walk`` does, which would follow links in circles.

    Links are followed, but not to a folder that they are in; and of those behind other links only
    one to each place: where a dozen folders link to each other, there are a billion ways.
    """
    ahead = {folder: (_lineage(folder), False)}  # all that it is in, and whether behind a link
    places = set()  # that links behind links have led to
    for parent, names, files in os.walk(folder, followlinks=True):
        above, is_linked = ahead.pop(parent)
        followed = []
        for name in sorted(names):
            path = os.path.join(parent, name)
            place, is_link = os.path.realpath(path), os.path.islink(path)
            if place in above or (is_link and is_linked and place in places):
                continue
            if is_link and is_linked:
                places.add(place)
            ahead[path] = above | _lineage(place), is_linked or is_link
            followed.append(name)
        names[:] = followed
        yield parent, files


def _lineage(folder: str) -> set[str]:
    """Return the real paths of a folder and of all that it is in."""
    place = Path(os.path.realpath(folder))
    return {str(place), *map(str, place.parents)}


def _find_shards(root: Path, split: str) -> list[Path]:
    found = sorted(os.listdir(root)) if root.is_dir() else []
    name = re.compile(rf"{re.escape(split)}(-.*)?\.(tar(\.(gz|bz2|xz|zst))?|tgz)")
    shards = [root / entry for entry in found if name.fullmatch(entry)]
    if not shards:
        listing = ", ".join(found[:10]) + (", ..." if len(found) > 10 else "")
        raise FileNotFoundError(
            f"{root}: holds no split {split!r}; looked for a folder {split}/ and for archives "
            f"{split}.tar and {split}-*.tar; "
            + (f"found {listing or 'nothing'}" if root.is_dir() else "there is no such folder")
        )
    return shards


def _list_shard(shard: Path, split: str) -> list[StoredImage]:
    images = []
    for member in _read_members(shard):
        class_name = _class_of(member, shard, split)
        if class_name is not None:
            place = (str(shard), member.offset_data, member.size)
            images.append(StoredImage(class_name, member.name.removeprefix("./"), *place))
    return images


def _read_members(shard: Path) -> list[tarfile.TarInfo]:
    with open_regular_file(shard) as file:
        _check_uncompressed(file, shard)
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                members = list(_iterate_members(archive))
                end = archive.offset
        except OSError:
            raise
        except Exception as error:  # a broken header leads tarfile to all kinds of errors
            raise ValueError(f"{shard}: not a tar archive, or a broken one: {error}") from error
        # tarfile stops at a damaged header as it does at the end of the archive.
        file.seek(end)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise ValueError(f"{shard}: broken tar archive: damaged or cut off at byte {end}")
    return members


def _iterate_members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """As ``archive.getmembers()``, which a size below 0 sends back for ever (CVE-2025-8194)."""
    start = 0
    while (member := archive.next()) is not None:
        end = member.offset_data + member.size
        is_plain = member.isreg() and not member.issparse()
        if member.size < 0 or archive.offset <= start or (is_plain and end > archive.offset):
            raise ValueError(f"member {member.name!r} has a wrong size, {member.size} bytes")
        start = archive.offset
        yield member


def _check_uncompressed(file: BinaryIO, shard: Path) -> None:
    start = file.read(8)
    file.seek(0)
    for signature, name in _COMPRESSED_STARTS.items():
        if start.startswith(signature):
            raise ValueError(
                f"{shard}: is compressed with {name}, so images in it cannot be read in place; "
                "expected an uncompressed tar archive"
            )


def _class_of(member: tarfile.TarInfo, shard: Path, split: str) -> str | None:
    """Return the class of a member that is an image; None for what is left out."""
    parts = PurePosixPath(member.name).parts
    where = f"{shard}: member {member.name!r}"
    if member.name.startswith("/") or ".." in parts:
        raise ValueError(f"{where} has a name that leads outside; refused")
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        raise ValueError(f"{where} is a link or another special file; expected images")
    if not _is_image(parts):
        return None
    if len(parts) < 2:
        raise ValueError(f"{where} is in no folder; expected <class>/<file>")
    # Below train/ the class comes first, as in a folder; elsewhere the last folder is the class.
    above = parts[:-2]
    return parts[above.index(split) + 1] if split in above else parts[-2]


def _is_image(parts: Iterable[str]) -> bool:
    """Tell whether a relative path is an image's by its extension, and not hidden."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    parts = list(parts)
    return parts[-1].lower().endswith(IMG_EXTENSIONS) and not any(map(_is_hidden, parts))


def _is_hidden(name: str) -> bool:
    return name.startswith(".")
