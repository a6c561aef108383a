"""The samplers: as generators, in their randomness, and against closed forms.

For data N(MU, SIGMA^2) the best possible noise prediction is known exactly, and so is everything
that a sampler does with it: no model is needed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.errors import DivergedError
from ldm.samplers import (
    SAMPLERS,
    Known,
    Prediction,
    Step,
    Steps,
    ddim,
    ddpm,
    guide,
    on_interval,
    sample,
)
from ldm.samplers.soundness import LARGEST, Watch, is_sound
from ldm.schedule import NoiseLevel, NoiseSchedule, noised
from tests.helpers import randn, rng

SCHEDULE = NoiseSchedule()
MU, SIGMA = 0.7, 0.5
SHAPE = (4, 4, 4)


def gaussian_eps(x: Tensor, t: Tensor) -> Tensor:
    """E[eps | x_t] for data N(MU, SIGMA^2): x_t is N(a MU, a^2 SIGMA^2 + 1 - a^2)."""
    alpha_bar = SCHEDULE.alpha_bar.to(x.device)[t].to(x.dtype).view(-1, 1, 1, 1)
    variance = alpha_bar * SIGMA**2 + 1 - alpha_bar
    return (1 - alpha_bar) ** 0.5 * (x - alpha_bar**0.5 * MU) / variance


def start(batch: int = 2, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(batch, *SHAPE, seed=3, dtype=dtype).to(device)


def run(kind: str, x: Tensor, steps: int = 6, eps_fn=gaussian_eps, seed: int = 10) -> Steps:
    """A sampler by its name: ddim at eta 0 ("ddim"), at eta 0.6 ("noisy ddim"), or another."""
    generators = [rng(seed + i) for i in range(len(x))]
    if kind in OTHERS:
        sampler = SAMPLERS[kind]
        grid = sampler.grid(steps, SCHEDULE)
        return sample(sampler.rule, eps_fn, x, grid, SCHEDULE, generators=generators)
    if kind == "ddpm":
        return ddpm(eps_fn, x, SCHEDULE.ddpm_timesteps(steps), SCHEDULE, generators=generators)
    eta = 0.6 if kind == "noisy ddim" else 0.0
    pairs = SCHEDULE.ddim_timesteps(steps)
    return ddim(eps_fn, x, pairs, SCHEDULE, eta=eta, generators=generators if eta else None)


OTHERS = [name for name in SAMPLERS if name not in ("ddim", "ddpm")]
every_sampler = pytest.mark.parametrize("kind", ["ddim", "noisy ddim", "ddpm", *OTHERS])
ONE_CALL = [name for name in OTHERS if name not in ("plms", "heun")]
one_call_a_step = pytest.mark.parametrize("kind", ["ddim", "noisy ddim", "ddpm", *ONE_CALL])


def tensors(step: Step) -> dict[str, Tensor]:
    values = {f.name: getattr(step, f.name) for f in dataclasses.fields(step)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


# --- As generators ---------------------------------------------------------------------------


@every_sampler
def test_steps_are_numbered_and_walk_the_pairs(kind: str, device: str) -> None:
    x = start(device=device)
    steps = list(run(kind, x))
    grid = SAMPLERS[kind.removeprefix("noisy ")].grid(6, SCHEDULE)
    assert [(s.t, s.t_prev) for s in steps] == [(here.t, there.t) for here, there in grid]
    assert [(s.alpha_bar, s.alpha_bar_prev) for s in steps] == [
        (here.alpha_bar, there.alpha_bar) for here, there in grid
    ]
    assert all(s.alpha_bar == SCHEDULE.alpha_bar_at(s.t) for s in steps)
    assert [s.index for s in steps] == list(range(6))
    assert torch.equal(steps[0].x, x)
    for before, after in pairwise(steps):
        assert torch.equal(before.x_prev, after.x)
    for step in steps:
        assert set(tensors(step)) == {"x", "eps", "x0", "x_prev"}  # no guidance, no parts of it
        assert all(v.shape == x.shape and v.device == x.device for v in tensors(step).values())
        assert all(v.dtype == x.dtype for v in tensors(step).values())


@every_sampler
def test_fields_of_a_step_fit_together(kind: str, device: str) -> None:
    for step in run(kind, start(device=device)):
        t = torch.full((2,), step.t, device=device)
        assert torch.equal(step.eps, gaussian_eps(step.x, t))
        # x is x0 noised by eps. fp32 rounding of x0, up to 15 times larger than x, and back.
        again = noised(step.x0, step.eps, SCHEDULE.alpha_bar_at(step.t))
        torch.testing.assert_close(again, step.x, rtol=0, atol=1e-5)


@one_call_a_step
def test_model_is_asked_once_per_step_with_one_timestep_per_image(kind: str, device: str) -> None:
    asked = []

    def eps_fn(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return gaussian_eps(x, t)

    steps = list(run(kind, start(3, device), eps_fn=eps_fn))
    assert [t.tolist() for t in asked] == [[s.t] * 3 for s in steps]
    assert all(t.dtype == torch.int64 and t.device.type == device for t in asked)


@every_sampler
def test_nothing_yielded_is_changed_later(kind: str, device: str) -> None:
    x = start(device=device)
    original = x.clone()
    kept = [(step, {k: v.clone() for k, v in tensors(step).items()}) for step in run(kind, x)]
    assert torch.equal(x, original)
    for step, copies in kept:
        for name, value in tensors(step).items():
            assert torch.equal(value, copies[name]), (step.index, name)


@every_sampler
def test_a_step_cannot_be_reassigned(kind: str) -> None:
    step = next(run(kind, start()))
    with pytest.raises(dataclasses.FrozenInstanceError):
        step.x = start()


@every_sampler
def test_send_goes_on_from_what_was_sent(kind: str, device: str) -> None:
    x, edited = start(device=device), 2 * start(device=device)
    usual = list(run(kind, x))
    generator = run(kind, x)
    next(generator)
    step = generator.send(edited)
    assert step.index == 1 and torch.equal(step.x, edited)
    assert not torch.equal(step.x_prev, usual[1].x_prev)
    # Sending what would come anyway changes nothing.
    generator = run(kind, x)
    step = next(generator)
    again = [step]
    while True:
        try:
            step = generator.send(step.x_prev)
        except StopIteration:
            break
        again.append(step)
    assert len(again) == len(usual)
    assert all(torch.equal(a.x_prev, b.x_prev) for a, b in zip(again, usual, strict=True))


@one_call_a_step
def test_a_sampler_can_be_left_early(kind: str) -> None:
    asked = []

    def eps_fn(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return gaussian_eps(x, t)

    generator = run(kind, start(), eps_fn=eps_fn)
    assert asked == []  # nothing before the first step is asked for
    next(generator)
    next(generator)
    generator.close()
    assert len(asked) == 2
    assert list(generator) == []


@one_call_a_step
def test_gradients_are_off_inside_and_the_callers_mode_is_its_own(kind: str) -> None:
    inside = []

    def eps_fn(x: Tensor, t: Tensor) -> Tensor:
        inside.append(torch.is_grad_enabled())
        return gaussian_eps(x, t)

    x = start().requires_grad_()
    assert torch.is_grad_enabled()
    for step in run(kind, x, eps_fn=eps_fn):
        assert torch.is_grad_enabled()  # while the sampler is suspended
        assert not step.x_prev.requires_grad
    assert torch.is_grad_enabled()
    with torch.no_grad():
        for _ in run(kind, x, eps_fn=eps_fn):
            assert not torch.is_grad_enabled()
    assert inside == [False] * 12


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_ddim_refuses_a_wrong_eta_at_the_call(eta: float) -> None:
    with pytest.raises(ValueError, match="eta must be between 0 and 1"):
        ddim(gaussian_eps, start(), SCHEDULE.ddim_timesteps(2), SCHEDULE, eta=eta)


@pytest.mark.parametrize("count", [None, 0, 1, 3])
@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
def test_noise_without_one_generator_per_image_is_refused_at_the_call(
    kind: str, count: int | None
) -> None:
    generators = None if count is None else [rng(i) for i in range(count)]
    match = "pass generators" if count is None else f"2 images need as many generators, not {count}"
    with pytest.raises(ValueError, match=match):
        if kind == "ddim":
            pairs = SCHEDULE.ddim_timesteps(2)
            ddim(gaussian_eps, start(), pairs, SCHEDULE, eta=0.5, generators=generators)
        else:
            pairs = SCHEDULE.ddpm_timesteps(2)
            ddpm(gaussian_eps, start(), pairs, SCHEDULE, generators=generators)


@pytest.mark.parametrize(
    "timesteps, match",
    [
        (SCHEDULE.timesteps(4), r"must be pairs \(t, t_prev\) of numbers.*not 751"),
        ([("5", 3)], r"must be pairs.*not \('5', 3\)"),
        ([(5, 3, 1)], r"must be pairs.*not \(5, 3, 1\)"),
        ([SCHEDULE.level(5)], r"must be pairs.*not NoiseLevel\(t=5, "),
        ([(math.nan, 3)], "between 0 and 999, not nan"),
        ([(5, -0.5)], "between 0 and 999, not -0.5"),
        ([(NoiseLevel(1000, 0.1), 3)], "between 0 and 999, not 1000"),
        ([(5, 3), (5000, 3)], "between 0 and 999, not 5000"),
        ([(-1, -1)], "between 0 and 999, not -1"),
        ([(5, -2)], "between 0 and 999, not -2"),
        ([(5, 3), (5, 10)], r"must be falling, from noise to picture, not \(5, 10\)"),
    ],
)
@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
def test_a_grid_that_is_none_is_refused_at_the_call(kind: str, timesteps, match: str) -> None:
    sampler = ddim if kind == "ddim" else functools.partial(ddpm, generators=rng())
    with pytest.raises(ValueError, match=match) as error:
        sampler(gaussian_eps, start(), timesteps, SCHEDULE)
    assert str(error.value).startswith("timesteps must be")


def test_a_grid_may_be_numpys_and_stay_where_it_is() -> None:
    grid = np.array([[5, 5], [5, 3]])
    assert [(step.t, step.t_prev) for step in ddim(gaussian_eps, start(), grid, SCHEDULE)] == [
        (5, 5),
        (5, 3),
    ]


@every_sampler
@pytest.mark.parametrize("part", ["eps", "eps_cond"])
def test_a_prediction_of_another_shape_is_refused(kind: str, part: str) -> None:
    """It would broadcast: all images would follow the first one's."""

    def eps_fn(x: Tensor, t: Tensor) -> Tensor | Prediction:
        return x[:1] if part == "eps" else Prediction(x, x[:1], x)

    with pytest.raises(ValueError, match=r"eps_fn returned \(1, 4, 4, 4\) for x of \(2, 4, 4, 4\)"):
        next(run(kind, start(), eps_fn=eps_fn))


