"""Checkpoints that both sides read."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm.config import ModelConfig
from tests.helpers import random_checkpoint, small_config, small_v2_config


@pytest.fixture(scope="session", params=[1.0, 0.01], ids=["unit", "small"])
def activation_std(request: pytest.FixtureRequest) -> float:
    """The size of the activations: at 0.01, an epsilon of a norm shows that is too large or small
    (the variance is 1e-4, the epsilons are 1e-5 and 1e-6)."""
    return request.param


@pytest.fixture(scope="session", params=[small_config(), small_v2_config()], ids=lambda c: c.name)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    """Stable Diffusion 1 and 2, but for the sizes."""
    return request.param


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, config: ModelConfig, activation_std: float
) -> Path:
    """A whole random model in a file of ours."""
    path = tmp_path_factory.mktemp("parity") / f"std_{activation_std}.safetensors"
    random_checkpoint(path, config, seed=1, activation_std=activation_std)
    return path
