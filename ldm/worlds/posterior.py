"""A perfect model: what could be said about the clean picture, by whoever knows its world exactly.

    says = posterior(Sea(), x_t, alpha_bar)        # mean, variance, score, log p(x_t)
    eps_fn = perfect(Checkerboards(), schedule)    # for any sampler
    latents = FiniteSet(encoded, sampled=True)     # Scenes, by as many of them as one has encoded

| law                       | how                                                     |
| ------------------------- | ------------------------------------------------------- |
| `FiniteSet`               | Bayes' rule over its atoms (`ldm.worlds.atoms`)         |
| `Checkerboards`           | the same: there are two                                 |
| `Gaussian`                | closed form, below                                      |
| `Sea`, `House`            | integrals over 1 and 4 numbers (`ldm.worlds.quadrature`)|

`Scenes` has no posterior that could be computed, but draws from it are a `FiniteSet`, `sampled`, of
pictures or of the latents that an autoencoder made of them, which the caller brings: nothing here
knows a network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.schedule import NoiseSchedule
from ldm.worlds.atoms import FEW, FiniteSet, Posterior, of_atoms
from ldm.worlds.captions import SOME
from ldm.worlds.ladder import Checkerboards, House, Sea
from ldm.worlds.quadrature import by_quadrature

if TYPE_CHECKING:
    from ldm.worlds.scenes import Scene

EpsFn = Callable[[Tensor, Tensor], Tensor]
"""eps_fn(x, t): x (B, C, H, W) and t (B,) -> the noise in x, of x's shape, as the samplers take
it, of each picture by itself."""


@dataclass(frozen=True)
class Gaussian:
    """A law that is Gaussian: the best that a model can be that knows no more than mean and
    covariance.

    Attributes:
        mean: (C, H, W).
        covariance: (D, D), D = C H W, in the order of `mean.flatten()`; symmetric, no negative
            eigenvalue.
    """

    mean: Tensor
    covariance: Tensor

    def __post_init__(self) -> None:
        """Raises ValueError unless the shapes agree."""
        d = self.mean.numel()
        if self.mean.ndim != 3 or self.covariance.shape != (d, d):
            shapes = f"{tuple(self.mean.shape)} and {tuple(self.covariance.shape)}"
            raise ValueError(f"mean and covariance must be (C, H, W) and (CHW, CHW), not {shapes}")


Law = FiniteSet | Gaussian | Checkerboards | Sea | House


def posterior(law: Law, x_t: Tensor, alpha_bar: float | Tensor) -> Posterior:
    """What noisy pictures say about the clean ones, if those come from this law.

    Computed in float64, and differentiable in x_t.

    Args:
        law: a world, or a set of pictures or latents.
        x_t: sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps, (B, C, H, W).
        alpha_bar: in [0, 1), one number or (B,); 0 is pure noise.

    Raises:
        ValueError: a shape or alpha_bar is wrong.
        TypeError: the law is none of these.
    """
    a = torch.as_tensor(alpha_bar, dtype=torch.float64, device=x_t.device)
    if a.shape not in ((), x_t.shape[:1]) or not ((a >= 0) & (a < 1)).all():
        raise ValueError(f"alpha_bar must be in [0, 1), one number or ({len(x_t)},), not {a}")
    a = a.expand(len(x_t))
    match law:
        case FiniteSet():
            shape = law.atoms.shape[1:]
        case Gaussian():
            shape = law.mean.shape
        case Checkerboards() | Sea() | House():
            shape = torch.Size([law.channels, x_t.shape[-1], x_t.shape[-1]])
        case _:
            raise TypeError(
                f"{type(law).__name__} has no posterior; draws from it have: FiniteSet(pictures or "
                "latents, sampled=True)"
            )
    if x_t.ndim != 4 or x_t.shape[1:] != shape:
        raise ValueError(f"x_t must be (B, {', '.join(map(str, shape))}), not {tuple(x_t.shape)}")
    match law:
        case FiniteSet():
            return of_atoms(law.atoms, law.log_weights, x_t, a, sampled=law.sampled)
        case Gaussian():
            return of_gaussian(law, x_t, a)
        case Checkerboards():
            both = law.render(torch.tensor([[0.0], [1.0]]), x_t.shape[-1]).to(x_t.device)
            return of_atoms(both, FiniteSet(both).log_weights, x_t, a)
        case Sea() | House():
            return by_quadrature(law, x_t, a)


def of_gaussian(law: Gaussian, x_t: Tensor, alpha_bar: Tensor) -> Posterior:
    """Along each principal axis of the covariance, with the variance s there (Bishop 2006,
    eq. 2.113 to 2.117):

        log p(x_t) = log N(x_t; sqrt(a) mean, a s + 1 - a)
        E[x0 | x_t] = mean + (x_t - sqrt(a) mean) sqrt(a) s / (a s + 1 - a)
        variance = s (1 - a) / (a s + 1 - a)
    """
    s, axes = torch.linalg.eigh(law.covariance.double())  # (D,), (D, D): an axis per column
    s, mean = s.clamp(min=0), law.mean.double().flatten()
    a = alpha_bar[:, None]  # (B, 1)
    total = a * s + 1 - a  # (B, D): the variance of x_t
    away = (x_t.double().flatten(1) - a**0.5 * mean) @ axes  # (B, D)
    log_prob = -(away.square() / total + (2 * math.pi * total).log()).sum(dim=1) / 2
    endless = torch.full_like(alpha_bar, math.inf)

    def shaped(y: Tensor) -> Tensor:
        return y.view(x_t.shape).to(x_t)

    return Posterior(
        mean=shaped(mean + (away * a**0.5 * s / total) @ axes.T),
        variance=shaped((s * (1 - a) / total) @ axes.T.square()),
        score=shaped(-(away / total) @ axes.T),
        log_prob=log_prob,
        effective_atoms=endless,
        few_atoms=endless < FEW,
    )


def perfect(law: Law, schedule: NoiseSchedule) -> EpsFn:
    """The noise that a perfect model of this law sees: E[eps | x_t] = -sqrt(1 - a) score.

    t may lie between two timesteps, and pictures of a batch may be at different ones.
    """

    def eps_fn(x: Tensor, t: Tensor) -> Tensor:
        table = [schedule.alpha_bar_at(value) for value in t.tolist()]
        alpha_bar = torch.tensor(table, dtype=torch.float64, device=x.device)
        noise_share = (1 - alpha_bar).sqrt().to(x.dtype).view(-1, 1, 1, 1)
        return -noise_share * posterior(law, x, alpha_bar).score

    return eps_fn


def stating(scenes: Sequence[Scene], stated: Mapping[str, str]) -> Tensor:
    """Of which scenes what a caption states (`Scene.describe`) is true: (N,) bool, for
    `FiniteSet.only`. The value `SOME` is true of all but "none".

    This is the law given that the statement is true. A caption tells a little more, by what it
    leaves out.

    Raises:
        AttributeError: scenes have no attribute of this name.
    """

    def agrees(scene: Scene, name: str, value: str) -> bool:
        has: str = getattr(scene, name)
        return has != "none" if value == SOME else has == value

    true = [all(agrees(scene, *item) for item in stated.items()) for scene in scenes]
    return torch.tensor(true, dtype=torch.bool)
