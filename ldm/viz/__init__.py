"""Pictures for people: how a picture comes out of noise, and where the words of a prompt look.

    from ldm import viz

    run = ldm.trace(pipe, "a red house on green grass at night", steps=20)
    viz.steps(run)                                    # the picture as it forms
    viz.attention(run)                                # where each word looked
    viz.alpha_bar(pipe.schedule, run.t)               # how much noise there was

Every function returns a PIL image or matplotlib axes, which show themselves in Jupyter, and needs
no display. Two words recur: `run` is a `Trace` or a list of steps, and `draw` is a function from
latents to pictures, `pipe.decode` or a `LatentRGB`. Curves need matplotlib, the rest does not.

    strips.py      a run, step by step, beside others
    attention.py   where words looked, laid over the picture
    plots.py       curves and maps with axes: the schedule, guidance, measurements, latents
    network.py     a UNet's shape, and the maps that pass through a network
    latents.py     what latents look like without the decoder, and their statistics
    sweeps.py      one prompt under every pair of values of two settings
    walks.py       from one prompt or seed to another, through what lies between
    animations.py  pictures that move
    live.py        watching a run in the cell that makes it
    card.py        what Jupyter shows of a trace
    player/        the page of `ldm explain`

and below them runs.py (what all of them take for a run), grids.py (pictures on one sheet),
lettering.py and colours.py. Others take the names below, and `ldm.viz.player.explain`.
"""

from __future__ import annotations

from ldm.observe.traces import show_as
from ldm.viz.animations import Animation, animation
from ldm.viz.attention import attention, attention_by_resolution, attention_over_steps, overlay
from ldm.viz.card import trace_html
from ldm.viz.grids import grid, strip
from ldm.viz.latents import (
    SD_V1_RGB,
    Components,
    Draw,
    LatentRGB,
    false_colours,
    fit_rgb,
    histogram,
    principal_components,
    scene_images,
    trace_rgb,
)
from ldm.viz.live import live
from ldm.viz.network import UNetMap, feature_maps, unet_shape
from ldm.viz.plots import (
    alpha_bar,
    betas,
    curves,
    guidance_map,
    guidance_norms,
    latent_components,
    latent_histogram,
    memorising,
    snr,
    timestep_rows,
)
from ldm.viz.runs import Run
from ldm.viz.strips import frames, side_by_side, steps
from ldm.viz.sweeps import sweep, sweep_images
from ldm.viz.walks import walk, walk_images

__all__ = [
    "SD_V1_RGB",
    "Animation",
    "Components",
    "Draw",
    "LatentRGB",
    "Run",
    "UNetMap",
    "alpha_bar",
    "animation",
    "attention",
    "attention_by_resolution",
    "attention_over_steps",
    "betas",
    "curves",
    "false_colours",
    "feature_maps",
    "fit_rgb",
    "frames",
    "grid",
    "guidance_map",
    "guidance_norms",
    "histogram",
    "latent_components",
    "latent_histogram",
    "live",
    "memorising",
    "overlay",
    "principal_components",
    "scene_images",
    "side_by_side",
    "snr",
    "steps",
    "strip",
    "sweep",
    "sweep_images",
    "timestep_rows",
    "trace_rgb",
    "unet_shape",
    "walk",
    "walk_images",
]

# In Jupyter a trace shows its card.
show_as(trace_html)
