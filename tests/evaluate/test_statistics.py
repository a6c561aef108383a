"""A law is near itself, and what was planted is found."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ldm.evaluate.statistics import (
    diversity,
    interval,
    kolmogorov_smirnov,
    nearest,
    share_below,
    shift,
)
from ldm.worlds.distribution import TRUNCATION

LAW = {"day": 0.5, "sunset": 0.3, "night": 0.2}


def counts(p: list[float], total: int, rng: np.random.Generator) -> dict[str, int]:
    return dict(zip(LAW, map(int, rng.multinomial(total, p)), strict=True))


def test_the_law_against_itself_exceeds_it_by_nothing() -> None:
    rng = np.random.default_rng(0)
    drawn = [shift(counts(list(LAW.values()), 200, rng), LAW, rng) for _ in range(40)]
    # One excess is luck, by 0.02 or so; forty of them average to a sixth of that.
    assert abs(np.mean([one.excess for one in drawn])) < 0.015
    assert np.mean([one.noise for one in drawn]) == pytest.approx(0.036, abs=0.006)
    assert sum(one.p < 0.05 for one in drawn) <= 8  # two, on average
    assert sum(abs(one.excess) <= one.margin for one in drawn) >= 30


def test_a_shift_is_found_and_as_large_as_it_is() -> None:
    rng = np.random.default_rng(1)
    one = shift(counts([0.2, 0.6, 0.2], 400, rng), LAW, rng)
    assert one.excess == pytest.approx(0.3, abs=0.06) and one.margin < 0.07
    assert one.p == pytest.approx(1 / 1001)


def test_chi_square_and_total_variation_are_as_by_hand() -> None:
    one = shift({"day": 60, "sunset": 20, "night": 20}, LAW, np.random.default_rng(2))
    assert one.tv == pytest.approx(0.1)
    assert one.chi_square == pytest.approx(10**2 / 50 + 10**2 / 30)
    assert one.p == pytest.approx(math.exp(-one.chi_square / 2), abs=0.03)  # two degrees of freedom


def test_what_the_law_excludes_is_infinitely_unlikely() -> None:
    one = shift({"day": 50, "noon": 1}, {"day": 1.0}, np.random.default_rng(3))
    assert one.chi_square == math.inf and one.p == pytest.approx(1 / 1001)
    assert one.as_dict()["chi_square"] is None and one.noise == 0


def test_numbers_by_the_law_are_near_it_and_shifted_ones_are_found() -> None:
    rng = np.random.default_rng(4)
    cut = rng.standard_normal(400)
    cut = cut[abs(cut) < TRUNCATION]
    same, moved, wide = (
        kolmogorov_smirnov([share_below(z) for z in some]) for some in (cut, cut + 0.4, 1.5 * cut)
    )
    assert same.p > 0.05 and same.distance < 0.08
    assert moved.p < 0.002 and moved.distance == pytest.approx(0.16, abs=0.05)
    assert wide.p < 0.01


def test_a_distance_by_hand() -> None:
    assert kolmogorov_smirnov([0.1, 0.2, 0.9]).distance == pytest.approx(2 / 3 - 0.2)
    # One number: the distance is uniform between 1/2 and 1.
    assert kolmogorov_smirnov([0.25]).p == pytest.approx(0.5, abs=0.06)


def test_the_share_below_ends_where_the_world_does() -> None:
    assert (share_below(-TRUNCATION), share_below(TRUNCATION)) == (0.0, 1.0)
    assert share_below(0) == pytest.approx(0.5) and share_below(9) == 1.0


def test_diversity_is_1_of_the_same_and_less_of_fewer() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(80, 50)), rng.normal(size=(80, 50))
    middle, low, high = diversity(a, b)
    assert low < 1 < high and middle == pytest.approx(1, abs=0.03)
    middle, low, high = diversity(a * 0.7, b)
    assert middle == pytest.approx(0.7, abs=0.03) and high < 0.8
    assert math.isnan(diversity(a[:2], b)[0])


def test_the_nearest_is_at_its_distance() -> None:
    rows = np.array([[0.0, 0.0], [3.0, 3.0]])
    assert nearest(rows, np.array([[1.0, 1.0], [9.0, 9.0]])) == pytest.approx([1.0, 2.0])


def test_an_interval_is_wilsons() -> None:
    low, high = interval(0, 200)
    assert low == pytest.approx(0, abs=1e-12) and high == pytest.approx(0.0188, abs=2e-4)
    assert interval(95, 100)[0] == pytest.approx(0.8882, abs=2e-4)
