"""`explain` writes one page, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ldm.pipeline import TextToImage
from ldm.viz.player import explain
from tests.viz.player.films import SETTINGS, page_data


def test_explain_writes_one_page_and_takes_what_differs(
    pipe: TextToImage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.html"
    asked = SETTINGS | {"steps": 2}
    explain(pipe, "a red house", path, compare={"guidance_scale": 1.0}, progress=True, **asked)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.html"]
    data = page_data(path.read_text(encoding="utf-8"))
    assert data["headings"] == ["guidance scale 3", "guidance scale 1"]
    assert [run["guidance"] is None for run in data["runs"]] == [False, True]
    assert "12/12" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "run.htm"}, "must end in .html"),
        ({"path": "nowhere/run.html"}, "there is no folder"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": ["a", "b"]}, "one picture"),
        ({"num_images": 2}, "one picture"),
        ({"steps": 0}, "steps must be between"),
        ({"compare": {"steps": 0}}, "steps must be between"),
        ({"compare": {"width": 24}}, "cannot compare by width"),
        ({"compare": {}}, "nothing to compare"),
        ({"compare": {"seed": 5, "eta": 0.0}}, "the first again"),
        ({"compare": {"prompt": ""}}, "the prompt is empty"),
    ],
)
def test_bad_input_is_refused_before_any_step(
    pipe: TextToImage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipe.unet, "forward", lambda *_: pytest.fail("the model was asked"))
    with pytest.raises(ValueError, match=message) as caught:
        explain(pipe, **({"prompt": "a house", "path": "run.html"} | SETTINGS | changes))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_leaves_the_page_that_was_there(
    pipe: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.html"
    path.write_text("as it was")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipe, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        explain(pipe, "a house", path, **SETTINGS | {"steps": 1})
    assert path.read_text() == "as it was" and len(list(tmp_path.iterdir())) == 1
