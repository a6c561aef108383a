"""What several tests of files of weights start from."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from tests.helpers import (
    random_checkpoint,
    tiny_config,
)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, nn.Module]]:
    """A random tiny model in a file."""
    path = tmp_path / "model.safetensors"
    return path, random_checkpoint(path, tiny_config(), seed=2)
