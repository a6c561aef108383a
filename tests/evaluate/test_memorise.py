"""Small networks between their training set and the world: the ends of the scale are known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from ldm import NoiseSchedule
from ldm.cli.main import main
from ldm.evaluate import memorise
from ldm.evaluate.memorise import (
    Curve,
    MemoriseResults,
    Point,
    agreement,
    ask,
    by_heart_of,
    copies,
    draw,
    evaluate_memorise,
    nearest,
)
from ldm.worlds.atoms import FiniteSet
from ldm.worlds.ladder import Sea
from ldm.worlds.posterior import EpsFn, perfect

SCHEDULE = NoiseSchedule()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seas(n: int, seed: int) -> torch.Tensor:
    return Sea().render(Sea().sample(seeded(seed), n), memorise.SIZE)


def between(share: float, a: EpsFn, b: EpsFn) -> EpsFn:
    return lambda x, t: share * a(x, t) + (1 - share) * b(x, t)


def test_perfect_models_stand_at_the_ends_of_the_scale_and_mixtures_between() -> None:
    members = seas(4, seed=1)
    set_model, world_model = perfect(FiniteSet(members), SCHEDULE), perfect(Sea(), SCHEDULE)
    for question in ask(Sea(), SCHEDULE, (100, 400), fresh=3, seed=0):
        by_heart = by_heart_of(members, question)
        for share in (1.0, 0.75, 0.0):
            found = agreement(between(share, set_model, world_model), question, by_heart)
            assert found == pytest.approx((1 - share, share), abs=1e-3)


def test_the_training_sets_perfect_model_draws_copies_and_the_worlds_does_not() -> None:
    members, fresh = seas(8, seed=1), seas(16, seed=2)
    start = torch.randn(fresh.shape, generator=seeded(3))
    by_heart = draw(perfect(FiniteSet(members), SCHEDULE), start, SCHEDULE)
    assert copies(by_heart, members) > 0.9  # in 25 steps one may end between two members
    assert nearest(by_heart, members) < 0.05 * nearest(fresh, members)
    of_the_world = draw(perfect(Sea(), SCHEDULE), start[:6], SCHEDULE)
    assert copies(of_the_world, members) < 0.9
    assert nearest(of_the_world, members) > 0.3 * nearest(fresh, members)


def test_a_copy_is_three_times_nearer_to_one_member_than_to_any_other() -> None:
    members = torch.tensor([0.0, 1.0, 9.0]).view(3, 1, 1, 1)
    pictures = torch.tensor([0.2, 0.3, 1.5, 8.0]).view(4, 1, 1, 1)
    assert copies(pictures, members) == 0.5  # 0.2 of 0.8, 0.3 of 0.7, 0.5 of 1.5, 1 of 7
    assert nearest(pictures, members) == pytest.approx((0.2 + 0.3 + 0.5 + 1.0) / 4)


def curve(scenes: int, from_set: float, from_truth: float) -> Curve:
    ends = [0.9, from_set, 0.9], [0.8, from_truth, 0.8]
    points = [Point(16, [3.0] * 3, [3.0] * 3, 0.0, 1.5), Point(40, *ends, 0.25, 0.5)]
    return Curve(scenes, points, 0.0625, 0.75)


def results(*curves: Curve) -> MemoriseResults:
    return MemoriseResults(curves, {"world": "Sea", "steps": 40, "levels": [100, 200, 400]})


def test_results_are_told_to_programs_and_to_people() -> None:
    found = results(curve(2, 0.1, 0.95), curve(32, 0.6, 0.5))
    lines = json.loads(json.dumps(found.as_dict()))["curves"]
    assert [Curve.read(line) for line in lines] == list(found.curves)
    table = found.as_markdown().splitlines()
    assert table[-3] == (
        "| 32 | 0.90 / 0.80 | 0.60 / 0.50 | 0.90 / 0.80 | 25% | 6% | 0.50 | 0.75 |"
    )
    assert found.over_time("from_set") == {
        "2 scenes": {16: 3.0, 40: 0.1},
        "32 scenes": {16: 3.0, 40: 0.6},
    }
    assert found.over_time("copies")["2 scenes"] == {16: 0.0, 40: 0.25}
    assert found.by_scenes()["second network"] == {2: 0.75, 32: 0.75}


def test_one_line_says_what_was_learnt_from_how_many_scenes() -> None:
    ends = {2: (0.1, 0.9), 8: (0.4, 0.5), 32: (0.6, 0.5), 128: (0.9, 0.2), 512: (1.2, 1.1)}
    found = results(*(curve(scenes, *end) for scenes, end in ends.items()))
    assert found.in_words() == (
        "After 40 steps, at t = 200: nearer to its training set, by heart, with 2, 8 scenes; "
        "nearer to the world with 32, 128 scenes; "
        "not trained for long enough to be near to either with 512 scenes."
    )
    assert results(curve(2, 0.1, 0.9)).in_words() == (
        "After 40 steps, at t = 200: nearer to its training set, by heart, with 2 scenes."
    )


def test_a_size_that_is_known_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = dict(model_channels=4, channel_mult=(1,), num_heads=1)
    monkeypatch.setattr(memorise, "NETWORK", dataclasses.replace(memorise.NETWORK, **small))
    monkeypatch.setattr(memorise, "BATCH", 4)
    out = tmp_path / "curves.jsonl"
    asked = dict(world=Sea(), steps=20, levels=(200,), fresh=2, drawn=2, out=out)
    first = evaluate_memorise(sizes=(2,), **asked)
    (points,) = (one.points for one in first.curves)
    assert [point.steps for point in points] == [16, 20]
    assert points[0].from_set != points[1].from_set
    with out.open("a") as file:
        file.write('{"scenes": 4, "poin')  # stopped while it was written
    more = evaluate_memorise(sizes=(2, 4), **asked)
    assert [one.scenes for one in more.curves] == [2, 4] and more.curves[0] == first.curves[0]
    monkeypatch.setattr(memorise, "training", None)
    assert evaluate_memorise(sizes=(2, 4), **asked) == more
    assert [one.scenes for one in evaluate_memorise(sizes=(4,), **asked).curves] == [4]
    with pytest.raises(ValueError, match="holds no curves of these settings"):
        evaluate_memorise(sizes=(2,), **(asked | {"steps": 21}))
    out.write_text(out.read_text().replace("by_chance", "by_luck"))
    with pytest.raises(ValueError, match=r"is damaged: .*by_luck"):
        evaluate_memorise(sizes=(2,), **asked)


@pytest.mark.parametrize(
    "asked, told",
    [
        (dict(sizes=()), "sizes must be 2 or more, and rise"),
        (dict(sizes=(1, 2)), "sizes must be 2 or more, and rise"),
        (dict(sizes=(8, 2)), "sizes must be 2 or more, and rise"),
        (dict(fresh=1), "fresh and drawn must be 2 or more"),
        (dict(steps=0), "steps and batch_size must be 1 or more"),
        (dict(levels=(1000,)), "timesteps must be between 0 and 999"),
        (dict(levels=()), "there are no noise levels"),
        (dict(seed=-1), "the seed must be 0 or more"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(
    asked: dict, told: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=told):
        evaluate_memorise(**(dict(world=Sea(), out=tmp_path / "x") | asked))
    assert not list(tmp_path.iterdir())


def test_the_command_prints_keeps_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    found = results(curve(2, 0.1, 0.9), curve(32, 0.6, 0.5))
    monkeypatch.setattr(memorise, "evaluate_memorise", lambda *, seed, out=None: found)
    assert main(["evaluate", "--memorise", "--out", str(tmp_path / "curves.jsonl")]) == 0
    assert capsys.readouterr().out.strip() == found.as_markdown()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert main(["evaluate", "--memorise", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["world"] == "Sea"
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.parametrize(
    "args, told",
    [
        (["--steps", "3"], "leave out --steps: --memorise has its own, or none"),
        (["--device", "cpu"], "leave out --device"),
        (["--weights", "x"], "leave out --weights"),
        (["--budget"], "are two measurements"),
        (["--out", "curves.png"], "--out is for JSON lines, curves.png for the plot"),
        (["--out", "no/folder/x"], "there is no folder"),
    ],
)
def test_the_command_refuses_what_does_not_go_with_it(
    args: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--memorise", *args]) == 2
    error = capsys.readouterr().err
    assert told in error and len(error.splitlines()) == 1
