"""What the page says of whole runs: what they were asked for, what two have different, how they are
aligned, and the call that draws one again."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from ldm.settings import Settings
from ldm.viz.player.film import Film

COMPARABLE = (
    *("prompt", "steps", "guidance_scale", "negative_prompt"),
    *("guidance_rescale", "guidance_interval", "weighting", "clip_skip"),
    *("sampler", "spacing", "eta", "seed", "like", "strength"),
)
"""What a second run may have different from the first: sizes must be the same."""

SPELLED = {
    "euler": "Euler",
    "euler_ancestral": "Euler ancestral",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
}
"""Samplers whose names are not written in capitals."""


def facts(films: Sequence[Film]) -> list[str]:
    """The settings of a run, or those that two share, for the line below the prompt."""
    s = films[0].run.settings
    names = ["steps", "sampler", "guidance_scale", "seed"]
    others = (
        *("spacing", "eta", "negative_prompt", "like", "strength", "variation_strength"),
        *("guidance_rescale", "guidance_interval", "weighting", "clip_skip"),
    )
    names += [name for name in others if getattr(s, name)]
    shared = [name for name in names if len({getattr(o.run.settings, name) for o in films}) == 1]
    said = [setting_words(name, getattr(s, name)) for name in shared]
    return [films[0].run.model, *said, f"{s.width}x{s.height} pixels"]


def picture_words(films: Sequence[Film]) -> list[str]:
    """What the finished pictures are, in words."""
    if len(films) == 1:
        return ["The picture that this run ended in"]
    return [f"The picture that run {letter} ended in" for letter in "AB"]


def left_out(films: Sequence[Film]) -> str:
    """Which steps are not shown, if any are not."""
    words = [
        f"Of {len(one.run)} steps {len(one.frames)} are shown, evenly spaced."
        for one in films
        if len(one.frames) < len(one.run)
    ]
    return " ".join(dict.fromkeys(words))


def headings(films: Sequence[Film]) -> list[str]:
    """What each run is called: of two, what it has different."""
    asked = [one.run.settings for one in films]
    names = [name for name in COMPARABLE if len({getattr(one, name) for one in asked}) > 1]
    return [", ".join(setting_words(name, getattr(one, name)) for name in names) for one in asked]


def setting_words(name: str, value: Any) -> str:
    """A setting in words: ("guidance_scale", 7.5) -> "guidance scale 7.5"."""
    if name == "prompt":
        return f"“{value}”"
    if name == "sampler":
        return SPELLED.get(value, str(value).upper())
    if name == "spacing":
        return f"{value} spacing" if value else "the sampler's own spacing"
    if name == "steps":
        return f"{value} steps" if value != 1 else "1 step"
    if name == "negative_prompt":
        return f"negative prompt “{value}”" if value else "no negative prompt"
    if name == "like":
        return f"as {value} draws" if value else "as ldm draws"
    if name == "guidance_interval":
        return f"guidance from t = {value[0]:g} to {value[1]:g}" if value else "guidance everywhere"
    if name == "weighting":
        return "words weighed by brackets" if value else "brackets as text"
    if name == "strength":
        return f"from a picture at strength {value:g}"
    return f"{name.replace('_', ' ')} {value:g}" if name != "seed" else f"seed {value}"


def alignment_words(films: Sequence[Film]) -> str:
    """How two runs are aligned, where that is not step by step."""
    if len(films) == 1 or films[0].run.t == films[1].run.t:
        return ""
    counts = [len(one.run) for one in films]
    leader = "AB"[max((0, 1), key=lambda i: len(films[i].frames))]
    return (
        f"The runs take {counts[0]} and {counts[1]} steps. The slider follows run {leader}; the "
        "other is shown at its step nearest in noise."
    )


def python_call(settings: Settings, inputs: Collection[str] = ()) -> str:
    """The call that draws the picture of these settings again; what it has to be given besides
    them, by its name alone."""
    fields = {one.name: one.default for one in dataclasses.fields(settings)}
    del fields["prompts"]
    values = {name: getattr(settings, name) for name in fields}
    said = [f"{name}={value!r}" for name, value in values.items() if value != fields[name]]
    given = [f"{name}=..." for name in inputs]
    return f"pipe({', '.join([repr(settings.prompt), *said, *given])})"
