"""How far what was drawn is from a law that is known, and how far luck alone would have brought it.

All of it is by simulation: so many draws from the law itself, of the same number, show what to
expect. Everything random takes its generator.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm.evaluate.prompts import lower_bound
from ldm.worlds.distribution import TRUNCATION

Array = npt.NDArray[np.float64]

DRAWS = 1000  # from the law: a p-value is 1 in 1,001 or more
Z = 1.96  # standard errors on either side of a 95% interval


def interval(right: int, total: int) -> tuple[float, float]:
    """The 95% confidence interval of a share (Wilson 1927); NaN of nothing."""
    return lower_bound(right, total), 1 - lower_bound(total - right, total)


@dataclass(frozen=True)
class Shift:
    """How far counts are from a law.

    Attributes:
        total: how many were counted.
        tv: total variation, half the sum of |share - probability|: 0 to 1.
        noise: its mean over draws of as many from the law itself.
        margin: 1.96 standard errors of `tv`, by bootstrap.
        chi_square: Pearson's; infinite where something was seen that the law excludes.
        p: how often draws from the law have as large a chi-square.
    """

    total: int
    tv: float
    noise: float
    margin: float
    chi_square: float
    p: float

    @property
    def excess(self) -> float:
        """`tv` less what luck alone brings: about 0 for the law itself."""
        return self.tv - self.noise

    def as_dict(self) -> dict[str, float | int | None]:
        """For programs; no infinity, which JSON has not."""
        chi = self.chi_square if math.isfinite(self.chi_square) else None
        return {
            "total": self.total,
            "tv": self.tv,
            "noise": self.noise,
            "excess": self.excess,
            "margin": self.margin,
            "chi_square": chi,
            "p": self.p,
        }


def shift(counts: Mapping[Any, int], law: Mapping[Any, float], rng: np.random.Generator) -> Shift:
    """Counts by value, one at least, held against the values' probabilities."""
    keys: list[Hashable] = list(dict.fromkeys([*law, *counts]))
    seen = np.array([counts.get(key, 0) for key in keys], dtype=np.int64)  # (K,)
    p = np.array([law.get(key, 0.0) for key in keys])
    p /= p.sum()
    total = int(seen.sum())
    drawn = rng.multinomial(total, p, DRAWS)  # (DRAWS, K)
    again = rng.multinomial(total, seen / total, DRAWS)
    chi_square = float(_chi_square(seen, p))
    as_large = int((_chi_square(drawn, p) >= chi_square - 1e-9).sum())
    return Shift(
        total=total,
        tv=float(total_variation(seen, p)),
        noise=float(total_variation(drawn, p).mean()),
        margin=Z * float(total_variation(again, p).std()),
        chi_square=chi_square,
        p=(1 + as_large) / (1 + DRAWS),
    )


def total_variation(counts: npt.NDArray[np.int64], p: Array) -> Array:
    """Half the sum of |share - probability|, of counts (..., K) against p (K,): (...)."""
    shares = counts / counts.sum(-1, keepdims=True)
    distance: Array = np.abs(shares - p).sum(-1) / 2
    return distance


def _chi_square(counts: npt.NDArray[np.int64], p: Array) -> Array:
    """Pearson's chi-square of counts (..., K) against p (K,): (...)."""
    expected = counts.sum(-1, keepdims=True) * p
    possible = p > 0
    terms = (counts - expected)[..., possible] ** 2 / expected[..., possible]
    excluded = counts[..., ~possible].sum(-1) > 0
    return np.where(excluded, np.inf, terms.sum(-1))


@dataclass(frozen=True)
class Closeness:
    """How far numbers are from a law: the Kolmogorov-Smirnov test.

    Attributes:
        total: how many numbers there are.
        distance: the largest between the shares below a value, as drawn and by the law: 0 to 1.
        p: how often as many draws from the law are as far from it.
    """

    total: int
    distance: float
    p: float

    def as_dict(self) -> dict[str, float | int]:
        """For programs."""
        return dict(vars(self))


def kolmogorov_smirnov(shares: Sequence[float]) -> Closeness:
    """Numbers, one at least, told as the share of the law that is below each: by the law itself
    these are uniform between 0 and 1, whatever it is, and so is the simulation."""
    drawn = np.array(shares, dtype=np.float64)
    distance = float(_distance(drawn[None])[0])
    as_far = int((_uniform_distances(len(drawn)) >= distance - 1e-12).sum())
    return Closeness(len(drawn), distance, (1 + as_far) / (1 + DRAWS))


def _distance(shares: Array) -> Array:
    """Of rows (R, n) in [0, 1] from the uniform law: (R,)."""
    n = shares.shape[1]
    ordered, steps = np.sort(shares, axis=1), np.arange(n + 1) / n
    distance: Array = np.maximum(steps[1:] - ordered, ordered - steps[:-1]).max(1)
    return distance


@lru_cache(maxsize=512)
def _uniform_distances(n: int) -> Array:
    return _distance(np.random.default_rng(n).random((DRAWS, n)))


def share_below(z: float) -> float:
    """The share of the world's Gaussians, which are cut at `TRUNCATION` standard deviations, that
    is below z of them."""

    def normal(z: float) -> float:
        return (1 + math.erf(z / math.sqrt(2))) / 2

    low = normal(-TRUNCATION)
    return min(max((normal(z) - low) / (1 - 2 * low), 0.0), 1.0)


def diversity(drawn: Array, fresh: Array) -> tuple[float, float, float]:
    """How different pictures (n, D) are from each other: the mean distance of two of them, as a
    share of that of fresh ones (m, D), and its 95% interval by jackknife. NaN below 3 of each."""
    if min(len(drawn), len(fresh)) < 3:
        return (math.nan,) * 3
    logs, variance = [], 0.0
    for rows in (drawn, fresh):
        distances, n = _distances(rows, rows), len(rows)
        total = distances.sum()
        logs.append(math.log(max(total / (n * (n - 1)), 1e-12)))
        without = (total - 2 * distances.sum(1)) / ((n - 1) * (n - 2))  # (n,): each left out
        without = np.log(np.maximum(without, 1e-12))
        variance += (n - 1) / n * float(((without - without.mean()) ** 2).sum())
    log, margin = logs[0] - logs[1], Z * math.sqrt(variance)
    return math.exp(log), math.exp(log - margin), math.exp(log + margin)


def nearest(rows: Array, others: Array) -> Array:
    """The distance of each row (n, D) to the nearest of the others (m, D): (n,)."""
    distance: Array = _distances(rows, others).min(1)
    return distance


def _distances(a: Array, b: Array) -> Array:
    """Root mean square differences of rows (n, D) and (m, D): (n, m)."""
    square = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    distance: Array = np.sqrt(np.maximum(square, 0) / a.shape[1])
    return distance
