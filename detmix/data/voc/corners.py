"""What the corners in an annotation file mean: four ways in which programs write VOC's XML.

Named after the number of the image's first pixel, and after whether ``xmax, ymax`` is the last
pixel of the object (inclusive) or the edge behind it (exclusive). detmix uses continuous
coordinates, in which the first pixel spans [0, 1]; this is their only conversion.

=============  ===================  ================================================
corners        whole image, W by H  written by
=============  ===================  ================================================
1-inclusive    1, 1, W, H           VOC's devkit, and hence the default
0-exclusive    0, 0, W, H           CVAT, Datumaro, VoTT
0-inclusive    0, 0, W - 1, H - 1   scripts that number pixels as NumPy does
1-exclusive    1, 1, W + 1, H + 1   Roboflow, supervision
=============  ===================  ================================================

LabelImg writes 0-exclusive corners cut to whole numbers, but 1 for 0, which seem 1-inclusive.
Legend: M boxes of a data set.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import numpy.typing as npt

Corners = Literal["1-inclusive", "0-exclusive", "0-inclusive", "1-exclusive"]
CORNERS: tuple[Corners, ...] = get_args(Corners)  # of two that fit alike the first is likelier
Array = npt.NDArray[Any]
Box = tuple[float, float, float, float]


def offsets(corners: Corners) -> Box:
    """Return what makes continuous coordinates of xmin, ymin, xmax, ymax, added to them."""
    if corners not in CORNERS:
        raise ValueError(f"corners must be one of {', '.join(CORNERS)}, got {corners!r}")
    first = int(corners[0])
    behind = first - corners.endswith("inclusive")
    return -first, -first, -behind, -behind


class CornerEvidence(NamedTuple):
    """What the corners of all boxes tell of how they are written."""

    num_below_1: int  # boxes whose xmin or ymin is written below 1
    num_at_edge: int  # whose xmax or ymax is written as the width or the height
    num_beyond: int  # where one of them is larger
    fitting: Corners  # what fits all boxes best; what is assumed if none fits better

    def __str__(self) -> str:
        """Tell it in a line."""
        return (
            f"{self.num_below_1} boxes begin below 1, {self.num_at_edge} end at the width or "
            f"height, {self.num_beyond} beyond; {self.fitting} fits best"
        )


def find_evidence(written: Array, sizes: Array, assumed: Corners) -> CornerEvidence:
    """Look at corners ``(M, 4)`` as written, in images of ``(M, 2)`` height and width.

    Those fit best with which most boxes begin at the image's first pixel and end at its last, and
    fewest lie beyond.
    """

    def fit(corners: Corners) -> int:
        boxes = written + offsets(corners)
        low, high = boxes[:, :2].min(axis=1), (boxes[:, 2:] - sizes[:, ::-1]).max(axis=1)
        return int(min((low == 0).sum(), (high == 0).sum()) - ((low < 0) | (high > 0)).sum())

    behind = written[:, 2:] - sizes[:, ::-1]
    return CornerEvidence(
        num_below_1=int((written[:, :2] < 1).any(axis=1).sum()),
        num_at_edge=int((behind == 0).any(axis=1).sum()),
        num_beyond=int((behind > 0).any(axis=1).sum()),
        fitting=max((assumed, *CORNERS), key=fit),
    )
