"""The ladder of small worlds: what they draw, its exact probability, and reading it back."""

from __future__ import annotations

import dataclasses
import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.samplers import ddim
from ldm.schedule import NoiseSchedule, eps_from_x0
from ldm.worlds.distribution import ATTRIBUTES, all_names, continuous
from ldm.worlds.ladder import (
    HOUSE_COLOURS,
    Checkerboards,
    House,
    Scenes,
    Sea,
    World,
    as_row,
    as_scene,
    covered,
    names_log_prob,
    palette,
    scene_log_prob,
    shares,
)
from ldm.worlds.scenes import Scene
from tests.helpers import rng

LADDER: tuple[World, ...] = (Checkerboards(), Sea(), House(), Scenes())
GAUSSIAN = (Sea(), House())
SD = 0.986578  # of a standard Gaussian truncated at 3: sqrt(1 - 6 phi(3) / 0.9973)


def ids(world: World) -> str:
    return type(world).__name__


@pytest.mark.parametrize("world", LADDER, ids=ids)
def test_one_interface_climbs_the_ladder(world: World) -> None:
    parameters = world.sample(rng(1), 3)
    assert parameters.shape == (3, len(world.names)) and parameters.dtype == torch.float64
    assert torch.equal(parameters, world.sample(rng(1), 3))
    assert not torch.equal(world.sample(rng(1), 12), world.sample(rng(2), 12))
    kept = parameters.clone()
    pictures = world.render(parameters, 16)
    assert pictures.shape == (3, world.channels, 16, 16) and pictures.dtype == torch.float32
    assert pictures.abs().max() <= 1 and pictures.std() > 0.1
    found = world.log_prob(parameters)
    assert found.shape == (3,) and found.dtype == torch.float64 and found.isfinite().all()
    assert torch.equal(parameters, kept)


@pytest.mark.parametrize("world", LADDER, ids=ids)
def test_parameters_of_another_world_are_refused_in_one_line(world: World) -> None:
    wrong = torch.zeros(2, len(world.names) + 1)
    for use in (world.log_prob, lambda p: world.render(p, 16)):
        with pytest.raises(ValueError, match=rf"parameters must be \(n, {len(world.names)}\)"):
            use(wrong)


# --------------------------------------------------------------------------------- checkerboards


def test_of_512_pictures_two_are_checkerboards_and_all_probabilities_sum_to_1() -> None:
    cells = torch.tensor(list(product((-1.0, 1.0), repeat=9))).view(512, 1, 3, 3)
    found = Checkerboards().log_prob_of_pictures(cells).exp()
    assert found.sum() == pytest.approx(1.0) and (found > 0).sum() == 2
    board = torch.tensor([[1.0, -1, 1], [-1, 1, -1], [1, -1, 1]])
    black, white = cells[found > 0, 0]
    assert torch.equal(white, board) and torch.equal(black, -board)
    drawn = Checkerboards().render(torch.tensor([[0.0], [1.0]]), 3)
    assert torch.equal(drawn[:, 0], torch.stack([-board, board]))


@pytest.mark.parametrize("size", [3, 7, 12])
def test_a_checkerboard_of_any_size_is_read_through_noise(size: int) -> None:
    world = Checkerboards()
    parameters = world.sample(rng(), 60)
    assert 15 < parameters.sum() < 45  # fair: five standard deviations of 60 tosses are 19
    pictures = world.render(parameters, size)
    noisy = pictures + 0.2 * torch.randn(pictures.shape, generator=rng(1))
    assert torch.equal(world.read(noisy), parameters)
    assert (world.log_prob_of_pictures(noisy) == math.log(0.5)).all()
    noisy[:, 0, 1, 0] *= -1  # a single pixel of the wrong colour
    assert (world.log_prob_of_pictures(noisy) == -math.inf).all()


def test_only_the_two_parameters_have_a_probability() -> None:
    found = Checkerboards().log_prob(torch.tensor([[0.0], [1.0], [0.5], [2.0]]))
    assert found.tolist() == [math.log(0.5), math.log(0.5), -math.inf, -math.inf]


def test_a_cell_needs_a_pixel() -> None:
    with pytest.raises(ValueError, match="4 cells need 4 pixels a side, not 3"):
        Checkerboards(cells=4).render(torch.zeros(1, 1), 3)


def test_the_exact_denoiser_of_two_pictures_draws_these_two_equally_often() -> None:
    world, schedule = Checkerboards(), NoiseSchedule()
    both = world.render(torch.tensor([[0.0], [1.0]]), 3).flatten(1)  # (2, 9)

    def eps_fn(x: Tensor, t: Tensor) -> Tensor:
        alpha_bar = schedule.alpha_bar[t][:, None]
        gap = (x.flatten(1)[:, None] - alpha_bar[..., None] ** 0.5 * both).square().sum(dim=2)
        posterior = torch.softmax(-gap / (2 * (1 - alpha_bar)), dim=1)  # (n, 2)
        return eps_from_x0(x.flatten(1), posterior @ both, alpha_bar).view_as(x)

    x = torch.randn(400, 1, 3, 3, generator=rng())
    for step in ddim(eps_fn, x, schedule.ddim_timesteps(20), schedule):
        pictures = step.x0
    assert (world.log_prob_of_pictures(pictures) == math.log(0.5)).all()
    assert 0.375 < world.read(pictures).mean() < 0.625  # five standard deviations


