"""A floor under the loss: how small a model's error can be at all, and how much larger its own is.

An error of 0.3 at t = 900 says nothing, since most of it nobody could avoid: the noise hides what
was there. The least error is that of a perfect model, E[x0 | x_t], over the law of all pictures.
That law is known only by draws from it, but these give a bracket (for x0, per number):

    lower   the draws as atoms, the validation picture itself among them. Who knows that the answer
            is one of these N pictures knows more than the law, and errs less.
    upper   the same atoms without the picture itself. That is a function of x_t like any model,
            and so errs no less than the perfect one: what can be reached.

Both hold on average over draws. At high noise they meet; at low noise, where no two pictures look
alike, they part, and say little. The error in eps is that in x0 times alpha_bar / (1 - alpha_bar),
so their ratios are the same.

    floors = floor(validation, latents, schedule, ts=(700, 800, 900))
    print(in_words(compare(eps_fn, floors, validation, schedule)))

It is the plain error, of the law without a caption. A loss that is weighted, or knows captions, has
another floor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.schedule import NoiseSchedule, noised
from ldm.worlds.atoms import of_atoms
from ldm.worlds.posterior import EpsFn

BATCH = 64


@dataclass(frozen=True)
class Floor:
    """The bracket at one timestep.

    Attributes:
        t, alpha_bar: the timestep, and what is left of the picture there.
        lower_each, upper_each: the mean squared error in x0 of each validation picture, (M,)
            float64.
        atoms: how many atoms are effective in `upper`, the median; below `FEW` it is these draws
            that are known, and not the law.
    """

    t: int
    alpha_bar: float
    lower_each: Tensor = field(repr=False)
    upper_each: Tensor = field(repr=False)
    atoms: float

    @property
    def x0_lower(self) -> float:
        """No model errs less, on average."""
        return self.lower_each.mean().item()

    @property
    def x0_upper(self) -> float:
        """A model can err as little as this."""
        return self.upper_each.mean().item()

    @property
    def lower(self) -> float:
        """`x0_lower` as an error in eps."""
        return self.x0_lower * self.eps_share

    @property
    def upper(self) -> float:
        """`x0_upper` as an error in eps."""
        return self.x0_upper * self.eps_share

    @property
    def eps_share(self) -> float:
        """Error in eps / error in x0, as sqrt(a) x0 + sqrt(1 - a) eps = x_t is fixed."""
        return self.alpha_bar / (1 - self.alpha_bar)

    @property
    def width(self) -> float:
        """upper / lower - 1: what is not known of the floor."""
        return ratio(self.x0_upper, self.x0_lower) - 1


@dataclass(frozen=True)
class Excess:
    """A model's error at one timestep beside the floor, on the same pictures and noise.

    Attributes:
        floor: the bracket.
        error: the model's mean squared error in eps.
        excess: error / floor.upper - 1: above 0 it is this much worse than what can be reached.
        margin: 1.96 standard errors of `excess`, from the differences picture by picture.
    """

    floor: Floor
    error: float
    excess: float
    margin: float


def floor(
    validation: Tensor,
    atoms: Tensor,
    schedule: NoiseSchedule,
    ts: Sequence[int],
    *,
    seed: int = 0,
) -> list[Floor]:
    """The bracket at each timestep.

    The other validation pictures are atoms as well: they too are draws from the law.

    Args:
        validation: M pictures or latents, as the model has to denoise them, (M, C, H, W). Some
            hundred: in much noise all that is at stake are a few numbers of each (is it night?),
            and 192 scenes of Horizon leave a margin of 3 to 5% in `Excess`.
        atoms: other draws from the same law, (N, C, H, W), none of them in `validation`; the more,
            the narrower the bracket.
        schedule: gives alpha_bar.
        ts: timesteps.
        seed: of the noise, the same at every timestep.

    Raises:
        ValueError: shapes differ, or a timestep is outside the table.
    """
    if validation.shape[1:] != atoms.shape[1:] or validation.ndim != 4 or not len(validation):
        shapes = f"(N, C, H, W), not {tuple(validation.shape)} and {tuple(atoms.shape)}"
        raise ValueError(f"validation and atoms must be (M, C, H, W) and {shapes}")
    known = torch.cat([validation, atoms.to(validation)])
    even = torch.zeros(len(known), dtype=torch.float64, device=known.device)
    noise = noise_of(validation, seed)
    floors = []
    for t in ts:
        schedule.check_timestep(t)
        alpha_bar = schedule.alpha_bar_at(t)
        x_t = noised(validation, noise, alpha_bar)
        lower, upper, effective = [], [], []
        for index in torch.arange(len(validation)).split(BATCH):
            x, x0 = x_t[index], validation[index]
            a = torch.full((len(x),), alpha_bar, dtype=torch.float64, device=x.device)
            without = even.repeat(len(x), 1)  # (B, M + N)
            without[torch.arange(len(x)), index] = -torch.inf
            others = of_atoms(known, without, x, a)
            lower.append(squared(of_atoms(known, even, x, a).mean - x0))
            upper.append(squared(others.mean - x0))
            effective.append(others.effective_atoms)
        median = torch.cat(effective).median().item()
        floors.append(Floor(t, alpha_bar, torch.cat(lower), torch.cat(upper), median))
    return floors


@torch.no_grad()
def compare(
    eps_fn: EpsFn,
    floors: Sequence[Floor],
    validation: Tensor,
    schedule: NoiseSchedule,
    *,
    seed: int = 0,
    batch: int = 16,
) -> list[Excess]:
    """A model's own error beside each floor; `validation` and `seed` as they were there.

    Floors of pure noise are left out: there x_t is eps, and seeing it no achievement.

    Args:
        eps_fn: predicts the noise: eps_fn(x, t), t int64 (B,).
        batch: how many pictures the model is asked about at one time.
    """
    noise = noise_of(validation, seed)
    found = []
    for known in floors:
        if known.alpha_bar == 0:
            continue
        x_t = noised(validation, noise, known.alpha_bar)
        parts = [
            squared(eps_fn(x, torch.full((len(x),), known.t, device=x.device)) - eps)
            for x, eps in zip(x_t.split(batch), noise.split(batch), strict=True)
        ]
        error = torch.cat(parts)  # (M,)
        above = error - known.upper_each * known.eps_share
        spread = 1.96 * above.std().item() / len(above) ** 0.5
        mean = error.mean().item()
        excess, margin = ratio(mean, known.upper) - 1, ratio(spread, known.upper)
        found.append(Excess(known, mean, excess, margin))
    return found


def noise_of(validation: Tensor, seed: int) -> Tensor:
    """The noise that both are measured with, drawn on the CPU as the samplers do."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(validation.shape, generator=generator).to(validation)


