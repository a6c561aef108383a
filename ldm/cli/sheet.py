"""Several pictures on one sheet, side by side, and below each what differs from the others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TypeVar

from PIL import Image

from ldm.cli.show import differing, told
from ldm.errors import printable
from ldm.recipe import Recipe
from ldm.viz.grids import grid

Thing = TypeVar("Thing")

GAP = 4
LONGEST_CAPTION = 300  # characters


def sheet(images: Sequence[Image.Image], recipes: Sequence[Recipe]) -> Image.Image:
    """The pictures of a run, all of one size: with captions where their recipes ask for them."""
    columns = columns_of(recipes)
    rows = in_rows(images, columns)
    if not recipes[0].captions:
        return plain(rows)
    return grid(rows, captions=in_rows(captions(recipes), columns), size=None)


def captions(recipes: Sequence[Recipe]) -> list[str]:
    """What differs, for each of them: a prompt, or "seed 3", or both."""
    names = differing(recipes)
    if len({recipe.settings.prompt for recipe in recipes}) == len(recipes):
        names = [name for name in names if name != "seed"]  # the prompts tell all pictures apart
    lines = ["\n".join(map(printable, told(recipe, names))) for recipe in recipes]
    return [line[:LONGEST_CAPTION] for line in lines]


def plain(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures side by side, and nothing else."""
    width, height = rows[0][0].size
    size = (len(rows[0]) * (width + GAP) - GAP, len(rows) * (height + GAP) - GAP)
    whole = Image.new("RGB", size, "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            whole.paste(image, (x * (width + GAP), y * (height + GAP)))
    return whole


def columns_of(recipes: Sequence[Recipe]) -> int:
    """A row per prompt where each has several pictures; else as near to a square as it gets."""
    prompts = [recipe.settings.prompt for recipe in recipes]
    runs = [len(list(run)) for _, run in itertools.groupby(prompts)]
    if len(runs) > 1 and runs[0] > 1:
        return runs[0]
    return math.ceil(math.sqrt(len(recipes)))


def in_rows(things: Sequence[Thing], columns: int) -> list[Sequence[Thing]]:
    """So many in each row."""
    return [things[i : i + columns] for i in range(0, len(things), columns)]
