"""Pictures in files: the same blocks, as an SVG that is small and a PNG."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from tests.picture.test_grid import MANY, Looked, blocks, looked, looks
from virtio_mem.picture.grid import cells_of, scale_for
from virtio_mem.picture.image import FORMATS, cells_shown, image

PATH = "{http://www.w3.org/2000/svg}path"


@pytest.fixture(scope="module", autouse=True)
def fonts() -> None:
    """The library keeps the fonts open that it has once used: that is no test's leak."""
    image([("日本語", blocks(8, []))], "svg")


def fills(svg: bytes) -> list[str]:
    """The colours of all that is filled."""
    styles = [element.get("style", "") for element in ElementTree.fromstring(svg).iter(PATH)]
    return [style.split("fill: ")[1][:7] for style in styles if "fill: #" in style]


def test_runs_are_rectangles() -> None:
    zone = blocks(1024, [(0, 64), (71, 100)], usable=512, requested=128)
    found = fills(image([("mem0", zone)], "svg"))
    assert found.count("#2f81f7") == 4  # two in the first row, one in the second, and the legend's


def test_the_same_blocks_give_the_same_bytes() -> None:
    zone = blocks(100, [(0, 64)])
    for format_ in FORMATS:
        assert image([("mem0", zone)], format_) == image([("mem0", zone)], format_)


@pytest.mark.parametrize("nb_blocks", [0, 1, 8, MANY])
def test_every_scale(nb_blocks: int) -> None:
    runs = looked(nb_blocks, min(7, nb_blocks))
    zone = blocks(nb_blocks, runs, requested=nb_blocks // 2)
    Looked.looks = 0
    svg, png = image([("a", zone)], "svg"), image([("a", zone), ("b", zone)], "png")
    assert Looked.looks <= 3 * cells_shown() * looks(len(runs))
    ElementTree.fromstring(svg)
    assert len(svg) < 1_000_000
    assert png.startswith(b"\x89PNG\r\n\x1a\n")


def test_names_of_any_kind() -> None:
    """What is markup to a library or a reader is a text here; what no font has is a box."""
    names = ["a$b", r"$\frac{", "\0<&>'", "日本語", "\ud800"]
    zone = blocks(8, [(0, 3)])
    ElementTree.fromstring(image([(name, zone) for name in names], "svg"))


def test_a_picture_has_more_rows_than_a_terminal() -> None:
    zone = blocks(MANY, [])
    assert len(cells_of(zone, scale_for(MANY, 141, rows=32))) == 128 * 32
