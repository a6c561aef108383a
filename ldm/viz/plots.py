"""Curves and maps by matplotlib: the noise schedule, timesteps, guidance, latents, measurements.

    viz.alpha_bar(pipe.schedule, pipe.schedule.ddim_timesteps(20))
    viz.guidance_norms(run)

Each function draws into the axes it is given, or into new ones, and returns them. New axes belong
to a figure of their own, not to pyplot: nothing is left open or shown twice, no display is needed,
and Jupyter shows them where they are a cell's last value.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from ldm.samplers import Grid
from ldm.schedule import NoiseLevel, NoiseSchedule
from ldm.viz.colours import LINES, heat
from ldm.viz.latents import histogram, principal_components
from ldm.viz.runs import Run, guidance, timesteps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Timesteps = Sequence[float] | Grid
"""Timesteps t, or the pairs (t, t_prev) that a sampler walks, of which t counts."""

CURVE, MARK = LINES[0], LINES[1]
MARKS = "os^Dvp"  # beside the colours, for who cannot tell these apart


@functools.cache
def shown_axes() -> type[Axes]:
    """matplotlib's axes, which show themselves in Jupyter though no pyplot knows their figure.

    Raises:
        ImportError: in one line, without matplotlib.
    """
    try:
        from matplotlib.axes import Axes
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'ldm-from-scratch[viz]'") from error

    class ShownAxes(Axes):
        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            cast("Figure", self.figure).savefig(file, format="png", dpi=110, bbox_inches="tight")
            return file.getvalue()

    return ShownAxes


def new_axes(width: float = 6.0, height: float = 3.4) -> Axes:
    """Axes alone in a figure of so many inches."""
    kind = shown_axes()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure.add_subplot(axes_class=kind)


# ---------------------------------------------------------------------------------- the schedule


def betas(
    schedule: NoiseSchedule, timesteps: Timesteps | None = None, ax: Axes | None = None
) -> Axes:
    """beta_t, the variance of the noise that training adds at each timestep (DDPM eq. 2)."""
    ax = _curve(schedule.betas, "beta", timesteps, ax)
    ax.set_title("Noise added at each timestep")
    ax.set_ylim(bottom=0)
    return ax


def alpha_bar(
    schedule: NoiseSchedule, timesteps: Timesteps | None = None, ax: Axes | None = None
) -> Axes:
    """alpha_bar_t, the share of the picture's variance that is left at each timestep (DDPM eq. 4),
    with those that are given, or that a sampler visits, marked."""
    ax = _curve(schedule.alpha_bar, "alpha_bar", timesteps, ax)
    ax.set_title("What is left of the picture")
    ax.set_ylim(-0.03, 1.03)
    return ax


def snr(
    schedule: NoiseSchedule, timesteps: Timesteps | None = None, ax: Axes | None = None
) -> Axes:
    """The signal-to-noise ratio alpha_bar_t / (1 - alpha_bar_t), on a logarithmic axis (Kingma et
    al. 2021, arXiv:2107.00630, eq. 2)."""
    ax = _curve(schedule.alpha_bar / (1 - schedule.alpha_bar), "signal / noise", timesteps, ax)
    ax.set_yscale("log")
    ax.axhline(1.0, color="#888888", linewidth=0.8, linestyle="--", zorder=0)
    ax.annotate(
        "as much noise as signal",
        (1.0, 1.0),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        fontsize="small",
        color="#555555",
    )
    ax.set_title("Signal to noise")
    return ax


def timestep_rows(grids: Mapping[str, Timesteps], ax: Axes | None = None) -> Axes:
    """The timesteps of several samplers, a row of dots each, noisiest left: {name: timesteps}."""
    if not grids:
        raise ValueError("there are no timesteps to show")
    ax = new_axes(7.0, 0.9 + 0.42 * len(grids)) if ax is None else ax
    for row, steps in enumerate(grids.values()):
        t = visited(steps)
        ax.axhline(row, color="#dddddd", linewidth=1.0, zorder=0)
        ax.plot(t, [row] * len(t), "o", color=LINES[row % len(LINES)], markersize=4.5)
    ax.set_yticks(range(len(grids)), list(grids))
    ax.set_ylim(len(grids) - 0.5, -0.5)
    if not ax.xaxis_inverted():
        ax.invert_xaxis()
    ax.set_xlabel("timestep t  (noise left, picture right)")
    return ax


# ------------------------------------------------------------------------------------- guidance


def guidance_map(run: Run, step: int = -1, ax: Axes | None = None) -> Axes:
    """How far the prompt turns the predicted noise at each place: the length of
    eps_cond - eps_uncond over the channels, at one step (-1 is the last).

    Raises:
        ValueError: the run was without guidance, or has no such step.
    """
    lengths, t = guidance(run), timesteps(run)
    if not -len(t) <= step < len(t):
        raise ValueError(f"step must be between {-len(t)} and {len(t) - 1}, not {step}")
    ax = new_axes(4.2, 3.6) if ax is None else ax
    image = ax.imshow(lengths[step].numpy(), cmap="inferno", vmin=0.0)
    bar = ax.figure.colorbar(image, ax=ax)
    bar.set_label("|eps_cond - eps_uncond|")
    ax.set_title(
        f"What the prompt changes\nstep {step % len(t) + 1} of {len(t)}, t = {t[step]:.5g}"
    )
    ax.set_xticks([])
    ax.set_yticks([])
    return ax


def guidance_norms(run: Run, ax: Axes | None = None) -> Axes:
    """||eps_cond - eps_uncond|| at every step: when the prompt matters most.

    Raises:
        ValueError: the run was without guidance.
    """
    norms = guidance(run).flatten(1).norm(dim=1)
    ax = new_axes() if ax is None else ax
    ax.plot(timesteps(run), norms.numpy(), "o-", color=CURVE, markersize=4, linewidth=1.5)
    ax.set_ylim(bottom=0)
    if not ax.xaxis_inverted():
        ax.invert_xaxis()
    ax.set_xlabel("timestep t  (noise left, picture right)")
    ax.set_ylabel("||eps_cond - eps_uncond||")
    ax.set_title("How much the prompt changes each step")
    _light_grid(ax)
    return ax


# --------------------------------------------------------------------------------- measurements


def curves(
    lines: Mapping[str, Mapping[float, float]],
    *,
    log: str = "",
    truth: float | None = None,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    ordered: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """What was measured, as lines with a colour and a mark of their own: {name: {x: y}}.

    Args:
        log: which axes are logarithmic: "", "x", "y" or "xy".
        truth: the y that all of them should have, as a dashed line.
        ordered: the lines are more and more of something, and their colours darker and darker.

    Raises:
        ValueError: there are no lines, one has no points, or `log` is something else.
    """
    if not lines or not all(lines.values()):
        raise ValueError("there is nothing to show: each line needs a point")
    if log not in ("", "x", "y", "xy"):
        raise ValueError(f"log must be '', 'x', 'y' or 'xy', not {log!r}")
    ax = new_axes() if ax is None else ax
    shades = heat(np.linspace(0.8, 0.15, len(lines))) / 255
    for i, (name, points) in enumerate(lines.items()):
        mark, colour = MARKS[i % len(MARKS)], shades[i] if ordered else LINES[i % len(LINES)]
        values = list(points.values())
        ax.plot(list(points), values, f"{mark}-", color=colour, markersize=4.5, label=name)
    if truth is not None:
        ax.axhline(truth, color="#333333", linestyle="--", linewidth=1, label="truth")
    if "x" in log:
        ax.set_xscale("log")
    if "y" in log:
        ax.set_yscale("log")
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if len(lines) > 1 or truth is not None:
        ax.legend(fontsize="small")
    _light_grid(ax)
    return ax


def memorising(
    from_set: Mapping[str, Mapping[float, float]],
    from_truth: Mapping[str, Mapping[float, float]],
    at_the_end: Mapping[str, Mapping[float, float]],
) -> Axes:
    """What networks learn from few pictures and from many (`ldm.evaluate.memorise`): three axes in
    a figure, of which the first are returned.

    Args:
        from_set: {training set: {steps: distance}}, from what is known by heart of it.
        from_truth: the same from the world's truth; 1 is how far these two are from each other.
        at_the_end: {what: {scenes: share}}.
    """
    kind = shown_axes()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.0), layout="constrained")
    left = figure.add_subplot(1, 3, 1, axes_class=kind)
    middle = figure.add_subplot(1, 3, 2, axes_class=kind, sharey=left)
    right = figure.add_subplot(1, 3, 3, axes_class=kind)
    for ax, lines, title in (
        (left, from_set, "From the training set by heart"),
        (middle, from_truth, "From the world"),
    ):
        curves(lines, log="xy", title=title, xlabel="steps of training", ordered=True, ax=ax)
        ax.axhline(1.0, color="#888888", linewidth=0.8, linestyle="--", zorder=0)
        if (legend := ax.get_legend()) is not None:
            legend.remove()
    left.set_ylabel("distance")
    curves(at_the_end, log="x", title="At the end", xlabel="scenes trained on", ax=right)
    right.set_ylim(bottom=0)
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="outside lower left",
        ncols=len(from_set),
        fontsize="small",
    )
    return left


# -------------------------------------------------------------------------------------- latents


def latent_histogram(latents: Tensor, ax: Axes | None = None, bins: int = 60) -> Axes:
    """The values of each channel of latents (B, C, h, w), beside the standard normal, the
    distribution of the noise that a run starts from."""
    edges, densities = histogram(latents, bins)
    ax = new_axes() if ax is None else ax
    for channel, density in enumerate(densities):
        colour = LINES[channel % len(LINES)]
        ax.stairs(density.numpy(), edges.numpy(), color=colour, label=f"channel {channel}")
    x = torch.linspace(edges[0].item(), edges[-1].item(), 200)
    normal = torch.exp(-x.square() / 2) / (2 * torch.pi) ** 0.5
    ax.plot(x, normal, color="#333333", linestyle="--", linewidth=1.2, label="N(0, 1)")
    ax.set_xlabel("value")
    ax.set_ylabel("density")
    ax.set_title(
        f"Values of the latents: mean {latents.float().mean():.2f}, "
        f"standard deviation {latents.float().std():.2f}"
    )
    ax.legend(fontsize="small")
    return ax


def latent_components(latents: Tensor, ax: Axes | None = None) -> Axes:
    """The first of a batch of latents (B, C, h, w) as a picture of its principal components: red,
    green and blue are the three directions in which the batch's channels vary most."""
    found = principal_components(latents, min(3, latents.shape[1]))
    (picture, *_) = found.rgb()(latents[:1])
    ax = new_axes(4.2, 4.0) if ax is None else ax
    ax.imshow(picture)
    names = ("red", "green", "blue")
    shares = ", ".join(
        f"{name} {share:.0%}" for name, share in zip(names, found.shares, strict=False)
    )
    ax.set_title(f"Principal components of the latents\nshare of the variance: {shares}")
    ax.set_xticks([])
    ax.set_yticks([])
    return ax


