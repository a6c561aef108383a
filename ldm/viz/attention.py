"""Where the words of a prompt looked, laid over the picture.

    run = ldm.trace(pipe, "a red house on green grass at night")
    viz.attention(run)                                  # every word
    viz.attention_over_steps(run, ["house", "grass"])

Attention is a share: at each place the weights of all tokens sum to 1, and the start token often
takes most of it. The maps here are mean shares, over heads, layers and steps, in percent; what a
word gets may be a tenth of what another gets, so a picture depends on its scale. There are two, and
every picture says which it has: "per word" lets each map fill the colours, and shows where;
"absolute" gives all maps one scale, and shows how much. A map whose peak is less than `FLAT` times
its mean shows no place: filling the colours it would glow like a find, so "per word" leaves it dark
and says that it is nearly the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from ldm.observe.maps import Word
from ldm.observe.traces import Trace
from ldm.viz.colours import heat
from ldm.viz.grids import fitted, grid, keyed
from ldm.viz.latents import trace_rgb
from ldm.viz.runs import spaced

SCALES = ("per word", "absolute")
PER_ROW = 6
FLAT = 1.5
"""How many times its mean a map's peak is at least, where the map shows a place."""

EVERYWHERE = "nearly the same everywhere"

Words = Sequence[str | Word] | str | Word


def overlay(
    image: Image.Image, weights: Tensor, top: float | None = None, *, smooth: bool = True
) -> Image.Image:
    """A map of weights as heat over a picture, of which the greys stay visible below.

    Args:
        image: any size.
        weights: (rows, columns), stretched over the picture. What is below 0 is shown as 0: bicubic
            upscaling dips there.
        top: the weight that is drawn brightest; None is the largest of this map.
        smooth: bicubic stretching; False shows each place as the rectangle that it is.

    Raises:
        ValueError: weights of another shape, or top is not above 0.
    """
    if weights.ndim != 2:
        raise ValueError(f"a map is (rows, columns), not {list(weights.shape)}")
    if top is not None and not top > 0:
        raise ValueError(f"top must be above 0, not {top}")
    top = top or max(float(weights.max()), 1e-12)
    way = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    stretched = Image.fromarray(weights.detach().float().cpu().numpy()).resize(image.size, way)
    strength = np.clip(np.asarray(stretched) / top, 0.0, 1.0)  # (H, W)

    grey = np.asarray(image.convert("L"), np.float32)[..., None]  # (H, W, 1)
    # Fixed parts: over any grey, more weight is brighter.
    mixed = 0.35 * grey + 0.65 * heat(strength)
    return Image.fromarray(mixed.round().astype(np.uint8))


def attention(
    trace: Trace,
    words: Words | None = None,
    *,
    step: int | None = None,
    resolution: int | None = None,
    method: str = "daam",
    scale: str = "per word",
    picture: Image.Image | None = None,
    title: str = "",
    size: int | None = 160,
) -> Image.Image:
    """The maps of words, each under its word, after the picture itself.

    Args:
        words: texts, or of `trace.words` (where the prompt says one twice); None is all of them
            without the start and the end.
        step, resolution, method: as in `Trace.attention`.
        scale: "per word" or "absolute".
        picture: what to lay the maps over; None is the trace's own.
        size: as in `viz.grid`.

    Raises:
        ValueError: there is no such word, step, resolution, method or scale.
    """
    chosen = chosen_words(trace, words)
    maps = [[share(trace, word, step, resolution, method)] for word in chosen]
    tops = brightest(maps, scale)
    image = fitted(picture_of(trace, picture), size)
    cells = [image, *(overlay(image, m, top) for (m,), top in zip(maps, tops, strict=True))]
    captions = ["the picture", *captioned(chosen, tops, scale)]
    starts = range(0, len(cells), PER_ROW)
    sheet = grid(
        [cells[i : i + PER_ROW] for i in starts],
        captions=[captions[i : i + PER_ROW] for i in starts],
        title=title,
        size=None,
    )
    what = measure(trace, resolution, method, span(trace, step))
    return keyed(sheet, f"{legend(tops, scale)}\n{what}")


def attention_over_steps(
    trace: Trace,
    words: Words | None = None,
    *,
    count: int = 6,
    resolution: int | None = None,
    method: str = "daam",
    scale: str = "per word",
    picture: Image.Image | None = None,
    title: str = "",
    size: int | None = 128,
) -> Image.Image:
    """The maps of words, a row each, at `count` evenly spaced steps: a word's row has one scale,
    so that its steps can be compared. Other arguments and errors as in `attention`."""
    chosen, shown = chosen_words(trace, words), spaced(len(trace), count)
    maps = [[share(trace, word, i, resolution, method) for i in shown] for word in chosen]
    tops = brightest(maps, scale)
    image = fitted(picture_of(trace, picture), size)
    sheet = grid(
        [[overlay(image, m, top) for m in row] for row, top in zip(maps, tops, strict=True)],
        row_captions=captioned(chosen, tops, scale),
        column_captions=[f"step {i + 1}\nt = {trace.t[i]:.5g}" for i in shown],
        title=title,
        size=None,
    )
    what = measure(trace, resolution, method, "each step alone")
    return keyed(sheet, f"{legend(tops, scale)}\n{what}")


