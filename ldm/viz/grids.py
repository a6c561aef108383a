"""Pictures side by side: strips, grids, the steps of a run, animations, sweeps over settings.

    viz.steps(run)                                        # x_t and x0 of eight steps
    viz.animation(viz.frames(run, pipe.decode)).save("run.webp")
    viz.sweep(pipe, "a red house", rows=("guidance_scale", [1, 4, 8]), columns=("steps", [5, 20]))

All are PIL images on white, with their captions in them. A picture smaller than its cell is
enlarged by a whole factor, so that one latent stays one square.
"""

from __future__ import annotations

import base64
import functools
import importlib.util
import inspect
import io
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm.files import check_writable, written_whole
from ldm.pipeline import check_prompts, check_settings
from ldm.viz.colours import heat
from ldm.viz.latents import Draw
from ldm.viz.runs import Run, drawn_by, guidance, spaced, timesteps, values

if TYPE_CHECKING:
    from ldm.pipeline import TextToImage

Axis = tuple[str, Sequence[Any]]
"""One direction of a sweep: a setting's name, and its values."""

INK, QUIET, PAPER = "#1a1a1a", "#555555", "#ffffff"
TITLE, TEXT = 16, 13
GAP, MARGIN = 6, 10
ROW_CAPTION = 130  # no row's caption is wider, in pixels
MIN_CELL = 56  # no column is narrower, so that a caption finds room under a tiny picture

NAMES = {
    "x": "noisy latents x",
    "x0": "clean estimate x0",
    "eps": "predicted noise eps",
    "eps_cond": "noise with the prompt",
    "eps_uncond": "noise without it",
    "guidance": "what the prompt changes",
}


# ------------------------------------------------------------------------------------ lettering


@functools.cache
def font(size: int, plain: bool = True) -> ImageFont.FreeTypeFont:
    """The font that Pillow carries; it knows little more than ASCII, so for other letters
    matplotlib's, where that is installed."""
    if not plain:
        spec = importlib.util.find_spec("matplotlib")
        folder = Path(str(spec.origin)).parent / "mpl-data" / "fonts" / "ttf" if spec else Path()
        if (path := folder / "DejaVuSans.ttf").is_file():
            return ImageFont.truetype(str(path), size - 1)
        return font(size)
    built_in = ImageFont.load_default(size=size)
    if not isinstance(built_in, ImageFont.FreeTypeFont):
        raise ValueError("captions need a Pillow with FreeType, as its wheels have")
    return built_in


@dataclass(frozen=True)
class Text:
    """Lines of text that fit a width."""

    lines: tuple[str, ...]
    font: ImageFont.FreeTypeFont
    colour: str

    @classmethod
    def wrapped(cls, text: str, width: int, size: int = TEXT, colour: str = INK) -> Text:
        """Break at spaces, and within a word only where it alone is too wide."""
        face = font(size, text.isascii())
        if not text.isascii() and face is font(size):
            letters = unicodedata.normalize("NFKD", text)
            text = "".join(letter for letter in letters if not unicodedata.combining(letter))
            text = text.encode("ascii", "replace").decode()
        lines = []
        for paragraph in text.split("\n"):
            line = ""
            for word in paragraph.split(" "):
                longer = f"{line} {word}" if line else word
                if face.getlength(longer) <= width:
                    line = longer
                    continue
                lines += [line] if line else []
                while face.getlength(word) > width and len(word) > 1:
                    fits = max(
                        (n for n in range(1, len(word)) if face.getlength(word[:n]) <= width),
                        default=1,
                    )
                    lines.append(word[:fits])
                    word = word[fits:]
                line = word
            lines.append(line)
        return cls(tuple(lines) if text else (), face, colour)

    @property
    def width(self) -> int:
        return max((int(self.font.getlength(line)) + 1 for line in self.lines), default=0)

    @property
    def height(self) -> int:
        return len(self.lines) * sum(self.font.getmetrics())

    def draw(self, on: ImageDraw.ImageDraw, x: float, y: float, anchor: str = "m") -> None:
        """Each line starts at ("l"), ends at ("r") or has its middle at ("m") x; y is the top."""
        for line in self.lines:
            on.text((x, y), line, font=self.font, fill=self.colour, anchor=f"{anchor}a")
            y += sum(self.font.getmetrics())


# ---------------------------------------------------------------------------------------- grids


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


# ------------------------------------------------------------------------------------ the steps


def steps(
    run: Run,
    draw: Draw | None = None,
    *,
    show: Sequence[str] = ("x", "x0"),
    count: int = 8,
    title: str = "",
    size: int | None = 128,
) -> Image.Image:
    """A run as a strip: what its latents looked like at `count` of its steps.

    Args:
        run: a `Trace`, or a list of `Step`s.
        draw: e.g. `pipe.decode`. None shows a trace by the linear map fitted to its own picture,
            and steps, which know no model, in false colours.
        show: one row each: x, x0, eps, eps_cond, eps_uncond, or "guidance": at each place the
            length of eps_cond - eps_uncond, as heat, each step on its own scale.
        count: how many steps, evenly spaced; the first and the last are among them.

    Raises:
        ValueError: before anything is drawn, for what the run does not have.
    """
    if isinstance(show, str):
        show = (show,)
    latents = {name: guidance(run) if name == "guidance" else values(run, name) for name in show}
    t = timesteps(run)
    shown = spaced(len(t), count)
    draw, note = drawn_by(run, draw)
    rows, captions = [], []
    for name, value in latents.items():
        tops = [float(value[i].max()) for i in shown]
        if name == "guidance":
            pairs = zip(value[shown], tops, strict=True)
            rows.append([Image.fromarray(heat(one / (top or 1.0))) for one, top in pairs])
            captions.append([f"0 to {top:.2g}" for top in tops])
        else:
            rows.append(draw(value[shown]))
            captions.append([""] * len(shown))
    sheet = grid(
        rows,
        captions=captions,
        row_captions=[NAMES[name] for name in latents],
        column_captions=[f"step {i + 1}\nt = {t[i]}" for i in shown],
        title=title,
        note=note,
        size=size,
    )
    if "guidance" not in latents:
        return sheet
    return keyed(sheet, "the step's own largest length of eps_cond - eps_uncond")


