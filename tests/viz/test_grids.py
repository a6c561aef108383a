"""Pictures side by side: every picture is where it belongs, unchanged, and no text is cut off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm import viz
from ldm.viz import grids
from ldm.viz.lettering import TITLE, Text
from tests.viz.pictures import BLUE, GREEN, RED, solid


def box(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a colour in a picture, which must fill that rectangle."""
    rows, columns = np.nonzero((np.asarray(sheet) == colour).all(axis=2))
    left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    assert len(rows) == (right - left) * (bottom - top)
    return int(left), int(top), int(right), int(bottom)


def edge_is_white(sheet: Image.Image, width: int = 4) -> bool:
    pixels = np.asarray(sheet)
    inner = np.zeros(pixels.shape[:2], bool)
    inner[width:-width, width:-width] = True
    return bool((pixels[~inner] == 255).all())


def test_pictures_stand_in_their_rows_and_columns_unchanged() -> None:
    sheet = viz.grid([[solid(RED), solid(GREEN)], [solid(BLUE)]], size=None)
    red, green, blue = box(sheet, RED), box(sheet, GREEN), box(sheet, BLUE)
    assert red[2] < green[0] and red[1] == green[1]
    assert red[3] < blue[1] and red[0] == blue[0]
    assert all((r - x, b - y) == (64, 64) for x, y, r, b in (red, green, blue))
    assert edge_is_white(sheet)


def test_small_pictures_are_enlarged_by_a_whole_factor_and_large_ones_reduced() -> None:
    left, top, right, bottom = box(viz.grid([[solid(RED, 10, 30)]], size=100), RED)
    assert (right - left, bottom - top) == (30, 90)
    left, top, right, bottom = box(viz.grid([[solid(RED, 400, 200)]], size=100), RED)
    assert (right - left, bottom - top) == (100, 50)
    latent = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    large = np.asarray(grids.fitted(latent, 9))
    assert (large == np.asarray(latent).repeat(4, axis=0).repeat(4, axis=1)).all()


def test_captions_change_no_picture_and_none_is_cut_off() -> None:
    long = "a very long caption about incomprehensibilities-that-cannot-be-broken-anywhere " * 2
    sheet = viz.grid(
        [[solid(RED), solid(GREEN)], [solid(BLUE), solid((9, 9, 9))]],
        captions=[[long, "short"], ["", long]],
        row_captions=[long, "second"],
        column_captions=["first", long],
        title=long,
        note=long,
        size=64,
    )
    boxes = [box(sheet, colour) for colour in (RED, GREEN, BLUE)]
    assert {(r - x, b - y) for x, y, r, b in boxes} == {(64, 64)}
    assert edge_is_white(sheet)


def test_a_title_wider_than_its_picture_widens_the_sheet() -> None:
    title = "a red house on green grass"
    width = Text.wrapped(title, 480, TITLE).width
    assert width > 64
    assert viz.strip([solid(RED)], title=title).width == width + 2 * grids.MARGIN


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(rows=[]), "needs pictures"),
        (dict(rows=[[]]), "needs pictures"),
        (dict(rows=[[solid(RED)]], row_captions=["a", "b"]), "row_captions: 1 are needed, not 2"),
        (dict(rows=[[solid(RED)]], column_captions="a"), "column_captions: 1 are needed"),
        (dict(rows=[[solid(RED)] * 2], captions=[["a"]]), "captions of a row: 2 are needed, not 1"),
        (dict(rows=[[solid(RED)]], size=0), "size must be 1 or more"),
    ],
)
def test_a_grid_refuses_what_does_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        viz.grid(**arguments)
