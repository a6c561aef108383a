"""A config as JSON."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ldm.checkpoints.config_json import LONGEST, config_from_json, config_to_json, read_config
from ldm.checkpoints.inspection import inspect
from ldm.checkpoints.loading import load_unet
from ldm.errors import ConfigError, UnreadableError
from tests.helpers import a_million_dicts, tiny_config


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", "{}", '{"unet": {"colour": 3}}', "3", "[" * 99999, '"' + "9" * 9999 + '"'),
        *("9" * 9999, '"\\u001b]0;owned\\u0007"', " " * 10**6),
    ],
)
def test_metadata_that_is_no_config_is_unreadable(saved, text: str) -> None:
    path, _ = saved
    save_file(load_file(path), path, metadata={"ldm": text})
    with pytest.raises(UnreadableError, match="not a config"):
        load_unet(path)


def with_config(path: Path, part: str, name: str, value: object) -> None:
    """Write a file of a tiny model again, with a config that was changed."""
    config = json.loads(config_to_json(tiny_config()))
    config[part][name] = value
    save_file(load_file(path), path, metadata={"ldm": json.dumps(config)})


WRONG_CONFIGS = {
    "a float for a whole number": ("unet", "norm_groups", 4.0),
    "a truth value for a whole number": ("unet", "num_heads", True),
    "a word for a number": ("vae", "scaling_factor", "0.1"),
    "a number for a list": ("unet", "channel_mult", 1),
    "a list in a list": ("unet", "channel_mult", [1, [2]]),
    "a field too many": ("text", "colour", 1),
}


@pytest.mark.parametrize("part, name, value", WRONG_CONFIGS.values(), ids=WRONG_CONFIGS)
def test_metadata_of_other_types_is_unreadable(saved, part: str, name: str, value) -> None:
    path, _ = saved
    with_config(path, part, name, value)
    with pytest.raises(UnreadableError, match="not a config"):
        load_unet(path)


OUT_OF_RANGE = {
    "a negative number": ("vae", "norm_groups", -4),
    "a huge number": ("unet", "model_channels", 10**12),
    "infinity": ("vae", "scaling_factor", float("inf")),
    "next to nothing": ("vae", "scaling_factor", 1e-320),
    "400 digits": ("schedule", "beta_start", 10**400),
    "more than all noise": ("schedule", "beta_end", 1.5),
    "heads that do not divide": ("text", "num_heads", 5),
    "groups that do not divide": ("unet", "norm_groups", 7),
    "a level that is not there": ("unet", "attention_levels", [2]),
    "no levels": ("unet", "channel_mult", []),
    "very many levels": ("unet", "channel_mult", [1] * 20_000),
    "very many blocks": ("vae", "num_res_blocks", 99_999),
    "very many layers": ("text", "num_layers", 999_999),
}


@pytest.mark.parametrize("part, name, value", OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
def test_a_number_of_the_metadata_out_of_its_range_is_told_at_once(
    saved, part: str, name: str, value
) -> None:
    path, _ = saved
    with_config(path, part, name, value)
    for look in (load_unet, inspect):
        started = time.process_time()
        with pytest.raises(ConfigError) as caught:
            look(path)
        assert time.process_time() - started < a_million_dicts()
        line = str(caught.value)
        assert line.startswith(f"{path}: ") and f"Config.{name} must be" in line, line
        assert line.isprintable()


def test_a_config_in_a_file_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(config_to_json(tiny_config(), indent=2))
    assert read_config(path) == tiny_config()
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UnreadableError, match=f"what {path} holds is not a config"):
        read_config(path)
    with path.open("wb") as file:  # a hole: it takes no room on the disk
        file.truncate(1 << 40)
    with pytest.raises(UnreadableError, match=f"more than {LONGEST:,}"):
        read_config(path)


def test_whole_numbers_may_stand_for_others() -> None:
    config = json.loads(config_to_json(tiny_config()))
    config["vae"]["scaling_factor"] = 1
    assert config_from_json(json.dumps(config), Path("a file")).vae.scaling_factor == 1.0


def test_a_config_keeps_what_its_unet_predicts_and_one_that_does_not_say_predicts_the_noise() -> (
    None
):
    v = dataclasses.replace(tiny_config(), prediction="v")
    assert config_from_json(config_to_json(v), Path("v.json")) == v
    assert "prediction" not in json.loads(config_to_json(tiny_config()))
    assert config_from_json(config_to_json(tiny_config()), Path("eps.json")).prediction == "eps"
    wrong = config_to_json(v).replace('"prediction": "v"', '"prediction": "w"')
    with pytest.raises(ConfigError, match="prediction must be one of eps, v, x0, flow"):
        config_from_json(wrong, Path("w.json"))
