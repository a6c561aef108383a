"""Classifier-free guidance: with the prompt and without it, and further along the difference."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.samplers.loop import EpsFn, Prediction

Scale = float | Callable[[float], float]
"""How hard to follow the prompt: everywhere alike, or by the timestep."""


def guide(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    context: Tensor,
    uncond_context: Tensor,
    guidance_scale: Scale,
    *,
    rescale: float = 0.0,
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
            then the prompt alone is asked; more follows it harder. A function of t has another at
            each timestep: see `on_interval`.
        rescale: from 0 to 1, how far the guided prediction gets back the standard deviation that
            the prompt's own has: much guidance makes it, and the picture's contrast, too large
            (Lin et al. 2023, arXiv:2305.08891, section 3.4; they take 0.7).
        images_per_call: how many of the B images share a call of the model; None is all of them.

    Raises:
        ValueError: at the call, if the contexts are not of one shape, the scale is not a finite
            number, or rescale is not within 0 and 1; when it is asked, if x is not of B images, or
            the scale of this t is no finite number.
    """
    if context.ndim != 3 or context.shape != uncond_context.shape:
        raise ValueError(
            "context and uncond_context must be (B, M, D) alike, "
            f"not {tuple(context.shape)} and {tuple(uncond_context.shape)}"
        )
    if not callable(guidance_scale):
        check_scale(guidance_scale)
    if not 0.0 <= rescale <= 1.0:
        raise ValueError(f"rescale must be between 0 and 1, not {rescale!r}")
    size = images_per_call or len(context)
    conds = context.split(size)
    # Joined once: who has computed something of a context knows it again by its tensor.
    pairs = [torch.cat(both) for both in zip(uncond_context.split(size), conds, strict=True)]

    def check(x: Tensor) -> None:
        if len(x) != len(context):
            raise ValueError(
                f"each image needs a context of its own: x is of {len(x)}, context of "
                f"{len(context)}; context.expand({len(x)}, -1, -1) gives one to all"
            )

    def alone(x: Tensor, t: Tensor) -> Tensor:
        check(x)
        x_parts, t_parts = x.to(context.dtype).split(size), t.split(size)
        parts = zip(x_parts, t_parts, conds, strict=True)
        eps = [model(x_n, t_n, cond) for x_n, t_n, cond in parts]
        return torch.cat(eps).to(x.dtype)  # (B, C, H, W)

    def guided(x: Tensor, t: Tensor, scale: float) -> Prediction:
        check(x)
        x_parts, t_parts = x.to(context.dtype).split(size), t.split(size)
        halves = []
        for x_n, t_n, both in zip(x_parts, t_parts, pairs, strict=True):
            eps = model(torch.cat([x_n, x_n]), torch.cat([t_n, t_n]), both)
            halves.append(eps.to(x.dtype).chunk(2))
        eps_uncond, eps_cond = map(torch.cat, zip(*halves, strict=True))  # (B, C, H, W) each
        eps = eps_uncond + scale * (eps_cond - eps_uncond)
        return Prediction(rescaled(eps, eps_cond, rescale), eps_cond, eps_uncond)

    def eps_fn(x: Tensor, t: Tensor) -> Tensor | Prediction:
        # Only a scale that depends on t may wait for the device to tell it.
        at_t = guidance_scale(t[0].item()) if callable(guidance_scale) else guidance_scale
        scale = check_scale(at_t)
        return alone(x, t) if scale == 1.0 else guided(x, t, scale)

    return eps_fn


def on_interval(guidance_scale: float, low: float, high: float) -> Callable[[float], float]:
    """Guidance from timestep `low` to `high` alone, both included, and none elsewhere (Kynkäänniemi
    et al. 2024, arXiv:2404.07724, eq. 4).

    Above, where only the layout is being decided, guidance makes all pictures of a prompt alike;
    below it changes next to nothing. Outside of the interval a step is one call of the model for
    each image, and not two. The paper's interval is one of sigma; that of timesteps is what the
    model knows: `schedule.timestep_at(1 / (1 + sigma**2))` turns the one into the other.
    """
    return lambda t: guidance_scale if low <= t <= high else 1.0


def rescaled(eps: Tensor, eps_cond: Tensor, share: float) -> Tensor:
    """eps with the standard deviation of eps_cond, image by image, for a share of it (Lin et al.
    2023, eq. 14 to 16): (B, C, H, W) each."""
    if share == 0.0:
        return eps
    std, wanted = (
        one.std(dim=tuple(range(1, one.ndim)), keepdim=True) for one in (eps, eps_cond)
    )  # (B, 1, 1, 1)
    return share * (eps * (wanted / std)) + (1 - share) * eps


def check_scale(scale: object) -> float:
    """A finite number, as Python's own, or a ValueError: a tuple, an array or a tensor would
    broadcast."""
    if not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(f"guidance_scale must be a finite number, not {scale!r}")
    return float(scale)
