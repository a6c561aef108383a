"""A whole random model at full size, in a file of each kind."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm.config import SD_V1
from tests.helpers import random_checkpoint

# The UNet in fp64 takes 6.9 GB; decoding a picture in fp64 nearly as much, for PyTorch's
# convolution copies every window of its input there.
MEMORY, DISK = 12e9, 10e9


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files go, on a machine that is large enough."""
    psutil = pytest.importorskip("psutil")
    folder = tmp_path_factory.mktemp("full_size")
    memory, disk = psutil.virtual_memory().available, shutil.disk_usage(folder).free
    if memory < MEMORY or disk < DISK:
        pytest.skip(
            f"needs {MEMORY / 1e9:.0f} GB of memory and {DISK / 1e9:.0f} GB of disk: "
            f"{memory / 1e9:.0f} and {disk / 1e9:.0f} are free"
        )
    return folder


@pytest.fixture(scope="session")
def checkpoint(folder: Path) -> Iterator[Path]:
    """All parameters of Stable Diffusion v1, drawn at random: 4.3 GB of safetensors."""
    path = folder / "model.safetensors"
    random_checkpoint(path, SD_V1, seed=1)
    yield path
    path.unlink()


@pytest.fixture(scope="session")
def pickled(checkpoint: Path) -> Iterator[Path]:
    """The same as the official files are: a pickle of torch's, one storage per tensor."""
    path = checkpoint.with_suffix(".ckpt")
    _pickle(checkpoint, path)
    yield path
    path.unlink()


def _pickle(source: Path, target: Path) -> None:
    weights = {key: tensor.clone() for key, tensor in load_file(source).items()}
    torch.save({"global_step": 470000, "state_dict": weights}, target)
