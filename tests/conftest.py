"""What every test may ask for: the devices that this machine has, CLIP's vocabulary if it is here.

And what has to be set before torch and the Hub's library are imported.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tests.places import NO_VOCABULARY, clip_vocabulary, hub_cache

# Threads that spin while they wait take the cores of the other programs that the tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's own always spin
# Of two programs on two cores, each has one.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test asks the network, or finds what the Hub's cache of this machine happens to hold; only
# CLIP's vocabulary is looked for there.
HUB_CACHE = hub_cache()
for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
    os.environ.pop(name, None)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = str(Path(tempfile.gettempdir()) / "ldm-tests-have-no-hub-cache")

import torch  # noqa: E402 (it reads the environment as it is loaded)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_configure(config: pytest.Config) -> None:
    for marker in (
        "slow: minutes in all; CI runs them",
        "compile: runs torch.compile, which takes tens of seconds; CI runs them",
        "full_size: Stable Diffusion v1 at its real size: minutes, 12 GB of memory",
        "notebooks: runs the notebooks: minutes in all",
    ):
        config.addinivalue_line("markers", marker)
    # TensorFloat-32 keeps 10 bits of a product: no fp32 tolerance of these tests would hold.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device of this machine in turn."""
    return request.param


@pytest.fixture(scope="session")
def clip_folder() -> Path:
    """A folder with CLIP's own vocabulary, in one of its forms."""
    folder = clip_vocabulary(HUB_CACHE)
    return folder or pytest.skip(NO_VOCABULARY)
