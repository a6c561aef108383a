"""Rules that look back: they fit a polynomial to what the model said at the steps before.

One call of the model a step gives a higher order so. PLMS does it with eps; the others with x0 and
in lambda = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)), half the logarithm of the signal-to-noise
ratio, where the flow has an exact solution but for one integral of x0 (Lu et al. 2022,
arXiv:2211.01095, eq. 9, "DPM-Solver++"):

    x' = (s' / s) x + a' (1 - e^-h) x0,  a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar)

with h = lambda' - lambda, if x0 stays what it is; what comes on top is how it changes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from torch import Tensor

from ldm.samplers.loop import Known
from ldm.samplers.solvers import along, euler_rule

# --- In eps ----------------------------------------------------------------------------------

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""The weights of the newest eps, the one before it, and so on, for 1 to 4 of them."""


def plms_rule(known: Known) -> Tensor:
    """PLMS (Liu et al. 2022, arXiv:2202.09778, eq. 12): DDIM's step along a mean of the last four
    eps, whose weights are Adams' and Bashforth's. The first step has none to look back at, and asks
    once more at its end, as CompVis' `PLMSSampler` does (Heun's method, in other words)."""
    past: tuple[Tensor, ...] = known.memory.get("eps", ())
    known.memory["eps"] = (known.eps, *past[:2])
    if not past and known.alpha_bar_prev < 1.0:
        return along(known, (known.eps + known.ask(euler_rule(known), known.there)) / 2)
    weights = ADAMS_BASHFORTH[len(past)]
    mean = weights[0] * known.eps
    for weight, eps in zip(weights[1:], past, strict=True):
        mean = mean + weight * eps
    return along(known, mean)


# --- In x0 and lambda ------------------------------------------------------------------------


def log_snr(alpha_bar: float) -> float:
    """lambda: minus infinity in pure noise, infinity in the clean picture."""
    if alpha_bar in (0.0, 1.0):
        return math.inf if alpha_bar else -math.inf
    return math.log(alpha_bar / (1 - alpha_bar)) / 2


def interval(known: Known) -> float:
    """h, how far the step goes in lambda."""
    return log_snr(known.alpha_bar_prev) - log_snr(known.alpha_bar)


def change(known: Known) -> Tensor | None:
    """D_1: how much x0 changes over the step, by its slope in lambda since the step before. None at
    the first step, and where the step ends in the clean picture, at lambda = infinity. What the
    next step needs is kept."""
    here, there = log_snr(known.alpha_bar), log_snr(known.alpha_bar_prev)
    before: tuple[float, Tensor] | None = known.memory.get("before")
    known.memory["before"] = (here, known.x0)
    if before is None or before[0] == here or there == math.inf:
        return None
    # h / h_0, which is 0 where the step before came from pure noise.
    return (there - here) / (here - before[0]) * (known.x0 - before[1])


def towards(known: Known, d1: Tensor | None) -> Tensor:
    """x' = (s' / s) x + a' (1 - e^-h) (x0 + D_1 / 2), the flow's solution (Lu et al. 2022, eq. 9)
    with x0 as it is half-way; without D_1 it is DDIM's step."""
    ratio = ((1 - known.alpha_bar_prev) / (1 - known.alpha_bar)) ** 0.5
    x0 = known.x0 if d1 is None else known.x0 + d1 / 2
    return ratio * known.x - known.alpha_bar_prev**0.5 * math.expm1(-interval(known)) * x0


def dpmpp_2m_rule(known: Known) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2)."""
    return towards(known, change(known))


def dpmpp_2m_sde_rule(known: Known) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, section 3.4): the same for the
    reverse SDE, which forgets twice as fast, and draws anew what it forgets:

    x' = (s' / s) e^-h x + a' (1 - e^-2h) (x0 + D_1 / 2) + s' sqrt(1 - e^-2h) z
    """
    h, d1 = interval(known), change(known)
    x0 = known.x0 if d1 is None else known.x0 + d1 / 2
    ratio = ((1 - known.alpha_bar_prev) / (1 - known.alpha_bar)) ** 0.5
    fresh = -math.expm1(-2 * h)
    mean = ratio * math.exp(-h) * known.x + known.alpha_bar_prev**0.5 * fresh * x0
    if known.alpha_bar_prev == 1.0:
        return mean
    return mean + ((1 - known.alpha_bar_prev) * fresh) ** 0.5 * known.draw()


def unipc_rule(known: Known, corrector: bool = True) -> Tensor:
    """UniPC of order 2 (Zhao et al. 2023, arXiv:2302.04867, algorithms 1 and 2, "bh2"): predict as
    DPM-Solver++(2M) does; then, once the model was asked at the step's end, which the next step
    does anyway, correct the prediction by what it said there. One order more, and no call more.

    The correction is added to x, so that what a caller sends instead of x is kept.
    """
    predicted: Predicted | None = known.memory.get("predicted")
    if corrector and predicted is not None:
        known = dataclasses.replace(known, x=known.x + predicted.correction(known.x0))
    h, before = interval(known), known.memory.get("before")
    d1 = change(known)
    weight = -(known.alpha_bar_prev**0.5) * math.expm1(-h)
    r = 0.0 if d1 is None or before is None else (before[0] - log_snr(known.alpha_bar)) / h
    # A step that stays where it is has nothing to be corrected.
    known.memory["predicted"] = Predicted(known.x0, d1, h, r, weight) if h else None
    return towards(known, d1)


@dataclass(frozen=True)
class Predicted:
    """A step that UniPC has predicted, to be corrected at its end.

    Attributes:
        x0: at its beginning; d1: what was predicted of its change, or None (`change`).
        h: how far it goes in lambda; r: where the step before began, in units of h.
        weight: a' (1 - e^-h), that of x0 in x'.
    """

    x0: Tensor
    d1: Tensor | None
    h: float
    r: float
    weight: float

    def correction(self, x0: Tensor) -> Tensor:
        """What to add to x', now that x0 at the end is known (Zhao et al. 2023, eq. 9)."""
        if self.d1 is None:
            return self.weight / 2 * (x0 - self.x0)
        # Their rho solve rho_1 + rho_2 = b_1 and r rho_1 + rho_2 = b_2, with B(h) = e^-h - 1.
        phi_1 = math.expm1(-self.h)
        phi_2 = phi_1 / -self.h - 1
        phi_3 = phi_2 / -self.h - 1 / 2
        b_1, b_2 = phi_2 / phi_1, 2 * phi_3 / phi_1
        rho_1 = (b_1 - b_2) / (1 - self.r)
        # The prediction had 1 / 2 of D_1, and nothing else.
        return self.weight * ((rho_1 - 1 / 2) * self.d1 + (b_1 - rho_1) * (x0 - self.x0))