# --- What is no picture ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_latents_are_sound_while_they_are_numbers_of_a_sane_size(dtype, device: str) -> None:
    x = start(device=device, dtype=dtype)
    assert is_sound(x) and is_sound(x[:0]) and is_sound(1000 * x)
    bad = [torch.nan, torch.inf, -torch.inf]
    bad += [] if dtype == torch.float16 else [2 * LARGEST, -1e30]
    for value in bad:
        spoilt = x.clone()
        spoilt[1, 2, 3, 0] = value
        assert not is_sound(spoilt), value


@one_call_a_step
@pytest.mark.parametrize(
    "value, kind_of",
    [(torch.nan, "NaN"), (torch.inf, "(NaN|infinity)"), (1e30, "numbers as large")],
)
def test_a_run_that_diverges_ends_with_an_error_that_names_the_step(
    kind: str, value: float, kind_of: str, device: str
) -> None:
    asked: list[int] = []

    def eps_fn(x: Tensor, t: Tensor) -> Tensor:
        asked.append(int(t[0]))
        eps = gaussian_eps(x, t)
        return eps + value if len(asked) == 3 else eps

    seen = []
    with pytest.raises(DivergedError) as error:
        for step in run(kind, start(device=device), eps_fn=eps_fn):
            seen.append(step)
    t = asked[2]
    expected = rf"the latents hold {kind_of}.* after step 3 of 6 \(t = {t}\)"
    assert error.match(expected) and "\n" not in str(error.value)
    assert error.value.t == t
    assert torch.equal(error.value.x, seen[1].x_prev)  # what that step was given
    assert len(seen) == (2 if device == "cpu" else 6)