def visited(steps: Timesteps) -> list[float]:
    """The timesteps t of a list of them, or of pairs (t, t_prev).

    Raises:
        ValueError: there are none.
    """
    starts = [step[0] if isinstance(step, tuple) else step for step in steps]
    t = [float(start.t if isinstance(start, NoiseLevel) else start) for start in starts]
    if not t:
        raise ValueError("there are no timesteps to show")
    return t


def _curve(values: Tensor, name: str, steps: Timesteps | None, ax: Axes | None) -> Axes:
    """Values over all timesteps, those that are visited marked."""
    t = [] if steps is None else visited(steps)
    if any(not 0 <= one < len(values) for one in t):
        raise ValueError(f"timesteps lie between 0 and {len(values) - 1}")
    ax = new_axes() if ax is None else ax
    ax.plot(range(len(values)), values.numpy(), color=CURVE, linewidth=1.8, label=name)
    if t:
        walked = any(isinstance(step, tuple) for step in steps or [])
        label = f"the {len(t)} timesteps of the sampler" if walked else f"{len(t)} timesteps"
        there = np.interp(t, range(len(values)), values.numpy())
        ax.plot(t, there, "o", color=MARK, markersize=4.5, label=label)
        ax.legend(fontsize="small")
    ax.set_xlabel("timestep t")
    ax.set_ylabel(name)
    _light_grid(ax)
    return ax


def _light_grid(ax: Axes) -> None:
    ax.grid(color="#e6e6e6", linewidth=0.8)
    ax.set_axisbelow(True)
