"""How probable a picture is to a model that only ever predicts noise (Song et al. 2021,
arXiv:2011.13456, section 4.3 and appendix D).

Noising spreads a law p_0 of pictures to p_t, and so does a flow without any noise, the
probability-flow ODE (their eq. 13). With s = sqrt(1 - alpha_bar) and the time
l = log(s / sqrt(alpha_bar)), minus half the logarithm of the signal-to-noise ratio, it is

    dx/dl = s (eps(x, t) - s x)

and along it the density thins out as the flow spreads (their eq. 39):

    log p_start(x_start) = log p_end(x_end) + integral of div [s (eps - s x)] dl

The divergence is a trace of a Jacobian: exact for small pictures, and for others an average over
random directions (their eq. 40).

It starts at the first timestep: what is measured is the law as smoothed by that little noise,
since pictures that were rendered from few numbers have no density of their own. It ends at the
last, where p_end is known for a known law, and is not N(0, 1) unless alpha_bar is 0 there.

    x = schedule.add_noise(pictures, noise, torch.zeros(len(pictures), dtype=torch.int64))
    log_likelihood(perfect(world, schedule), x, schedule,
                   end=lambda x, alpha_bar: posterior(world, x, alpha_bar).log_prob)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.schedule import NoiseSchedule
from ldm.worlds.posterior import EpsFn

LARGEST_EXACT = 16
"""Pixels, or latents, along a side: the exact divergence asks for one gradient per number."""

Divergence = Callable[[Tensor, Tensor], Tensor]
"""divergence(eps, x): eps as it came from x, (B, C, H, W) both -> sum of d eps_i / d x_i, (B,)."""


def log_likelihood(
    eps_fn: EpsFn,
    x: Tensor,
    schedule: NoiseSchedule,
    *,
    end: Callable[[Tensor, float], Tensor],
    steps: int = 50,
    generator: torch.Generator | None = None,
    probes: int = 1,
) -> Tensor:
    """log p(x) in nats, (B,) float64, where p is the law of noisy pictures at timestep 0.

    With the exact score of a known law it is exact but for the steps. A model's is an estimate:
    its eps is no gradient of anything, and `end` is unknown to it. So two models may be compared by
    it, with the same x, `end` and generator; the number itself says little.

    Args:
        eps_fn: predicts the noise, each picture's by itself; asked 4 times per step, also between
            the timesteps of the table.
        x: noisy pictures of timestep 0, (B, C, H, W), best in float64; never changed.
        schedule: gives alpha_bar(t).
        end: end(x, alpha_bar) -> log p(x), (B,), where the flow ends: at the last timestep, or, if
            that is pure noise (it is infinitely far), at the one before.
        steps: of the fourth-order method of Runge and Kutta, evenly in l.
        generator: draws the random directions (Hutchinson's trace). None: the exact divergence.
        probes: random directions per picture.

    Raises:
        ValueError: the picture is larger than 16 x 16, and there is no generator; `eps_fn` has no
            gradient in x; or a number is out of its range.
    """
    if min(steps, probes) < 1:
        raise ValueError(f"steps and probes must be 1 or more, not {steps} and {probes}")
    if generator is None and max(x.shape[-2:]) > LARGEST_EXACT:
        size = f"{LARGEST_EXACT} x {LARGEST_EXACT}"
        raise ValueError(f"the divergence is exact up to {size}: beyond, it needs a generator")
    table = schedule.alpha_bar[schedule.alpha_bar > 0]
    if len(table) < 2:
        raise ValueError("the schedule has but one timestep with a picture left: nothing flows")
    divergence = exact if generator is None else hutchinson(x, probes, generator)
    first, last = table[0].item(), table[-1].item()

    def flow(x: Tensor, time: float) -> tuple[Tensor, Tensor]:
        """dx/dl, (B, C, H, W), and its divergence, (B,) float64."""
        alpha_bar = min(max(alpha_bar_of(time), last), first)
        s = (1 - alpha_bar) ** 0.5
        t = torch.full((len(x),), schedule.timestep_at(alpha_bar), device=x.device)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            eps = eps_fn(x, t)
            if not eps.requires_grad:
                raise ValueError("eps_fn has no gradient in x: does it run under no_grad()?")
            trace = divergence(eps, x)
        spread = s * (trace.double() - s * x[0].numel())
        return (s * (eps - s * x)).detach(), spread

    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    start, stop = time_of(first), time_of(last)
    h = (stop - start) / steps
    for step in range(steps):
        time = start + step * h
        k1, d1 = flow(x, time)
        k2, d2 = flow(x + h / 2 * k1, time + h / 2)
        k3, d3 = flow(x + h / 2 * k2, time + h / 2)
        k4, d4 = flow(x + h * k3, time + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        total = total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    return total + end(x, last).double()


def standard_normal(x: Tensor, alpha_bar: float) -> Tensor:
    """log N(x; 0, 1), (B,) float64: the end for a law that is unknown, and of unit variance, or of
    any where alpha_bar is next to nothing. Stable Diffusion's last alpha_bar, 0.005, is not that:
    its end has another mean for each law."""
    return -(x.double().square() + math.log(2 * math.pi)).flatten(1).sum(dim=1) / 2


def time_of(alpha_bar: float) -> float:
    """l = log(sqrt(1 - alpha_bar) / sqrt(alpha_bar))."""
    return math.log((1 - alpha_bar) / alpha_bar) / 2


def alpha_bar_of(time: float) -> float:
    """`time_of` turned around."""
    return 1 / (1 + math.exp(2 * time))


def exact(eps: Tensor, x: Tensor) -> Tensor:
    """The divergence by one gradient per number, all of them in one pass backwards."""
    flat = eps.flatten(1).sum(dim=0)  # (D,): a picture's eps depends on no other picture
    rows = torch.eye(len(flat), dtype=flat.dtype, device=flat.device)
    (jacobian,) = torch.autograd.grad(flat, x, rows, is_grads_batched=True)  # (D, B, C, H, W)
    return jacobian.flatten(2).diagonal(dim1=0, dim2=2).sum(dim=1)


def hutchinson(x: Tensor, probes: int, generator: torch.Generator) -> Divergence:
    """The divergence as the mean of v . (d eps / dx) v over random signs v, (probes, B, C, H, W).
    They stay the same along the flow, which so remains one smooth function of x."""
    coins = torch.randint(2, (probes, *x.shape), generator=generator)
    signs = (2 * coins - 1).to(x)

    def divergence(eps: Tensor, x: Tensor) -> Tensor:
        found = [torch.autograd.grad(eps, x, v, retain_graph=True)[0] * v for v in signs]
        return torch.stack(found).mean(dim=0).flatten(1).sum(dim=1)

    return divergence