def test_a_run_that_starts_from_nothing_sound_says_so() -> None:
    with pytest.raises(DivergedError, match="x, from which the run starts, holds NaN") as error:
        list(run("ddim", start() * torch.nan))
    assert error.value.x is None


def test_who_looks_only_at_the_end_still_learns_which_step_it_was() -> None:
    """As on a GPU, where to look at every step would be to wait for it."""
    x, times = start(), SCHEDULE.timesteps(4)
    watch = Watch(x)
    given = [x, x + 1, (x + 1) * torch.nan, x * torch.nan]
    for index, latents in enumerate(given):
        watch.see(index, latents)
    with pytest.raises(DivergedError, match=rf"NaN after step 2 of 4 \(t = {times[1]}\)") as error:
        watch.check(x * torch.nan, times)
    assert torch.equal(error.value.x, given[1])
    watch.check(x, times)  # sound in the end: nothing is wrong


# --- Rules -----------------------------------------------------------------------------------


def test_a_rule_of_ones_own_walks_the_same_loop(device: str) -> None:
    """The rule below is DDIM's at eta 0 in other words: x moves by the change of noise level."""

    def rule(known: Known) -> Tensor:
        ratio = math.sqrt(known.alpha_bar_prev / known.alpha_bar)
        change = math.sqrt(1 - known.alpha_bar_prev) - ratio * math.sqrt(1 - known.alpha_bar)
        return ratio * known.x + change * known.eps

    x = start(device=device, dtype=torch.float64)
    pairs = SCHEDULE.ddim_timesteps(6)
    ours, theirs = (
        sample(rule, gaussian_eps, x, pairs, SCHEDULE),
        ddim(gaussian_eps, x, pairs, SCHEDULE),
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.x_prev, b.x_prev, rtol=0, atol=1e-12)


