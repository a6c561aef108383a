"""Where a run begins, and the rule that it follows from there.

noise ─────────────────────────── x          from noise alone
picture ── encode ── x0 ─ noised ─ x         from a picture, at the strength's noise level
latents ───────────────────────── x          from what is given
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from ldm.inputs import Inputs
from ldm.presets import PRESETS, Walk
from ldm.samplers import SAMPLERS, Generators, Rule, draw_noise, inpaint_rule, slerp
from ldm.schedule import noised
from ldm.settings import Settings


def begin(
    settings: Settings,
    inputs: Inputs,
    walk: Walk,
    source: Generators,
    like: Tensor,
    encode: Callable[[], Tensor],
) -> tuple[Tensor, Rule]:
    """x at the first step, of the shape of `like`, (B, C, h, w), and the sampler's rule; with a
    mask, that rule within one that keeps what the mask keeps.

    Args:
        walk: the run's.
        source: what the starting noise is drawn from.
        like: (B, C, h, w), of the run's device and dtype; not read.
        encode: gives the clean latents of the pictures that the run starts from, (1 or B, C, h, w);
            called first, since it may draw too.
    """
    sampler = SAMPLERS[settings.sampler]
    options = {name: getattr(settings, name) for name in sampler.options}
    rule: Rule = functools.partial(sampler.rule, **options)
    if inputs.latents is not None:
        if settings.like is None and inputs.noise is None:
            draw_noise(source, like)  # set aside: each step's noise is then the seed's own
        return inputs.latents.to(like), rule
    if not inputs.image:
        return starting_noise(settings, source, like), rule
    x0 = encode().to(like).expand_as(like)
    noise = starting_noise(settings, source, like)
    if inputs.mask:
        mask = inputs.redrawn(settings, settings.height // like.shape[2]).to(like)
        rule = inpaint_rule(rule, x0, noise, mask, end=walk.grid[-1][1])
    return noised(x0, noise, walk.start.alpha_bar), rule


def starting_noise(settings: Settings, source: Generators, like: Tensor) -> Tensor:
    """The noise of the run's seeds, (B, C, h, w), or that which is handed in; and of a variation,
    some of the way on to that of its seeds."""
    noise = draw_noise(source, like)
    if settings.variation_seed is None:
        return noise
    others = PRESETS[settings.like].generators(settings.variation_seed, settings.num_images)
    return slerp(noise, draw_noise(others, like), settings.variation_strength)
