"""Inversion: DDIM up the grid and down again, on a Gaussian whose exact denoiser is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.samplers import ddim, invert, rising
from ldm.schedule import NoiseSchedule, output_from, x0_from_eps
from tests.helpers import randn

SCHEDULE = NoiseSchedule()
MEAN, STD = 0.3, 0.8


def eps_fn(x: Tensor, t: Tensor) -> Tensor:
    """The exact noise where pictures are N(MEAN, STD^2)."""
    alpha_bar = SCHEDULE.alpha_bar[t].double().view(-1, 1, 1, 1)
    residual = x - MEAN * alpha_bar.sqrt()
    return (1 - alpha_bar).sqrt() * residual / (STD**2 * alpha_bar + 1 - alpha_bar)


def pictures() -> Tensor:
    return MEAN + STD * randn(2, 4, 8, 8, dtype=torch.float64)


def round_trip(steps: int) -> float:
    x0, grid = pictures(), SCHEDULE.ddim_timesteps(steps)
    *_, last = invert(eps_fn, x0, rising(grid), SCHEDULE)
    *_, again = ddim(eps_fn, last.x_prev, grid, SCHEDULE)
    return float((again.x_prev - x0).std() / x0.std())


def test_a_round_trips_error_falls_with_the_number_of_steps() -> None:
    """Half as much for twice as many."""
    errors = [round_trip(steps) for steps in (50, 100, 200, 1000)]
    print("of the pictures' standard deviation:", [f"{error:.2g}" for error in errors])
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.1)
    assert errors[2] == pytest.approx(errors[1] / 2, rel=0.1)
    assert errors[3] < 0.005


def test_inversion_ends_in_the_noise_that_the_flow_leads_to() -> None:
    """In a Gaussian world x / sqrt(its variance) stays what it is along the flow."""
    x0 = pictures()
    *_, last = invert(eps_fn, x0, rising(SCHEDULE.ddim_timesteps(1000)), SCHEDULE)
    first, end = SCHEDULE.alpha_bar_at(0), last.alpha_bar_prev
    start = (x0 - MEAN * first**0.5) / (STD**2 * first + 1 - first) ** 0.5
    expected = MEAN * end**0.5 + start * (STD**2 * end + 1 - end) ** 0.5
    assert float((last.x_prev - expected).std()) < 0.01


def test_the_steps_are_those_of_the_rising_grid() -> None:
    grid = SCHEDULE.ddim_timesteps(4)
    assert rising(grid) == [(0, 1), (1, 251), (251, 501), (501, 751)]
    steps = list(invert(eps_fn, pictures(), rising(grid), SCHEDULE))
    assert [(step.t, step.t_prev) for step in steps] == rising(grid)
    assert torch.equal(steps[0].x, pictures())
    assert torch.equal(steps[0].x0, x0_from_eps(steps[0].x, steps[0].eps, steps[0].alpha_bar))


@pytest.mark.parametrize("prediction", ["v", "x0", "flow"])
def test_whatever_the_model_predicts_the_way_is_the_same(prediction: str) -> None:
    def says(x: Tensor, t: Tensor) -> Tensor:
        alpha_bar, eps = SCHEDULE.alpha_bar[t].double().view(-1, 1, 1, 1), eps_fn(x, t)
        return output_from(prediction, x0_from_eps(x, eps, alpha_bar), eps, alpha_bar)

    grid = rising(SCHEDULE.ddim_timesteps(20))
    *_, last = invert(says, pictures(), grid, SCHEDULE, prediction=prediction)
    *_, expected = invert(eps_fn, pictures(), grid, SCHEDULE)
    torch.testing.assert_close(last.x_prev, expected.x_prev)


@pytest.mark.parametrize(
    ("timesteps", "line"),
    [
        (SCHEDULE.ddim_timesteps(4), r"must be rising, from picture to noise, not \(751, 501\)"),
        ([(-1, 5)], "must be between 0 and 999, not -1"),
        ([5, 9], "must be pairs"),
    ],
    ids=["falling", "clean", "no pairs"],
)
def test_a_grid_that_does_not_rise_is_refused_at_the_call(timesteps: list, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        invert(eps_fn, pictures(), timesteps, SCHEDULE)
