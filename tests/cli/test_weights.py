"""`ldm inspect`, `convert` and `download`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from PIL import Image

from ldm.checkpoints.inspection import inspect
from ldm.cli import main as cli


def test_inspect_tells_people_and_programs_what_is_there(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(model)]) == 0
    told = capsys.readouterr().out
    assert "safetensors" in told and "unet" in told and "tiny" in told
    assert cli.main(["inspect", str(model / "model.safetensors"), "--json", "--sha256"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["container"] == "safetensors" and found["stages"].keys() == {"unet", "vae", "text"}
    expected = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert expected in json.dumps(found)


def test_convert_writes_a_folder_and_a_file_that_draw_the_same_picture(
    generate, model: Path, tmp_path: Path
) -> None:
    assert cli.main(["convert", str(model), "folder"]) == 0
    (tmp_path / "half").mkdir()
    to = ["folder", "half/model.safetensors", "--dtype", "float16"]
    assert cli.main(["convert", *to]) == 0
    assert inspect("half").dtypes.keys() == {"float16"}
    args = ["--device", "cpu", "--steps", "2", "--seed", "3"]
    for weights, name in ((model, "a.png"), ("folder", "b.png")):
        command = ["generate", "a red house", "--weights", str(weights), "-o", name, *args]
        assert cli.main(command) == 0
    with Image.open("a.png") as a, Image.open("b.png") as b:
        assert a.tobytes() == b.tobytes()


def test_download_of_an_unknown_model_lists_those_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["download", "sd-v9"]) == 2
    assert "sd-v1-4" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_weights_that_are_not_there_are_told_in_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = ["x.safetensors"] if command == "convert" else []
    assert cli.main([command, str(tmp_path / "none"), *target]) == 2
    error = capsys.readouterr().err.strip()
    assert "none" in error and len(error.splitlines()) == 1