def test_a_rule_may_ask_again_within_its_step_and_the_steps_eps_is_the_first_answer() -> None:
    asked: list[int] = []

    def eps_fn(x: Tensor, t: Tensor) -> Prediction:
        asked.append(int(t[0]))
        return Prediction(gaussian_eps(x, t), x, x)

    def rule(known: Known) -> Tensor:
        there = known.ask(known.x, max(known.t_prev, 1))
        return known.x - (known.eps + there) / 2

    steps = list(sample(rule, eps_fn, start(), SCHEDULE.ddim_timesteps(4), SCHEDULE))
    assert len(steps) == 4  # one Step per interval, whatever the number of calls
    assert asked == [t for step in steps for t in (step.t, max(step.t_prev, 1))]
    for step in steps:
        assert torch.equal(step.eps, gaussian_eps(step.x, torch.full((2,), step.t)))


def test_a_rule_may_ask_between_the_timesteps_of_the_table_and_not_beyond() -> None:
    asked: list[Tensor] = []

    def eps_fn(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return 0 * x

    def rule_at(t: float) -> Callable[[Known], Tensor]:
        return lambda known: known.ask(known.x, t)

    next(sample(rule_at(500.5), eps_fn, start(), [(900, 100)], SCHEDULE))
    assert asked[1].tolist() == [500.5, 500.5]
    for t in (-1, 999.5, 5000, math.nan):
        with pytest.raises(ValueError, match=f"timesteps must be between 0 and 999, not {t}"):
            next(sample(rule_at(t), eps_fn, start(), [(900, 100)], SCHEDULE))


def test_a_grid_may_be_of_noise_levels_and_of_points_between_timesteps() -> None:
    """A noise level is given with what the model is to be told of it; a t alone is the table's."""
    asked: list[Tensor] = []

    def eps_fn(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return 0.1 * x

    here, there = NoiseLevel(700, 0.2), NoiseLevel(400, 0.6)
    x = start(dtype=torch.float64)
    step, last = ddim(eps_fn, x, [(here, there), (there, 0.5)], SCHEDULE)
    assert (step.t, step.alpha_bar, step.alpha_bar_prev) == (700, 0.2, 0.6)
    torch.testing.assert_close(step.x_prev, noised(step.x0, step.eps, 0.6))
    assert (last.t_prev, last.alpha_bar_prev) == (0.5, SCHEDULE.alpha_bar_at(0.5))
    list(ddim(eps_fn, x, [(500.5, 3)], SCHEDULE))
    assert [(t.dtype, t.tolist()) for t in asked[1:]] == [
        (torch.int64, [400, 400]),
        (torch.float32, [500.5, 500.5]),
    ]


def test_a_rule_of_ones_own_may_walk_upwards() -> None:
    up = [(t_prev, t) for t, t_prev in reversed(SCHEDULE.ddim_timesteps(4))]
    rule = functools.partial(SAMPLERS["ddim"].rule, eta=0.0)
    steps = sample(rule, gaussian_eps, start(), up, SCHEDULE)
    assert [step.t_prev for step in steps] == [t_prev for _, t_prev in up]


def test_what_a_rule_keeps_stays_through_the_run_and_after_send() -> None:
    kept: list[list[int]] = []

    def rule(known: Known) -> Tensor:
        kept.append(list(known.memory.setdefault("visited", [])))
        known.memory["visited"].append(known.t)
        return known.x0

    pairs = SCHEDULE.ddim_timesteps(3)
    steps = sample(rule, gaussian_eps, start(), pairs, SCHEDULE)
    next(steps)
    steps.send(2 * start())
    next(steps)
    (first, _), (second, _), _ = pairs
    assert kept == [[], [first], [first, second]]
    next(sample(rule, gaussian_eps, start(), pairs, SCHEDULE))
    assert kept[-1] == []  # another run begins with nothing


def test_a_rule_that_draws_needs_generators() -> None:
    steps = sample(lambda known: known.draw(), gaussian_eps, start(), [(5, 3)], SCHEDULE)
    with pytest.raises(ValueError, match="pass generators"):
        next(steps)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_a_sampler_by_its_name_is_the_public_function(name: str) -> None:
    sampler = SAMPLERS[name]
    options = dict.fromkeys(sampler.options, 0.6)
    rule = functools.partial(sampler.rule, **options)
    grid = sampler.grid(5, SCHEDULE)
    x, function = start(), {"ddim": ddim, "ddpm": ddpm}[name]
    by_name = sample(rule, gaussian_eps, x, grid, SCHEDULE, generators=[rng(1), rng(2)])
    called = function(gaussian_eps, x, grid, SCHEDULE, generators=[rng(1), rng(2)], **options)
    for a, b in zip(by_name, called, strict=True):
        assert torch.equal(a.x_prev, b.x_prev)
    own = SCHEDULE.ddim_timesteps(5) if name == "ddim" else SCHEDULE.ddpm_timesteps(5)
    assert [(here.t, there.t) for here, there in grid] == own


# --- Randomness ------------------------------------------------------------------------------


@every_sampler
def test_image_of_a_batch_equals_the_image_made_alone(kind: str, device: str) -> None:
    x = start(3, device)
    together = list(run(kind, x, seed=10))
    for i in range(3):
        alone = list(run(kind, x[i : i + 1], seed=10 + i))
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a.x_prev[i : i + 1], b.x_prev)


@every_sampler
def test_the_global_generator_is_neither_used_nor_seeded(kind: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = [s.x_prev for s in run(kind, start())]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(torch.equal(a, s.x_prev) for a, s in zip(first, run(kind, start()), strict=True))


@pytest.mark.parametrize("kind", ["noisy ddim", "ddpm"])
def test_noise_is_the_generators_and_the_same_on_every_device(kind: str, device: str) -> None:
    """With a known x0 and eps, what remains of x_prev is noise: that of the CPU generator."""
    x = start(1, device)
    step = next(run(kind, x, seed=5))
    a, b = SCHEDULE.alpha_bar_at(step.t), SCHEDULE.alpha_bar_at(step.t_prev)
    variance = (1 - b) / (1 - a) * (1 - a / b)  # DDPM eq. 7
    sigma = math.sqrt(variance) * (0.6 if kind == "noisy ddim" else 1.0)
    # DDIM eq. 12; at eta = 1 it is DDPM's mean, in other words.
    mean = math.sqrt(b) * step.x0 + math.sqrt(1 - b - sigma**2) * step.eps
    noise = ((step.x_prev - mean) / sigma).cpu()
    # fp32 rounding of latents of size 1, divided by sigma (0.3 at least).
    torch.testing.assert_close(noise[0], torch.randn(SHAPE, generator=rng(5)), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "kind, draws", [("noisy ddim", 6), ("ddpm", 5)], ids=["noisy ddim", "ddpm"]
)
def test_each_step_draws_once_but_ddpms_last(kind: str, draws: int) -> None:
    """So what a generator gives next, after a run, is known too."""
    generator, same = rng(5), rng(5)
    if kind == "ddpm":
        pairs = SCHEDULE.ddpm_timesteps(6)
        steps = ddpm(gaussian_eps, start(1), pairs, SCHEDULE, generators=[generator])
    else:
        pairs = SCHEDULE.ddim_timesteps(6)
        steps = ddim(gaussian_eps, start(1), pairs, SCHEDULE, eta=1.0, generators=[generator])
    assert len(list(steps)) == 6
    for _ in range(draws):
        torch.randn(SHAPE, generator=same)
    assert torch.equal(generator.get_state(), same.get_state())


@pytest.mark.parametrize("kind", ["noisy ddim", "ddpm"])
def test_another_seed_is_another_image(kind: str) -> None:
    first, second = (list(run(kind, start(), seed=s))[-1].x_prev for s in (0, 100))
    assert (first - second).abs().mean() > 0.1


def test_ddpms_last_step_gives_x0_without_noise(device: str) -> None:
    last = list(run("ddpm", start(device=device)))[-1]
    assert last.t_prev == -1
    # x0's share is exactly 1 and x's exactly 0 but for the rounding of 1 - alpha.
    torch.testing.assert_close(last.x_prev, last.x0, rtol=1e-6, atol=1e-6)


# --- Closed forms ----------------------------------------------------------------------------


def gaussian_of(t: int) -> tuple[float, float]:
    """Mean and standard deviation of x_t."""
    alpha_bar = SCHEDULE.alpha_bar_at(t)
    return math.sqrt(alpha_bar) * MU, math.sqrt(alpha_bar * SIGMA**2 + 1 - alpha_bar)


def affine_product(pairs: list[tuple[int, int]]) -> tuple[float, float]:
    """DDIM with the exact eps is affine at every step: the whole run is x -> scale x + shift."""
    scale, shift = 1.0, 0.0
    for t, t_prev in pairs:
        a, b = SCHEDULE.alpha_bar_at(t), SCHEDULE.alpha_bar_at(t_prev)
        mean, std = gaussian_of(t)
        slope = math.sqrt(1 - a) / std**2  # eps = slope (x - mean)
        # x_prev = sqrt(b / a) x + (sqrt(1 - b) - sqrt(b / a) sqrt(1 - a)) eps
        eps_share = math.sqrt(1 - b) - math.sqrt(b / a) * math.sqrt(1 - a)
        step_scale = math.sqrt(b / a) + eps_share * slope
        scale, shift = step_scale * scale, step_scale * shift - eps_share * slope * mean
    return scale, shift


@pytest.mark.parametrize("steps", [1, 2, 10, 50, 250, 1000])
def test_ddim_on_a_gaussian_is_the_product_of_its_affine_steps(steps: int, device: str) -> None:
    pairs = SCHEDULE.ddim_timesteps(steps)
    x = start(device=device, dtype=torch.float64)
    *_, last = ddim(gaussian_eps, x, pairs, SCHEDULE)
    scale, shift = affine_product(pairs)
    # float64: up to 1000 steps of a few roundings (1e-16) each.
    torch.testing.assert_close(last.x_prev, scale * x + shift, rtol=0, atol=1e-6)
    if steps >= 10:
        assert 0.3 < scale < 0.7  # data have SIGMA = 0.5: the closed form is not trivial


def test_ddims_error_against_the_exact_flow_falls_as_one_over_steps(device: str) -> None:
    """The probability flow (Song et al. 2021) carries one Gaussian into the other without
    crossing: it keeps (x - mean) / std. DDIM is Euler's method for it, of the first order."""
    x = start(device=device, dtype=torch.float64)
    errors = []
    for steps in (50, 100, 200):
        pairs = SCHEDULE.ddim_timesteps(steps)
        *_, last = ddim(gaussian_eps, x, pairs, SCHEDULE)
        (mean, std), (end_mean, end_std) = gaussian_of(pairs[0][0]), gaussian_of(pairs[-1][1])
        exact = end_mean + end_std * (x - mean) / std
        errors.append((last.x_prev - exact).abs().max().item())
    # Twice the steps, half the error: the second order is still some 10 % of it at 50 steps.
    for coarse, fine in pairwise(errors):
        assert 1.7 < coarse / fine < 2.3, errors
    assert errors[-1] < 0.02  # and it is small


def test_ddim_keeps_a_known_picture(device: str) -> None:
    """Where data are one picture, eps is known exactly and every x0 is that picture."""
    picture = 0.8 * torch.tanh(start(device=device, dtype=torch.float64))

    def eps_fn(x: Tensor, t: Tensor) -> Tensor:
        alpha_bar = SCHEDULE.alpha_bar_at(int(t[0]))
        return (x - alpha_bar**0.5 * picture) / (1 - alpha_bar) ** 0.5

    x = randn(2, *SHAPE, seed=9, dtype=torch.float64).to(device)
    for step in ddim(eps_fn, x, SCHEDULE.ddim_timesteps(20), SCHEDULE):
        # float64, magnified by 1 / sqrt(alpha_bar), 15 at most.
        torch.testing.assert_close(step.x0, picture, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["noisy ddim", "ddpm"])
def test_noisy_samplers_keep_the_marginals(kind: str) -> None:
    """Where data are one picture, x_t is exactly N(sqrt(alpha_bar) x0, 1 - alpha_bar) at every
    step, with any eta (DDIM lemma 1; DDPM eq. 4)."""
    n = 40_000
    picture = torch.full((1, 1, 1, n), 0.6)

    def eps_fn(x: Tensor, t: Tensor) -> Tensor:
        alpha_bar = SCHEDULE.alpha_bar_at(int(t[0]))
        return (x - alpha_bar**0.5 * picture) / (1 - alpha_bar) ** 0.5

    first = SCHEDULE.alpha_bar_at(SCHEDULE.timesteps(8)[0])
    x = noised(picture, randn(1, 1, 1, n, seed=4), first)
    for step in run(kind, x, steps=8, eps_fn=eps_fn):
        alpha_bar = SCHEDULE.alpha_bar_at(step.t_prev)
        std = math.sqrt(1 - alpha_bar)
        # Five standard errors of n normal numbers' mean and standard deviation; and fp32 rounding.
        noise = 5 * std / math.sqrt(n) + 1e-6
        assert abs(step.x_prev.mean().item() - math.sqrt(alpha_bar) * 0.6) < noise
        assert abs(step.x_prev.std().item() - std) < noise


@every_sampler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_latents_stay_close(kind: str, dtype: torch.dtype, device: str) -> None:
    x = start(device=device)
    *_, exact = run(kind, x, steps=10)
    *_, rounded = run(kind, x.to(dtype), steps=10)
    assert rounded.x_prev.dtype == dtype
    # Ten steps of a few roundings each, of latents up to 4 and of x0 up to 15 times as large:
    # measured 4.1 epsilons at most.
    bound = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(rounded.x_prev.float(), exact.x_prev, rtol=0, atol=bound)


# --- Guidance --------------------------------------------------------------------------------


def linear_model(calls: list[tuple[Tensor, ...]]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """eps = x + mean(context): no image sees another's context."""

    def model(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        calls.append((x, t, context))
        return x + context.mean(dim=(1, 2)).view(-1, 1, 1, 1)

    return model


def contexts(device: str) -> tuple[Tensor, Tensor]:
    return randn(2, 5, 6, seed=1).to(device), randn(2, 5, 6, seed=2).to(device)


@pytest.mark.parametrize("scale", [0.0, 3.0, 7.5, -1.0])
def test_guidance_goes_from_the_unconditional_through_the_conditional(
    scale: float, device: str
) -> None:
    calls: list[tuple[Tensor, ...]] = []
    context, uncond = contexts(device)
    x, t = start(device=device), torch.tensor([7, 7], device=device)
    prediction = guide(linear_model(calls), context, uncond, scale)(x, t)
    assert isinstance(prediction, Prediction)
    cond_eps, uncond_eps = linear_model([])(x, t, context), linear_model([])(x, t, uncond)
    assert torch.equal(prediction.eps_cond, cond_eps)
    assert torch.equal(prediction.eps_uncond, uncond_eps)
    expected = uncond_eps + scale * (cond_eps - uncond_eps)
    torch.testing.assert_close(prediction.eps, expected, rtol=1e-6, atol=1e-6)  # a few roundings
    # One call, the unconditional half first.
    ((asked_x, asked_t, asked_context),) = calls
    assert torch.equal(asked_x, torch.cat([x, x])) and asked_t.tolist() == [7] * 4
    assert torch.equal(asked_context, torch.cat([uncond, context]))


def test_scale_1_asks_the_prompt_alone(device: str) -> None:
    calls: list[tuple[Tensor, ...]] = []
    context, uncond = contexts(device)
    x, t = start(device=device), torch.tensor([7, 7], device=device)
    eps = guide(linear_model(calls), context, uncond, 1.0)(x, t)
    assert isinstance(eps, Tensor)
    assert torch.equal(eps, linear_model([])(x, t, context))
    assert len(calls) == 1 and len(calls[0][0]) == 2


def test_every_image_has_a_context_of_its_own() -> None:
    context, uncond = contexts("cpu")
    t = torch.tensor([7, 7])
    for scale in (1.0, 3.0):
        one = guide(linear_model([]), context[:1], uncond[:1], scale)
        with pytest.raises(ValueError, match="each image needs a context of its own: x is of 2"):
            one(start(), t)
    for wrong in (uncond[:1], uncond[:, :3], uncond[0]):
        with pytest.raises(ValueError, match=r"context and uncond_context must be \(B, M, D\)"):
            guide(linear_model([]), context, wrong, 3.0)


@pytest.mark.parametrize("scale", [math.nan, math.inf, "3", None, torch.tensor([3.0, 3.0])])
def test_guide_refuses_a_scale_that_is_no_number_at_the_call(scale: object) -> None:
    with pytest.raises(ValueError, match="guidance_scale must be a finite number, not"):
        guide(linear_model([]), *contexts("cpu"), scale)


@pytest.mark.parametrize("scale", [np.float32(3), np.float16(3), np.int64(3), 3])
def test_a_scale_may_be_a_number_of_any_type(scale: float) -> None:
    x, t = start(), torch.tensor([7, 7])
    eps, expected = (guide(linear_model([]), *contexts("cpu"), s)(x, t).eps for s in (scale, 3.0))
    assert eps.dtype == torch.float32 and torch.equal(eps, expected)


def test_guidance_on_an_interval_asks_twice_within_it_alone() -> None:
    calls: list[tuple[Tensor, ...]] = []
    context, uncond = contexts("cpu")
    eps_fn = guide(linear_model(calls), context, uncond, on_interval(3.0, 200, 600))
    always = guide(linear_model([]), context, uncond, 3.0)
    for t, rows in ((601, 2), (600, 4), (200, 4), (199, 2)):
        at = torch.tensor([t, t])
        answer = eps_fn(start(), at)
        assert len(calls.pop()[0]) == rows
        if rows == 4:
            assert torch.equal(answer.eps, always(start(), at).eps)
        else:
            assert torch.equal(answer, linear_model([])(start(), at, context))


def test_a_scale_of_t_that_is_no_number_is_refused_where_it_is_asked() -> None:
    eps_fn = guide(linear_model([]), *contexts("cpu"), lambda t: math.nan if t == 7 else 2.0)
    assert isinstance(eps_fn(start(), torch.tensor([8, 8])), Prediction)
    with pytest.raises(ValueError, match="guidance_scale must be a finite number, not nan"):
        eps_fn(start(), torch.tensor([7, 7]))


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_rescaled_guidance_is_diffusers(share: float) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    context, uncond = contexts("cpu")
    x, t = start(), torch.tensor([7, 7])
    plain = guide(linear_model([]), context, uncond, 7.5)(x, t)
    ours = guide(linear_model([]), context, uncond, 7.5, rescale=share)(x, t)
    theirs = rescale_noise_cfg(plain.eps.double(), plain.eps_cond.double(), share)
    torch.testing.assert_close(ours.eps.double(), theirs, rtol=0, atol=1e-5)
    assert torch.equal(ours.eps, plain.eps) == (share == 0.0)
    with pytest.raises(ValueError, match=r"rescale must be between 0 and 1, not 1\.5"):
        guide(linear_model([]), context, uncond, 7.5, rescale=1.5)


@every_sampler
def test_guided_steps_carry_both_predictions(kind: str, device: str) -> None:
    context, uncond = contexts(device)
    eps_fn = guide(linear_model([]), context, uncond, 2.0)
    for step in run(kind, start(device=device), eps_fn=eps_fn):
        assert step.eps_cond is not None and step.eps_uncond is not None
        expected = step.eps_uncond + 2.0 * (step.eps_cond - step.eps_uncond)
        assert torch.equal(step.eps, expected)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_model_runs_in_the_contexts_dtype_and_latents_keep_theirs(scale: float) -> None:
    calls: list[tuple[Tensor, ...]] = []
    context, uncond = (c.bfloat16() for c in contexts("cpu"))
    eps = guide(linear_model(calls), context, uncond, scale)(start(), torch.tensor([7, 7]))
    assert calls[0][0].dtype == torch.bfloat16
    parts = eps if isinstance(eps, Prediction) else [eps]
    assert all(part.dtype == torch.float32 for part in parts)
