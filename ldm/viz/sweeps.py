"""One prompt drawn under every pair of values of two settings.

viz.sweep(pipe, "a red house", rows=("guidance_scale", [1, 4, 8]), columns=("steps", [5, 20]))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from ldm.config import ModelConfig
from ldm.inputs import Inputs, Keywords, asked
from ldm.settings import Settings
from ldm.viz.grids import grid

if TYPE_CHECKING:
    from ldm.pipeline import TextToImage

Axis = tuple[str, Sequence[Any]]
"""One direction of a sweep: a setting's name, and its values."""


def sweep(
    pipe: TextToImage,
    prompt: str,
    rows: Axis,
    columns: Axis,
    *,
    title: str = "",
    size: int | None = None,
    **settings: Any,
) -> Image.Image:
    """One prompt drawn under every pair of values of two settings.

        viz.sweep(pipe, "a red house", rows=("eta", [0.0, 1.0]), columns=("seed", range(5)))

    Args:
        rows, columns: the names of two keywords of `pipe(...)`, each with its values.
        size: as in `grid`; None shows the pictures as they are.
        settings: for all pictures.

    Raises:
        ValueError: before any picture is drawn, for a name or a value that `pipe` does not take.
    """
    return grid(
        sweep_images(pipe, prompt, rows, columns, **settings),
        row_captions=[f"{rows[0]} = {value}" for value in rows[1]],
        column_captions=[f"{columns[0]} = {value}" for value in columns[1]],
        title=title or prompt,
        size=size,
    )


def sweep_images(
    pipe: TextToImage, prompt: str, rows: Axis, columns: Axis, **settings: Any
) -> list[list[Image.Image]]:
    """The pictures of a `sweep` alone, those of the first row's value first."""
    cells = sweep_runs(pipe.config, prompt, rows, columns, **settings)
    return [[pipe.draw(*cell)[0] for cell in row] for row in cells]


def sweep_runs(
    config: ModelConfig, prompt: str, rows: Axis, columns: Axis, **settings: Any
) -> list[list[tuple[Settings, Inputs]]]:
    """The runs of a `sweep`, a row for each of the rows' values. Errors as there."""
    if not isinstance(prompt, str):
        raise ValueError(f"a sweep is of one prompt, a string, not {prompt!r}")
    known = Keywords.__annotations__.keys() - {"num_images"}
    given = [rows[0], columns[0], *settings]
    for name in given:
        if name not in known:
            raise ValueError(f"a sweep has no setting {name!r}: {', '.join(sorted(known))}")
        if given.count(name) > 1:
            raise ValueError(f"{name} is given twice")
    for name, options in (rows, columns):
        if isinstance(options, str) or not len(options):
            raise ValueError(f"{name} needs a list of values, not {options!r}")
    return [
        [
            asked(config, prompt, {rows[0]: row, columns[0]: column, **settings})
            for column in columns[1]
        ]
        for row in rows[1]
    ]
