"""A run as pictures: what its latents looked like, step by step.

viz.steps(run)                                        # x_t and x0 of eight steps
viz.side_by_side({"ddim": run, "ddpm": other})        # several runs, a row each
viz.animation(viz.frames(run, pipe.decode))           # every step
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image

from ldm.viz.colours import heat
from ldm.viz.grids import grid, keyed, strip
from ldm.viz.latents import Draw
from ldm.viz.runs import Run, drawn_by, guidance, spaced, timesteps, values

NAMES = {
    "x": "noisy latents x",
    "x0": "clean estimate x0",
    "eps": "predicted noise eps",
    "eps_cond": "noise with the prompt",
    "eps_uncond": "noise without it",
    "guidance": "what the prompt changes",
}


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
        column_captions=[f"step {i + 1}\nt = {t[i]:.5g}" for i in shown],
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
        captions=[
            [f"t = {timesteps(run)[i]:.5g}" for i in shown[name]] for name, run in runs.items()
        ],
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
        strip([picture], [f"step {i + 1} of {len(t)}, t = {t[i]:.5g}"], size=size)
        for i, picture in enumerate(pictures)
    ]