def ratio(error: float, least: float) -> float:
    """error / least; infinite where there need be none."""
    return error / least if least > 0 else math.inf


def squared(error: Tensor) -> Tensor:
    """The mean square of each picture: (B, C, H, W) -> (B,) float64."""
    return error.double().square().flatten(1).mean(dim=1)


# What is decided while so much of the picture is left, from noise to picture.
DECIDED = ((0.1, "layout"), (0.6, "objects"), (1.0, "detail"))


def in_words(measured: Sequence[Excess], tolerance: float = 0.05) -> str:
    """What a training run should hear: where the model is further above what can be reached than
    the tolerance, beyond the noise of the measurement, and what is decided there.

        from t = 880 up 19% above what can be reached: layout is undertrained
    """
    ordered = sorted(measured, key=lambda one: one.floor.t)
    if not ordered:
        return "nothing was measured"
    sentences, least = [], -1.0
    for most, what in DECIDED:
        band = [one for one in ordered if least < one.floor.alpha_bar <= most]
        least = most
        behind = [one for one in band if one.excess - one.margin > 0 and one.excess > tolerance]
        if not behind:
            continue
        low, high = behind[0].floor.t, behind[-1].floor.t
        where = f"from t = {low} " + ("up" if high == ordered[-1].floor.t else f"to {high}")
        if low == high:
            where = f"at t = {low}"
        above = f"{max(one.excess for one in behind):.0%} above what can be reached"
        verb = "are" if what == "objects" else "is"
        sentences.append(f"{where} {above}: {what} {verb} undertrained")
    if sentences:
        return "; ".join(sentences)
    return f"within {tolerance:.0%} of what can be reached, as far as that is known"
