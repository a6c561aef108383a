"""`ldm export`: a folder of graphs, or one line that says what is wrong before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm.cli.main import main

pytest.importorskip("onnx", reason="onnx is not installed here")
pytest.importorskip("onnxscript", reason="onnxscript is not installed here")


@pytest.mark.slow
def test_the_command_writes_a_folder(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "graphs"
    assert main(["export", "onnx", "--weights", str(model), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    names = ["decoder.onnx", "merges.txt", "model.json", "text.onnx", "unet.onnx"]
    names += ["unet.weights", "unet_insides.onnx", "vocab.json"]
    assert sorted(path.name for path in out.iterdir()) == names


def test_what_cannot_be_written_is_said_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out, message in ((tmp_path, "exists already"), (tmp_path / "no" / "a", "no folder")):
        assert main(["export", "onnx", "--weights", "nothing", "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1


def test_without_onnx_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["export", "onnx", "--out", str(tmp_path / "new")]) == 2
    assert "pip install 'ldm-from-scratch[live]'" in capsys.readouterr().err
