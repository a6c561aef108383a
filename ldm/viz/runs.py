"""What a run is to the pictures of it: a `Trace`, or the list of its `Step`s, as in
`list(pipe.denoise("a red house", steps=20))`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.observe.traces import Trace
from ldm.samplers import Step
from ldm.viz.latents import Draw, false_colours, trace_rgb

Run = Trace | Sequence[Step]
"""Of a list of steps, the first picture of the batch is shown."""

LATENTS = ("x", "x0", "eps", "eps_cond", "eps_uncond")


def check_run(run: Run) -> None:
    """A ValueError in one line for what is no run, such as a generator that was not run yet."""
    is_list = isinstance(run, Sequence) and all(isinstance(step, Step) for step in run)
    if not isinstance(run, Trace) and not (is_list and run):
        kind = type(run).__name__
        raise ValueError(f"a run is a Trace or list(pipe.denoise(...)), not {kind}")


def values(run: Run, name: str) -> Tensor:
    """One of x, x0, eps, eps_cond, eps_uncond at every step, (S, C, h, w), on the CPU.

    Raises:
        ValueError: there is no such value, or the run was without guidance and has none.
    """
    check_run(run)
    if name not in LATENTS:
        raise ValueError(f"a step has no {name!r}: it has {', '.join(LATENTS)}")
    found = (
        [getattr(run, name)] if isinstance(run, Trace) else [getattr(step, name) for step in run]
    )
    if any(value is None for value in found):
        raise ValueError(f"there is no {name}: the run was without guidance")
    if isinstance(run, Trace):
        return found[0]
    return torch.cat([value[:1].detach().float().cpu() for value in found])


def timesteps(run: Run) -> list[float]:
    """The timestep t of every step."""
    check_run(run)
    return list(run.t) if isinstance(run, Trace) else [step.t for step in run]


def guidance(run: Run) -> Tensor:
    """How far the prompt turns the prediction at each place: the length over channels of
    eps_cond - eps_uncond, (S, h, w).

    Raises:
        ValueError: the run was without guidance.
    """
    return (values(run, "eps_cond") - values(run, "eps_uncond")).norm(dim=1)


def spaced(total: int, count: int) -> list[int]:
    """At most `count` of the indices 0 to total - 1: evenly spaced, the first and the last among
    them (one alone is the last).

    Raises:
        ValueError: count is below 1.
    """
    if count < 1:
        raise ValueError(f"count must be 1 or more, not {count}")
    if count == 1:
        return [total - 1]
    count = min(count, total)
    return [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]


def drawn_by(run: Run, draw: Draw | None) -> tuple[Draw, str]:
    """How to draw a run's latents, and what to tell the viewer about it, if anything."""
    if draw is not None:
        return draw, ""
    channels = values(run, "x").shape[1]
    rgb = trace_rgb(run) if isinstance(run, Trace) else false_colours(channels)
    if rgb != false_colours(channels):
        return rgb, "Colours by a linear map of the latents, not by the decoder."
    # One channel or three may well be pixels, and are then shown as they are.
    return rgb, "" if channels in (1, 3) else "False colours: the first channels of the latents."
