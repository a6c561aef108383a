"""`ldm evaluate`; where words look is in tests/evaluate/test_attention.py."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ldm.cli import main as cli
from ldm.evaluate import distribution, edits
from ldm.evaluate import prompts as measure


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--per-value", "0"], "--per-value must be 1 or more"),
        (["--distribution", "--per-kind", "0"], "--per-kind must be 1 or more"),
        (["--distribution", "--per-value", "3"], "--per-value does not go with what is measured"),
        (["--per-kind", "3"], "--per-kind does not go with what is measured"),
        (["--edits", "--per-value", "3"], "--per-value does not go with what is measured"),
        (["--edits", "--budget"], "--budget and --edits are two measurements"),
        (["--attention", "--out", "x"], "--out does not go with what is measured"),
        (["--attention", "--distribution"], "ask for one"),
        (["--distribution", "--out", "no/folder/x"], "there is no folder"),
        (["--steps", "0"], "steps must be between"),
        (["--sampler", "eluer"], "unknown sampler"),
        (["--guidance-scale", "nan"], "guidance_scale must be a finite number"),
        (["--seed", "-1"], "the seed must be between"),
        (["--weights", "nothing"], "no weights at"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    args: list[str],
    message: str,
    model: Path,
    no_work: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    no_work()
    assert cli.main(["evaluate", "--weights", str(model), *args]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_results_are_printed_as_a_table_or_as_json(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[object, measure.Results]] = []
    evaluate = measure.evaluate

    @functools.wraps(evaluate)
    def once(pipe, pair, **settings):  # type: ignore[no-untyped-def]
        if not measured:
            measured.append((settings, evaluate(pipe, pair, **settings)))
        asked, results = measured[0]
        assert settings == asked
        return results

    monkeypatch.setattr(measure, "evaluate", once)
    args = ["evaluate", "--weights", str(model), "--per-value", "1", "--steps", "1"]
    with pytest.warns(UserWarning, match="too long"):  # the tiny model reads a few tokens
        assert cli.main([*args, "--device", "cpu"]) == 0
    assert "| sky |" in capsys.readouterr().out
    assert cli.main([*args, "--device", "cpu", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["autoencoder"]["sky"]["total"] == 3
    sky = results["prompts"]["sky"]
    assert 0 <= sky["right"] <= sky["total"] >= 3  # each of its values is asked for at least once
    assert results["settings"] | {"steps": 1, "sampler": "ddim"} == results["settings"]


def test_pictures_are_held_against_the_law_and_kept(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = functools.partial(distribution.evaluate_distribution, kinds={"night": {"sky": "night"}})
    monkeypatch.setattr(distribution, "evaluate_distribution", few)
    out = tmp_path / "drawn.jsonl"
    args = ["evaluate", "--weights", str(model), "--distribution", "--per-kind", "2"]
    args += ["--steps", "1", "--seed", "4", "--device", "cpu", "--out", str(out)]
    assert cli.main(args) == 0
    assert "| night |" in capsys.readouterr().out
    first, *lines = map(json.loads, out.read_text().splitlines())
    assert first["steps"] == 1 and [line["seed"] for line in lines] == [4, 5]
    assert cli.main([*args, "--json"]) == 0
    (kind,) = json.loads(capsys.readouterr().out)["kinds"]
    assert kind["total"] == 2 and len(out.read_text().splitlines()) == 3
    # Others' pictures are not taken for this model's.
    assert cli.main([*args, "--sampler", "ddpm"]) == 2
    assert "no pictures of this model and these settings" in capsys.readouterr().err


def test_edits_are_measured_with_the_settings_that_are_asked_for(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = functools.partial(edits.evaluate_edits, names=("tree",))
    monkeypatch.setattr(edits, "evaluate_edits", one)
    args = ["evaluate", "--weights", str(model), "--edits", "--per-kind", "1", "--steps", "2"]
    args += ["--seed", "4", "--device", "cpu"]
    with pytest.warns(UserWarning, match="too long"):  # the tiny model reads a few tokens
        assert cli.main([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = {"per_kind": 1, "steps": 2, "seed": 4}
    assert found["settings"] | wanted == found["settings"]
    assert {row["name"] for row in found["scores"]} == {"all", "tree"}
