"""Fixtures of all tests of diffusers folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints.diffusers.helpers import (
    Models,
    random_models,
    save,
)
from tests.helpers import (
    tiny_config,
)


@pytest.fixture(scope="session")
def diffusers() -> Any:
    return pytest.importorskip("diffusers")


@pytest.fixture(scope="session")
def tiny_models() -> Models:
    return random_models(tiny_config())


@pytest.fixture(scope="session")
def written(tiny_models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ours, to be looked at only."""
    return save(tmp_path_factory.mktemp("written") / "tiny", tiny_models, tiny_config())


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """The same folder, to be changed."""
    return Path(shutil.copytree(written, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def pipe(diffusers: Any, written: Path) -> Any:
    """diffusers' whole pipeline of our folder."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(str(written), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe
