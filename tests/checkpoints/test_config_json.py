"""A config as JSON."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

from ldm.checkpoints.config_json import config_to_json
from ldm.checkpoints.loading import load_unet
from ldm.errors import (
    UnreadableError,
)
from tests.helpers import (
    tiny_config,
)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"unet": {"colour": 3}}', "3", "[" * 99999, '"' + "9" * 9999 + '"']
)
def test_metadata_that_is_no_config_is_unreadable(saved, text: str) -> None:
    path, _ = saved
    save_file(load_file(path), path, metadata={"ldm": text})
    with pytest.raises(UnreadableError, match="not a config"):
        load_unet(path)


WRONG_CONFIGS = {
    "a float for a whole number": ("unet", "norm_groups", 4.0),
    "a truth value for a whole number": ("unet", "num_heads", True),
    "a negative number": ("vae", "norm_groups", -4),
    "a huge number": ("unet", "model_channels", 10**12),
    "infinity": ("vae", "scaling_factor", float("inf")),
    "a number for a list": ("unet", "channel_mult", 1),
    "a list in a list": ("unet", "channel_mult", [1, [2]]),
    "a field too many": ("text", "colour", 1),
}


@pytest.mark.parametrize("part, name, value", WRONG_CONFIGS.values(), ids=WRONG_CONFIGS)
def test_metadata_with_impossible_values_is_unreadable(saved, part: str, name: str, value) -> None:
    path, _ = saved
    config = json.loads(config_to_json(tiny_config()))
    config[part][name] = value
    save_file(load_file(path), path, metadata={"ldm": json.dumps(config)})
    with pytest.raises(UnreadableError, match="not a config"):
        load_unet(path)
