"""Likelihood by the probability-flow ODE, against densities that are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.schedule import NoiseSchedule, noised
from ldm.worlds.atoms import FiniteSet
from ldm.worlds.ladder import Checkerboards, Sea
from ldm.worlds.likelihood import log_likelihood, standard_normal
from ldm.worlds.posterior import Gaussian, Law, perfect, posterior
from tests.helpers import rng

SCHEDULE = NoiseSchedule()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def smoothed(pictures: Tensor, schedule: NoiseSchedule = SCHEDULE) -> Tensor:
    """With the noise of the first timestep."""
    noise = normal(*pictures.shape, seed=7)
    return noised(pictures.double(), noise, schedule.alpha_bar_at(0))


def truth(law: Law, x: Tensor, schedule: NoiseSchedule = SCHEDULE) -> Tensor:
    """log p(x) at the first timestep: closed form, or quadrature."""
    return posterior(law, x, schedule.alpha_bar_at(0)).log_prob


def estimate(
    law: Law, x: Tensor, steps: int, schedule: NoiseSchedule = SCHEDULE, **options: object
) -> Tensor:
    """The same from the perfect model's eps alone, and the law's end."""

    def end(x: Tensor, alpha_bar: float) -> Tensor:
        return posterior(law, x, alpha_bar).log_prob

    eps_fn = perfect(law, schedule)
    return log_likelihood(eps_fn, x, schedule, end=end, steps=steps, **options)  # type: ignore[arg-type]


ROOT = normal(18, 18, seed=1) / 18**0.5
GAUSSIAN = Gaussian(2 + normal(2, 3, 3), ROOT @ ROOT.T)
X = smoothed(GAUSSIAN.mean + (normal(4, 18, seed=2) @ ROOT.T).view(4, 2, 3, 3))


def test_of_a_gaussian_it_is_its_density() -> None:
    kept = X.clone()
    found = estimate(GAUSSIAN, X, 20)
    assert found.shape == (4,) and found.dtype == torch.float64 and not found.requires_grad
    assert (found - truth(GAUSSIAN, X)).abs().max() < 0.005
    assert torch.equal(X, kept)


def test_of_checkerboards_it_is_the_density_of_two_noisy_pictures() -> None:
    world = Checkerboards()
    x = smoothed(world.render(torch.tensor([[0.0], [1.0]]), 6))
    assert (estimate(world, x, 20) - truth(world, x)).abs().max() < 0.05


def test_of_the_sea_it_is_the_integral_over_its_heights() -> None:
    x = smoothed(Sea().render(torch.tensor([[0.41]]), 4))
    assert (estimate(Sea(), x, 14) - truth(Sea(), x)).abs().max() < 0.05


def test_the_end_is_the_laws_own_and_no_standard_normal() -> None:
    found = log_likelihood(perfect(GAUSSIAN, SCHEDULE), X, SCHEDULE, end=standard_normal, steps=20)
    assert (found - truth(GAUSSIAN, X)).abs().min() > 0.05
    flat = X.flatten(1)
    normal_law = torch.distributions.Normal(torch.zeros(18).double(), 1.0)
    torch.testing.assert_close(standard_normal(X, 0.0), normal_law.log_prob(flat).sum(dim=1))


def test_a_schedule_that_ends_in_pure_noise_is_left_a_timestep_before() -> None:
    betas = (*torch.linspace(0.01, 0.4, 20).tolist(), 1.0)
    schedule = NoiseSchedule(ScheduleConfig(num_train_timesteps=21, betas=betas))
    x = smoothed(GAUSSIAN.mean.expand(2, -1, -1, -1), schedule)
    found = estimate(GAUSSIAN, x, 20, schedule)
    assert (found - truth(GAUSSIAN, x, schedule)).abs().max() < 0.005


def test_random_directions_find_the_trace() -> None:
    """Where numbers are independent any random signs give it exactly, else on average."""
    upright = Gaussian(GAUSSIAN.mean, torch.linspace(0.1, 2.0, 18).double().diag())
    found = estimate(upright, X, 20, generator=rng())
    assert (found - truth(upright, X)).abs().max() < 0.005

    exact = estimate(GAUSSIAN, X[:1], 8)
    copies = X[:1].expand(400, -1, -1, -1)  # each with signs of its own
    one = estimate(GAUSSIAN, copies, 8, generator=rng())
    four = estimate(GAUSSIAN, copies, 8, generator=rng(), probes=4)
    for found in (one, four):
        assert (found.mean() - exact).abs() < 4 * found.std() / 400**0.5
    assert one.std() > 0.1
    assert four.std() == pytest.approx(one.std().item() / 2, rel=0.2)
    assert torch.equal(one, estimate(GAUSSIAN, copies, 8, generator=rng()))


def test_large_pictures_need_a_generator() -> None:
    law = FiniteSet(torch.ones(1, 1, 17, 17))
    x = smoothed(law.atoms)
    with pytest.raises(ValueError, match="exact up to 16 x 16: beyond, it needs a generator"):
        estimate(law, x, 4)
    found = estimate(law, x, 30, generator=rng())
    assert (found - truth(law, x)).abs().max() < 0.05


def test_a_model_without_gradients_is_told_so() -> None:
    model = torch.no_grad()(perfect(GAUSSIAN, SCHEDULE))
    with pytest.raises(ValueError, match=r"eps_fn has no gradient in x: does it run under no_grad"):
        log_likelihood(model, X, SCHEDULE, end=standard_normal)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 4, "probes": 0}])
def test_counts_are_at_least_1(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="steps and probes must be 1 or more"):
        estimate(GAUSSIAN, X, **wrong)


def test_a_better_model_finds_the_pictures_likelier() -> None:
    """What it may be used for: two models, the same pictures. One takes the law for rounder."""
    rounder = Gaussian(GAUSSIAN.mean, GAUSSIAN.covariance.diagonal().diag())
    assert estimate(GAUSSIAN, X, 12).mean() > estimate(rounder, X, 12).mean() + 1
