"""Diffusers folders of random models, and what the other libraries make of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.checkpoints.diffusers.names import (
    PART_OF,
)
from ldm.checkpoints.diffusers.writing import save_folder
from ldm.checkpoints.folders import PARTS
from ldm.checkpoints.keys import POSITION_IDS, key_map
from ldm.checkpoints.opening import open_archive
from ldm.checkpoints.recognise import recognise
from ldm.checkpoints.stages import build_stage
from ldm.config import HORIZON, SD_V1, ModelConfig
from ldm.tokenizer import Tokenizer
from tests.helpers import (
    STAGES,
    random_stage,
    tiny_config,
)

TEXTS = ["a red house on green grass at night", "the blue sea and the sky by day"]
CONFIGS = [SD_V1, HORIZON, tiny_config()]
UNET, VAE, TEXT = (f"{PART_OF[stage]}/{PARTS[PART_OF[stage]][0]}" for stage in STAGES)
Models = dict[str, nn.Module]


def tokenizer_of(config: ModelConfig) -> Tokenizer:
    tokenizer = Tokenizer.train(TEXTS * 5, config.text.vocab_size)
    assert len(tokenizer) == config.text.vocab_size
    return tokenizer


def random_models(config: ModelConfig, seed: int = 0, activation_std: float = 1.0) -> Models:
    tokenizer = tokenizer_of(config)
    return {s: random_stage(s, config, seed, activation_std, tokenizer) for s in STAGES}


def save(path: Path, models: Models, config: ModelConfig, **options: Any) -> Path:
    options = dict(tokenizer=models["text"].tokenizer) | options
    save_folder(path, config=config, **models, **options)
    return path


def loaded(folder: Path, stages: Iterable[str] = STAGES) -> Models:
    """The stages of a folder, strictly: every key used, every shape equal up to ones at its end."""
    weights = recognise(open_archive(folder))
    config, left = weights.config, dict(weights.entries)
    models = {stage: build_stage(stage, config) for stage in stages}
    for model in models.values():
        shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
        state = {}
        for ours, official in key_map(model).items():
            entry, shape = left.pop(official), shapes[ours]
            assert entry.shape == shape[: len(entry.shape)]
            state[ours] = entry.map().reshape(shape)
        model.load_state_dict(state, strict=True)
    assert left.keys() <= {POSITION_IDS}
    return {stage: model.eval() for stage, model in models.items()}


def assert_equal_weights(found: Models, expected: Models) -> None:
    for stage, model in found.items():
        state = expected[stage].state_dict()
        assert model.state_dict().keys() == state.keys()
        for key, value in model.state_dict().items():
            assert torch.equal(value, state[key]), f"{stage}: {key}"


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None of ours means that the field goes."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(fields))


def change_weights(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def oracle(diffusers: Any, stage: str, folder: Path, dtype: torch.dtype) -> nn.Module:
    """One stage of a folder, built and filled by the other library alone."""
    from transformers import CLIPTextModel

    kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    kind = kinds.get(stage, CLIPTextModel)
    model = kind.from_pretrained(folder / PART_OF[stage], torch_dtype=torch.float32)
    return model.eval().to(dtype)
