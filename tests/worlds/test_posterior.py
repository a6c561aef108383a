"""What a perfect model says, against Bayes' rule by brute force."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.samplers import ddim
from ldm.schedule import NoiseSchedule, noised
from ldm.worlds import atoms as atoms_module
from ldm.worlds.atoms import FiniteSet, Posterior
from ldm.worlds.ladder import Checkerboards, House, Scenes, Sea
from ldm.worlds.posterior import Gaussian, perfect, posterior, stating
from ldm.worlds.scenes import Scene
from tests.helpers import rng

SCHEDULE = NoiseSchedule()
FIRST = SCHEDULE.alpha_bar_at(0)  # 0.99915: the least noise


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def by_hand(atoms: Tensor, log_weights: Tensor, x_t: Tensor, alpha_bar: float) -> dict[str, Tensor]:
    """Bayes' rule as it is written, for each x_t and atom, in float64."""
    gap = x_t.double()[:, None] - alpha_bar**0.5 * atoms.double()  # (B, N, C, H, W)
    d = gap[0, 0].numel()
    density = -gap.square().flatten(2).sum(dim=2) / (2 * (1 - alpha_bar))
    joint = log_weights + density - d / 2 * math.log(2 * math.pi * (1 - alpha_bar))
    w = joint.softmax(dim=1)  # (B, N)
    mean = torch.einsum("bn,nchw->bchw", w, atoms.double())
    spread = (atoms.double() - mean[:, None]).square()
    return {
        "mean": mean,
        "variance": torch.einsum("bn,bnchw->bchw", w, spread),
        "score": -torch.einsum("bn,bnchw->bchw", w, gap) / (1 - alpha_bar),
        "log_prob": joint.logsumexp(dim=1),
        "effective_atoms": 1 / w.square().sum(dim=1),
    }


# --------------------------------------------------------------------------------- finite sets


@pytest.mark.parametrize("alpha_bar", [FIRST, 0.9, 0.3, 0.004, 0.0])
def test_a_finite_sets_posterior_is_bayes_rule(alpha_bar: float) -> None:
    atoms = 0.3 * normal(40, 2, 4, 4).float()  # so near that some share an x_t even at 0.9
    weights = torch.rand(40, generator=rng(1))
    x_t = noised(atoms[:6], normal(6, 2, 4, 4, seed=2).float(), alpha_bar)
    kept = x_t.clone()
    found = posterior(FiniteSet(atoms, weights), x_t, alpha_bar)
    log_weights = (weights.double() / weights.double().sum()).log()
    for name, expected in by_hand(atoms, log_weights, x_t, alpha_bar).items():
        value = getattr(found, name)
        # x_t, and so its answer, is float32; of the variance the last bits are lost in E[x^2].
        torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6)
    assert found.mean.dtype == found.score.dtype == torch.float32
    assert found.log_prob.dtype == torch.float64
    assert torch.equal(x_t, kept)


