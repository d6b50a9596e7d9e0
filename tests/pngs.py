"""Whether a PNG file holds a picture."""

from PIL import Image


def check_png(path, min_width=300, min_height=200, max_side=2500):
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        width, height = picture.size
        colors = picture.convert("RGB").getcolors(1 << 24)
    assert min_width <= width <= max_side
    assert min_height <= height <= max_side
    assert len(colors) > 1  # not blank
    return width, height
