"""The names of diffusers' layers, with its own models as the judges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ldm.checkpoints.diffusers.names import (
    PART_OF,
    diffusers_names,
    official_keys,
)
from ldm.checkpoints.diffusers.writing import config_files
from ldm.checkpoints.keys import key_map
from ldm.checkpoints.stages import build_stage
from ldm.config import ModelConfig
from tests.checkpoints.diffusers.helpers import (
    CONFIGS,
)
from tests.helpers import (
    STAGES,
)


def oracle_on_meta(diffusers: Any, stage: str, config: ModelConfig) -> nn.Module:
    """diffusers' and transformers' own model of our JSON, without memory."""
    from transformers import CLIPTextConfig, CLIPTextModel

    fields = config_files(config)[f"{PART_OF[stage]}/config.json"]
    with torch.device("meta"):
        if stage == "text":
            return CLIPTextModel(CLIPTextConfig(**fields))
        kind = diffusers.UNet2DConditionModel if stage == "unet" else diffusers.AutoencoderKL
        return kind(**{k: v for k, v in fields.items() if not k.startswith("_")})


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
@pytest.mark.parametrize("stage", STAGES)
def test_the_names_are_a_bijection_onto_all_of_diffusers_keys(
    diffusers: Any, stage: str, config: ModelConfig
) -> None:
    with torch.device("meta"):
        ours = build_stage(stage, config)
    names = diffusers_names(ours)
    theirs = oracle_on_meta(diffusers, stage, config).state_dict()
    if stage == "text":  # transformers 5 has no prefix in its models, and writes it to files
        theirs = {"text_model." + k.removeprefix("text_model."): v for k, v in theirs.items()}
        theirs.pop("text_model.embeddings.position_ids", None)

    state = ours.state_dict()
    assert names.keys() == state.keys()
    assert len(set(names.values())) == len(names)
    assert set(names.values()) == theirs.keys()
    for key, name in names.items():
        shape, found = tuple(state[key].shape), tuple(theirs[name].shape)
        if stage == "vae" and ".mid.attention.to_" in key and key.endswith("weight"):
            assert shape == (*found, 1, 1)
        else:
            assert shape == found


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
@pytest.mark.parametrize("stage", STAGES)
def test_every_diffusers_name_leads_to_the_official_one(stage: str, config: ModelConfig) -> None:
    with torch.device("meta"):
        model = build_stage(stage, config)
    keys, official = official_keys(stage, config), key_map(model)
    for ours, theirs in diffusers_names(model).items():
        assert keys[theirs] == official[ours]


def test_a_module_that_is_no_stage_has_no_names() -> None:
    with pytest.raises(TypeError, match="no diffusers names for Linear"):
        diffusers_names(nn.Linear(1, 1))