# ------------------------------------------------------------------------------- Gaussian worlds


@pytest.mark.parametrize("world", GAUSSIAN, ids=ids)
def test_the_density_is_the_truncated_gaussians(world: Sea | House) -> None:
    mean, sd = torch.tensor(list(world.numbers.values()), dtype=torch.float64).unbind(1)
    at_mean = world.log_prob(mean[None]).item()
    expected = sum(-math.log(s * math.sqrt(2 * math.pi) * 0.9973002039) for s in sd.tolist())
    assert at_mean == pytest.approx(expected, abs=1e-9)
    for p in range(len(mean)):
        away = mean.repeat(4, 1)
        away[:, p] += sd[p] * torch.tensor([1.0, -2.999, 3.001, -3.001])
        one, two, *outside = world.log_prob(away).tolist()
        assert one == pytest.approx(at_mean - 0.5) and two == pytest.approx(at_mean - 2.999**2 / 2)
        assert outside == [-math.inf, -math.inf]


def test_the_seas_density_integrates_to_1_and_is_what_is_drawn() -> None:
    world = Sea()
    heights = torch.linspace(0.1, 0.9, 8001, dtype=torch.float64)
    density = world.log_prob(heights[:, None]).exp()
    cumulative = density.cumsum(dim=0) * 0.0001
    # The density jumps at its two ends: the sum is off by a step's height times its width.
    assert cumulative[-1] == pytest.approx(1.0, abs=1e-5)
    drawn = world.sample(rng(), 4000)[:, 0].sort().values
    expected = cumulative[((drawn - 0.1) / 0.0001).round().long()]
    distance = (expected - (torch.arange(4000) + 0.5) / 4000).abs().max()
    assert distance < 1.95 / math.sqrt(4000)  # Kolmogorov's test at 0.1%


def test_the_houses_density_integrates_to_1() -> None:
    world = House()
    mean, sd = torch.tensor(list(world.numbers.values()), dtype=torch.float64).unbind(1)
    box = torch.rand(100_000, 4, generator=rng(), dtype=torch.float64) * 6.2 - 3.1
    values = world.log_prob(mean + sd * box).exp() * (6.2 * sd).prod()
    # The standard error is 0.009: a uniform sample rarely meets the peak.
    assert values.mean() == pytest.approx(1.0, abs=0.045)


@pytest.mark.parametrize("world", GAUSSIAN, ids=ids)
def test_numbers_are_independent_with_their_means_and_deviations(world: Sea | House) -> None:
    mean, sd = torch.tensor(list(world.numbers.values()), dtype=torch.float64).unbind(1)
    z = (world.sample(rng(3), 5000) - mean) / sd
    assert world.names == tuple(world.numbers)
    assert 2.5 < z.abs().max() <= 3.0
    assert z.mean(dim=0).abs().max() < 5 / math.sqrt(5000)
    assert (z.std(dim=0) - SD).abs().max() < 5 * 0.7 / math.sqrt(5000)
    together = torch.corrcoef(z.T).reshape(len(mean), -1) - torch.eye(len(mean))
    assert together.abs().max() < 5 / math.sqrt(5000)


def test_what_is_covered_adds_up() -> None:
    low, high = torch.tensor([0.1, 0.26]), torch.tensor([0.6, 0.27])
    parts = covered(low, high, 4)
    assert torch.allclose(parts[0], torch.tensor([0.6, 1.0, 0.4, 0.0]))
    assert torch.allclose(parts[1], torch.tensor([0.0, 0.04, 0.0, 0.0]), atol=1e-6)
    assert torch.allclose(parts.mean(dim=1), high - low)


def test_the_sea_fills_the_picture_to_its_horizon() -> None:
    sky, sea = palette("8cc8f0", "1f75a3")
    picture = Sea().render(torch.tensor([[0.3]]), 4)[0]  # (3, 4, 4)
    for row, colour in enumerate([sky, sky, 0.8 * sky + 0.2 * sea, sea]):
        assert torch.allclose(picture[:, row], colour[:, None].expand(3, 4), atol=1e-6)


@pytest.mark.parametrize("size", [8, 15])
def test_a_horizon_is_read_back_exactly(size: int) -> None:
    heights = torch.cat([Sea().sample(rng(), 50), torch.tensor([[0.2], [0.8]])])
    found = Sea().read(Sea().render(heights, size))
    assert torch.allclose(found, heights, atol=1e-6)  # float32's precision


