"""The noise schedule against its closed forms."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.config import PREDICTIONS, ScheduleConfig
from ldm.schedule import (
    NoiseSchedule,
    as_eps_fn,
    eps_from_v,
    eps_from_x0,
    even_timesteps,
    noised,
    output_from,
    pair_from,
    pairs,
    v_from_eps,
    x0_from_eps,
    x0_from_v,
)
from tests.helpers import randn

SCHEDULE = NoiseSchedule()


# --- The tables ------------------------------------------------------------------------------


def test_betas_are_squares_of_evenly_spaced_roots() -> None:
    first, last = math.sqrt(0.00085), math.sqrt(0.012)
    expected = [(first + (last - first) * i / 999) ** 2 for i in range(1000)]
    # Computed in float64, cast once: half a unit in the last place of float32, 2^-24.
    torch.testing.assert_close(
        SCHEDULE.betas.double(), torch.tensor(expected, dtype=torch.float64), rtol=2**-24, atol=0
    )


def test_alpha_bar_is_the_product_of_one_minus_beta_rounded_once() -> None:
    """In exact rational arithmetic: a product in float32 would be off by up to 1e-5."""
    first, last = math.sqrt(0.00085), math.sqrt(0.012)
    product, expected = Fraction(1), []
    for i in range(1000):
        product *= 1 - Fraction((first + (last - first) * i / 999) ** 2)
        product = product.limit_denominator(10**30)
        expected.append(float(product))
    # Cast once to float32: half a unit in the last place, 2^-24, and some slack for float64's own
    # thousand roundings (1e-13).
    torch.testing.assert_close(
        SCHEDULE.alpha_bar.double(),
        torch.tensor(expected, dtype=torch.float64),
        rtol=2**-24 + 1e-12,
        atol=0,
    )


def test_alpha_bar_has_sd_v1s_known_values() -> None:
    """Its ends: 1 - 0.00085; and, as sigma = sqrt((1 - alpha_bar) / alpha_bar), the range that
    k-diffusion prints for Stable Diffusion v1, 0.0292 to 14.6146."""
    assert SCHEDULE.alpha_bar[0].item() == pytest.approx(0.99915, abs=1e-7)
    sigma = ((1 - SCHEDULE.alpha_bar) / SCHEDULE.alpha_bar).sqrt()
    assert round(sigma[0].item(), 4) == 0.0292
    assert round(sigma[-1].item(), 4) == 14.6146
    assert (SCHEDULE.alpha_bar.diff() < 0).all()


def test_zero_terminal_snr_ends_in_pure_noise_and_begins_where_it_began() -> None:
    """Lin et al. 2023, algorithm 1, against diffusers' own, which computes it in float32."""
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    rescaled = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True))
    assert rescaled.alpha_bar[-1] == 0 and rescaled.betas[-1] == 1
    assert rescaled.alpha_bar[0] == SCHEDULE.alpha_bar[0]
    root, plain = rescaled.alpha_bar.double().sqrt(), SCHEDULE.alpha_bar.double().sqrt()
    assert (rescaled.alpha_bar.diff() < 0).all()
    slope = (root[0] - root[-1]) / (plain[0] - plain[-1])
    torch.testing.assert_close(root, slope * (plain - plain[-1]), rtol=1e-6, atol=1e-6)
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(SCHEDULE.betas.clone()), dim=0)
    torch.testing.assert_close(rescaled.alpha_bar, theirs, rtol=0, atol=2e-6)
    assert rescaled.timesteps(4) == [999, 749, 499, 249]


def test_tables_are_float32_on_the_cpu() -> None:
    for table in (SCHEDULE.betas, SCHEDULE.alpha_bar):
        assert table.shape == (1000,)
        assert table.dtype == torch.float32 and table.device.type == "cpu"


def test_alpha_bar_at_is_the_table_and_one_for_the_clean_picture() -> None:
    for t in (0, 1, 500, 999):
        assert SCHEDULE.alpha_bar_at(t) == SCHEDULE.alpha_bar[t].item()
    assert SCHEDULE.alpha_bar_at(-1) == 1.0
    for t in (-2, 1000):
        with pytest.raises(IndexError, match=r"out of (range|bounds)"):
            SCHEDULE.alpha_bar_at(t)


