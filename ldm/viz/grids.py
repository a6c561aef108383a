"""Pictures in rows and columns, on one sheet.

    viz.grid([[a, b], [c, d]], column_captions=["before", "after"], title="Two changes")

A sheet is a PIL image on white, with its captions in it. A picture smaller than its cell is
enlarged by a whole factor, so that one latent stays one square.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ldm.viz.colours import heat
from ldm.viz.lettering import PAPER, QUIET, TITLE, Text

GAP, MARGIN = 6, 10
ROW_CAPTION = 130  # no row's caption is wider, in pixels
MIN_CELL = 56  # no column is narrower, so that a caption finds room under a tiny picture


def fitted(image: Image.Image, size: int | None) -> Image.Image:
    """The picture, its longer side at most `size` pixels: enlarged by a whole factor, or reduced.
    None leaves it as it is."""
    rgb = image.convert("RGB")
    longest = max(rgb.size)
    if size is None or size == longest:
        return rgb
    if size < longest:
        width, height = (max(1, round(side * size / longest)) for side in rgb.size)
        return rgb.resize((width, height), Image.Resampling.LANCZOS)
    factor = size // longest
    return rgb.resize((rgb.width * factor, rgb.height * factor), Image.Resampling.NEAREST)


def grid(
    rows: Sequence[Sequence[Image.Image]],
    *,
    captions: Sequence[Sequence[str]] | None = None,
    row_captions: Sequence[str] | None = None,
    column_captions: Sequence[str] | None = None,
    title: str = "",
    note: str = "",
    size: int | None = 128,
) -> Image.Image:
    """Pictures in rows and columns.

    Args:
        rows: of pictures; a row may be shorter than another.
        captions: one below each picture.
        row_captions: one left of each row.
        column_captions: one above each column.
        title, note: above everything, and below.
        size: of the longer side of a picture in pixels, at most; None leaves all as they are.

    Raises:
        ValueError: no pictures, or captions that are not as many.
    """
    if not rows or not any(rows):
        raise ValueError("a grid needs pictures")
    if size is not None and size < 1:
        raise ValueError(f"size must be 1 or more, not {size}")
    columns = max(len(row) for row in rows)
    _check_count("row_captions", row_captions, len(rows))
    _check_count("column_captions", column_captions, columns)
    _check_count("captions", captions, len(rows))
    for row, below in zip(rows, captions or [], strict=False):
        _check_count("captions of a row", below, len(row))

    cells = [[fitted(image, size) for image in row] for row in rows]
    widths = [
        max([MIN_CELL, *(row[c].width for row in cells if c < len(row))]) for c in range(columns)
    ]
    heights = [max((image.height for image in row), default=0) for row in cells]
    left = [Text.wrapped(text, ROW_CAPTION) for text in row_captions or [""] * len(rows)]
    over = [
        Text.wrapped(text, width)
        for text, width in zip(column_captions or [""] * columns, widths, strict=True)
    ]
    under = [
        [Text.wrapped(text, width) for text, width in zip(row, widths, strict=False)]
        for row in captions or [[""] * len(row) for row in rows]
    ]
    left_width = max(text.width for text in left)
    left_width += GAP if left_width else 0
    over_height = max(text.height for text in over)
    over_height += 3 if over_height else 0
    under_heights = [max((text.height for text in row), default=0) for row in under]

    inner = left_width + sum(widths) + GAP * (columns - 1)
    inner = max(inner, Text.wrapped(title, 480, TITLE).width, Text.wrapped(note, 320).width)
    head, foot = Text.wrapped(title, inner, TITLE), Text.wrapped(note, inner, colour=QUIET)
    top = MARGIN + head.height + (GAP if title else 0)
    row_heights = [
        max(h + u, text.height) for h, u, text in zip(heights, under_heights, left, strict=True)
    ]
    height = top + over_height + sum(row_heights) + GAP * (len(rows) - 1)
    height += (foot.height + GAP if note else 0) + MARGIN

    sheet = Image.new("RGB", (inner + 2 * MARGIN, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    head.draw(pen, MARGIN, MARGIN, "l")
    lefts = [MARGIN + left_width + sum(widths[:c]) + GAP * c for c in range(columns)]
    for text, x, width in zip(over, lefts, widths, strict=True):
        text.draw(pen, x + width / 2, top + over_height - 3 - text.height)
    y = top + over_height
    for row, caption, beneath, high, full in zip(
        cells, left, under, heights, row_heights, strict=True
    ):
        middle = y + max(0, (high - caption.height) // 2)
        caption.draw(pen, MARGIN + left_width - GAP, middle, "r")
        for image, words, x, width in zip(row, beneath, lefts, widths, strict=False):
            sheet.paste(image, (x + (width - image.width) // 2, y + (high - image.height) // 2))
            words.draw(pen, x + width / 2, y + high)
        y += full + GAP
    foot.draw(pen, MARGIN, y, "l")
    return sheet


def strip(
    images: Sequence[Image.Image],
    captions: Sequence[str] | None = None,
    *,
    title: str = "",
    note: str = "",
    size: int | None = 128,
) -> Image.Image:
    """Pictures in one row, each with its caption below. See `grid`."""
    below = None if captions is None else [captions]
    return grid([images], captions=below, title=title, note=note, size=size)


def keyed(sheet: Image.Image, high: str) -> Image.Image:
    """A sheet with the key to its heat colours below: from 0 to what `high` says."""
    bar_width, bar_height = 120, 10
    zero = Text.wrapped("0", 20)
    x = MARGIN + zero.width + GAP
    room = max(sheet.width - (x + bar_width + GAP) - MARGIN, 400)
    text = Text.wrapped(high, room)
    width = max(sheet.width, x + bar_width + GAP + text.width + MARGIN)
    key = Image.new("RGB", (width, sheet.height + text.height + MARGIN), PAPER)
    key.paste(sheet, (0, 0))
    pen, y = ImageDraw.Draw(key), sheet.height
    zero.draw(pen, MARGIN, y, "l")
    colours = np.tile(heat(np.linspace(0, 1, bar_width)), (bar_height, 1, 1))
    key.paste(Image.fromarray(colours), (x, y + (zero.height - bar_height) // 2))
    text.draw(pen, x + bar_width + GAP, y, "l")
    return key


def _check_count(name: str, captions: Sequence[Any] | None, count: int) -> None:
    if captions is not None and (isinstance(captions, str) or len(captions) != count):
        given = "one string" if isinstance(captions, str) else len(captions)
        raise ValueError(f"{name}: {count} are needed, not {given}")