def test_each_picture_has_its_own_alpha_bar() -> None:
    law = FiniteSet(normal(10, 1, 3, 3))
    x_t, alpha_bar = normal(3, 1, 3, 3, seed=1), torch.tensor([0.0, 0.5, 0.99])
    together = posterior(law, x_t, alpha_bar)
    for i, a in enumerate(alpha_bar.tolist()):
        alone = posterior(law, x_t[i : i + 1], a)
        torch.testing.assert_close(together.mean[i : i + 1], alone.mean, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(together.score[i : i + 1], alone.score, rtol=1e-6, atol=1e-9)


def test_atoms_are_taken_in_parts_and_the_answer_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    law, x_t = FiniteSet(normal(50, 1, 4, 4)), normal(5, 1, 4, 4, seed=1)
    whole = posterior(law, x_t, 0.4)
    monkeypatch.setattr(atoms_module, "CHUNK", 7 * 16)
    assert [len(part) for part in atoms_module.in_float64(law.atoms)] == [7] * 7 + [1]
    parts = posterior(law, x_t, 0.4)
    for name in ("mean", "variance", "score", "log_prob"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


def test_pure_noise_says_nothing() -> None:
    law, x_t = FiniteSet(normal(10, 1, 3, 3)), normal(2, 1, 3, 3, seed=1)
    found = posterior(law, x_t, 0.0)
    torch.testing.assert_close(found.mean, law.atoms.mean(dim=0).expand(2, -1, -1, -1))
    torch.testing.assert_close(found.score, -x_t)
    torch.testing.assert_close(found.effective_atoms, torch.full((2,), 10.0).double())


def test_draws_that_stand_in_for_a_law_are_told_when_they_are_few() -> None:
    atoms, x_t = normal(200, 1, 3, 3), normal(1, 1, 3, 3, seed=1)
    noisy = posterior(FiniteSet(atoms, sampled=True), x_t, 0.01)
    clear = posterior(FiniteSet(atoms, sampled=True), x_t, 0.99)
    assert noisy.effective_atoms > 30 and not noisy.few_atoms
    assert clear.effective_atoms < 30 and clear.few_atoms
    assert not posterior(FiniteSet(atoms), x_t, 0.99).few_atoms  # they are the whole law


def test_a_condition_leaves_the_atoms_it_is_true_of() -> None:
    rows = [Scene.sample(np.random.default_rng(seed)) for seed in range(60)]
    mask = stating(rows, {"sky": "night", "house": "some"})
    true = [scene.sky == "night" and scene.house != "none" for scene in rows]
    assert mask.tolist() == true and 0 < sum(true) < 60
    law = FiniteSet(normal(60, 1, 2, 2), torch.rand(60, generator=rng()), sampled=True).only(mask)
    assert len(law.atoms) == len(law.log_weights) == sum(true) and law.sampled
    assert law.log_weights.exp().sum() == pytest.approx(1.0)
    assert stating(rows, {}).all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FiniteSet(torch.zeros(3, 4)), r"atoms must be \(N, C, H, W\), not \(3, 4\)"),
        (lambda: FiniteSet(torch.zeros(0, 1, 2, 2)), r"atoms must be \(N, C, H, W\)"),
        (lambda: FiniteSet(torch.zeros(3, 1, 2, 2), torch.ones(2)), r"weights must be \(3,\)"),
        (lambda: FiniteSet(torch.zeros(2, 1, 2, 2), torch.zeros(2)), "not all 0"),
        (lambda: FiniteSet(torch.zeros(2, 1, 2, 2), torch.tensor([2.0, -1])), "0 or more"),
        (lambda: FiniteSet(torch.zeros(2, 1, 2, 2), torch.tensor([2.0, math.nan])), "0 or more"),
        (lambda: Gaussian(torch.zeros(1, 2, 2), torch.eye(3)), r"\(CHW, CHW\), not \(1, 2, 2\)"),
        (lambda: posterior(Sea(), torch.zeros(2, 1, 8, 8), 0.5), r"x_t must be \(B, 3, 8, 8\)"),
        (lambda: posterior(Sea(), torch.zeros(2, 3, 8, 8), 1.0), r"alpha_bar must be in \[0, 1\)"),
        (lambda: posterior(Sea(), torch.zeros(2, 3, 8, 8), math.nan), r"must be in \[0, 1\)"),
        (lambda: posterior(Sea(), torch.zeros(2, 3, 8, 8), torch.ones(3) / 2), r"or \(2,\)"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(make: partial[object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_scenes_are_not_computed_but_drawn() -> None:
    with pytest.raises(TypeError, match="Scenes has no posterior; draws from it have: FiniteSet"):
        posterior(Scenes(), torch.zeros(1, 3, 8, 8), 0.5)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------- known laws

GAUSSIAN = Gaussian(normal(1, 3, 3), normal(9, 9, seed=1) @ normal(9, 9, seed=1).T / 9)


@pytest.mark.parametrize("alpha_bar", [FIRST, 0.4, 0.0])
def test_a_gaussians_posterior_is_conditioning(alpha_bar: float) -> None:
    """x0 and x_t are Gaussian together: S = a K + (1 - a) 1 is the covariance of x_t."""
    mean, k = GAUSSIAN.mean.flatten(), GAUSSIAN.covariance
    x_t = normal(4, 1, 3, 3, seed=2)
    found = posterior(GAUSSIAN, x_t, alpha_bar)
    s = alpha_bar * k + (1 - alpha_bar) * torch.eye(9).double()
    law = torch.distributions.MultivariateNormal(alpha_bar**0.5 * mean, s)
    away = (x_t.flatten(1) - alpha_bar**0.5 * mean).T
    expected = mean + (alpha_bar**0.5 * k @ torch.linalg.solve(s, away)).T
    left = (k - alpha_bar * k @ torch.linalg.solve(s, k)).diagonal()
    torch.testing.assert_close(found.mean.flatten(1), expected)
    torch.testing.assert_close(found.variance.flatten(1), left.expand(4, -1))
    torch.testing.assert_close(found.log_prob, law.log_prob(x_t.flatten(1)))
    assert found.effective_atoms.isinf().all() and not found.few_atoms.any()


@pytest.mark.parametrize("alpha_bar", [FIRST, 0.3])
@pytest.mark.parametrize("law", [FiniteSet(normal(5, 1, 3, 3)), GAUSSIAN, Checkerboards()])
def test_score_and_variance_are_derivatives(
    law: FiniteSet | Gaussian | Checkerboards, alpha_bar: float
) -> None:
    """The score is the gradient of log p(x_t), and the variance (1 - a) / sqrt(a) times that of the
    mean (Tweedie's formulas)."""
    x_t = normal(2, 1, 3, 3, seed=3).requires_grad_()
    found = posterior(law, x_t, alpha_bar)
    (gradient,) = torch.autograd.grad(found.log_prob.sum(), x_t, retain_graph=True)
    torch.testing.assert_close(found.score, gradient)
    rows = [
        torch.autograd.grad(found.mean[:, 0, i, j].sum(), x_t, retain_graph=True)[0][:, 0, i, j]
        for i in range(3)
        for j in range(3)
    ]
    slope = torch.stack(rows, dim=1).view_as(x_t)
    expected = (1 - alpha_bar) / alpha_bar**0.5 * slope
    torch.testing.assert_close(found.variance, expected, rtol=1e-6, atol=1e-9)


def test_checkerboards_are_a_set_of_two() -> None:
    world = Checkerboards()
    both = world.render(torch.tensor([[0.0], [1.0]]), 5)
    x_t = noised(both, normal(2, 1, 5, 5).float(), 0.05)
    found = posterior(world, x_t, 0.05)
    expected = by_hand(both, torch.full((2,), math.log(0.5)).double(), x_t, 0.05)
    torch.testing.assert_close(found.mean.double(), expected["mean"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.log_prob, expected["log_prob"])
    assert (found.effective_atoms <= 2).all() and not found.few_atoms.any()


def disagreement(found: Posterior, expected: dict[str, Tensor]) -> tuple[float, float]:
    """Of the means, as a share of their norm; and of log p(x_t), in nats. The largest of all."""
    gap = (found.mean - expected["mean"]).flatten(1).norm(dim=1)
    apart = (found.log_prob - expected["log_prob"]).abs().max()
    return (gap / expected["mean"].flatten(1).norm(dim=1)).max().item(), apart.item()


@pytest.mark.parametrize("t", [0, 300, 700, 850, 999])
def test_the_seas_posterior_is_an_integral_over_all_heights(t: int) -> None:
    """Brute force: 6,000 heights, a ten-thousandth apart; with the least noise x_t tells the height
    to a thousandth."""
    world, a = Sea(), SCHEDULE.alpha_bar_at(t)
    heights = (torch.arange(6000, dtype=torch.float64)[:, None] + 0.5) / 10_000 + 0.2
    pictures = world.render(heights, 8)
    log_weights = world.log_prob(heights) + math.log(1e-4)
    x_t = noised(pictures[[700, 2950, 4444]], normal(3, 3, 8, 8).float(), a)
    found = posterior(world, x_t, a)
    means, nats = disagreement(found, by_hand(pictures, log_weights, x_t, a))
    assert means < 0.005 and nats < 0.01


HOUSE = House()
MEAN, SD = torch.tensor(list(HOUSE.numbers.values()), dtype=torch.float64).unbind(dim=1)
BUILT = MEAN + SD * torch.tensor([0.3, -0.5, 0.4, 0.2])


@pytest.mark.parametrize("t", [500, 900])
def test_in_much_noise_a_house_may_be_any(t: int) -> None:
    """Brute force: 10,000 houses as they are drawn."""
    a = SCHEDULE.alpha_bar_at(t)
    x_t = noised(HOUSE.render(BUILT[None], 8), normal(1, 3, 8, 8, seed=2).float(), a)
    drawn = HOUSE.render(HOUSE.sample(rng(3), 10_000), 8)
    expected = by_hand(drawn, torch.tensor(-math.log(10_000)).double(), x_t, a)
    means, nats = disagreement(posterior(HOUSE, x_t, a), expected)
    assert means < 0.01 and nats < 0.05


@pytest.mark.parametrize("t, wide", [(0, 0.15), (300, 1.5)])
def test_in_little_noise_a_house_is_told_by_its_four_numbers(t: int, wide: float) -> None:
    """Brute force: numbers drawn evenly from a box, once within `wide` standard deviations of the
    true ones, to see where the posterior is, and then 4.5 of its own to each side."""
    a = SCHEDULE.alpha_bar_at(t)
    x_t = noised(HOUSE.render(BUILT[None], 8), normal(1, 3, 8, 8, seed=2).float(), a)
    middle, half = BUILT, wide * SD
    for n in (6_000, 12_000):
        box = torch.rand(n, 4, generator=rng(n), dtype=torch.float64) * 2 - 1
        numbers, pictures = middle + half * box, HOUSE.render(middle + half * box, 8)
        log_weights = HOUSE.log_prob(numbers) + (2 * half).log().sum() - math.log(n)
        gap = (x_t - a**0.5 * pictures).double().square().flatten(1).sum(dim=1)
        w = (log_weights - gap / (2 * (1 - a))).softmax(dim=0)
        middle = w @ numbers
        half = 4.5 * (w @ (numbers - middle).square()).sqrt()
    expected = by_hand(pictures, log_weights, x_t, a)
    means, nats = disagreement(posterior(HOUSE, x_t, a), expected)
    enough = expected["effective_atoms"].item()
    assert enough > 100 and means < 0.01 and nats < 3 / enough**0.5


# ------------------------------------------------------------------------------- a perfect model


def test_a_perfect_model_of_a_finite_set_draws_its_members() -> None:
    law = FiniteSet(normal(6, 1, 4, 4))
    x = normal(30, 1, 4, 4, seed=1).float()
    for step in ddim(perfect(law, SCHEDULE), x, SCHEDULE.ddim_timesteps(100), SCHEDULE):
        drawn = step.x0
    apart = torch.cdist(drawn.flatten(1).double(), law.atoms.flatten(1))  # (30, 6)
    assert apart.min(dim=1).values.max() < 1e-4
    assert len(apart.argmin(dim=1).unique()) > 3  # and not one of them alone


def test_a_perfect_model_starts_from_pure_noise_and_between_timesteps() -> None:
    betas = (0.1, 0.5, 1.0)  # of the last timestep's picture nothing is left
    schedule = NoiseSchedule(ScheduleConfig(num_train_timesteps=3, betas=betas))
    law, x = FiniteSet(normal(4, 1, 3, 3)), normal(3, 1, 3, 3, seed=1)
    eps = perfect(law, schedule)(x, torch.tensor([2.0, 1.0, 0.5]))
    torch.testing.assert_close(eps[0], x[0])
    for i, t in ((1, 1), (2, 0.5)):
        a = schedule.alpha_bar_at(t)
        expected = -((1 - a) ** 0.5) * posterior(law, x[i : i + 1], a).score
        torch.testing.assert_close(eps[i : i + 1], expected)
    assert 0.45 < schedule.alpha_bar_at(0.5) < 0.9