def test_between_two_timesteps_the_logarithm_of_sigma_is_a_straight_line() -> None:
    def log_sigma(t: float) -> float:
        a = SCHEDULE.alpha_bar_at(t)
        return math.log((1 - a) / a) / 2

    for t in (0.25, 41.5, 998.9):
        share = t - math.floor(t)
        low, high = log_sigma(math.floor(t)), log_sigma(math.floor(t) + 1)
        assert log_sigma(t) == pytest.approx((1 - share) * low + share * high, abs=1e-12)
        assert SCHEDULE.timestep_at(SCHEDULE.alpha_bar_at(t)) == pytest.approx(t, abs=1e-8)
    assert SCHEDULE.level(3.0) == (3, SCHEDULE.alpha_bar_at(3))
    assert isinstance(SCHEDULE.level(3.0).t, int) and isinstance(SCHEDULE.level(3.5).t, float)


def test_beside_the_clean_picture_and_pure_noise_the_angle_is_a_straight_line() -> None:
    """There the logarithm is infinite."""
    schedule = NoiseSchedule(ScheduleConfig(num_train_timesteps=3, betas=(0.1, 0.2, 1.0)))
    angle = {t: math.acos(schedule.alpha_bar_at(t) ** 0.5) for t in (-1, -0.5, 0, 1, 1.5, 2)}
    assert angle[-0.5] == pytest.approx(angle[0] / 2, abs=1e-9)
    assert angle[1.5] == pytest.approx((angle[1] + math.pi / 2) / 2, abs=1e-9)
    assert schedule.timestep_at(schedule.alpha_bar_at(1.5)) == pytest.approx(1.5, abs=1e-9)


def test_what_the_table_does_not_reach_is_refused() -> None:
    for outside in (1.0, 0.9992, 0.004, math.nan):
        with pytest.raises(ValueError, match=r"alpha_bar must be between 0\.0046\d+ and 0\.99915"):
            SCHEDULE.timestep_at(outside)
    for t in (-1.5, 999.5, math.nan):
        with pytest.raises(IndexError, match="out of range"):
            SCHEDULE.alpha_bar_at(t)


def test_schedule_follows_its_config() -> None:
    schedule = NoiseSchedule(ScheduleConfig(num_train_timesteps=3, beta_start=0.01, beta_end=0.09))
    expected = torch.tensor([0.01, 0.04, 0.09])  # the squares of 0.1, 0.2, 0.3
    torch.testing.assert_close(schedule.betas, expected, rtol=1e-6, atol=0)  # float32
    assert schedule.alpha_bar[2].item() == pytest.approx(0.99 * 0.96 * 0.91, rel=1e-6)


# --- Noising ---------------------------------------------------------------------------------


def test_add_noise_takes_each_image_to_its_own_timestep(device: str) -> None:
    x0, noise = randn(3, 4, 2, 2).to(device), randn(3, 4, 2, 2, seed=1).to(device)
    t = torch.tensor([0, 500, 999], device=device)
    before = x0.clone(), noise.clone()
    x = SCHEDULE.add_noise(x0, noise, t)
    assert x.shape == x0.shape and x.dtype == x0.dtype and x.device == x0.device
    for i, step in enumerate(t.tolist()):
        a = SCHEDULE.alpha_bar_at(step)
        expected = math.sqrt(a) * x0[i] + math.sqrt(1 - a) * noise[i]
        # sqrt(1 - alpha_bar) in float32: at t = 0 the difference 0.00085 keeps only 14 bits.
        torch.testing.assert_close(x[i], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(x0, before[0]) and torch.equal(noise, before[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_add_noise_keeps_the_dtype_and_its_precision(dtype: torch.dtype, device: str) -> None:
    """1 - alpha_bar at t = 0 is 0.00085: in half precision alpha_bar itself would round to 1 (or
    near it), and the noise would vanish (or be a quarter too large)."""
    zeros, ones = torch.zeros(2, 1).to(device, dtype), torch.ones(2, 1).to(device, dtype)
    x = SCHEDULE.add_noise(zeros, ones, torch.tensor([0, 999], device=device))
    assert x.dtype == dtype
    expected = (1 - SCHEDULE.alpha_bar[[0, 999]].double()).sqrt()[:, None]
    # One rounding to the dtype, and float32's 1 - alpha_bar (see above).
    rtol = torch.finfo(dtype).eps + 1e-4
    torch.testing.assert_close(x.double().cpu(), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"t": torch.tensor([-1, 3])}, "t must be between 0 and 999, not -1"),
        ({"t": torch.tensor([3, 1000])}, "t must be between 0 and 999, not 1000"),
        ({"t": 3}, r"t must be int64 \(2,\), a timestep for each, not 3"),
        ({"t": torch.tensor(3)}, r"t must be int64 \(2,\).*not torch.int64 \(\)"),
        ({"t": torch.tensor([3])}, r"t must be int64 \(2,\).*not torch.int64 \(1,\)"),
        ({"t": torch.tensor([3.0, 4.0])}, r"t must be int64 \(2,\).*not torch.float32 \(2,\)"),
        ({"noise": randn(1, 4)}, r"noise must be \(2, 4\) as x0 is, not \(1, 4\)"),
    ],
)
def test_add_noise_refuses_what_does_not_fit(change: dict, match: str) -> None:
    arguments = {"x0": randn(2, 4), "noise": randn(2, 4), "t": torch.tensor([3, 4])}
    with pytest.raises(ValueError, match=match):
        SCHEDULE.add_noise(**(arguments | change))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_timestep_outside_the_table_gives_nan() -> None:
    x0, t = torch.ones(4, 3, device="cuda"), torch.tensor([-1, 0, 999, 1000], device="cuda")
    is_nan = SCHEDULE.add_noise(x0, x0, t).isnan()
    assert is_nan.all(dim=1).tolist() == [True, False, False, True]
    assert not is_nan[1:3].any()


