"""`ldm verify`: its report, its exit code, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldm.cli import main as cli
from ldm.evaluate.verify_published import Published


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of the tiny model's sizes in the place of the official weights'."""
    inputs = dict(x=1.0, side=8, t=1, context=0.5, tokens=1)
    wide = Published("wide", "unet", "unet_corner", ("v1-4",), "v1-4", "x", "us", 1e3, (0.0,) * 36)
    near = Published("near", "unet", "unet_corner", ("v1-5",), "v1-5", "x", "us", 1e-9, (0.0,) * 36)
    numbers = tuple(Published(**vars(one) | {"inputs": inputs}) for one in (wide, near))
    monkeypatch.setattr("ldm.evaluate.verify.published", lambda: numbers)
    monkeypatch.setattr("ldm.evaluate.verify.check_official", lambda weights: None)


@pytest.mark.parametrize(("version", "code"), [("v1-4", 0), ("v1-5", 1)])
def test_the_exit_code_says_whether_published_numbers_agree(
    version: str, code: int, asked: None, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(model), "--as", version]) == code
    told = capsys.readouterr()
    assert f"ldm verify: {model.name}: Stable Diffusion {version}" in told.out and not told.err
    assert ("| unet | DIFFERS |" in told.out) == bool(code)
    assert cli.main(["verify", str(model), "--as", version, "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["proved"] is (code == 0) and found["version"] == version


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], "is tiny: numbers were published for Stable Diffusion v1 alone"),
        (["--as", "v9"], "unknown version 'v9'"),
        (["--device", "cuda:99"], "there is no device"),
    ],
)
def test_what_cannot_be_verified_is_told_in_one_line(
    args: list[str], told: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(model), *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_a_file_that_is_not_there_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