def side_by_side(
    runs: Mapping[str, Run],
    draw: Draw | None = None,
    *,
    show: str = "x0",
    count: int = 8,
    title: str = "",
    size: int | None = 128,
) -> Image.Image:
    """Several runs, one row each, so that their timesteps can be compared: {name: run}.

    Each row shows `count` steps evenly spaced over its own run, with their timesteps; the other
    arguments are those of `steps`.
    """
    if not runs:
        raise ValueError("there are no runs to compare")
    latents = {name: values(run, show) for name, run in runs.items()}
    shown = {name: spaced(len(value), count) for name, value in latents.items()}
    drawings = {name: drawn_by(run, draw) for name, run in runs.items()}
    notes = dict.fromkeys(note for _, note in drawings.values() if note)
    return grid(
        [drawings[name][0](value[shown[name]]) for name, value in latents.items()],
        captions=[[f"t = {timesteps(run)[i]}" for i in shown[name]] for name, run in runs.items()],
        row_captions=list(runs),
        title=title,
        note=" ".join(notes),
        size=size,
    )


def frames(
    run: Run, draw: Draw | None = None, *, show: str = "x0", size: int | None = 256
) -> list[Image.Image]:
    """One captioned picture for every step of a run, all of one size, for an `animation`."""
    t, latents = timesteps(run), values(run, show)
    draw, _ = drawn_by(run, draw)
    pictures = draw(latents)
    return [
        strip([picture], [f"step {i + 1} of {len(t)}, t = {t[i]}"], size=size)
        for i, picture in enumerate(pictures)
    ]


# ------------------------------------------------------------------------------------ animation


@dataclass(frozen=True)
class Animation:
    """Pictures that play one after the other, again and again; Jupyter shows them moving.

    Attributes:
        frames: of one size.
        durations: of each, in milliseconds.
    """

    frames: tuple[Image.Image, ...]
    durations: tuple[int, ...]

    def save(self, path: str | Path) -> None:
        """Write a .gif or a .webp file, whole or not at all. GIF has 256 colours a frame, and joins
        frames that are equal.

        Raises:
            ValueError: another suffix, or it cannot be written there.
        """
        path = Path(path)
        if path.suffix.lower() not in (".gif", ".webp"):
            raise ValueError(f"an animation is a .gif or a .webp file, not {path.name!r}")
        check_writable(path)
        data = self.encoded(path.suffix.lower().removeprefix("."))
        with written_whole(path) as temporary:
            temporary.write_bytes(data)

    def encoded(self, kind: str) -> bytes:
        """The bytes of a "gif" or "webp" file."""
        file = io.BytesIO()
        first, *rest = self.frames
        options: dict[str, Any] = {"quality": 90, "method": 4} if kind == "webp" else {}
        first.save(
            file,
            format=kind,
            save_all=True,
            append_images=rest,
            duration=list(self.durations),
            loop=0,
            **options,
        )
        return file.getvalue()

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.encoded("webp")).decode()
        alt = f"animation of {len(self.frames)} pictures"
        return f'<img alt="{alt}" src="data:image/webp;base64,{data}">'


def animation(images: Sequence[Image.Image], ms: int = 80, *, hold_ms: int = 1000) -> Animation:
    """Pictures of one size, `ms` milliseconds each, the last for `hold_ms`.

    Raises:
        ValueError: no pictures, of several sizes, or a time below 20 ms, which players slow down.
    """
    if not images:
        raise ValueError("an animation needs pictures")
    if len({image.size for image in images}) != 1:
        raise ValueError("the pictures of an animation must be of one size")
    if min(ms, hold_ms) < 20:
        raise ValueError(f"a picture must stay for 20 ms or more, not {min(ms, hold_ms)}")
    durations = [ms] * (len(images) - 1) + [hold_ms]
    return Animation(tuple(image.convert("RGB") for image in images), tuple(durations))


# ---------------------------------------------------------------------------------------- sweeps


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
        rows, columns: the names of two settings of `pipe.denoise`, each with its values.
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
    if not isinstance(prompt, str):
        raise ValueError(f"a sweep is of one prompt, a string, not {prompt!r}")
    check_prompts(prompt, 1)
    known = set(inspect.signature(pipe.denoise).parameters) - {"prompt", "num_images"}
    given = [rows[0], columns[0], *settings]
    for name in given:
        if name not in known:
            raise ValueError(f"a sweep has no setting {name!r}: {', '.join(sorted(known))}")
        if given.count(name) > 1:
            raise ValueError(f"{name} is given twice")
    for name, options in (rows, columns):
        if isinstance(options, str) or not len(options):
            raise ValueError(f"{name} needs a list of values, not {options!r}")
    cells = [
        [{rows[0]: row, columns[0]: column, **settings} for column in columns[1]] for row in rows[1]
    ]
    for row in cells:
        for cell in row:
            bound = inspect.signature(pipe.denoise).bind(prompt, **cell)
            bound.apply_defaults()
            del bound.arguments["prompt"]
            check_settings(pipe.config, **bound.arguments)
    return [[pipe(prompt, **cell)[0] for cell in row] for row in cells]
