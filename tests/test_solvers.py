"""The other samplers: their orders, their noise, and their grids, where the right answer is known.

For data N(MU, SIGMA^2) the best prediction of the noise is a straight line in x, and so is a whole
run: where it comes out, its mean and its variance are known exactly.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.samplers import SAMPLERS, SPACINGS, Known, Rule, ddim, sample
from ldm.samplers.grids import Levels, spaced
from ldm.schedule import NoiseLevel, NoiseSchedule, eps_from_x0, noised, sigma_of, v_from_eps
from tests.helpers import randn, rng

SCHEDULE = NoiseSchedule()
MU, SIGMA = 0.7, 0.5
FROM, TO = 10.0, 0.1  # sigmas between which orders are measured: both above 0


def gaussian_of(alpha_bar: float) -> tuple[float, float]:
    """Mean and standard deviation of x."""
    return alpha_bar**0.5 * MU, (alpha_bar * SIGMA**2 + 1 - alpha_bar) ** 0.5


def exact_eps(x: Tensor, alpha_bar: float) -> Tensor:
    mean, std = gaussian_of(alpha_bar)
    return (1 - alpha_bar) ** 0.5 * (x - mean) / std**2


def continuous(steps: int, even_in: str) -> tuple[Levels, Callable[[Tensor, Tensor], Tensor]]:
    """Noise levels in continuous time, and the model that knows them: their t is only their
    number, from which it looks up their alpha_bar."""
    share = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if even_in == "sigma":
        sigmas = FROM + share * (TO - FROM)
    else:
        sigmas = (math.log(FROM) + share * (math.log(TO) - math.log(FROM))).exp()
    levels = [NoiseLevel(i, 1 / (1 + sigma**2)) for i, sigma in enumerate(sigmas.tolist())]

    def eps_fn(x: Tensor, t: Tensor) -> Tensor:
        return exact_eps(x, levels[int(t[0])].alpha_bar)

    return list(pairwise(levels)), eps_fn


# --- Orders ----------------------------------------------------------------------------------


def flow_error(rule: Rule, steps: int, even_in: str) -> float:
    """How far a run ends from the exact flow, which keeps (x - mean) / std."""
    grid, eps_fn = continuous(steps, even_in)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)
    *_, last = sample(rule, eps_fn, x, grid, SCHEDULE)
    mean, std = gaussian_of(grid[0][0].alpha_bar)
    end_mean, end_std = gaussian_of(grid[-1][1].alpha_bar)
    exact = end_mean + end_std * (x - mean) / std
    return (last.x_prev - exact).abs().max().item()


ORDERS = {
    "ddim": (functools.partial(SAMPLERS["ddim"].rule, eta=0.0), 1),
    "euler": (SAMPLERS["euler"].rule, 1),
    "heun": (SAMPLERS["heun"].rule, 2),
    "dpmpp_2m": (SAMPLERS["dpmpp_2m"].rule, 2),
    "unipc": (SAMPLERS["unipc"].rule, 3),
    "unipc without its corrector": (functools.partial(SAMPLERS["unipc"].rule, corrector=False), 2),
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_error_against_the_exact_flow_falls_with_the_samplers_order(name: str) -> None:
    """Twice the steps, a 2^order-th of the error."""
    rule, order = ORDERS[name]
    errors = [flow_error(rule, steps, "log sigma") for steps in (40, 80, 160, 320)]
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    print(f"{name}: {', '.join(f'{one:.3f}' for one in orders)}; 40 steps {errors[0]:.2g}")
    assert abs(orders[-1] - order) < 0.1 and abs(orders[-2] - order) < 0.2
    assert errors[-1] < errors[0] < 0.1


def test_plms_is_of_a_high_order_where_steps_are_equal_and_else_of_the_second() -> None:
    """Adams' and Bashforth's weights are those of equal steps, in the variable that the flow is
    integrated over: sigma."""
    for even_in, least, most in (("sigma", 3.0, 4.1), ("log sigma", 1.9, 2.1)):
        coarse, fine = (flow_error(SAMPLERS["plms"].rule, n, even_in) for n in (400, 800))
        order = math.log2(coarse / fine)
        print(f"plms, steps even in {even_in}: {order:.3f}")
        assert least < order < most


def moments(rule: Rule, steps: int) -> tuple[float, float]:
    """Mean and standard deviation where a run ends that starts from the right ones, without a
    random number: a run is linear in its start and in each draw, so the first "image" of a batch
    starts from 0 and draws zeros, the second starts from 1, and each other draws a 1 once."""
    grid, eps_fn = continuous(steps, "log sigma")
    x = torch.zeros(steps + 2, 1, 1, 1, dtype=torch.float64)
    x[1] = 1
    drawn = iter(range(2, steps + 2))

    def draw() -> Tensor:
        noise = torch.zeros_like(x)
        noise[next(drawn)] = 1
        return noise

    def drawing(known: Known) -> Tensor:
        return rule(dataclasses.replace(known, draw=draw))

    *_, last = sample(drawing, eps_fn, x, grid, SCHEDULE)
    shift, *scales = last.x_prev.flatten().tolist()
    scale, *noise = (one - shift for one in scales)
    mean, std = gaussian_of(grid[0][0].alpha_bar)
    variance = (scale * std) ** 2 + sum(one**2 for one in noise)
    assert next(drawn, None) is None  # one draw a step
    return scale * mean + shift, variance**0.5


@pytest.mark.parametrize(
    "name, order",
    [("ddpm", 1), ("noisy ddim", 1), ("euler_ancestral", 1), ("dpmpp_2m_sde", 2)],
)
def test_mean_and_variance_of_noisy_samplers_come_out_right_with_their_order(
    name: str, order: int
) -> None:
    sampler = SAMPLERS[name.removeprefix("noisy ")]
    rule = functools.partial(sampler.rule, eta=0.6) if sampler.options else sampler.rule
    mean, std = gaussian_of(1 / (1 + TO**2))
    found = [moments(rule, steps) for steps in (40, 80, 160)]
    assert all(abs(one - mean) < 1e-12 for one, _ in found)  # of so simple a law it is exact
    errors = [abs(one - std) for _, one in found]
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    print(f"{name}: {', '.join(f'{one:.3f}' for one in orders)}; 40 steps {errors[0]:.2g}")
    assert abs(orders[-1] - order) < 0.2
    assert errors[-1] < 0.05 * std


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde"])
def test_noisy_samplers_keep_the_marginals_of_one_picture(name: str) -> None:
    """Where data are one picture, x_t is exactly N(sqrt(alpha_bar) x0, 1 - alpha_bar)."""
    n = 40_000
    picture = torch.full((1, 1, 1, n), 0.6)

    def eps_fn(x: Tensor, t: Tensor) -> Tensor:
        return eps_from_x0(x, picture, SCHEDULE.alpha_bar_at(int(t[0])))

    grid = SAMPLERS[name].grid(8, SCHEDULE)
    x = noised(picture, randn(1, 1, 1, n, seed=4), grid[0][0].alpha_bar)
    for step in sample(SAMPLERS[name].rule, eps_fn, x, grid, SCHEDULE, generators=[rng(5)]):
        std = math.sqrt(1 - step.alpha_bar_prev)
        # Five standard errors of n normal numbers, and fp32 rounding.
        noise = 5 * std / math.sqrt(n) + 1e-6
        assert abs(step.x_prev.mean().item() - step.alpha_bar_prev**0.5 * 0.6) < noise
        assert abs(step.x_prev.std().item() - std) < noise


# --- What rules are to one another -----------------------------------------------------------


def end_of(rule: Rule, grid: Levels, prediction: str = "eps", eps_fn=None) -> Tensor:
    x = randn(2, 4, 4, 4, seed=3, dtype=torch.float64)
    fn = eps_fn or (lambda x, t: exact_eps(x, SCHEDULE.alpha_bar_at(float(t[0]))))
    *_, last = sample(
        rule, fn, x, grid, SCHEDULE, generators=[rng(1), rng(2)], prediction=prediction
    )
    return last.x_prev


@pytest.mark.parametrize("spacing", SPACINGS)
def test_euler_is_ddim_and_with_noise_ddim_at_eta_1_which_is_ddpm(spacing: str) -> None:
    grid = SAMPLERS["ddpm"].grid(12, SCHEDULE, spacing)
    close = dict(rtol=0, atol=1e-10)
    plain = end_of(functools.partial(SAMPLERS["ddim"].rule, eta=0.0), grid)
    torch.testing.assert_close(end_of(SAMPLERS["euler"].rule, grid), plain, **close)
    # DDIM at eta 1 draws at its last step too, and adds nothing of it.
    noisy = end_of(functools.partial(SAMPLERS["ddim"].rule, eta=1.0), grid)
    for name in ("euler_ancestral", "ddpm"):
        torch.testing.assert_close(end_of(SAMPLERS[name].rule, grid), noisy, **close)


def test_unipc_without_its_corrector_is_dpmpp_2m() -> None:
    grid = SAMPLERS["unipc"].grid(9, SCHEDULE)
    bare = end_of(functools.partial(SAMPLERS["unipc"].rule, corrector=False), grid)
    assert torch.equal(bare, end_of(SAMPLERS["dpmpp_2m"].rule, grid))
    assert not torch.allclose(bare, end_of(SAMPLERS["unipc"].rule, grid))


def test_unipc_goes_on_from_what_a_caller_sends() -> None:
    """Its correction is added: it does not bring back the latents that were replaced."""
    ends = []
    for shift in (0.0, 1.0):
        grid, eps_fn = SAMPLERS["unipc"].grid(6, SCHEDULE), lambda x, t: 0 * x
        x = randn(1, 4, 4, 4, dtype=torch.float64)
        run = sample(SAMPLERS["unipc"].rule, eps_fn, x, grid, SCHEDULE)
        step = next(run)
        for _ in grid[1:]:
            step = run.send(step.x_prev + shift)
        ends.append(step.x_prev)
    assert (ends[1] - ends[0]).abs().min() > 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_step_that_stays_where_it_is_changes_nothing(name: str) -> None:
    sampler = SAMPLERS[name]
    rule = functools.partial(sampler.rule, eta=0.0) if sampler.options else sampler.rule
    (first, second), *_ = sampler.grid(4, SCHEDULE)
    grid = [(first, first), (first, first), (first, second)]
    steps = list(
        sample(rule, lambda x, t: 0.9 * x, randn(1, 4, 4, 4), grid, SCHEDULE, generators=[rng()])
    )
    assert all(step.x_prev.isfinite().all() for step in steps)
    if name != "lcm":  # that begins anew from its clean picture
        torch.testing.assert_close(steps[1].x_prev, steps[0].x, rtol=0, atol=1e-5)


def test_lcm_is_the_clean_picture_at_once_and_then_noised_again() -> None:
    grid = SAMPLERS["lcm"].grid(4, SCHEDULE)
    assert [here.t for here, _ in grid] == [999, 759, 499, 259]
    x = randn(1, 4, 4, 4)
    steps = list(
        sample(SAMPLERS["lcm"].rule, lambda x, t: 0.5 * x, x, grid, SCHEDULE, generators=[rng(1)])
    )
    torch.testing.assert_close(steps[-1].x_prev, steps[-1].x0, rtol=0, atol=1e-3)  # c_skip: 4e-8
    same = rng(1)
    for step in steps[:-1]:
        noise = torch.randn(4, 4, 4, generator=same)[None]
        expected = noised(step.x0, noise, step.alpha_bar_prev)
        torch.testing.assert_close(step.x_prev, expected, rtol=0, atol=1e-4)


# --- What the model predicts -----------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction", ["v", "x0", "flow"])
def test_a_run_is_the_same_whatever_the_model_predicts(name: str, prediction: str) -> None:
    sampler = SAMPLERS[name]
    rule = functools.partial(sampler.rule, eta=0.4) if sampler.options else sampler.rule
    grid = sampler.grid(7, SCHEDULE)

    def output(x: Tensor, t: Tensor) -> Tensor:
        alpha_bar = SCHEDULE.alpha_bar_at(float(t[0]))
        eps = exact_eps(x, alpha_bar)
        x0 = (x - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
        return {"v": v_from_eps(x0, eps, alpha_bar), "x0": x0, "flow": eps - x0}[prediction]

    there = end_of(rule, grid, prediction, output)
    torch.testing.assert_close(there, end_of(rule, grid), rtol=0, atol=1e-9)


PURE = NoiseSchedule(
    ScheduleConfig(num_train_timesteps=1000, betas=(*SCHEDULE.betas[:-1].tolist(), 1.0))
)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_can_start_in_pure_noise_with_a_model_that_says_something_of_it(
    name: str,
) -> None:
    assert PURE.alpha_bar[-1] == 0
    sampler = SAMPLERS[name]
    rule = functools.partial(sampler.rule, eta=0.0) if sampler.options else sampler.rule
    grid = sampler.grid(40, PURE)
    assert grid[0][0] == (999, 0.0)

    def v(x: Tensor, t: Tensor) -> Tensor:
        alpha_bar = PURE.alpha_bar_at(int(t[0]))
        mean, std = gaussian_of(alpha_bar)
        eps = (1 - alpha_bar) ** 0.5 * (x - mean) / std**2
        x0 = MU + alpha_bar**0.5 * SIGMA**2 * (x - mean) / std**2
        return v_from_eps(x0, eps, alpha_bar)

    x = randn(1, 1, 100, 100, dtype=torch.float64)
    steps = list(sample(rule, v, x, grid, PURE, generators=[rng(1)], prediction="v"))
    assert all(step.x_prev.isfinite().all() for step in steps)
    torch.testing.assert_close(steps[0].x0, torch.full_like(x, MU))  # of pure noise, the mean
    last = steps[-1].x_prev
    assert abs(last.mean().item() - MU) < 0.05
    if name != "lcm":  # which never was distilled to this
        assert abs(last.std().item() - SIGMA) < 0.06
    with pytest.raises(ValueError, match="no prediction of the noise can say"):
        sample(rule, v, x, grid, PURE)


def test_an_unknown_prediction_is_refused_at_the_call() -> None:
    with pytest.raises(ValueError, match="unknown prediction 'velocity': there are eps, v, x0"):
        ddim(lambda x, t: x, randn(1, 4, 4, 4), [(5, 3)], SCHEDULE, prediction="velocity")


# --- Grids -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("ddim", "ddpm")])
def test_every_other_sampler_begins_at_the_top_for_every_number_of_steps(name: str) -> None:
    sampler = SAMPLERS[name]
    for steps in range(1, 51 if name == "lcm" else 1001):
        timesteps = sampler.timesteps(steps, SCHEDULE)
        assert len(timesteps) == steps and timesteps[0] == 999
        assert all(a > b >= 0 for a, b in pairwise(timesteps))


@pytest.mark.parametrize("end", [0, -1])
def test_spacings_written_out(end: int) -> None:
    def of(spacing: str, steps: int) -> list[float]:
        return [round(t, 2) for t in spaced(spacing, steps, SCHEDULE, end=end)]

    assert of("leading", 4) == [751, 501, 251, 1] and of("trailing", 4) == [999, 749, 499, 249]
    # Down to timestep 0: the last of the steps, or, if the run ends there, its end.
    assert of("linspace", 4) == ([999, 749.25, 499.5, 249.75] if end == 0 else [999, 666, 333, 0])
    for spacing in SPACINGS:
        first = 1 if spacing == "leading" else 999
        assert of(spacing, 1) == [first]
        with pytest.raises(ValueError, match="between 1 and 1000, not 1001"):
            of(spacing, 1001)


@pytest.mark.parametrize("end", [0, -1])
def test_karras_sigmas_have_evenly_spaced_seventh_roots(end: int) -> None:
    timesteps = [*spaced("karras", 12, SCHEDULE, end=end), *([0] if end == 0 else [])]
    assert timesteps[0] == 999 and timesteps[-1] == 0
    roots = [sigma_of(SCHEDULE.alpha_bar_at(t)) ** (1 / 7) for t in timesteps]
    distances = [a - b for a, b in pairwise(roots)]
    assert distances == pytest.approx([distances[0]] * len(distances), rel=1e-9)


def test_karras_needs_a_sigma_to_begin_with() -> None:
    with pytest.raises(ValueError, match="this schedule ends in pure noise: take 'trailing'"):
        spaced("karras", 4, PURE, end=-1)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_some_samplers_visit_timesteps_of_the_table_alone(name: str, spacing: str) -> None:
    sampler = SAMPLERS[name]
    grid = sampler.grid(7, SCHEDULE, spacing)
    assert len(grid) == 7
    assert all(a[1] == b[0] for a, b in pairwise(grid))
    assert grid[-1][1] == SCHEDULE.level(sampler.end)
    whole = all(isinstance(here.t, int) for here, _ in grid)
    assert whole == (sampler.rounds or spacing in ("leading", "trailing"))
    assert all(here.alpha_bar == SCHEDULE.alpha_bar_at(here.t) for here, _ in grid)


def test_one_step_more_is_not_another_picture() -> None:
    """The official grid of 501 steps begins at t = 501: what came out was 0.455 from that of 500
    steps, of a standard deviation of 0.88."""
    ends = {}
    for steps in (250, 350, 500, 501):
        ends[steps] = end_of(
            functools.partial(SAMPLERS["ddim"].rule, eta=0.0),
            SAMPLERS["ddim"].grid(steps, SCHEDULE),
        )
    for steps in (250, 350, 501):
        rms = (ends[steps] - ends[500]).square().mean().sqrt().item()
        assert rms < 0.01
