"""What is said of a step is true of its numbers; two runs stand where their noise is nearest."""

from __future__ import annotations

import dataclasses

import pytest

from ldm.viz.player import story
from ldm.viz.player.film import Film
from tests.viz.player.films import A_SETTINGS, a_trace


def test_the_numbers_of_a_step_are_what_they_say() -> None:
    told = [story.numbers(a_trace(), i) for i in range(3)]
    assert [one.noise for one in told] == pytest.approx([0.998, 0.75, 0.05])
    assert told[0].moved is None
    assert [one.moved for one in told[1:]] == pytest.approx([0.6, 0.01])
    assert [one.prompt_change for one in told] == pytest.approx([0.25, 0.75, 0.02], rel=1e-5)
    assert [one.difference for one in told] == pytest.approx([0.5, 3.0, 0.02], rel=1e-5)
    assert [(one.x, one.eps, one.x0) for one in told[:2]] == [(5.0, 1.0, 10.0), (2.0, 2.0, 4.0)]


def test_guidance_on_an_interval_is_told_where_it_is_and_where_not() -> None:
    run = dataclasses.replace(a_trace(), eps_cond=None, eps_uncond=None)
    settings = dataclasses.replace(run.settings, guidance_interval=(run.t[1], run.t[0]))
    run = dataclasses.replace(run, settings=settings)
    assert "There is guidance." in story.sentence(run, 0)
    assert "There is no guidance here, but from" in story.sentence(run, 2)


def test_the_sentence_tells_the_numbers_of_its_step() -> None:
    run = a_trace()
    assert story.sentence(run, 0) == (
        "Step 1 of 3: nearly nothing but noise (99.8% noise, 0.2% picture). The model makes its "
        "first guess of the finished picture. The prompt changes the predicted noise by 25%; "
        "guidance makes that 5 times as much: 125%."
    )
    assert story.sentence(run, 1) == (
        "Step 2 of 3: more noise than picture (75% noise, 25% picture). The guess of the finished "
        "picture changed by 60%: it is being redrawn. The prompt changes the predicted noise by "
        "75%; guidance makes that 5 times as much: 375%."
    )
    assert story.sentence(run, 2) == (
        "Step 3 of 3: nearly clean (5% noise, 95% picture). The guess of the finished picture "
        "changed by 1%: hardly at all. The prompt changes the predicted noise by 2%; guidance "
        "makes that 5 times as much: 10%. This is the last step: it leaves the picture."
    )


def test_the_sentence_knows_runs_of_other_kinds() -> None:
    unguided = a_trace(eps_cond=None, eps_uncond=None)
    assert "There is no guidance: the model is asked with the prompt" in story.sentence(unguided, 1)
    noisy = "Fresh noise is added on the way to the next step."
    for changes, added in (({"eta": 0.5}, True), ({"sampler": "ddpm"}, True), ({}, False)):
        run = a_trace(settings=dataclasses.replace(A_SETTINGS, **changes))
        assert [noisy in story.sentence(run, i) for i in range(3)] == [added, added, False]
    negative = a_trace(settings=dataclasses.replace(A_SETTINGS, negative_prompt="fog"))
    assert "Put in the negative prompt's place, the prompt changes" in story.sentence(negative, 1)
    away = a_trace(settings=dataclasses.replace(A_SETTINGS, guidance_scale=-2.0))
    assert "guidance makes that -2 times as much: 150%." in story.sentence(away, 1)


def test_words_change_where_they_should() -> None:
    assert story.noise_words(0.3).startswith("more picture than noise (30% noise, 70% picture)")
    assert story.moved_words(0.2).endswith("by 20%: it is taking shape.")
    assert story.moved_words(0.05).endswith("by 5%: it is being refined.")
    assert [story.percent(x) for x in (0.0713, 0.995, 1.254, 0.5, 0.0)] == [
        *("7.1%", "99.5%", "125%", "50%", "0%")
    ]


def test_two_runs_stand_side_by_side_at_the_nearest_noise(one: Film, alone: Film) -> None:
    assert one.run.t == (831, 665, 499, 333, 167, 1)
    assert alone.run.t == (667, 334, 1)
    # 831 and 665 are nearest to 667; 499 is 165 from 334 and 168 from 667; 167 is 166 from 1.
    expected = [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]
    assert story.timeline([one, alone]) == expected
    assert story.timeline([alone, one]) == [(b, a) for a, b in expected]
    assert story.timeline([alone]) == [(0,), (1,), (2,)]


def test_the_distance_of_two_guesses_is_relative_to_the_first(one: Film, alone: Film) -> None:
    positions = story.timeline([one, alone])
    told = story.apart(one, alone, positions)
    a, b = one.run.x0[4], alone.run.x0[2]
    assert told[4] == pytest.approx(float((b - a).norm() / a.norm()))
    assert story.apart(one, one, [(0, 0), (1, 1)]) == [0.0, 0.0]