def attention_by_resolution(
    trace: Trace,
    words: Words | None = None,
    *,
    step: int | None = None,
    scale: str = "per word",
    picture: Image.Image | None = None,
    title: str = "",
    size: int | None = 160,
) -> Image.Image:
    """The maps of words, a row each, as the layers of each resolution have them: every place is
    the rectangle of the picture that it stands for. Other arguments and errors as in `attention`.
    """
    chosen = chosen_words(trace, words)
    sizes = trace.resolutions
    method = "prompt-to-prompt"
    maps = [[share(trace, word, step, rows, method) for rows, _ in sizes] for word in chosen]
    tops = brightest(maps, scale)
    image = fitted(picture_of(trace, picture), size)
    sheet = grid(
        [
            [overlay(image, m, top, smooth=False) for m in row]
            for row, top in zip(maps, tops, strict=True)
        ],
        row_captions=captioned(chosen, tops, scale),
        column_captions=[
            f"{rows} x {columns}\n{_layers(len(trace.layers(rows)))}" for rows, columns in sizes
        ],
        title=title,
        size=None,
    )
    what = f"mean share over heads, the layers of that size and {span(trace, step)}"
    return keyed(sheet, f"{legend(tops, scale)}\n{what}")


# ------------------------------------------------------------------------------- words and scales


def chosen_words(trace: Trace, words: Words | None) -> list[Word]:
    """The words that were asked for; None is those of the prompt, without start and end."""
    if words is None:
        return list(trace.words[1:-1])
    listed = [words] if isinstance(words, str | Word) else list(words)
    if not listed:
        raise ValueError("name one word or more")
    return [trace.word(word) if isinstance(word, str) else word for word in listed]


def brightest(maps: Sequence[Sequence[Tensor]], scale: str) -> list[float]:
    """The weight that each word's maps draw brightest: their own largest, or that of all; infinite
    where maps of their own scale are flat, so that nothing of them is bright."""
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}: there are {', '.join(SCALES)}")
    tops = [max(max(float(m.max()) for m in row), 1e-12) for row in maps]
    if scale == "absolute":
        return [max(tops)] * len(tops)
    return [math.inf if is_flat(row) else top for row, top in zip(maps, tops, strict=True)]


def is_flat(maps: Sequence[Tensor]) -> bool:
    """Whether maps are nearly the same everywhere, on one scale: their peak below FLAT means."""
    peak = max(float(m.max()) for m in maps)
    return peak < FLAT * sum(float(m.mean()) for m in maps) / len(maps)


def picture_of(trace: Trace, picture: Image.Image | None) -> Image.Image:
    """What to lay maps over: the picture given, or the trace's own, or, where it has none, its
    final latents by a linear map, enlarged."""
    if picture is not None:
        return picture.convert("RGB")
    if trace.picture is not None:
        return Image.fromarray(trace.picture.numpy())
    (small,) = trace_rgb(trace)(trace.latents)
    return small.resize((8 * small.width, 8 * small.height), Image.Resampling.NEAREST)


def share(
    trace: Trace, word: Word, step: int | None, resolution: int | None, method: str
) -> Tensor:
    """The mean share of attention that a word gets at each place, (rows, columns). DAAM's maps are
    sums: they are divided by the number of maps summed."""
    weights = trace.attention(word, step, resolution, method)
    if method != "daam":
        return weights
    steps = len(trace) if step is None else 1
    return weights / (steps * len(trace.layers(resolution)) * trace.heads)


def captioned(words: Sequence[Word], tops: Sequence[float], scale: str) -> list[str]:
    """Each word, and its scale where it has its own."""
    if scale == "absolute":
        return [word.text for word in words]
    ranges = [f"0 to {percent(top)}" if top < math.inf else EVERYWHERE for top in tops]
    return [f"{word.text}\n{said}" for word, said in zip(words, ranges, strict=True)]


def percent(number: float) -> str:
    """0.0217 is "2.2%"."""
    return f"{100 * number:.2g}%" if number < 0.995 else f"{100 * number:.0f}%"


def legend(tops: Sequence[float], scale: str) -> str:
    """What the brightest colour means."""
    if scale == "per word":
        return "scale per word: up to the largest share that this word gets anywhere"
    return f"absolute scale, one for all words: up to {percent(tops[0])} of the attention"


def measure(trace: Trace, resolution: int | None, method: str, steps: str) -> str:
    """What was averaged, in words."""
    if method == "prompt-to-prompt" and resolution is None:
        resolution = trace.resolutions[-2:][0][0]
    layers = "all layers" if resolution is None else f"the layers of {resolution} rows"
    named = {"daam": "DAAM", "prompt-to-prompt": "prompt-to-prompt"}[method]
    return f"mean share over heads, {layers} and {steps} ({named})"


def _layers(count: int) -> str:
    return f"{count} layer" + ("s" if count > 1 else "")


def span(trace: Trace, step: int | None) -> str:
    """Which steps a map is of."""
    return "all steps" if step is None else f"step {step + 1} (t = {trace.t[step]:.5g}) alone"
