"""What a notebook shows of a `Trace`: its facts, the picture as it forms, and where words looked.

One piece of HTML with its pictures inside, below 200 kB, since a notebook keeps what it shows. It
takes the colours of the page around it, light or dark.
"""

from __future__ import annotations

import base64
import io
from html import escape

from PIL import Image

from ldm.observe.traces import Trace
from ldm.viz.attention import brightest, captioned, overlay, picture_of, share
from ldm.viz.grids import fitted
from ldm.viz.runs import drawn_by, spaced, values
from ldm.viz.strips import NAMES

MAX_WORDS = 24
STEPS = 8
THUMBNAIL = 72
TINY = 32
"""Pictures up to so many pixels are latents: they are kept exactly, and enlarged as squares."""


def trace_html(trace: Trace) -> str:
    """The HTML of a trace. The prompt and all other text are escaped."""
    settings = trace.settings
    facts = {
        "model": trace.model,
        "size": f"{settings.width} x {settings.height}",
        "sampler": settings.sampler,
        "steps": len(trace),
        "guidance scale": settings.guidance_scale,
        "eta": settings.eta,
        "seed": settings.seed,
        "negative prompt": settings.negative_prompt,
        "like": settings.like or "",
        "memory": f"{trace.nbytes / 1e6:.3g} MB",
    }
    stated = [f"{name} <b>{escape(str(value))}</b>" for name, value in facts.items() if value != ""]
    return (
        '<div style="max-width:60em">'
        f'<p style="margin:0 0 .3em"><b>{escape(trace.prompt)}</b></p>'
        f'<p style="margin:0 0 .6em;opacity:.8">{" &middot; ".join(stated)}</p>'
        f"{_steps(trace)}{_words(trace)}</div>"
    )


def _steps(trace: Trace) -> str:
    """A row of small pictures each for x and x0, and the picture that came out."""
    draw, note = drawn_by(trace, None)
    shown = spaced(len(trace), STEPS)
    rows = []
    for name in ("x", "x0"):
        images = draw(values(trace, name)[shown])
        cells = [
            _figure(image, f"{NAMES[name]} at step {i + 1}", f"t = {trace.t[i]:.5g}")
            for i, image in zip(shown, images, strict=True)
        ]
        rows.append(_row(NAMES[name], cells))
    if trace.picture is not None:
        image = fitted(picture_of(trace, None), 160)
        rows.insert(0, _row("", [_figure(image, "the picture", size=160)]))
    small = f'<p style="margin:0;opacity:.8;font-size:85%">{note}</p>' if note else ""
    return "".join(rows) + small


def _words(trace: Trace) -> str:
    """Each word's attention over the whole run, on its own scale."""
    image = fitted(picture_of(trace, None), THUMBNAIL)
    words = trace.words[1:-1]
    if not words:
        return ""
    cells = []
    for word in words[:MAX_WORDS]:
        weights = share(trace, word, None, None, "daam")
        tops = brightest([[weights]], "per word")
        (caption,) = captioned([word], tops, "per word")
        alt = f"which places looked at {word.text!r}"
        cells.append(_figure(overlay(image, weights, *tops), alt, *caption.splitlines()))
    more = f" (the first {MAX_WORDS} of {len(words)} words)" if len(words) > MAX_WORDS else ""
    return _row(
        f"which places looked at a word, up to its largest share of it (scale per word){more}",
        cells,
    )


def _row(caption: str, figures: list[str]) -> str:
    said = f'<p style="margin:.5em 0 .1em;opacity:.8">{escape(caption)}</p>' if caption else ""
    return f'{said}<div style="display:flex;flex-wrap:wrap;gap:6px">{"".join(figures)}</div>'


def _figure(image: Image.Image, alt: str, *captions: str, size: int = THUMBNAIL) -> str:
    return (
        f'<div style="text-align:center;font-size:80%;max-width:{size}px;overflow-wrap:anywhere">'
        f'<img alt="{escape(alt)}" src="{_data(image)}" '
        f'style="display:block;width:{size}px;margin:0;image-rendering:{_rendering(image)}">'
        f"{'<br>'.join(escape(caption) for caption in captions)}</div>"
    )


def _rendering(image: Image.Image) -> str:
    return "pixelated" if max(image.size) <= TINY else "auto"


def _data(image: Image.Image) -> str:
    """A picture as a data URI: exact where it is tiny, else as WebP, which takes a few kB."""
    file = io.BytesIO()
    if max(image.size) <= TINY:
        image.save(file, "PNG")
        kind = "png"
    else:
        image.save(file, "WEBP", quality=80)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
