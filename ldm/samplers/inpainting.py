"""Inpainting: a rule around a rule, which keeps a part of the picture.

    x ── rule ── x_prev ── the kept part: the original, noised to x_prev's level ── x_prev

Any sampler's rule can be in it, and any model: nothing here was trained for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.samplers.loop import Known, Rule
from ldm.schedule import NoiseLevel, noised


def inpaint_rule(rule: Rule, x0: Tensor, noise: Tensor, mask: Tensor, end: NoiseLevel) -> Rule:
    """The same sampler, but where the mask is 0 the latents stay those of a picture (Lugmayr et al.
    2022, arXiv:2201.09865, eq. 8, without its jumps back).

    After each step the kept part is the original, noised to the step's end with the run's own
    starting noise, so that nothing more is drawn; after the last it is the original itself.

    Args:
        rule: the sampler's own.
        x0: the original's latents, (B, C, h, w), clean.
        noise: what they were noised with at the start of the run, of the same shape.
        mask: (B, 1, h, w): 1 is redrawn, 0 is kept, and between them the two are mixed.
        end: where the run ends: `timesteps[-1][1]`.
    """

    def masked(known: Known) -> Tensor:
        last = known.there == end
        kept = x0 if last else noised(x0, noise, known.alpha_bar_prev)
        return torch.lerp(kept, rule(known), mask.to(kept.dtype).expand_as(kept))

    return masked
