"""What is loaded is what is in the file, and costs no more memory than that."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from ldm.checkpoints.keys import key_map
from ldm.checkpoints.loading import load_stages
from ldm.checkpoints.stages import STAGES
from ldm.config import SD_V1
from tests.benchmarks.harness import Setting, run_alone
from tests.benchmarks.load import ours

pytestmark = pytest.mark.full_size

PARAMETERS = {"unet": 859_520_964, "vae": 83_653_863, "text": 123_060_480}
FP32_BYTES = 4 * sum(PARAMETERS.values())


@pytest.fixture(params=["checkpoint", "pickled"], ids=["safetensors", "zip pickle"])
def path(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def bits(tensor: Tensor) -> Tensor:
    """What equality of floats does not see: -0 and 0."""
    return tensor.detach().view(torch.int32)


def test_every_parameter_is_the_files_own_bit_for_bit(path: Path, checkpoint: Path) -> None:
    with safe_open(checkpoint, framework="pt") as file:
        for stage, model in zip(STAGES, load_stages(path), strict=True):
            names = key_map(model)
            weights = dict(model.named_parameters())
            assert weights.keys() == names.keys()
            assert sum(weight.numel() for weight in weights.values()) == PARAMETERS[stage]
            for ours, theirs in names.items():
                assert weights[ours].dtype == torch.float32
                assert torch.equal(bits(weights[ours]), bits(file.get_tensor(theirs))), theirs


@pytest.mark.parametrize(
    "dtype, share", [(torch.float32, 1.05), (torch.float16, 0.6)], ids=["fp32", "fp16"]
)
def test_loading_takes_little_more_memory_than_the_weights(
    path: Path, dtype: torch.dtype, share: float
) -> None:
    load = partial(ours, stages=STAGES, dtype=dtype, check=True, read=True)
    memory = run_alone(load, Setting(path, SD_V1, configs=path)).memory
    print(f"{memory / FP32_BYTES:.3f} of the weights in fp32")
    half = dtype.itemsize / 4
    assert half * FP32_BYTES <= memory <= share * FP32_BYTES
