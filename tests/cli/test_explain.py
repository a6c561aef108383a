"""`ldm explain`: a page named after its prompt, or one line that says what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm.cli import options
from ldm.cli.main import main
from tests.viz.player.films import page_data


def test_the_command_writes_a_page_named_after_the_prompt(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["explain", "A red house!", "--weights", str(model), "--device", "cpu", "--steps=3"]
    assert main([*command, "--compare", "blue", "--compare-sampler", "ddpm"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "a-red-house.html\n" and "\nseed " in printed.err
    assert "step" not in printed.err  # no bar where nobody watches
    data = page_data(Path("a-red-house.html").read_text(encoding="utf-8"))
    assert data["headings"] == ["“A red house!”, DDIM", "“blue”, DDPM"]
    unquoted = ["explain", "A", "red", "house!", *command[2:]]  # all words are one prompt
    assert main([*unquoted, "--seed", "1"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-red-house-2.html", "a-red-house.html"]
    assert "seed 1 " in Path("a-red-house-2.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a", "-o", "a.png"], "must end in .html"),
        (["a", "-o", "no/a.html"], "no folder"),
        (["  "], "the prompt is empty"),
        (["a", "--steps", "0"], "steps must be between"),
        (["a", "--compare-steps", "0"], "steps must be between"),
        (["a", "--compare-sampler", "eluer"], "unknown sampler"),
        (["a", "--seed", "1", "--compare-seed", "1"], "the first again"),
        (["a", "--height", "7"], "height must be"),
        (["a", "--live", "--sampler", "euler"], "by ddim alone"),
        (["a", "--live", "--compare", "b"], "nothing to compare"),
        (["a", "--live", "--runtime", "nowhere"], "nowhere has no ort"),
        (["a", "--runtime", "nowhere"], "--runtime is of --live"),
    ],
)
def test_the_command_refuses_before_the_weights_are_read(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(options, "plan_asked", lambda *_: pytest.fail("weights were read"))
    assert main(["explain", "--weights", str(model), "--device", "cpu", *args]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
