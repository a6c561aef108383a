"""Noise that is handed in, and what lies between two noises."""

from __future__ import annotations

import math

import pytest
import torch

from ldm.samplers import ddpm, draw_noise, handed_in, slerp
from ldm.schedule import NoiseSchedule
from tests.helpers import randn

SCHEDULE = NoiseSchedule()


def test_the_way_between_two_noises_stays_noise() -> None:
    """Half-way along the straight line the standard deviation would be 0.71."""
    start, end = randn(3, 4, 32, 32, seed=1), randn(3, 4, 32, 32, seed=2)
    for share in (0.25, 0.5, 0.75):
        between = slerp(start, end, share)
        assert between.shape == start.shape
        assert between.flatten(1).std(dim=1).tolist() == pytest.approx([1.0] * 3, abs=0.03)
    assert torch.equal(slerp(start, end, 0.0), start)
    assert torch.equal(slerp(start, end, 1.0), end)


def test_equal_angles_lie_between_at_equal_shares() -> None:
    """In the plane: a quarter turn, in thirds."""
    start, end = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    for share in (1 / 3, 2 / 3):
        angle = share * math.pi / 2
        expected = torch.tensor([[math.cos(angle), math.sin(angle)]])
        torch.testing.assert_close(slerp(start, end, share), expected)


def test_where_there_is_no_arc_the_way_is_straight() -> None:
    noise = randn(1, 4, 8, 8)
    torch.testing.assert_close(slerp(noise, 2 * noise, 0.5), 1.5 * noise)
    torch.testing.assert_close(slerp(noise, -noise, 0.25), 0.5 * noise)


def test_image_i_of_a_batch_goes_its_own_way() -> None:
    start, end = randn(2, 4, 8, 8, seed=1), randn(2, 4, 8, 8, seed=2)
    together = slerp(start, end, 0.3)
    for i in range(2):
        assert torch.equal(together[i : i + 1], slerp(start[i : i + 1], end[i : i + 1], 0.3))


def test_a_sampler_takes_noise_that_is_handed_in() -> None:
    noise = [randn(1, 4, 8, 8, seed=k) for k in range(3)]
    steps = list(
        ddpm(
            lambda x, t: 0.1 * x,
            noise[0],
            SCHEDULE.ddpm_timesteps(3),
            SCHEDULE,
            generators=handed_in(noise[1:]),
        )
    )
    with_none = list(
        ddpm(
            lambda x, t: 0.1 * x,
            noise[0],
            SCHEDULE.ddpm_timesteps(3),
            SCHEDULE,
            generators=handed_in(lambda k, shape: torch.zeros(shape)),
        )
    )
    added = (steps[0].x_prev - with_none[0].x_prev) / noise[1]
    assert added.std() < 1e-5 < added.mean()  # one number of times that noise


def test_noise_that_does_not_fit_or_is_too_little_is_told() -> None:
    like = torch.empty(1, 4, 8, 8)
    draw = handed_in([torch.zeros(1, 4, 8, 8)])
    draw_noise(draw, like)
    with pytest.raises(ValueError, match="noise has 1 tensors, and the run draws one more"):
        draw_noise(draw, like)
    with pytest.raises(ValueError, match=r"noise 0 must be a tensor \(1, 4, 8, 8\), not float"):
        draw_noise(handed_in(lambda k, shape: 0.5), like)
