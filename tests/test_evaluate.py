"""The evaluation: scores, their bounds, and a judge that cannot be fooled."""

from __future__ import annotations

import math

import pytest

from ldm.scenes import ATTRIBUTES
from ldm.train.evaluate import Judged, Score, fresh_prompts, prompt_scores, table


@pytest.mark.parametrize(
    ("right", "total", "bound"),
    # Wilson's interval for these, as tables of it print it.
    [(95, 100, 0.8882), (300, 300, 0.9874), (0, 50, 0.0), (1, 2, 0.0945)],
)
def test_the_lower_bound_is_wilsons(right: int, total: int, bound: float) -> None:
    assert Score("x", right, total).lower_bound == pytest.approx(bound, abs=2e-4)


def test_a_score_of_nothing_is_not_a_number() -> None:
    assert math.isnan(Score("x", 0, 0).share) and math.isnan(Score("x", 0, 0).lower_bound)


def test_only_what_a_prompt_states_is_judged() -> None:
    seen = dict.fromkeys(ATTRIBUTES, "none") | {"sky": "night", "ground": "grass"}
    cases = [
        Judged("night", {"sky": "night"}, seen),
        Judged("day on grass", {"sky": "day", "ground": "grass"}, seen),
        Judged("a red house", {"house": "red", "house_position": "left"}, seen),
    ]
    scores = {s.name: (s.right, s.total) for s in prompt_scores(cases)}
    assert scores["sky"] == (1, 2)
    assert scores["ground"] == (1, 1)
    # A missing house is wrong in all that was said of it.
    assert scores["house"] == (0, 1) and scores["house_position"] == (0, 1)
    assert scores["tree"] == (0, 0)


def test_fresh_prompts_are_reproducible_and_state_only_known_values() -> None:
    prompts = fresh_prompts(50, seed=1)
    assert prompts == fresh_prompts(50, seed=1)
    assert prompts != fresh_prompts(50, seed=2)
    for text, stated in prompts:
        assert text and all(value in ATTRIBUTES[name] for name, value in stated.items())
    assert sum("sky" in stated for _, stated in prompts) > 30


def test_the_table_shows_counts_share_and_bound() -> None:
    assert "| sky | 95 / 100 | 95.0% | 88.8% |" in table([Score("sky", 95, 100)])
