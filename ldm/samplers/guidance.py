"""Classifier-free guidance: with the prompt and without it, and further along the difference."""

from __future__ import annotations

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
    """
    size = images_per_call or len(context)
    contexts = list(zip(uncond_context.split(size), context.split(size), strict=True))

    def alone(x: Tensor, t: Tensor) -> Tensor:
        x_parts, t_parts = x.to(context.dtype).split(size), t.split(size)
        parts = zip(x_parts, t_parts, contexts, strict=True)
        eps = [model(x_n, t_n, cond) for x_n, t_n, (_, cond) in parts]
        return torch.cat(eps).to(x.dtype)  # (B, C, H, W)

    def guided(x: Tensor, t: Tensor) -> Prediction:
        x_parts, t_parts = x.to(context.dtype).split(size), t.split(size)
        halves = []
        for x_n, t_n, both in zip(x_parts, t_parts, contexts, strict=True):
            eps = model(torch.cat([x_n, x_n]), torch.cat([t_n, t_n]), torch.cat(both))
            halves.append(eps.to(x.dtype).chunk(2))
        eps_uncond, eps_cond = map(torch.cat, zip(*halves, strict=True))  # (B, C, H, W) each
        return Prediction(
            eps_uncond + guidance_scale * (eps_cond - eps_uncond), eps_cond, eps_uncond
        )

    return alone if guidance_scale == 1.0 else guided
