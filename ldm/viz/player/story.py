"""What happens at a step, in numbers and in sentences that are true of them; and which steps of two
runs stand side by side.

It is decided here, where it can be tested; the page's script only shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ldm.observe.traces import Trace
from ldm.viz.player.film import Film


@dataclass(frozen=True)
class Numbers:
    """What can be said of one step in numbers; norms are over all numbers of the latents.

    Attributes:
        noise: the share of the variance of x that is noise, 1 - alpha_bar.
        moved: ||x0 - x0 of the step before|| / ||x0 of the step before||; None at the first step.
        prompt_change: ||eps_cond - eps_uncond|| / ||eps_uncond||; None without guidance.
        x, eps, x0, difference: the norms, the last of eps_cond - eps_uncond.
    """

    noise: float
    moved: float | None
    prompt_change: float | None
    x: float
    eps: float
    x0: float
    difference: float | None


def numbers(run: Trace, step: int) -> Numbers:
    """The numbers of one step, 0 to S - 1."""
    moved, prompt_change, difference = None, None, None
    if step > 0:
        before = run.x0[step - 1]
        moved = float((run.x0[step] - before).norm() / before.norm())
    if run.eps_cond is not None and run.eps_uncond is not None:
        difference = float((run.eps_cond[step] - run.eps_uncond[step]).norm())
        prompt_change = difference / float(run.eps_uncond[step].norm())
    return Numbers(
        noise=1.0 - run.alpha_bar[step],
        moved=moved,
        prompt_change=prompt_change,
        x=float(run.x[step].norm()),
        eps=float(run.eps[step].norm()),
        x0=float(run.x0[step].norm()),
        difference=difference,
    )


def sentence(run: Trace, step: int) -> str:
    """What happens at a step, in plain words and true of its numbers."""
    told = numbers(run, step)
    sentences = [
        f"Step {step + 1} of {len(run)}: {noise_words(told.noise)}.",
        beginning_words(run, step),
        moved_words(told.moved),
        guidance_words(run, step, told.prompt_change),
        ending_words(run, step),
    ]
    return " ".join(filter(None, sentences))


def noise_words(noise: float) -> str:
    """How much of x is noise."""
    shares = f"{percent(noise)} noise, {percent(1 - noise)} picture"
    if noise > 0.9:
        return f"nearly nothing but noise ({shares})"
    if noise > 0.5:
        return f"more noise than picture ({shares})"
    if noise > 0.1:
        return f"more picture than noise ({shares})"
    return f"nearly clean ({shares})"


def beginning_words(run: Trace, step: int) -> str:
    """What the first step begins with, where that is not noise alone."""
    if step > 0 or run.settings.strength is None:
        return ""
    return "The run starts here: from a picture, noised."


def moved_words(moved: float | None) -> str:
    """How far the clean estimate moved since the step before."""
    if moved is None:
        return "The model makes its first guess of the finished picture."
    changed = f"The guess of the finished picture changed by {percent(moved)}"
    if moved > 0.5:
        return f"{changed}: it is being redrawn."
    if moved > 0.15:
        return f"{changed}: it is taking shape."
    if moved > 0.03:
        return f"{changed}: it is being refined."
    return f"{changed}: hardly at all."


def guidance_words(run: Trace, step: int, prompt_change: float | None) -> str:
    """How strong the guidance is."""
    interval = run.settings.guidance_interval
    if prompt_change is None and interval is not None and run.settings.guidance_scale != 1.0:
        low, high = interval
        if low <= run.t[step] <= high:
            return "There is guidance."
        return f"There is no guidance here, but from t = {low:g} to {high:g} alone."
    if prompt_change is None:
        return "There is no guidance: the model is asked with the prompt alone."
    scale = run.settings.guidance_scale
    instead = "Put in the negative prompt's place, the" if run.settings.negative_prompt else "The"
    return (
        f"{instead} prompt changes the predicted noise by {percent(prompt_change)}; guidance makes "
        f"that {scale:g} times as much: {percent(abs(scale) * prompt_change)}."
    )


def ending_words(run: Trace, step: int) -> str:
    """What is special about the way to the next step, if anything is."""
    is_last = step == len(run) - 1
    if is_last:
        return "This is the last step: it leaves the picture."
    return "Fresh noise is added on the way to the next step." if run.settings.adds_noise else ""


def percent(share: float) -> str:
    """0.0713 -> "7.1%", 0.995 -> "99.5%": three digits near the ends, two between."""
    digits = 3 if share > 0.99 else 2
    return f"{float(f'{100 * share:.{digits}g}'):g}%"


# --- Two runs side by side -----------------------------------------------------------------------


def timeline(films: Sequence[Film]) -> list[tuple[int, ...]]:
    """For every position of the slider, the frame of each film. The film with the most frames
    leads; the other is shown at the frame whose timestep is nearest."""
    times = [[one.run.t[i] for i in one.frames] for one in films]
    leader = max(times, key=len)
    return [tuple(nearest(t, row) for row in times) for t in leader]


def nearest(t: float, times: Sequence[float]) -> int:
    """The place of the timestep that is nearest to t, the noisier one of two."""
    return min(range(len(times)), key=lambda i: abs(times[i] - t))


def apart(first: Film, second: Film, positions: Sequence[tuple[int, ...]]) -> list[float]:
    """At every position, ||x0 of the second - x0 of the first|| / ||x0 of the first||."""
    pairs = [(first.run.x0[first.frames[i]], second.run.x0[second.frames[j]]) for i, j in positions]
    return [float((b - a).norm() / a.norm()) for a, b in pairs]
