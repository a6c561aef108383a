"""Samplers: from noise to a picture, one step at a time.

Each sampler is a generator: it asks `eps_fn` for the noise, takes one step towards less of it, and
yields everything it knows as a `Step`. Samplers know no model, so they run as well on a closed
form as on a UNet:

    for step in ddim(eps_fn, x, schedule.ddim_timesteps(50), schedule):
        show(step.x0)

`generator.send(new_x)` goes on from `new_x` instead of `step.x_prev` and returns the next Step.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.schedule import NoiseSchedule, x0_from_eps


class Prediction(NamedTuple):
    """What a guided model says: the noise to use, and the two predictions it was made of."""

    eps: Tensor
    eps_cond: Tensor
    eps_uncond: Tensor


EpsFn = Callable[[Tensor, Tensor], Tensor | Prediction]
"""eps_fn(x, t): x (B, C, H, W) and t int64 (B,) -> the noise in x."""


@dataclass(frozen=True)
class Step:
    """One step of a sampler. No later step changes these tensors; all are (B, C, H, W).

    Attributes:
        index: 0 for the first step.
        t: the timestep of `x`; t_prev: that of `x_prev` (-1 is the clean picture).
        x: the noisy latents before the step; x_prev: after it.
        eps: the predicted noise in `x`; x0: the clean picture that it implies.
        eps_cond, eps_uncond: with and without the prompt, where guidance made `eps`, else None.
    """

    index: int
    t: int
    t_prev: int
    x: Tensor
    eps: Tensor
    eps_cond: Tensor | None
    eps_uncond: Tensor | None
    x0: Tensor
    x_prev: Tensor


Steps = Generator[Step, Tensor | None, None]

Generators = torch.Generator | Sequence[torch.Generator]
"""Where noise comes from: a generator per image, or a single one that draws for the whole batch."""


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


def ddim(
    eps_fn: EpsFn,
    x: Tensor,
    timesteps: Sequence[tuple[int, int]],
    schedule: NoiseSchedule,
    *,
    eta: float = 0.0,
    generators: Generators | None = None,
) -> Steps:
    """DDIM (Song et al. 2020, arXiv:2010.02502, eq. 12).

    Args:
        eps_fn: predicts the noise.
        x: starting noise, (B, C, H, W); never changed.
        timesteps: pairs (t, t_prev), e.g. `schedule.ddim_timesteps(50)`.
        schedule: gives alpha_bar.
        eta: 0 is deterministic, 1 adds as much noise per step as DDPM does.
        generators: for the noise of eta > 0, see `draw_noise`.

    Raises:
        ValueError: at the call, for an eta outside [0, 1] or noise without its generators.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must be between 0 and 1, not {eta}")
    if eta > 0.0:
        check_generators(generators, x)

    @torch.no_grad()
    def steps(x: Tensor) -> Steps:
        for index, (t, t_prev) in enumerate(timesteps):
            alpha_bar, alpha_bar_prev = schedule.alpha_bar_at(t), schedule.alpha_bar_at(t_prev)
            prediction = eps_fn(x, torch.full((len(x),), t, device=x.device))
            eps, eps_cond, eps_uncond = unpack(prediction)
            x0 = x0_from_eps(x, eps, alpha_bar)

            # DDIM eq. 16: the noise's share; the direction to x_t takes what is left of it.
            variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
            sigma = eta * max(variance, 0.0) ** 0.5
            direction = max(1 - alpha_bar_prev - sigma**2, 0.0) ** 0.5 * eps
            x_prev = alpha_bar_prev**0.5 * x0 + direction  # DDIM eq. 12
            if eta > 0.0:
                x_prev = x_prev + sigma * draw_noise(generators, x)

            sent = yield Step(index, t, t_prev, x, eps, eps_cond, eps_uncond, x0, x_prev)
            x = x_prev if sent is None else sent

    return steps(x)


def ddpm(
    eps_fn: EpsFn,
    x: Tensor,
    timesteps: Sequence[tuple[int, int]],
    schedule: NoiseSchedule,
    *,
    generators: Generators | None = None,
) -> Steps:
    """DDPM's ancestral sampling (Ho et al. 2020, arXiv:2006.11239, algorithm 2).

    Steps may skip timesteps: alpha is then the ratio of the two alpha_bars. The variance is the
    posterior's ("fixed small", beta-tilde of eq. 7), and x0 is not clipped.

    Args:
        eps_fn: predicts the noise.
        x: starting noise, (B, C, H, W); never changed.
        timesteps: pairs (t, t_prev), e.g. `schedule.ddpm_timesteps(1000)`.
        schedule: gives alpha_bar.
        generators: for the noise of every step but the last, see `draw_noise`.

    Raises:
        ValueError: at the call, when the generators are missing or not one per image.
    """
    check_generators(generators, x)

    @torch.no_grad()
    def steps(x: Tensor) -> Steps:
        for index, (t, t_prev) in enumerate(timesteps):
            alpha_bar, alpha_bar_prev = schedule.alpha_bar_at(t), schedule.alpha_bar_at(t_prev)
            alpha = alpha_bar / alpha_bar_prev
            prediction = eps_fn(x, torch.full((len(x),), t, device=x.device))
            eps, eps_cond, eps_uncond = unpack(prediction)
            x0 = x0_from_eps(x, eps, alpha_bar)

            # DDPM eq. 7: the mean of q(x_prev | x, x0), and its variance beta-tilde.
            x0_share = alpha_bar_prev**0.5 * (1 - alpha) / (1 - alpha_bar)
            x_share = alpha**0.5 * (1 - alpha_bar_prev) / (1 - alpha_bar)
            variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha)
            x_prev = x0_share * x0 + x_share * x
            if t_prev >= 0:
                x_prev = x_prev + variance**0.5 * draw_noise(generators, x)

            sent = yield Step(index, t, t_prev, x, eps, eps_cond, eps_uncond, x0, x_prev)
            x = x_prev if sent is None else sent

    return steps(x)


def unpack(prediction: Tensor | Prediction) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(eps, eps_cond, eps_uncond); the last two are None where there was no guidance."""
    return prediction if isinstance(prediction, Prediction) else (prediction, None, None)


def draw_noise(generators: Generators | None, like: Tensor) -> Tensor:
    """Standard normal noise of the shape, device and dtype of `like`, (B, ...).

    Args:
        generators: one CPU generator per image, so that a seed means the same noise on every device
            and an image does not depend on its neighbours in the batch. Or a single generator, on
            any device: it draws the whole batch at once, in `like`'s dtype.
        like: what the noise is for; not read.
    """
    assert generators is not None  # the samplers checked
    if isinstance(generators, torch.Generator):
        device = generators.device
        noise = torch.randn(like.shape, generator=generators, device=device, dtype=like.dtype)
    else:
        noise = torch.stack([torch.randn(like.shape[1:], generator=g) for g in generators])
    if noise.device.type == "cpu" and like.device.type == "cuda":
        # From pinned memory the program need not wait for the copy.
        return noise.pin_memory().to(like.device, like.dtype, non_blocking=True)
    return noise.to(like.device, like.dtype)


def check_generators(generators: Generators | None, x: Tensor) -> None:
    """One generator per image or a single one for all, or a ValueError that says so."""
    if generators is None:
        raise ValueError("this sampler draws noise: pass generators=[...], one per image")
    if not isinstance(generators, torch.Generator) and len(generators) != x.shape[0]:
        raise ValueError(f"{x.shape[0]} images need as many generators, not {len(generators)}")
