"""The evaluation: prompts, verdicts, scores and their bounds, and a judge that cannot be fooled."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm.evaluate.prompts import (
    DRAWN,
    NOT_DRAWN,
    Prompt,
    Results,
    Score,
    clip_score,
    fresh_prompts,
    held_out_prompts,
    is_true,
    lower_bound,
    prompt_scores,
    table,
    verdicts,
)
from ldm.worlds.captions import SOME
from ldm.worlds.distribution import ATTRIBUTES, HELD_OUT
from ldm.worlds.reader import read
from ldm.worlds.scenes import Scene, training_scene

NIGHT = dict.fromkeys(ATTRIBUTES, "none") | {"sky": "night", "ground": "grass", "horizon": "low"}


@pytest.mark.parametrize(
    ("right", "total", "bound"),
    # Wilson's interval for these, as tables of it print it.
    [(95, 100, 0.8882), (300, 300, 0.9874), (0, 50, 0.0), (1, 2, 0.0945)],
)
def test_the_lower_bound_is_wilsons(right: int, total: int, bound: float) -> None:
    assert lower_bound(right, total) == pytest.approx(bound, abs=2e-4)


def test_a_bound_of_nothing_is_not_a_number() -> None:
    assert math.isnan(lower_bound(0, 0))


# ------------------------------------------------------------------------------------- prompts


def test_every_value_is_asked_for_often_enough() -> None:
    prompts = fresh_prompts(10, seed=1)
    asked = Counter(claim for prompt in prompts for claim in prompt.stated.items())
    for name, values in ATTRIBUTES.items():
        for value in values:
            assert asked[name, value] >= 10, (name, value)
    # A prompt serves several values at once: far fewer than ten for each are needed.
    assert len(prompts) < 10 * sum(len(values) for values in ATTRIBUTES.values()) / 2


def test_fresh_prompts_are_reproducible_and_never_held_out() -> None:
    prompts = fresh_prompts(5, seed=1)
    assert prompts == fresh_prompts(5, seed=1) != fresh_prompts(5, seed=2)
    for prompt in prompts:
        assert prompt.text and not prompt.held_out
        assert not any(case.items() <= prompt.stated.items() for case in HELD_OUT)
        for name, value in prompt.stated.items():
            assert value in (*ATTRIBUTES[name], SOME)


def test_held_out_prompts_ask_for_each_combination_and_place() -> None:
    prompts = held_out_prompts(7, seed=0)
    for case in HELD_OUT:
        asked = [p for p in prompts if case.items() <= p.stated.items()]
        assert len(asked) >= 7 and all(p.held_out for p in asked)
    assert all(p.stated["house_position"] != "none" for p in prompts)


# ------------------------------------------------------------------------------------ verdicts


def test_only_what_a_prompt_states_is_judged() -> None:
    assert list(verdicts({"sky": "night"}, NIGHT)) == [("sky", "night", True)]
    assert list(verdicts({"sky": "day"}, NIGHT)) == [("sky", "day", False)]


def test_a_missing_house_is_wrong_in_all_that_was_said_of_it() -> None:
    stated = {"house": "red", "house_position": "left", "house_size": "small"}
    assert {what: right for what, _, right in verdicts(stated, NIGHT)} == {
        DRAWN: False,
        "house colour": False,
        "house position": False,
        "house size": False,
    }


def test_a_house_without_colour_is_asked_for_all_the_same() -> None:
    stated = {"house": SOME, "house_position": "left"}
    seen = NIGHT | {"house": "blue", "house_position": "left", "house_size": "small"}
    told = {what: right for what, _, right in verdicts(stated, seen)}
    assert told == {DRAWN: True, "house position": True}


def test_a_house_where_none_was_asked_is_wrong() -> None:
    seen = NIGHT | {"house": "red", "house_position": "left", "house_size": "small"}
    absent = {"house": "none", "house_position": "none", "house_size": "none"}
    assert list(verdicts(absent, seen)) == [(NOT_DRAWN, "none", False)]
    assert list(verdicts(absent, NIGHT)) == [(NOT_DRAWN, "none", True)]
    at_sea = list(verdicts({"ground": "sea"}, seen))
    assert (NOT_DRAWN, "sea", False) in at_sea and ("ground", "sea", False) in at_sea


def test_a_tree_named_without_its_side_may_stand_on_either() -> None:
    for seen, right in (("left", True), ("right", True), ("none", False)):
        assert list(verdicts({"tree": SOME}, NIGHT | {"tree": seen})) == [("tree", SOME, right)]


def test_scores_count_by_value() -> None:
    cases = [
        (Prompt("night", {"sky": "night"}), NIGHT),
        (Prompt("day on grass", {"sky": "day", "ground": "grass"}), NIGHT),
        (Prompt("night", {"sky": "night"}), NIGHT),
    ]
    scores = prompt_scores(iter(cases))
    assert scores["sky"].right == {"night": 2, "day": 0}
    assert scores["sky"].total == {"night": 2, "day": 1}
    assert scores.keys() == {"sky", "ground"}  # nothing else was asked


def test_true_scenes_are_read_as_their_captions_say() -> None:
    """A model that drew every scene perfectly would score nearly everything."""
    rng = np.random.default_rng(3)
    cases = []
    for _ in range(60):
        scene = training_scene(rng)
        text, stated = scene.describe(rng)
        cases.append((Prompt(text, stated), read(scene.render())))
    for what, score in prompt_scores(iter(cases)).items():
        assert sum(score.right.values()) >= 0.97 * sum(score.total.values()), what


# --------------------------------------------------------------------------------------- CLIP


def test_a_caption_is_true_of_its_own_scene_and_false_of_one_that_differs() -> None:
    rng = np.random.default_rng(4)
    scene = Scene.sample(rng, sky="night", house="red", ground="grass", tree="left")
    other = Scene.sample(rng, sky="night", house="blue", ground="grass", tree="right")
    for _ in range(50):
        assert is_true(scene.describe(rng)[1], scene)
    assert is_true({"sky": "night", "tree": SOME}, other)
    assert not is_true({"house": "red"}, other) and not is_true({"tree": "left"}, other)


class Oracle(nn.Module):
    """A pair that reads the picture and the caption by hand, or that guesses."""

    image_size = 64

    def __init__(self, guess: bool) -> None:
        super().__init__()
        self.guess = guess
        self.text = self
        self.claims: list[dict[str, str]] = []
        self.values = [pair for k, v in ATTRIBUTES.items() for pair in product([k], [*v, SOME])]

    def tokenize(self, texts: list[str]) -> list[str]:
        return texts

    def embed_text(self, texts: list[str]) -> Tensor:
        """A vector with 1 for every claim, found by describing the same scenes again."""
        rng = np.random.default_rng([0, 1_000_000, 3])
        scenes = [training_scene(rng) for _ in texts]
        told = [scene.describe(rng) for scene in scenes]
        assert [text for text, _ in told] == texts
        rows = [[float(said.get(k) == v) for k, v in self.values] for _, said in told]
        return torch.tensor(rows)

    def embed_images(self, x: Tensor) -> Tensor:
        if self.guess:
            return torch.randn(1, len(self.values), generator=torch.Generator().manual_seed(0))
        pixels = ((x[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        seen = read(pixels)
        # A claim that is false costs more than all true ones together gain.
        row = [
            1.0 if (seen[k] == v or (v == SOME and seen[k] != "none")) else -100.0
            for k, v in self.values
        ]
        return torch.tensor([row])


def test_clip_is_right_when_it_reads_and_wrong_when_it_guesses() -> None:
    knows = clip_score(Oracle(guess=False), 40, seed=0)
    guesses = clip_score(Oracle(guess=True), 40, seed=0)
    # Every other caption is false of the picture, so who reads well is right; one in 64 by chance.
    assert knows.total["caption"] == 40 and knows.right["caption"] >= 38
    assert guesses.right["caption"] <= 6


# -------------------------------------------------------------------------------------- tables


def results() -> Results:
    score = Score()
    for right in [True] * 95 + [False] * 5:
        score.add("night", right)
    score.add("day", True)
    kept = Score()
    kept.add("day", True)
    return Results({"sky": score}, {"sky": score}, {"sky": kept}, 30.25, kept, {"steps": 50})


def test_the_table_shows_counts_share_bound_and_the_worst_value() -> None:
    assert "| sky | 96 / 101 | 95.0% | 88.9% | night: 95 / 100 |" in table(results().prompts)
    text = results().as_markdown()
    assert "PSNR 30.2 dB" in text and "the right one of 64" in text and "steps 50" in text


def test_programs_get_the_same_figures() -> None:
    data = results().as_dict()
    sky = data["prompts"]["sky"]
    assert (sky["right"], sky["total"]) == (96, 101)
    assert sky["lower_bound"] == pytest.approx(lower_bound(96, 101))
    assert sky["values"]["night"]["right"] == 95
    assert data["clip"]["right of 64"]["right"] == 1