def test_noised_latents_keep_a_unit_variance() -> None:
    x0, noise = randn(1, 100_000), randn(1, 100_000, seed=1)
    for t in (0, 300, 999):
        x = SCHEDULE.add_noise(x0, noise, torch.tensor([t]))
        # The standard error of the variance of n normal numbers is sqrt(2 / n) = 0.0045: five.
        assert abs(x.var().item() - 1) < 5 * math.sqrt(2 / 100_000)


# --- The same equation, turned around --------------------------------------------------------

NUMBERS = st.floats(-10, 10)
ALPHA_BARS = st.floats(0.004, 0.9995)  # a little more than the schedule's range


@given(NUMBERS, NUMBERS, ALPHA_BARS)
def test_any_two_of_x_x0_eps_v_give_the_rest(x0: float, eps: float, alpha_bar: float) -> None:
    x0, eps = (torch.tensor(a, dtype=torch.float64) for a in (x0, eps))
    x = noised(x0, eps, alpha_bar)
    v = v_from_eps(x0, eps, alpha_bar)
    # float64 rounding (1e-16) of numbers up to 20, magnified by 1 / sqrt(0.0005) = 45 at most.
    close = dict(rtol=0, atol=1e-12)
    torch.testing.assert_close(x0_from_eps(x, eps, alpha_bar), x0, **close)
    torch.testing.assert_close(eps_from_x0(x, x0, alpha_bar), eps, **close)
    torch.testing.assert_close(x0_from_v(x, v, alpha_bar), x0, **close)
    torch.testing.assert_close(eps_from_v(x, v, alpha_bar), eps, **close)


@given(NUMBERS, NUMBERS, st.floats(0.05, 1.52))
def test_x_and_v_are_x0_and_eps_turned_by_one_angle(x0: float, eps: float, phi: float) -> None:
    """Salimans & Ho 2022: alpha = cos(phi), sigma = sin(phi), and v = dx / dphi."""
    x0, eps = (torch.tensor(a, dtype=torch.float64) for a in (x0, eps))
    alpha_bar = math.cos(phi) ** 2
    v = v_from_eps(x0, eps, alpha_bar)
    torch.testing.assert_close(
        v, -math.sin(phi) * x0 + math.cos(phi) * eps, rtol=0, atol=1e-12
    )  # float64, magnified by 1 / sin(0.05) = 20
    x = noised(x0, eps, alpha_bar)
    torch.testing.assert_close(x**2 + v**2, x0**2 + eps**2, rtol=1e-12, atol=1e-12)


def test_functions_broadcast_a_tensor_of_alpha_bars() -> None:
    x0, eps = randn(2, 3, dtype=torch.float64), randn(2, 3, seed=1, dtype=torch.float64)
    alpha_bar = torch.tensor([[0.9], [0.1]], dtype=torch.float64)
    for function in (noised, x0_from_eps, eps_from_x0, v_from_eps, x0_from_v, eps_from_v):
        together = function(x0, eps, alpha_bar)
        for i, a in enumerate((0.9, 0.1)):
            # The same float64 operations, on a number and on a tensor.
            torch.testing.assert_close(together[i], function(x0[i], eps[i], a), rtol=1e-14, atol=0)


# --- The grids -------------------------------------------------------------------------------


