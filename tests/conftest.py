"""What every test may ask for: the devices that this machine has."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch

# No test asks the network, or finds what the Hub's cache of this machine happens to hold.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = str(Path(tempfile.gettempdir()) / "ldm-tests-have-no-hub-cache")

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compile: runs torch.compile, which takes tens of seconds")
    config.addinivalue_line(
        "markers", "full_size: Stable Diffusion v1 at its real size: minutes, 12 GB of memory"
    )
    config.addinivalue_line(
        "markers", "notebooks: runs the notebooks that take longest: minutes in all"
    )
    # TensorFloat-32 keeps 10 bits of a product: no fp32 tolerance of these tests would hold.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device of this machine in turn."""
    return request.param
