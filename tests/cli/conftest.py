"""A tiny model in a folder, and `ldm generate` with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ldm.cli import main as cli
from tests.helpers import tiny_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def generate(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run `ldm generate` in an empty folder, with the tiny model on the CPU."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str, device: tuple[str, ...] = ("--device", "cpu")) -> int:
        return cli.main(["generate", "--weights", str(model), *device, *args])

    return run


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and from then on a test fails where weights are read."""
    from ldm.pipeline import TextToImage

    def refuse() -> None:
        monkeypatch.setattr(TextToImage, "from_plans", lambda *_, **__: pytest.fail("work started"))

    return refuse
