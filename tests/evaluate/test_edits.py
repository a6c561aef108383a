"""Edits of pictures, held against the same scene with one thing changed."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

import ldm
from ldm.evaluate.edits import (
    MOVED,
    OTHERS,
    THINGS,
    Edit,
    EditResults,
    Judged,
    edits_of,
    evaluate_edits,
    in_words,
    judge,
    mask_picture,
    moved,
    words_of,
)
from ldm.observe.edits import aligned
from ldm.pipeline import TextToImage
from ldm.worlds.scenes import Scene

SIZE = 128
ENDS = {"do nothing", "the answer, decoded", "draw anew"}
METHODS = {*ENDS, "img2img 0.5", "img2img 0.75", "inpainting", "inversion", "prompt-to-prompt"}


@pytest.fixture(scope="module")
def pipe() -> TextToImage:
    return ldm.load(device="cpu", dtype=torch.float32)


@pytest.fixture
def edit() -> Edit:
    before = Scene.sample(
        np.random.default_rng(3), house="red", house_position="left", sky="day", tree="none"
    )
    return Edit("house", before, before.edited(house="blue"), SIZE, 0)


@pytest.mark.parametrize("name", THINGS)
def test_one_thing_changes_and_nothing_else_moves(name: str) -> None:
    edits = edits_of(name, 12, SIZE, seed=1)
    assert [edit.seed for edit in edits] == list(range(1, 13))
    for edit in edits:
        before, after = edit.before.attributes, edit.after.attributes
        assert {k for k in before if before[k] != after[k]} == {name}
        assert moved(edit.before, edit.after) <= set(MOVED.get(name, ()))
        assert not edit.before.held_out and not edit.after.held_out
        assert edit.mask.shape == (SIZE, SIZE) and edit.mask.any()
    again = edits_of(name, 12, SIZE, seed=1)
    assert [edit.after for edit in again] == [edit.after for edit in edits]


def test_what_changes_does_so_within_its_mask(edit: Edit) -> None:
    pictures = [np.asarray(image, dtype=int) for image in (edit.picture, edit.answer)]
    differs = np.abs(pictures[0] - pictures[1]).max(axis=2) > 60
    assert differs.sum() > 100 and not (differs & ~edit.mask).any()


def test_an_edit_changes_one_place_of_the_words(pipe: TextToImage, edit: Edit) -> None:
    before, after = (in_words(scene.attributes) for scene in (edit.before, edit.after))
    assert before.replace("red", "blue") == after
    places = aligned(words_of(pipe, before), words_of(pipe, after))
    assert places == list(range(pipe.config.text.max_length))
    for name in THINGS:  # and the model knows the words, and reads them to the end
        for one in edits_of(name, 8, SIZE, seed=2):
            for scene in (one.before, one.after):
                (ids,) = pipe.text.tokenize([in_words(scene.attributes)]).tolist()
                assert ids[-1] == pipe.config.text.eos_token_id


def test_the_right_answer_is_right_and_the_picture_itself_is_not(edit: Edit) -> None:
    answer = judge(edit, "the answer", edit.answer)
    assert answer.right and answer.inside == answer.outside == 0.0
    nothing = judge(edit, "nothing", edit.picture)
    assert not nothing.changed and nothing.kept == OTHERS and not nothing.right
    assert nothing.inside > 20 > 5 > nothing.outside


def test_a_wrong_house_is_seen_inside_and_a_wrong_sky_outside(edit: Edit) -> None:
    night = dataclasses.replace(edit.after, sky="night")
    found = judge(edit, "another sky", night.render(SIZE))
    assert found.changed and found.kept == OTHERS - 1 and not found.right
    assert found.outside > 50
    black = Image.composite(edit.answer, Image.new("RGB", (SIZE, SIZE)), mask_picture(~edit.mask))
    found = judge(edit, "no house", black)
    assert found.outside == 0.0 and found.inside > 50


def test_a_mask_is_white_where_the_thing_is(edit: Edit) -> None:
    levels = np.asarray(mask_picture(edit.mask))
    assert levels.dtype == np.uint8 and ((levels == 255) == edit.mask).all()


def test_every_way_to_edit_is_measured(pipe: TextToImage) -> None:
    results = evaluate_edits(pipe, per_kind=1, names=("house",), steps=8)
    scores = {score.method: score for score in results.scores()}
    assert scores.keys() == METHODS
    assert all(score.total == 1 and score.others == OTHERS for score in scores.values())
    nothing, answer = scores["do nothing"], scores["the answer, decoded"]
    assert nothing.changed == nothing.right == 0 and answer.right == 1
    # What is kept is nearer to the picture than what is drawn anew; the mask keeps most.
    outside = {method: score.outside for method, score in scores.items()}
    assert outside["inpainting"] < outside["draw anew"]
    assert outside["img2img 0.5"] < outside["draw anew"]
    assert results.settings == {
        **{"per_kind": 1, "sampler": pipe.config.defaults.sampler, "steps": 8},
        **{"guidance_scale": pipe.config.defaults.guidance_scale, "seed": 0},
    }


@pytest.mark.slow
def test_edits_lie_between_doing_nothing_and_the_right_answer(pipe: TextToImage) -> None:
    results = evaluate_edits(pipe, per_kind=3, steps=15)
    by_kind = {
        name: {score.method: score for score in results.scores(name)} for name in results.names
    }
    scores = {score.method: score for score in results.scores()}
    best = scores["the answer, decoded"]
    assert best.right >= 11 and scores["do nothing"].changed == 0
    for method in METHODS - ENDS:
        assert scores[method].changed > 0 and scores[method].inside > best.inside
        assert scores[method].outside > best.outside
    # Half the noise leaves the sky what it was; a way back to all of it does not.
    assert by_kind["sky"]["img2img 0.5"].changed < by_kind["sky"]["inversion"].changed
    # A mask keeps the rest better than anything else does, where the rest is to stay.
    for name in ("house", "house_position", "tree"):
        off = {method: by_kind[name][method].outside for method in METHODS - ENDS}
        assert min(off, key=off.__getitem__) == "inpainting"


def results() -> EditResults:
    """Two methods, two edits."""
    judged = [
        Judged("nothing", "house", changed=False, kept=7, inside=30.0, outside=0.0),
        Judged("anew", "house", changed=True, kept=7, inside=10.0, outside=12.0),
        Judged("nothing", "sky", changed=False, kept=7, inside=50.0, outside=40.0),
        Judged("anew", "sky", changed=True, kept=5, inside=10.0, outside=16.0),
    ]
    return EditResults(judged, {"steps": 8})


def test_the_leaderboard_begins_with_the_one_that_is_most_often_right() -> None:
    first, last = results().scores()
    assert (first.method, first.right, first.total, first.kept) == ("anew", 1, 2, 12)
    assert first.outside == pytest.approx(np.sqrt((12.0**2 + 16.0**2) / 2))
    assert (last.method, last.right, last.changed) == ("nothing", 0, 0)
    assert [score.right for score in results().scores("house")] == [1, 0]
    assert [score.method for score in results().scores("sky")] == ["anew", "nothing"]


def test_results_are_told_to_programs_and_to_people() -> None:
    told = json.loads(json.dumps(results().as_dict()))
    assert told["settings"] == {"steps": 8}
    rows = [(row["name"], row["method"], row["right"]) for row in told["scores"]]
    assert rows[:2] == [("all", "anew", 1), ("all", "nothing", 0)] and len(rows) == 6
    lines = results().as_markdown().splitlines()
    assert "(steps 8)" in lines[0]
    assert "| anew | 1 / 2 (at least 9%) | 100% | 85.7% | 10.0 | 14.1 |" in lines
    assert lines[-2:] == ["| anew | 1 / 1, 12.0 | 0 / 1, 16.0 |", lines[-1]]
    assert lines[-1] == "| nothing | 0 / 1, 0.0 | 0 / 1, 40.0 |"


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (dict(per_kind=0), "per_kind must be 1 or more"),
        (dict(names=("horizon",)), "no edits of 'horizon'"),
        (dict(sampler="dimm"), "unknown sampler 'dimm'"),
        (dict(steps=1), "strength=0.5 of 1 steps leaves none"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_picture(
    pipe: TextToImage, asked: dict[str, object], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextToImage, "decode", lambda *_: pytest.fail("work started"))
    with pytest.raises(ValueError, match=told):
        evaluate_edits(pipe, **asked)  # type: ignore[arg-type]
