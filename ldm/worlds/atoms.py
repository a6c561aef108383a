"""What a noisy picture says about the clean one, if that is one of finitely many: exactly.

With x_t = sqrt(a) x0 + sqrt(1 - a) eps (DDPM eq. 4; a is alpha_bar) and x0 one of N atoms, Bayes'
rule gives each atom its probability, and the rest is averages:

    w_n = p_n N(x_t; sqrt(a) atom_n, 1 - a) / p(x_t)        p(x_t) = the sum of the numerators
    E[x0 | x_t] = sum of w_n atom_n                         what a perfect model predicts
    score = grad log p(x_t) = (sqrt(a) E[x0 | x_t] - x_t) / (1 - a)         (Tweedie's formula)

At a = 0 nothing is left of the picture: w_n = p_n, and the score is that of N(0, 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

FEW = 30
"""Effective atoms. Where fewer draws of a larger law stand in for it, they are too few."""

CHUNK = 2**22
"""Numbers of the atoms that are in float64 at one time: 32 MiB."""


@dataclass(frozen=True)
class Posterior:
    """What x_t says: each is in x_t's dtype, or float64 where it has no picture's shape.

    Attributes:
        mean: E[x0 | x_t], (B, C, H, W): the x0 with the least expected squared error.
        variance: of each number of x0 given x_t, (B, C, H, W). Its mean is the least error.
        score: the gradient of log p(x_t), (B, C, H, W).
        log_prob: log p(x_t) in nats, (B,).
        effective_atoms: 1 / sum of w^2, (B,), from 1 to N; infinite where a law is continuous.
        few_atoms: (B,) bool, whether draws stand in for a larger law, and fewer than `FEW` of
            them are near: then the mean is more that of these draws than that of the law.
    """

    mean: Tensor
    variance: Tensor
    score: Tensor
    log_prob: Tensor
    effective_atoms: Tensor
    few_atoms: Tensor


@dataclass(frozen=True)
class FiniteSet:
    """A law of finitely many pictures or latents.

    Attributes:
        atoms: (N, C, H, W).
        weights: (N,) what each counts, of any sum; None is all alike.
        sampled: whether the atoms are draws that stand in for a larger law.
    """

    atoms: Tensor
    weights: Tensor | None = None
    sampled: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError unless there are atoms, and a weight for each."""
        if self.atoms.ndim != 4 or not len(self.atoms):
            raise ValueError(f"atoms must be (N, C, H, W), not {tuple(self.atoms.shape)}")
        weights = self.weights
        if weights is None:
            return
        if weights.shape != self.atoms.shape[:1]:
            raise ValueError(f"weights must be ({len(self.atoms)},), not {tuple(weights.shape)}")
        if not (weights >= 0).all() or not 0 < weights.sum() < math.inf:
            raise ValueError("weights must be 0 or more, finite, and not all 0")

    @property
    def log_weights(self) -> Tensor:
        """The logarithms of the atoms' probabilities, (N,) float64."""
        if self.weights is None:
            n = len(self.atoms)
            return torch.full((n,), -math.log(n), dtype=torch.float64, device=self.atoms.device)
        return (self.weights.double() / self.weights.double().sum()).log()

    def only(self, mask: Tensor) -> FiniteSet:
        """Those atoms whose place in `mask`, (N,) bool, is true: the law under a condition."""
        weights = None if self.weights is None else self.weights[mask]
        return FiniteSet(self.atoms[mask], weights, self.sampled)


def of_atoms(
    atoms: Tensor, log_weights: Tensor, x_t: Tensor, alpha_bar: Tensor, *, sampled: bool = False
) -> Posterior:
    """The equations above, in float64. They are differentiable in x_t.

    Args:
        atoms: (N, C, H, W).
        log_weights: log p_n, (N,), or (B, N) where each x_t has its own.
        x_t: (B, C, H, W).
        alpha_bar: (B,) float64 in [0, 1).
    """
    x, a = x_t.double().flatten(1), alpha_bar[:, None]  # (B, D), (B, 1)
    logits = log_likelihoods(atoms, x_t, alpha_bar) + log_weights  # (B, N)
    log_prob = torch.logsumexp(logits, dim=1)
    w = (logits - log_prob[:, None]).exp()

    mean, square = torch.zeros_like(x), torch.zeros_like(x)
    start = 0
    for chunk in in_float64(atoms):
        part = w[:, start : start + len(chunk)]
        mean, square = mean + part @ chunk, square + part @ chunk.square()
        start += len(chunk)
    score = (a**0.5 * mean - x) / (1 - a)
    effective = 1 / w.square().sum(dim=1)

    def shaped(y: Tensor) -> Tensor:
        return y.view(x_t.shape).to(x_t)

    return Posterior(
        mean=shaped(mean),
        variance=shaped((square - mean.square()).clamp(min=0)),
        score=shaped(score),
        log_prob=log_prob,
        effective_atoms=effective,
        few_atoms=effective < (FEW if sampled else 0),
    )


def log_likelihoods(atoms: Tensor, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """log N(x_t; sqrt(a) atom, 1 - a) for each x_t and atom: (B, N) float64.

    |x - sqrt(a) atom|^2 is multiplied out: so it is one matrix product, and no (B, N, D).
    """
    x, a = x_t.double().flatten(1), alpha_bar[:, None]
    rows = [
        2 * a**0.5 * (x @ chunk.T) - a * chunk.square().sum(dim=1) for chunk in in_float64(atoms)
    ]
    distance = x.square().sum(dim=1, keepdim=True) - torch.cat(rows, dim=1)  # (B, N)
    return -distance / (2 * (1 - a)) - x.shape[1] / 2 * (2 * math.pi * (1 - a)).log()


def in_float64(atoms: Tensor) -> Iterator[Tensor]:
    """The atoms as rows, (n, D) float64, as many at one time as `CHUNK` allows."""
    rows = atoms.flatten(1)
    for chunk in rows.split(max(1, CHUNK // rows.shape[1])):
        yield chunk.double()


def joined(parts: list[Posterior]) -> Posterior:
    """The posteriors of the parts of a batch as one of the batch."""
    return Posterior(
        *(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Posterior))
    )
