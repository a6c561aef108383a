"""The floor under the loss, against that of a law whose floor is known."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.schedule import NoiseSchedule, eps_from_x0, noised
from ldm.worlds.floor import Excess, Floor, compare, floor, in_words, noise_of, squared
from ldm.worlds.posterior import Gaussian, perfect, posterior
from tests.helpers import rng

SCHEDULE = NoiseSchedule()
# A law of so few numbers that some hundred draws lie close together.
LAW = Gaussian(torch.ones(1, 2, 2), torch.tensor([1.5, 0.7, 0.5, 0.3]).diag())
TS = (400, 700, 900, 999)


def draws(n: int, seed: int) -> Tensor:
    z = torch.randn(n, 4, generator=rng(seed))
    return (1 + z * LAW.covariance.diagonal().sqrt()).view(n, 1, 2, 2)


VALIDATION, ATOMS = draws(300, 1), draws(100, 2)
FLOORS = floor(VALIDATION, ATOMS, SCHEDULE, TS)


def test_the_bracket_holds_the_least_error_there_is() -> None:
    """On average over draws: so here but for twice the standard error, and where the bracket is
    wider than that, without it."""
    for known in FLOORS:
        x_t = noised(VALIDATION, noise_of(VALIDATION, 0), known.alpha_bar)
        best = posterior(LAW, x_t, known.alpha_bar)
        least = squared(best.mean - VALIDATION)
        below, above = least - known.lower_each, known.upper_each - least
        for gap in (below, above):
            assert gap.mean() > -2 * gap.std() / len(gap) ** 0.5, known
        if known.width > 0.02:
            assert known.x0_lower < least.mean() < known.x0_upper
        assert least.mean().item() == pytest.approx(best.variance.mean().item(), rel=0.15)
    assert FLOORS[0].width > 0.02


def test_the_bracket_narrows_with_the_noise_and_with_more_atoms() -> None:
    widths = [known.width for known in FLOORS]
    assert widths == sorted(widths, reverse=True) and widths[-1] > 0
    fewer = floor(VALIDATION[:60], ATOMS, SCHEDULE, (700,))[0]
    more = floor(VALIDATION[:60], draws(1500, 3), SCHEDULE, (700,))[0]
    assert more.width < fewer.width / 2 and more.atoms > 5 * fewer.atoms


def test_an_error_in_eps_is_that_in_x0_times_the_signal_to_noise_ratio() -> None:
    for known in FLOORS:
        noise = noise_of(VALIDATION, 0)
        x_t = noised(VALIDATION, noise, known.alpha_bar)
        guess = VALIDATION.mean(dim=0).expand_as(x_t)
        in_eps = (eps_from_x0(x_t, guess, known.alpha_bar) - noise).square().mean().item()
        in_x0 = (guess - VALIDATION).square().mean().item()
        assert in_eps == pytest.approx(in_x0 * known.eps_share, rel=1e-3)
        assert known.upper == known.x0_upper * known.eps_share


def test_a_perfect_model_is_not_above_what_can_be_reached_and_a_poor_one_is_told_by_how_much() -> (
    None
):
    model = perfect(LAW, SCHEDULE)
    for one in compare(model, FLOORS, VALIDATION, SCHEDULE):
        assert -0.1 < one.excess < one.margin

    def poor(x: Tensor, t: Tensor) -> Tensor:
        """Errs by 0.1 in each number, where there is nearly no picture left."""
        return model(x, t) + 0.1 * (t >= 900).float().view(-1, 1, 1, 1)

    found = compare(poor, FLOORS, VALIDATION, SCHEDULE)
    for one in found:
        plain = compare(model, [one.floor], VALIDATION, SCHEDULE)[0]
        added = 0.01 if one.floor.t >= 900 else 0.0
        assert one.error == pytest.approx(plain.error + added, abs=0.004)
        assert one.margin > 0
    assert in_words(found).startswith("from t = 900 up ")
    assert in_words(found).endswith("above what can be reached: layout is undertrained")


def test_the_same_seed_is_the_same_noise() -> None:
    again = floor(VALIDATION, ATOMS, SCHEDULE, (999, 700))
    assert [a.x0_upper for a in again] == [FLOORS[3].x0_upper, FLOORS[1].x0_upper]
    other = floor(VALIDATION, ATOMS, SCHEDULE, (700,), seed=1)[0]
    assert other.x0_upper != FLOORS[1].x0_upper


def test_of_pure_noise_there_is_a_floor_but_no_excess() -> None:
    schedule = NoiseSchedule(ScheduleConfig(num_train_timesteps=2, betas=(0.2, 1.0)))
    floors = floor(VALIDATION[:50], ATOMS[:50], schedule, (0, 1))
    assert floors[1].upper == 0.0 and floors[1].x0_upper > 0.4
    found = compare(perfect(LAW, schedule), floors, VALIDATION[:50], schedule)
    assert [one.floor.t for one in found] == [0]


def test_shapes_and_timesteps_are_checked() -> None:
    with pytest.raises(ValueError, match="validation and atoms must be"):
        floor(VALIDATION, ATOMS[:, :, :1], SCHEDULE, (1,))
    with pytest.raises(ValueError, match="timesteps must be between 0 and 999, not 1000"):
        floor(VALIDATION, ATOMS, SCHEDULE, (1000,))


# ------------------------------------------------------------------------------------- in words


def measured(*rows: tuple[int, float, float]) -> list[Excess]:
    """(t, excess, margin) each, with Horizon's schedule."""
    one = torch.ones(2).double()
    return [
        Excess(Floor(t, SCHEDULE.alpha_bar_at(t), 0.9 * one, one, 50.0), 1 + above, above, margin)
        for t, above, margin in rows
    ]


def test_what_is_undertrained_is_said_in_words() -> None:
    rows = [(300, -0.2, 0.1), (700, -0.15, 0.04), (880, 0.17, 0.02), (900, 0.19, 0.02)]
    told = in_words(measured(*rows, (990, 0.18, 0.02)))
    assert told == "from t = 880 up 19% above what can be reached: layout is undertrained"


def test_every_band_has_its_word_and_chance_is_no_finding() -> None:
    rows = [(50, 0.5, 0.1), (400, 0.06, 0.0), (500, 0.3, 0.01), (800, 0.2, 0.3), (990, 0.04, 0.0)]
    told = in_words(measured(*rows[::-1]))
    assert told == (
        "from t = 400 to 500 30% above what can be reached: objects are undertrained; "
        "at t = 50 50% above what can be reached: detail is undertrained"
    )


def test_a_good_model_is_told_so_and_no_model_nothing() -> None:
    within = "within 5% of what can be reached, as far as that is known"
    assert in_words(measured((500, -0.3, 0.1), (900, 0.02, 0.01))) == within
    assert in_words([]) == "nothing was measured"
    worse = dataclasses.replace(measured((900, 0.08, 0.01))[0])
    assert in_words([worse], tolerance=0.1) == within.replace("5", "10")
