"""Whether processes, or a run and the one it goes on from, have the same training images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import distributed

__all__ = ["check_same_images", "digest_of"]


def digest_of(names: Sequence[str]) -> str:
    """Return a digest of images' names in their order."""
    # A file's name may be no valid text.
    text = "\n".join(names).encode(errors="surrogatepass")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def check_same_images(names: Sequence[str], num_skipped: int) -> None:
    """Raise ValueError unless all processes have the same images: their steps would not match.

    All processes must call it.

    Args:
        names: This process's images.
        num_skipped: How many it left out.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    found: list[tuple[str, int]] = [("", 0)] * distributed.get_world_size()
    distributed.all_gather_object(found, (digest_of(names), num_skipped))
    if len(set(found)) > 1:
        counts = ", ".join(str(number) for _, number in found)
        raise ValueError(
            "data.on_error=skip left out other images in some processes than in others (of each "
            f"process {counts}): the files that they read must be the same"
        )
