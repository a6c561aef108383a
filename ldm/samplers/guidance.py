"""Classifier-free guidance: with the prompt and without it, and further along the difference."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.samplers.loop import EpsFn, Prediction


def guide(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    context: Tensor,
    uncond_context: Tensor,
    guidance_scale: float,
    *,
    images_per_call: int | None = None,
) -> EpsFn:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, eq. 6): step away from what
    the model would draw anyway, towards what the prompt asks for.

    The model runs in the context's dtype (half precision, say); `x` and the result stay in theirs.

    Args:
        model: model(x, t, context) -> eps; asked for both contexts in one batch, without first.
        context: the prompts' text states, (B, M, D).
        uncond_context: those of the empty (or the negative) prompt, (B, M, D).
        guidance_scale: the paper's 1 + w. At 1 the model follows the prompt as trained, and only
            then the prompt alone is asked; more follows it harder.
        images_per_call: how many of the B images share a call of the model; None is all of them.

    Raises:
        ValueError: at the call, if the contexts are not of one shape or the scale is not a finite
            number; when it is asked, if x is not of B images.
    """
    if context.ndim != 3 or context.shape != uncond_context.shape:
        raise ValueError(
            "context and uncond_context must be (B, M, D) alike, "
            f"not {tuple(context.shape)} and {tuple(uncond_context.shape)}"
        )
    # A tuple, an array or a tensor would broadcast.
    if not isinstance(guidance_scale, numbers.Real) or not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be a finite number, not {guidance_scale!r}")
    scale = float(guidance_scale)
    size = images_per_call or len(context)
    contexts = list(zip(uncond_context.split(size), context.split(size), strict=True))

    def check(x: Tensor) -> None:
        if len(x) != len(context):
            raise ValueError(
                f"each image needs a context of its own: x is of {len(x)}, context of "
                f"{len(context)}; context.expand({len(x)}, -1, -1) gives one to all"
            )

    def alone(x: Tensor, t: Tensor) -> Tensor:
        check(x)
        x_parts, t_parts = x.to(context.dtype).split(size), t.split(size)
        parts = zip(x_parts, t_parts, contexts, strict=True)
        eps = [model(x_n, t_n, cond) for x_n, t_n, (_, cond) in parts]
        return torch.cat(eps).to(x.dtype)  # (B, C, H, W)

    def guided(x: Tensor, t: Tensor) -> Prediction:
        check(x)
        x_parts, t_parts = x.to(context.dtype).split(size), t.split(size)
        halves = []
        for x_n, t_n, both in zip(x_parts, t_parts, contexts, strict=True):
            eps = model(torch.cat([x_n, x_n]), torch.cat([t_n, t_n]), torch.cat(both))
            halves.append(eps.to(x.dtype).chunk(2))
        eps_uncond, eps_cond = map(torch.cat, zip(*halves, strict=True))  # (B, C, H, W) each
        return Prediction(eps_uncond + scale * (eps_cond - eps_uncond), eps_cond, eps_uncond)

    return alone if scale == 1.0 else guided
