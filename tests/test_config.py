"""A config is one that a model can be built from, whoever makes it; or an error that names the
field."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from ldm.checkpoints.stages import empty_stage
from ldm.config import (
    HORIZON,
    SD_V1,
    DefaultsConfig,
    ModelConfig,
    ScheduleConfig,
    TextConfig,
    UNetConfig,
    VAEConfig,
)
from ldm.errors import ConfigError
from ldm.schedule import NoiseSchedule
from tests.helpers import STAGES, small_config, tiny_config

HUGE = 10**400  # larger than any float


def out_of_range(field: str, *values: Any) -> list[tuple[str, Any]]:
    return [(field, value) for value in values]


WHOLE = (0, -1, HUGE, 1.0, 1.5, True, "1", None, math.nan, [1])
REAL = (0.0, -1.0, HUGE, math.inf, math.nan, 1e-320, 1e308, True, "1", None)
WRONG: dict[type[Any], list[tuple[str, Any]]] = {
    UNetConfig: [
        *out_of_range("in_channels", *WHOLE, 1025),
        *out_of_range("out_channels", *WHOLE, 1025),
        *out_of_range("model_channels", *WHOLE, 2**17),
        *out_of_range("channel_mult", (), (1,) * 17, (1, 0, 1, 1), (1, -1), (1, 2.0), (HUGE,)),
        *out_of_range("channel_mult", [1, 2, 4, 4], None, 1, "1244", (True, 1, 1, 1), (1, (2,))),
        *out_of_range("num_res_blocks", *WHOLE, 17),
        *out_of_range("attention_levels", (4,), (-1,), (1, 0), (0, 0), [0], (0.0,), (False,), None),
        *out_of_range("num_heads", *WHOLE, 7, 640),
        *out_of_range("context_dim", *WHOLE, 2**16 + 1),
        *out_of_range("norm_groups", *WHOLE, 7, 640),
        *out_of_range("head_width", -1, 3, 2**16 + 1, True, 1.0, "64", None),
        *out_of_range("linear_projections", 0, 1, None, "true"),
    ],
    VAEConfig: [
        *out_of_range("in_channels", *WHOLE),
        *out_of_range("latent_channels", *WHOLE),
        *out_of_range("model_channels", *WHOLE),
        *out_of_range("channel_mult", (), (1,) * 17, [1, 2]),
        *out_of_range("num_res_blocks", *WHOLE, 17),
        *out_of_range("norm_groups", *WHOLE, 7),
        *out_of_range("scaling_factor", *REAL),
    ],
    TextConfig: [
        *out_of_range("vocab_size", *WHOLE, 1, 2**20 + 1),
        *out_of_range("hidden_size", *WHOLE, 2**16 + 1),
        *out_of_range("num_layers", *WHOLE, 65),
        *out_of_range("num_heads", *WHOLE, 5, 1536),
        *out_of_range("mlp_size", *WHOLE),
        *out_of_range("max_length", *WHOLE, 1, 2**16 + 1),
        *out_of_range("bos_token_id", -1, 49408, True, 1.0),
        *out_of_range("eos_token_id", -1, 49408, True, 1.0),
        *out_of_range("open_clip", 0, 1, None, "true"),
    ],
    ScheduleConfig: [
        *out_of_range("num_train_timesteps", *WHOLE, 2**16 + 1),
        *out_of_range("beta_start", *REAL),
        *out_of_range("beta_end", *REAL, 1.5, 0.0008, 0.5, 1.0),
        *out_of_range("betas", (), (0.1,) * 999, [0.1] * 1000, 0.1),
        *out_of_range("betas", *((0.001,) * 999 + (last,) for last in (*REAL, 1.5))),
        *out_of_range("betas", (0.001,) * 500 + (1.0,) + (0.001,) * 499, (0.1,) * 1000),
        *out_of_range("zero_terminal_snr", 0, 1, None, "true", 1.0),
    ],
    DefaultsConfig: [
        *out_of_range("sampler", "a\x1bb", "a" * 256, None, 3),
        *out_of_range("steps", *WHOLE),
        *out_of_range("guidance_scale", HUGE, math.inf, math.nan, 1e30, True, "1"),
    ],
}


@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_a_number_out_of_its_range_is_named_in_one_line(kind: type[Any]) -> None:
    assert {name for name, _ in WRONG[kind]} == {field.name for field in dataclasses.fields(kind)}
    for name, value in WRONG[kind]:
        with pytest.raises(ConfigError) as caught:
            kind(**{name: value})
        line = str(caught.value)
        # Where two fields do not go together either may be the one.
        assert line.startswith(f"{kind.__name__}."), (name, value)
        assert " must be " in line and line.isprintable() and len(line) < 250, (name, value)
        if name not in ("model_channels", "channel_mult", "num_train_timesteps", "beta_start"):
            assert line.startswith(f"{kind.__name__}.{name} "), line


def test_the_name_and_the_size_of_a_model_have_ranges() -> None:
    for name in ("a\nb", "\x1b]0;owned\x07", "a" * 256, None):
        with pytest.raises(ConfigError, match=r"ModelConfig\.name must be"):
            ModelConfig(name=name, image_size=8)  # type: ignore[arg-type]
    for size in (*WHOLE, 2**17):
        with pytest.raises(ConfigError, match=r"ModelConfig\.image_size must be"):
            ModelConfig(name="a", image_size=size)  # type: ignore[arg-type]


def test_from_pure_noise_the_noise_is_no_prediction() -> None:
    for schedule in (
        ScheduleConfig(zero_terminal_snr=True),
        ScheduleConfig(2, 0.5, 1.0, (0.5, 1.0)),
    ):
        assert schedule.ends_in_noise
        with pytest.raises(ConfigError, match=r"prediction must be v, x0 or flow: the noise"):
            ModelConfig("a", 8, schedule=schedule)
        ModelConfig("a", 8, schedule=schedule, prediction="v")
    assert not ScheduleConfig().ends_in_noise
    with pytest.raises(ConfigError, match="num_train_timesteps must be 2 or more"):
        ScheduleConfig(1, zero_terminal_snr=True)


def test_a_channel_for_each_sine_and_cosine() -> None:
    with pytest.raises(ConfigError, match="model_channels must be even"):
        UNetConfig(model_channels=33, norm_groups=1, num_heads=1)


# --- What the ranges let through ---------------------------------------------------------------

SHAPES = {
    "sd-v1": SD_V1,
    "horizon": HORIZON,
    "small": small_config(),
    "tiny": tiny_config(),
    "inpainting": dataclasses.replace(SD_V1, unet=UNetConfig(in_channels=9)),
    "pix2pix": dataclasses.replace(SD_V1, unet=UNetConfig(in_channels=8)),
    "as wide as sd 2": ModelConfig(
        "sd-v2",
        768,
        unet=UNetConfig(num_heads=5, context_dim=1024),
        text=TextConfig(hidden_size=1024, num_layers=24, num_heads=16, mlp_size=4096),
    ),
    "the least": ModelConfig(
        "",
        1,
        unet=UNetConfig(1, 1, 2, (1,), 1, (), 1, 1, 1),
        vae=VAEConfig(1, 1, 1, (1,), 1, 1, 1e-4),
        text=TextConfig(2, 1, 1, 1, 1, 2, 0, 1),
        schedule=ScheduleConfig(1, 1e-6, 1e-6),
    ),
    "the deepest": ModelConfig(
        "a" * 255,
        2**16,
        unet=UNetConfig(1024, 1024, 2**16, (1,) * 16, 1, (0, 15), 2**16, 2**16, 2**16),
        vae=VAEConfig(1024, 1024, 2, (1,) * 15 + (2**15,), 2, 2, 1e4),
        text=TextConfig(2**20, 2**16, 64, 2**16, 2**16, 2**16, 0, 2**20 - 1),
        schedule=ScheduleConfig(2**16, 1e-6, 1e-3),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_config_can_be_built(name: str) -> None:
    """On paper: a shape takes no memory."""
    config = SHAPES[name]
    for stage in STAGES:
        assert next(empty_stage(stage, config).parameters()).is_meta
    alpha_bar = NoiseSchedule(config.schedule).alpha_bar
    assert (alpha_bar.diff() < 0).all() and 0 < alpha_bar[-1] <= alpha_bar[0] < 1


def test_the_last_beta_may_be_one() -> None:
    rule = NoiseSchedule(ScheduleConfig(3, 0.1, 1.0))
    table = NoiseSchedule(ScheduleConfig(3, 0.1, 1.0, (0.1, 0.3, 1.0)))
    for schedule in (rule, table):
        assert schedule.alpha_bar[-1] == 0 and (schedule.alpha_bar[:-1] > 0).all()
        assert schedule.betas[-1] == 1 and (schedule.betas[:-1] < 1).all()