def test_grid_has_exactly_the_asked_steps_within_the_table_and_begins_in_the_noise() -> None:
    """The official one where that does; pure noise is not what a model knows at t = 501."""
    for steps in range(1, 1001):
        grid = SCHEDULE.timesteps(steps)
        assert len(grid) == steps
        assert all(0 <= t <= 999 for t in grid)
        assert grid == sorted(set(grid), reverse=True)
        if steps > 10:
            assert grid[0] >= 900
        if grid == even_timesteps(steps, 1000):
            assert {a - b for a, b in pairwise(grid)} <= {1000 // steps}
        else:
            assert even_timesteps(steps, 1000)[0] < 900 and grid[0] == 999
            assert {a - b for a, b in pairwise(grid)} <= {1000 // steps, 1000 // steps + 1}
    other = [s for s in range(1, 1001) if SCHEDULE.timesteps(s) != even_timesteps(s, 1000)]
    assert other[0] == 112 and {334, 350, 501, 899} <= set(other)
    assert not {10, 50, 100, 200, 250, 333, 500, 900, 999, 1000} & set(other)


def test_a_table_that_ends_in_pure_noise_is_walked_from_its_end() -> None:
    schedule = NoiseSchedule(ScheduleConfig(num_train_timesteps=4, betas=(0.1, 0.2, 0.5, 1.0)))
    assert schedule.timesteps(2) == [3, 1] and SCHEDULE.timesteps(2) == [501, 1]


def test_grids_written_out() -> None:
    assert SCHEDULE.timesteps(1) == [1]
    assert SCHEDULE.timesteps(3) == [667, 334, 1]
    assert SCHEDULE.timesteps(4) == [751, 501, 251, 1]
    assert SCHEDULE.timesteps(7) == [853, 711, 569, 427, 285, 143, 1]  # CompVis would take 8
    assert SCHEDULE.timesteps(50)[:2] == [981, 961] and SCHEDULE.timesteps(50)[-1] == 1
    assert SCHEDULE.timesteps(999) == list(range(999, 0, -1))
    assert SCHEDULE.timesteps(1000) == list(range(999, -1, -1))


def test_grid_is_compvis_where_steps_divide_1000() -> None:
    """`range(0, 1000, 1000 // S) + 1`, backwards."""
    for steps in (s for s in range(1, 1000) if 1000 % s == 0):
        compvis = [t + 1 for t in range(0, 1000, 1000 // steps)][::-1]
        assert SCHEDULE.timesteps(steps) == compvis


def test_ddim_ends_at_timestep_0_and_ddpm_at_the_clean_picture() -> None:
    assert SCHEDULE.ddim_timesteps(4) == [(751, 501), (501, 251), (251, 1), (1, 0)]
    assert SCHEDULE.ddpm_timesteps(4) == [(751, 501), (501, 251), (251, 1), (1, -1)]
    assert SCHEDULE.ddim_timesteps(1000)[-2:] == [(1, 0), (0, 0)]
    assert SCHEDULE.ddpm_timesteps(1000)[-2:] == [(1, 0), (0, -1)]
    assert pairs([5], end=2) == [(5, 2)]


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_number_of_steps_is_refused(steps: int) -> None:
    for grid in (SCHEDULE.timesteps, SCHEDULE.ddim_timesteps, SCHEDULE.ddpm_timesteps):
        with pytest.raises(ValueError, match=f"between 1 and 1000, not {steps}"):
            grid(steps)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_pair_from_turns_every_target_of_training_back_into_x0_and_eps(prediction: str) -> None:
    x0, eps = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    alpha_bar = torch.tensor([0.9, 0.5, 0.1]).double().view(-1, 1, 1, 1)
    output = output_from(prediction, x0, eps, alpha_bar)
    pair = pair_from(prediction, output, noised(x0, eps, alpha_bar), alpha_bar)
    torch.testing.assert_close(pair, (x0, eps))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_model_of_any_prediction_is_one_of_the_noise(prediction: str) -> None:
    zero = prediction != "eps"
    schedule = NoiseSchedule(ScheduleConfig(zero_terminal_snr=zero))
    t = torch.tensor([0.0, 300.0, 700.5, 999.0 if zero else 998.0])
    x0, eps = randn(4, 4, 3, 3).double(), randn(4, 4, 3, 3, seed=1).double()
    levels = torch.tensor([schedule.alpha_bar_at(one) for one in t.tolist()]).double()
    alpha_bar = levels.view(4, 1, 1, 1)

    def model(x: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        assert torch.equal(told, t)
        return output_from(prediction, x0, eps, alpha_bar)

    found = as_eps_fn(model, prediction, schedule)(noised(x0, eps, alpha_bar), t)
    torch.testing.assert_close(found, eps, rtol=1e-5, atol=1e-6)
