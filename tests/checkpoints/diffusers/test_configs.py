"""Diffusers' config files, read as ours: what they say, and what our classes cannot be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from ldm.checkpoints.diffusers.configs import ConfigFile, model_config
from ldm.checkpoints.diffusers.names import (
    PART_OF,
)
from ldm.checkpoints.diffusers.writing import config_files
from ldm.checkpoints.opening import open_archive
from ldm.checkpoints.recognise import recognise
from ldm.config import PREDICTIONS, SD_V1, ModelConfig, ScheduleConfig
from ldm.errors import ConfigError, FamilyError, UnreadableError
from ldm.schedule import NoiseSchedule
from tests.checkpoints.diffusers.helpers import (
    CONFIGS,
)


def config_file(fields: dict[str, Any]) -> ConfigFile:
    return ConfigFile(Path("config.json"), fields)


def parsed(files: dict[str, dict[str, Any]], name: str = "a name") -> ModelConfig:
    """The config that the files of `config_files` mean, having been text in between."""
    names = {stage: f"{folder}/config.json" for stage, folder in PART_OF.items()}
    names["schedule"] = "scheduler/scheduler_config.json"
    return model_config(
        name, {s: config_file(json.loads(json.dumps(files[n]))) for s, n in names.items()}
    )


# What the official folder says (CompVis/stable-diffusion-v1-4): it is older than many fields.
OFFICIAL: dict[str, dict[str, Any]] = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.2.2",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 768,
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.2.2",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "out_channels": 3,
        "sample_size": 512,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "text": {
        "_name_or_path": "openai/clip-vit-large-patch14",
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "torch_dtype": "float32",
        "transformers_version": "4.21.0.dev0",
        "vocab_size": 49408,
    },
    "schedule": {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.7.0.dev0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
}


def official_config(stage: str = "", **changes: Any) -> ModelConfig:
    """What the official files mean, with some fields of one of them changed."""
    files = {s: fields | changes if s == stage else fields for s, fields in OFFICIAL.items()}
    return model_config("a name", {s: config_file(fields) for s, fields in files.items()})


def test_the_official_folder_is_sd_v1() -> None:
    assert official_config() == SD_V1  # and so by its name: "sd-v1", not the folder's


def test_absent_parts_are_sd_v1s() -> None:
    assert model_config("a name", {}) == SD_V1


def test_other_numbers_have_the_folders_name() -> None:
    assert official_config("unet", sample_size=96) == dataclasses.replace(
        SD_V1, name="a name", image_size=768
    )


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_a_config_survives_diffusers_files(config: ModelConfig) -> None:
    assert parsed(config_files(config), config.name) == config


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_all_that_diffusers_fills_in_is_what_we_have(
    diffusers: Any, config: ModelConfig, tmp_path: Path
) -> None:
    """diffusers writes dozens of fields that we leave to its defaults: they say the same model."""
    files = config_files(config)
    with torch.device("meta"):
        diffusers.UNet2DConditionModel.from_config(files["unet/config.json"]).save_config(
            tmp_path / "unet"
        )
        diffusers.AutoencoderKL.from_config(files["vae/config.json"]).save_config(tmp_path / "vae")
    for name in ("unet/config.json", "vae/config.json"):
        full = json.loads((tmp_path / name).read_text())
        assert len(full) > len(files[name]) + 5
        files[name] = full
    assert parsed(files, config.name) == config


@pytest.mark.parametrize(
    "change",
    [
        ("unet", "cross_attention_dim", [768, 768, 768, 768]),
        ("unet", "layers_per_block", [2, 2, 2, 2]),
        ("unet", "attention_head_dim", [8, 8, 8, 8]),
        ("unet", "only_cross_attention", [False, False, False, False]),
        ("unet", "sample_size", [64, 64]),
        ("unet", "upcast_attention", True),
        ("unet", "dropout", 0.1),
        ("unet", "a_field_of_the_future", None),
        ("vae", "force_upcast", False),
        ("vae", "sample_size", 256),
        ("text", "eos_token_id", 49407),
        ("text", "torch_dtype", "float16"),
        ("schedule", "_class_name", "EulerDiscreteScheduler"),
        ("schedule", "steps_offset", 0),
    ],
    ids=lambda change: f"{change[0]}-{change[1]}",
)
def test_other_ways_to_say_sd_v1(change: tuple[str, str, Any]) -> None:
    stage, name, value = change
    changes = {name: value} | ({"bos_token_id": 49406} if name == "eos_token_id" else {})
    assert official_config(stage, **changes) == SD_V1


OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "sdxl": ("unet", {"addition_embed_type": "text_time"}, "this is Stable Diffusion XL"),
    "depth": ("unet", {"in_channels": 5}, "this is a depth-to-image model"),
    "upscaler": ("unet", {"in_channels": 7}, "this is an upscaler"),
    "learnt-variance": ("unet", {"out_channels": 8}, "4 input and 8 output channels"),
    "unet-class": ("unet", {"_class_name": "UNet2DModel"}, "of the class 'UNet2DModel'"),
    "act": ("unet", {"act_fn": "gelu"}, "act_fn is 'gelu', not 'silu'"),
    "eps": ("unet", {"norm_eps": 1e-6}, "norm_eps is 1e-06, not 1e-05"),
    "heads": ("unet", {"attention_head_dim": [5, 10, 20, 40]}, "not heads of one width"),
    "mid": ("unet", {"mid_block_type": None}, "mid_block_type is None"),
    "sines": ("unet", {"flip_sin_to_cos": False}, "flip_sin_to_cos is False"),
    "down": (
        "unet",
        {"down_block_types": ["AttnDownBlock2D", *["DownBlock2D"] * 3]},
        "down_block_types",
    ),
    "up": ("unet", {"up_block_types": ["UpBlock2D"] * 4}, "up_block_types"),
    "few-levels": ("unet", {"block_out_channels": [320, 640]}, "down_block_types"),
    "widths": ("unet", {"block_out_channels": [320, 480, 1280, 1280]}, "whole multiples"),
    "lcm": ("unet", {"time_cond_proj_dim": 256}, "a latent consistency model (LCM)"),
    "future": ("unet", {"a_field_of_the_future": 1}, "a_field_of_the_future is 1"),
    "oblong": ("unet", {"sample_size": [64, 96]}, "sample_size is"),
    "vae-class": ("vae", {"_class_name": "AutoencoderTiny"}, "of the class 'AutoencoderTiny'"),
    "flux-vae": ("vae", {"shift_factor": 0.1159}, "shift_factor is 0.1159"),
    "sd3-vae": ("vae", {"use_quant_conv": False}, "use_quant_conv is False"),
    "vae-levels": ("vae", {"up_block_types": ["UpDecoderBlock2D"] * 3}, "one UpDecoderBlock2D"),
    "vae-sides": ("vae", {"out_channels": 6}, "out_channels is 6"),
    "activation": ("text", {"hidden_act": "relu"}, "hidden_act is 'relu', not 'quick_gelu' or"),
    "bert": ("text", {"model_type": "bert"}, "model_type is 'bert'"),
    "flow": ("schedule", {"prediction_type": "flow_prediction"}, "is 'flow_prediction', not eps"),
    "linear": ("schedule", {"beta_schedule": "linear"}, "beta_schedule is 'linear'"),
}


@pytest.mark.parametrize("stage, changes, told", OTHERS.values(), ids=OTHERS)
def test_what_our_classes_cannot_be_is_refused_by_name(
    stage: str, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(FamilyError) as caught:
        official_config(stage, **changes)
    message = str(caught.value)
    assert message.startswith("config.json: ") and told in message, message
    assert message.endswith("; ldm loads Stable Diffusion 1 and 2 models") and "\n" not in message


def test_a_scheduler_that_says_nothing_has_diffusers_default_and_is_refused() -> None:
    with pytest.raises(FamilyError, match="beta_schedule is 'linear', not 'scaled_linear'"):
        model_config("a name", {"schedule": config_file({})})


@pytest.mark.parametrize(
    "stage, changes",
    [
        ("unet", {"in_channels": "4"}),
        ("unet", {"in_channels": True}),
        ("unet", {"layers_per_block": []}),
        ("unet", {"block_out_channels": []}),
        ("unet", {"block_out_channels": [0, 0]}),
        ("unet", {"block_out_channels": 320}),
        ("unet", {"down_block_types": 5}),
        ("unet", {"down_block_types": [{}]}),
        ("vae", {"latent_channels": None}),
        ("schedule", {"beta_start": "0.1"}),
        ("schedule", {"rescale_betas_zero_snr": "yes"}),
        ("schedule", {"trained_betas": 0.1}),
    ],
    ids=str,
)
def test_what_no_model_can_be_is_unreadable(stage: str, changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(UnreadableError, match=f"config.json: {name} must be"):
        official_config(stage, **changes)


@pytest.mark.parametrize(
    "stage, name, value, ours",
    [
        ("unet", "cross_attention_dim", 0, "UNetConfig.context_dim"),
        ("unet", "layers_per_block", 10**4, "UNetConfig.num_res_blocks"),
        ("unet", "attention_head_dim", 7, "UNetConfig.num_heads"),
        ("unet", "norm_num_groups", 33, "UNetConfig.norm_groups"),
        ("unet", "sample_size", 2**20, "ModelConfig.image_size"),
        ("vae", "scaling_factor", 0, "VAEConfig.scaling_factor"),
        ("vae", "scaling_factor", float("nan"), "VAEConfig.scaling_factor"),
        ("vae", "scaling_factor", 10**400, "VAEConfig.scaling_factor"),
        ("vae", "layers_per_block", 10**4, "VAEConfig.num_res_blocks"),
        ("text", "num_hidden_layers", 10**4, "TextConfig.num_layers"),
        ("text", "hidden_size", 2**60, "TextConfig.hidden_size"),
        ("text", "num_attention_heads", 5, "TextConfig.num_heads"),
        ("schedule", "num_train_timesteps", -1, "ScheduleConfig.num_train_timesteps"),
        ("schedule", "beta_end", 1.5, "ScheduleConfig.beta_end"),
        ("schedule", "trained_betas", [0.1, "0.2"], "ScheduleConfig.beta_end"),
        ("schedule", "trained_betas", [0.1, 0.2, -1, 0.4], "ScheduleConfig.betas"),
    ],
)
def test_a_number_out_of_its_range_is_refused_as_by_our_config(
    stage: str, name: str, value: Any, ours: str
) -> None:
    with pytest.raises(ConfigError, match=f"^config.json: {ours} must be"):
        official_config(stage, **{name: value})


def test_very_many_levels_are_refused_at_once() -> None:
    many = {"block_out_channels": [320] * 10_000, "down_block_types": ["DownBlock2D"] * 10_000}
    with pytest.raises(ConfigError, match=r"^config.json: UNetConfig.channel_mult must be"):
        official_config("unet", **many)
    many = {
        "block_out_channels": [320] * 10_000,
        "down_block_types": ["DownEncoderBlock2D"] * 10_000,
        "up_block_types": ["UpDecoderBlock2D"] * 10_000,
    }
    with pytest.raises(ConfigError, match=r"^config.json: VAEConfig.channel_mult must be"):
        official_config("vae", **many)


def test_a_table_of_betas_is_a_schedule() -> None:
    betas = (0.1, 0.2, 0.3)
    schedule = official_config("schedule", trained_betas=list(betas)).schedule
    assert schedule == ScheduleConfig(3, 0.1, 0.3, betas)


def test_a_folder_may_have_any_name(folder: Path, tmp_path: Path) -> None:
    """The model is called so, in letters that can be shown."""
    odd = folder.rename(tmp_path / "a\x1b]0;b\n")
    assert recognise(open_archive(odd)).config.name == r"a\x1b]0;b\n"


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(SD_V1, unet=dataclasses.replace(SD_V1.unet, channel_mult=(2, 4, 4, 4))),
        dataclasses.replace(SD_V1, unet=dataclasses.replace(SD_V1.unet, in_channels=6)),
        dataclasses.replace(SD_V1, image_size=500),
    ],
    ids=["width", "channels", "size"],
)
def test_a_config_that_diffusers_cannot_say_is_an_error(config: ModelConfig) -> None:
    with pytest.raises(FamilyError):
        config_files(config)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_what_a_model_predicts_goes_there_and_back(prediction: str) -> None:
    for zero_terminal_snr in (False, True):
        schedule = ScheduleConfig(zero_terminal_snr=zero_terminal_snr)
        if prediction == "eps" and zero_terminal_snr:
            continue
        config = dataclasses.replace(SD_V1, schedule=schedule, prediction=prediction, name="a")
        if prediction == "flow":
            with pytest.raises(FamilyError, match="prediction_type is 'flow'"):
                config_files(config)
            continue
        fields = config_files(config)["scheduler/scheduler_config.json"]
        theirs = DDIMScheduler.from_config(fields)
        assert theirs.config.prediction_type == fields["prediction_type"]
        alpha_bar = NoiseSchedule(schedule).alpha_bar
        torch.testing.assert_close(theirs.alphas_cumprod, alpha_bar, rtol=0, atol=2e-6)
        read = model_config("a", {"schedule": config_file(fields)})
        assert (read.prediction, read.schedule) == (prediction, schedule)


def test_a_table_that_is_to_be_rescaled_is() -> None:
    betas = NoiseSchedule(ScheduleConfig()).betas.tolist()
    fields = {"trained_betas": betas, "rescale_betas_zero_snr": True}
    read = model_config(
        "a", {"schedule": config_file(fields | {"prediction_type": "v_prediction"})}
    )
    theirs = DDIMScheduler.from_config({**fields, "prediction_type": "v_prediction"})
    ours = NoiseSchedule(read.schedule).alpha_bar
    torch.testing.assert_close(theirs.alphas_cumprod, ours, rtol=0, atol=2e-6)
    with pytest.raises(ConfigError, match=r"config.json: ModelConfig.prediction must be v, x0 or"):
        model_config("a", {"schedule": config_file(fields)})
