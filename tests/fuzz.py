"""Files made to do harm, and limits of time and memory for whoever reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import ITIMER_REAL, SIGALRM, setitimer, signal

SECONDS = 10.0  # that a case may take, on a machine with other work
GIBIBYTES = 2  # of address space that it may ask for

XML = b"""<?xml version="1.0" encoding="UTF-8"?>
<annotation>
  <filename>a.jpg</filename>
  <size><width>60</width><height>40</height><depth>3</depth></size>
  <object>
    <name>person</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>
    <bndbox><xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>20</ymax></bndbox>
    <part><name>head</name><bndbox><xmin>12</xmin><ymin>7</ymin><xmax>15</xmax><ymax>9</ymax></bndbox></part>
  </object>
  <object>
    <name>dog</name><difficult>1</difficult>
    <bndbox><xmax>59.5</xmax><xmin>1</xmin><ymax>40</ymax><ymin>2</ymin></bndbox>
  </object>
</annotation>
"""

_LAUGHS = "".join(
    f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' if n else '<!ENTITY l0 "ha">' for n in range(10)
)
DOCTYPES = (
    f"<!DOCTYPE annotation [{_LAUGHS}]>",
    f'<!DOCTYPE annotation [<!ENTITY l9 "{"a" * 100_000}">]>',
    '<!DOCTYPE annotation [<!ENTITY l9 SYSTEM "file:///etc/passwd">]>',
    '<!DOCTYPE annotation SYSTEM "file:///dev/zero">',
)


@contextmanager
def limits() -> Iterator[None]:
    """Allow `GIBIBYTES` more address space than there is in use."""
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + GIBIBYTES * 2**30, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def time_limit() -> Iterator[None]:
    """Raise TimeoutError after `SECONDS`."""

    def stop(signum: int, frame: object) -> None:
        raise AssertionError(f"took more than {SECONDS:g} s")

    before = signal(SIGALRM, stop)
    setitimer(ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        setitimer(ITIMER_REAL, 0)
        signal(SIGALRM, before)


def zigzag(num_points: int, extent: float) -> list[float]:
    """Return a polygon to and fro, left to right: next to no area, and edges of any length."""
    return [value for n in range(num_points) for value in (extent * (-1) ** n, float(n))]
