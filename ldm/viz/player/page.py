"""From films to one HTML file.

`player_html` is a pure function: text, numbers and pictures go into one page, with the template
`page.html`, the style `page.css` and the files of `script/`, joined. The page asks nothing of any
network, and a Content-Security-Policy, which allows this style and this script by their hashes,
keeps it so.
"""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from ldm.version import ldm_version
from ldm.viz.player.captions import (
    alignment_words,
    facts,
    headings,
    left_out,
    picture_words,
    python_call,
)
from ldm.viz.player.encoding import (
    FINENESSES,
    SMALL_PICTURE,
    Fineness,
    attention_maps,
    guidance_maps,
    picture_uri,
    script_safe,
    sha256,
)
from ldm.viz.player.film import Film
from ldm.viz.player.story import apart, numbers, sentence, timeline

SMALL_BYTES, LARGE_BYTES = 5_000_000, 25_000_000

SCRIPT = ("data", "maps", "pictures", "words", "charts", "numbers", "draw", "time", "start")
"""The files of `script/`, in the order in which they are joined to one script."""


def player_html(
    films: Sequence[Film], alpha_bar: Sequence[float], *, max_bytes: int | None = None
) -> str:
    """One self-contained page of one film, or of two of the same picture size, side by side.

    Args:
        films: one or two.
        alpha_bar: of the model's noise schedule, `pipe.schedule.alpha_bar.tolist()`.
        max_bytes: what the page may weigh: pictures and attention maps are kept as finely as fits,
            and at the very least as the last of `FINENESSES`. None is 5 MB for pictures of up to
            256 pixels, 25 MB for larger ones.

    Raises:
        ValueError: there are no films or too many, two that do not fit together, or latents that
            are not finite.
    """
    if not 1 <= len(films) <= 2:
        raise ValueError(f"a page shows one run or two, not {len(films)}")
    if len({(one.picture.size, one.run.x.shape[1:]) for one in films}) > 1:
        raise ValueError("two runs can be compared only at one picture size")
    if not all(one.run.x.isfinite().all() and one.run.x0.isfinite().all() for one in films):
        raise ValueError("the model's numbers are not finite: there is nothing to show")
    is_small = max(films[0].picture.size) <= SMALL_PICTURE
    if max_bytes is None:
        max_bytes = SMALL_BYTES if is_small else LARGE_BYTES
    # Large pictures without loss would be most of any page.
    for fineness in FINENESSES[0 if is_small else 1 : -1]:
        if picture_bytes(films, fineness, every=10) > max_bytes:
            continue  # the pictures of every tenth step foretell it
        page = page_of(films, alpha_bar, fineness)
        if len(page.encode()) <= max_bytes:
            return page
    return page_of(films, alpha_bar, FINENESSES[-1])


def picture_bytes(films: Sequence[Film], fineness: Fineness, every: int) -> int:
    """About what the pictures take, from those of every so manyth frame."""
    return every * sum(
        len(picture_uri(image, fineness))
        for one in films
        for images in (one.x, one.x0)
        for image in images[every // 2 :: every]
    )


def page_of(films: Sequence[Film], alpha_bar: Sequence[float], fineness: Fineness) -> str:
    """The page, as fine as asked."""
    positions = timeline(films)
    data = {
        "runs": [film_data(one, fineness) for one in films],
        "headings": headings(films) if len(films) > 1 else [""],
        "timeline": positions,
        "apart": apart(films[0], films[1], positions) if len(films) > 1 else None,
        "schedule": schedule_curve(alpha_bar),
        "t_max": len(alpha_bar) - 1,
    }
    assets = files("ldm.viz.player")
    style = (assets / "page.css").read_text(encoding="utf-8")
    script = "\n".join(
        (assets / "script" / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPT
    )
    parts = {
        "policy": f"default-src 'none'; img-src data:; style-src '{sha256(style)}'; "
        f"script-src '{sha256(script)}'; base-uri 'none'; form-action 'none'",
        "style": style,
        "script": script,
        "data": script_safe(data),
        "version": html.escape(ldm_version()),
        "prompt": html.escape(" / ".join(dict.fromkeys(one.run.prompt for one in films))),
        "facts": html.escape(" · ".join(facts(films))),
        "pictures": "".join(
            f'<img src="{picture_uri(one.picture, fineness)}" alt="{html.escape(alt)}">'
            for one, alt in zip(films, picture_words(films), strict=True)
        ),
        "alignment": html.escape(" ".join(filter(None, (alignment_words(films), left_out(films))))),
        "calls": "\n".join(
            html.escape(python_call(one.run.settings, one.run.inputs)) for one in films
        ),
    }
    template = (assets / "page.html").read_text(encoding="utf-8")
    # In one pass: what a prompt says is never taken for a place of the template.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)


def film_data(one: Film, fineness: Fineness) -> dict[str, Any]:
    """All that the script shows of a run."""
    run = one.run
    kinds = ["start", *["word"] * (len(run.words) - 2), "end"]
    return {
        "settings": run.settings.as_dict(),
        "words": [
            {"text": word.text, "kind": kind} for word, kind in zip(run.words, kinds, strict=True)
        ],
        "steps": len(run),
        "frames": [
            {
                "step": i,
                "t": round(run.t[i], 2),
                "t_prev": round(run.t_prev[i], 2),
                "alpha_bar": run.alpha_bar[i],
                "sentence": sentence(run, i),
                **dataclasses.asdict(numbers(run, i)),
            }
            for i in one.frames
        ],
        "x": [picture_uri(image, fineness) for image in one.x],
        "x0": [picture_uri(image, fineness) for image in one.x0],
        "guidance": guidance_maps(one),
        "attention": [
            attention_maps(one, resolution, fineness.map_side) for resolution in run.resolutions
        ],
        "latent_size": list(run.x.shape[2:]),
    }


def schedule_curve(alpha_bar: Sequence[float], points: int = 101) -> list[tuple[int, float]]:
    """The noise's share at evenly spaced timesteps, [(t, 1 - alpha_bar), ...], t rising."""
    last = len(alpha_bar) - 1
    places = dict.fromkeys(round(i * last / (points - 1)) for i in range(points))
    return [(t, 1.0 - alpha_bar[t]) for t in places]