@pytest.mark.parametrize("size", [12, 16, 33])
def test_a_house_is_read_back(size: int) -> None:
    world = House()
    drawn = world.sample(rng(), 40)
    mean, sd = torch.tensor(list(world.numbers.values()), dtype=torch.float64).unbind(1)
    corners = mean + 3 * sd * torch.tensor(list(product((-1, 1), repeat=4)))
    parameters = torch.cat([drawn, corners])
    error = (world.read(world.render(parameters, size)) - parameters).abs().amax(dim=0)
    assert error[0] < 1e-6 and error[3] < 1e-6  # horizon and size are areas: exact
    assert error[1] < 0.1 / size and error[2] < 0.1 / size


def test_a_house_stands_on_grass_under_a_roof() -> None:
    sky, grass, wall, roof = palette(*HOUSE_COLOURS)
    n = 100
    picture = House().render(torch.tensor([[0.55, 0.4, 0.2, 0.3]]), n)[0]

    def at(x: float, y: float) -> Tensor:
        return picture[:, n - 1 - int(y * n), int(x * n)]

    for place, colour in {
        (0.405, 0.205): wall,  # its foot
        (0.265, 0.365): wall,  # its corners
        (0.535, 0.205): wall,
        (0.235, 0.205): grass,
        (0.405, 0.185): grass,
        (0.405, 0.395): roof,
        (0.245, 0.385): roof,  # the eaves reach beyond the wall
        (0.405, 0.505): roof,
        (0.405, 0.535): grass,  # above the ridge, 0.2 + (0.6 + 0.5) 0.3
        (0.305, 0.485): grass,  # beside it
        (0.9, 0.545): grass,
        (0.9, 0.555): sky,
    }.items():
        assert torch.allclose(at(*place), colour, atol=1e-5), place


def test_shares_turn_mixing_around() -> None:
    world = House()
    found = shares(world.render(world.sample(rng(), 5), 16), HOUSE_COLOURS)
    assert torch.allclose(found.sum(dim=1), torch.ones(1, dtype=torch.float64))
    assert found.min() > -1e-5 and found.max() < 1 + 1e-5


# --------------------------------------------------------------------------------------- scenes


def test_the_probabilities_of_all_names_sum_to_1() -> None:
    table = {tuple(sorted(names.items())): p for names, p in all_names()}
    total = 0.0
    for values in product(*ATTRIBUTES.values()):
        names = dict(zip(ATTRIBUTES, values, strict=True))
        probability = math.exp(names_log_prob(names))
        total += probability
        row = tuple(sorted((k, v) for k, v in names.items() if k not in ("light", "horizon")))
        assert probability == pytest.approx(table.get(row, 0.0) / 9), names
    assert total == pytest.approx(1.0)


def test_a_scenes_density_is_the_product_of_its_parts() -> None:
    draw = np.random.default_rng(0)
    for _ in range(30):
        scene = Scene.sample(draw)
        expected = names_log_prob(scene.attributes)
        for name, (mean, sd) in continuous(scene.attributes).items():
            if sd > 0:
                z = (getattr(scene, name) - mean) / sd
                expected -= z * z / 2 + math.log(sd * math.sqrt(2 * math.pi) * 0.9973002039)
        assert scene_log_prob(scene) == pytest.approx(expected, abs=1e-7)


def test_a_scene_that_is_never_drawn_has_no_density() -> None:
    draw = np.random.default_rng(1)
    scene = Scene.sample(draw, house="red", light="none", horizon="low")
    assert math.isfinite(scene_log_prob(scene))
    for change in (
        {"horizon_height": 0.30 + 0.015 * 3.01},
        {"horizon_height": 0.46},  # that is a middle one
        {"light_x": 0.17},  # of a sun that is not there
        {"drift": 1.0},
        {"roll": -0.1},
        {"house": "none"},  # with a place and a size
        {"ground": "sea"},
    ):
        assert scene_log_prob(dataclasses.replace(scene, **change)) == -math.inf, change
    assert math.isfinite(scene_log_prob(dataclasses.replace(scene, drift=0.0, roll=0.999)))


def test_scenes_become_rows_and_come_back() -> None:
    world = Scenes()
    parameters = world.sample(rng(5), 3)
    for row, found in zip(parameters, world.log_prob(parameters), strict=True):
        scene = as_scene(row)
        assert torch.equal(as_row(scene), row)
        assert found == scene_log_prob(scene)
    picture = world.render(parameters[:1], 32)[0].permute(1, 2, 0)
    expected = np.asarray(as_scene(parameters[0]).render(32), np.float32)
    assert np.abs((picture.numpy() + 1) * 127.5 - expected).max() < 1e-3


def test_names_are_read_and_numbers_are_not() -> None:
    world = Scenes()
    parameters = world.sample(rng(7), 2)
    found = world.read(world.render(parameters, 64))
    assert torch.equal(found[:, : len(ATTRIBUTES)], parameters[:, : len(ATTRIBUTES)])
    assert found[:, len(ATTRIBUTES) :].isnan().all()
