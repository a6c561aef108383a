"""Diffusers folders, read and written, with diffusers and transformers as the judges."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.checkpoints.checkpoint import build_stage
from ldm.config import HORIZON, SD_V1, ModelConfig
from ldm.checkpoints.diffusers_layout import (
    FOLDERS,
    OLD_VAE_ATTENTION,
    VAE_ATTENTION,
    WEIGHTS,
    ConfigFile,
    config_files,
    diffusers_names,
    diffusers_vae_names,
    is_diffusers_folder,
    model_config,
    official_keys,
    read_folder,
    save_folder,
)
from ldm.errors import CheckpointError, FamilyError, MissingPartsError, UnreadableError
from ldm.checkpoints.keys import POSITION_IDS, key_map
from ldm.pipeline import TextToImage
from ldm.samplers import ddim, draw_noise
from ldm.schedule import NoiseSchedule
from ldm.tokenizer import Tokenizer
from tests.helpers import (
    STAGES,
    randn,
    random_stage,
    relative_error,
    rng,
    small_config,
    text_in_fp64,
    tiny_config,
)
from tests.parity import assert_parity

TEXTS = ["a red house on green grass at night", "the blue sea and the sky by day"]
CONFIGS = [SD_V1, HORIZON, tiny_config()]
UNET, VAE, TEXT = (f"{FOLDERS[stage]}/{WEIGHTS[stage][0]}" for stage in STAGES)
Models = dict[str, nn.Module]
CLIP = Path(__file__).parents[3] / "shared" / "clip" / "bpe_simple_vocab_16e6.txt.gz"


# --- Helpers ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def diffusers() -> Any:
    return pytest.importorskip("diffusers")


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


@pytest.fixture(scope="session")
def tiny_models() -> Models:
    return random_models(tiny_config())


@pytest.fixture(scope="session")
def written(tiny_models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ours, to be looked at only."""
    return save(tmp_path_factory.mktemp("written") / "tiny", tiny_models, tiny_config())


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """The same folder, to be changed."""
    return Path(shutil.copytree(written, tmp_path / "tiny"))


def loaded(folder: Path, stages: Iterable[str] = STAGES) -> Models:
    """The stages of a folder, strictly: every key used, every shape equal up to ones at its end."""
    archive, config = read_folder(folder)
    left = dict(archive.entries)
    models = {stage: build_stage(stage, config) for stage in stages}
    for model in models.values():
        state = {}
        for ours, official in key_map(model).items():
            entry, shape = left.pop(official), model.state_dict()[ours].shape
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


def config_file(fields: dict[str, Any]) -> ConfigFile:
    return ConfigFile(Path("config.json"), fields)


def parsed(files: dict[str, dict[str, Any]], name: str = "a name") -> ModelConfig:
    """The config that the files of `config_files` mean, having been text in between."""
    names = {stage: f"{folder}/config.json" for stage, folder in FOLDERS.items()}
    names["schedule"] = "scheduler/scheduler_config.json"
    return model_config(
        name, {s: config_file(json.loads(json.dumps(files[n]))) for s, n in names.items()}
    )


# --- Names -----------------------------------------------------------------------------------


def oracle_on_meta(diffusers: Any, stage: str, config: ModelConfig) -> nn.Module:
    """diffusers' and transformers' own model of our JSON, without memory."""
    from transformers import CLIPTextConfig, CLIPTextModel

    fields = config_files(config)[f"{FOLDERS[stage]}/config.json"]
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

    assert names.keys() == ours.state_dict().keys()
    assert len(set(names.values())) == len(names)
    assert set(names.values()) == theirs.keys()
    for key, name in names.items():
        shape, found = tuple(ours.state_dict()[key].shape), tuple(theirs[name].shape)
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


# --- Configs ---------------------------------------------------------------------------------

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
    "sd2": ("unet", {"cross_attention_dim": 1024}, "this is Stable Diffusion 2"),
    "sd2-linear": ("unet", {"use_linear_projection": True}, "this is Stable Diffusion 2"),
    "inpainting": ("unet", {"in_channels": 9}, "this is an inpainting model"),
    "pix2pix": ("unet", {"in_channels": 8}, "this is an instruct-pix2pix model"),
    "learnt-variance": ("unet", {"out_channels": 8}, "4 input and 8 output channels"),
    "unet-class": ("unet", {"_class_name": "UNet2DModel"}, "of the class 'UNet2DModel'"),
    "act": ("unet", {"act_fn": "gelu"}, "act_fn is 'gelu', not 'silu'"),
    "eps": ("unet", {"norm_eps": 1e-6}, "norm_eps is 1e-06, not 1e-05"),
    "heads": ("unet", {"attention_head_dim": [5, 10, 20, 20]}, "not one number"),
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
    "lcm": ("unet", {"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256, not absent"),
    "future": ("unet", {"a_field_of_the_future": 1}, "a_field_of_the_future is 1"),
    "oblong": ("unet", {"sample_size": [64, 96]}, "sample_size is"),
    "vae-class": ("vae", {"_class_name": "AutoencoderTiny"}, "of the class 'AutoencoderTiny'"),
    "flux-vae": ("vae", {"shift_factor": 0.1159}, "shift_factor is 0.1159"),
    "sd3-vae": ("vae", {"use_quant_conv": False}, "use_quant_conv is False"),
    "vae-levels": ("vae", {"up_block_types": ["UpDecoderBlock2D"] * 3}, "one UpDecoderBlock2D"),
    "vae-sides": ("vae", {"out_channels": 6}, "out_channels is 6"),
    "openclip": ("text", {"hidden_act": "gelu"}, "hidden_act is 'gelu', not 'quick_gelu'"),
    "bert": ("text", {"model_type": "bert"}, "model_type is 'bert'"),
    "v": ("schedule", {"prediction_type": "v_prediction"}, "predicts v"),
    "sample": ("schedule", {"prediction_type": "sample"}, "prediction_type is 'sample'"),
    "linear": ("schedule", {"beta_schedule": "linear"}, "beta_schedule is 'linear'"),
    "zero-snr": ("schedule", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True"),
    "betas": ("schedule", {"trained_betas": [0.1, 0.2]}, "trained_betas is"),
}


@pytest.mark.parametrize("stage, changes, told", OTHERS.values(), ids=OTHERS)
def test_what_our_classes_cannot_be_is_refused_by_name(
    stage: str, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(FamilyError) as caught:
        official_config(stage, **changes)
    message = str(caught.value)
    assert message.startswith("config.json: ") and told in message, message
    assert message.endswith("; ldm loads Stable Diffusion v1 models") and "\n" not in message


def test_a_scheduler_that_says_nothing_has_diffusers_default_and_is_refused() -> None:
    with pytest.raises(FamilyError, match="beta_schedule is 'linear', not 'scaled_linear'"):
        model_config("a name", {"schedule": config_file({})})


@pytest.mark.parametrize(
    "stage, changes",
    [
        ("unet", {"in_channels": "4"}),
        ("unet", {"in_channels": 0}),
        ("unet", {"in_channels": True}),
        ("unet", {"layers_per_block": 10**4}),
        ("unet", {"layers_per_block": []}),
        ("unet", {"block_out_channels": []}),
        ("unet", {"block_out_channels": [0, 0]}),
        ("unet", {"block_out_channels": 320}),
        ("unet", {"block_out_channels": [320] * 10**4}),
        ("unet", {"down_block_types": 5}),
        ("unet", {"down_block_types": [{}]}),
        ("vae", {"scaling_factor": 0}),
        ("vae", {"scaling_factor": float("nan")}),
        ("vae", {"latent_channels": None}),
        ("vae", {"layers_per_block": 10**4}),
        ("text", {"num_hidden_layers": 10**4}),
        ("text", {"hidden_size": 2**60}),
        ("schedule", {"beta_start": "0.1"}),
        ("schedule", {"num_train_timesteps": -1}),
    ],
    ids=str,
)
def test_what_no_model_can_be_is_unreadable(stage: str, changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(UnreadableError, match=f"config.json: {name} must be"):
        official_config(stage, **changes)


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(SD_V1, unet=dataclasses.replace(SD_V1.unet, channel_mult=(2, 4))),
        dataclasses.replace(SD_V1, unet=dataclasses.replace(SD_V1.unet, in_channels=9)),
        dataclasses.replace(SD_V1, image_size=500),
    ],
    ids=["width", "channels", "size"],
)
def test_a_config_that_diffusers_cannot_say_is_an_error(config: ModelConfig) -> None:
    with pytest.raises(FamilyError):
        config_files(config)


# --- Our folder, read by diffusers -----------------------------------------------------------


def oracle(diffusers: Any, stage: str, folder: Path, dtype: torch.dtype) -> nn.Module:
    """One stage of a folder, built and filled by the other library alone."""
    from transformers import CLIPTextModel

    kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    kind = kinds.get(stage, CLIPTextModel)
    model = kind.from_pretrained(folder / FOLDERS[stage], torch_dtype=torch.float32)
    return model.eval().to(dtype)


def outputs(stage: str, model: nn.Module, config: ModelConfig, dtype: torch.dtype) -> list[Tensor]:
    """What a stage gives for some inputs, whichever library it is of."""
    ours = model.__module__.startswith("ldm.")
    if stage == "unet":
        x, t = randn(2, 4, 16, 16, seed=1).to(dtype), torch.tensor([999, 1])
        context = randn(2, 9, config.unet.context_dim, seed=2).to(dtype)
        return [model(x, t, context) if ours else model(x, t, context).sample]
    if stage == "vae":
        x, z = randn(1, 3, 32, 32, seed=3).to(dtype), randn(1, 4, 4, 4, seed=4).to(dtype)
        if ours:
            return [model.encode(x).mean, model.decode(z)]
        return [model.encode(x).latent_dist.mean, model.decode(z).sample]
    size, end = config.text.max_length, config.text.eos_token_id
    ids = torch.randint(0, end - 1, (2, size), generator=rng(5))
    ids[:, 0], ids[:, -3:] = end - 1, end
    return [model.encode(ids) if ours else model(input_ids=ids).last_hidden_state]


@pytest.fixture(scope="session", params=[1.0, 0.01], ids=["unit", "small"])
def small(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Models, Path]:
    """A model with all of Stable Diffusion v1's levels, and its folder."""
    models = random_models(small_config(), activation_std=request.param)
    return models, save(tmp_path_factory.mktemp("small") / "model", models, small_config())


@text_in_fp64
@pytest.mark.parametrize("stage", STAGES)
@torch.no_grad()
def test_diffusers_reads_our_folder_and_computes_the_same(
    diffusers: Any, stage: str, small: tuple[Models, Path]
) -> None:
    models, folder = small
    config = small_config()
    exact = oracle(diffusers, stage, folder, torch.float64)
    theirs = oracle(diffusers, stage, folder, torch.float32)
    references = outputs(stage, exact, config, torch.float64)
    oracles = outputs(stage, theirs, config, torch.float32)
    mine = outputs(stage, models[stage], config, torch.float32)
    for ours, other, reference in zip(mine, oracles, references, strict=True):
        assert reference.dtype == torch.float64
        assert_parity(ours, other, reference, stage)


@pytest.fixture(scope="session")
def pipe(diffusers: Any, written: Path) -> Any:
    """diffusers' whole pipeline of our folder."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(str(written), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_pipeline_of_diffusers_draws_the_same_picture(pipe: Any, tiny_models: Models) -> None:
    config = tiny_config()
    mine = TextToImage(
        tiny_models["unet"],
        tiny_models["vae"],
        tiny_models["text"],
        NoiseSchedule(config.schedule),
        config,
    )
    settings = dict(guidance_scale=7.5, negative_prompt="the sea")
    (*_, last) = mine.denoise("a red house", steps=4, seed=3, **settings)
    (image,) = mine.decode(last.x_prev)

    noise = draw_noise([rng(3)], torch.empty(1, 4, 8, 8))
    settings |= dict(prompt="a red house", num_inference_steps=4, latents=noise)
    latents = pipe(**settings, output_type="latent").images
    (theirs,) = pipe(**settings).images

    assert relative_error(last.x_prev, latents) < 1e-4
    assert image.size == theirs.size == (16, 16)
    levels = np.stack([np.asarray(image), np.asarray(theirs)]).astype(float)
    assert np.abs(levels[0] - levels[1]).max() <= 1
    assert levels.std() > 10  # a picture, not one colour


PROMPTS = [
    "",
    "a red house",
    "  A  Red\tHOUSE's 3 doors, don't!  ",
    "naïve café ☕ 日本 e\u0301",
    "the end <|endoftext|> of it",
    "x" * 199,
]


def assert_equal_ids(ours: Tokenizer, theirs: Any, max_length: int) -> None:
    for prompt in PROMPTS:
        found = theirs(prompt, padding="max_length", truncation=True).input_ids
        assert found == ours.pad(ours.encode(prompt), max_length), prompt
        assert len(found) == max_length


def test_the_tokenizer_of_transformers_gives_the_same_ids(pipe: Any, tiny_models: Models) -> None:
    assert_equal_ids(tiny_models["text"].tokenizer, pipe.tokenizer, max_length=12)


@pytest.mark.skipif(not CLIP.exists(), reason=f"CLIP's vocabulary is not committed: no {CLIP}")
def test_the_tokenizer_of_transformers_gives_clips_ids(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    ours = Tokenizer.from_folder(CLIP.parent)
    ours.save(tmp_path)
    for name, fields in config_files(SD_V1).items():
        if name.startswith("tokenizer/"):
            (tmp_path / Path(name).name).write_text(json.dumps(fields))
    assert_equal_ids(ours, CLIPTokenizer.from_pretrained(tmp_path), max_length=77)


def test_the_scheduler_of_diffusers_takes_our_steps(diffusers: Any, written: Path) -> None:
    """Alone, since the pipeline of diffusers corrects a scheduler that is set otherwise."""
    scheduler = diffusers.DDIMScheduler.from_pretrained(str(written), subfolder="scheduler")
    scheduler.set_timesteps(5)
    schedule, x = NoiseSchedule(tiny_config().schedule), randn(1, 4, 8, 8)
    for step in ddim(lambda x, t: 0.1 * x, x, schedule.ddim_timesteps(5), schedule):
        t = scheduler.timesteps[step.index]
        assert t == step.t
        theirs = scheduler.step(step.eps, t, step.x)
        # Rounding alone: their tables are fp32, 1e-5 off; x0, far above 1, would show a clipping.
        assert relative_error(step.x_prev, theirs.prev_sample) < 1e-4
        assert relative_error(step.x0, theirs.pred_original_sample) < 1e-4
    assert step.index == 4


# --- Folders of diffusers, read by us --------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_folder_that_diffusers_wrote_is_read_exactly(
    pipe: Any, safe: bool, tiny_models: Models, tmp_path: Path
) -> None:
    pipe.save_pretrained(tmp_path / "theirs", safe_serialization=safe)
    assert (tmp_path / "theirs" / UNET).exists() == safe
    archive, config = read_folder(tmp_path / "theirs")
    assert archive.container == "diffusers folder" and archive.path == tmp_path / "theirs"
    assert config == dataclasses.replace(tiny_config(), name="theirs")
    assert_equal_weights(loaded(tmp_path / "theirs"), tiny_models)


def test_pickled_weights_are_read_exactly(tiny_models: Models, folder: Path) -> None:
    for stage in STAGES:
        safe, pickled = (folder / FOLDERS[stage] / name for name in WEIGHTS[stage])
        torch.save({"settings": argparse.Namespace(stage=stage)} | load_file(safe), pickled)
        safe.unlink()
    archive, _ = read_folder(folder)
    assert archive.stubs == ("argparse.Namespace",)  # dropped and listed, once for all parts
    assert archive.metadata["text"] == "text_encoder/pytorch_model.bin"
    assert_equal_weights(loaded(folder), tiny_models)


@pytest.mark.parametrize("as_matrix", [True, False], ids=["linear", "convolution"])
@torch.no_grad()
def test_the_old_names_of_the_autoencoders_attention_are_read(
    diffusers: Any, as_matrix: bool, tiny_models: Models, folder: Path
) -> None:
    names = diffusers_vae_names(tiny_config().vae, VAE_ATTENTION)
    old = diffusers_vae_names(tiny_config().vae, OLD_VAE_ATTENTION)
    renamed = {names[ours]: old[ours] for ours in names}

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        changed = {}
        for key, value in tensors.items():
            layer, kind = key.rsplit(".", 1)
            convolved = not as_matrix and value.ndim == 2
            changed[f"{renamed[layer]}.{kind}"] = value[..., None, None] if convolved else value
        assert changed.keys() != tensors.keys()
        return changed

    change_weights(folder / VAE, change)
    found = loaded(folder)
    assert_equal_weights(found, tiny_models)
    if as_matrix:  # the names are right: diffusers still knows them
        theirs = oracle(diffusers, "vae", folder, torch.float32)
        z = randn(1, 4, 4, 4)
        assert relative_error(found["vae"].decode(z), theirs.decode(z).sample) < 1e-4


@pytest.mark.parametrize("prefix", ["", "text_model."])
@pytest.mark.parametrize("dtype", [None, torch.int64, torch.float32], ids=str)
def test_text_keys_come_in_several_kinds(
    prefix: str, dtype: torch.dtype | None, tiny_models: Models, folder: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {prefix + k.removeprefix("text_model."): v for k, v in tensors.items()}
        if dtype is not None:
            tensors[f"{prefix}embeddings.position_ids"] = torch.arange(12, dtype=dtype)[None]
        return tensors

    change_weights(folder / TEXT, change)
    archive, _ = read_folder(folder)
    assert (POSITION_IDS in archive.entries) == (dtype is not None)
    assert_equal_weights(loaded(folder), tiny_models)


def test_a_sharded_model_is_read(pipe: Any, tiny_models: Models, folder: Path) -> None:
    shutil.rmtree(folder / "unet")
    pipe.unet.save_pretrained(folder / "unet", max_shard_size="200KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 2
    archive, _ = read_folder(folder)
    assert archive.metadata["unet"] == f"{UNET}.index.json"
    assert_equal_weights(loaded(folder), tiny_models)


@pytest.mark.parametrize("kind", ["single", "sharded", "sharded, old name"])
def test_the_fp16_variant_is_read_where_there_is_no_other(
    pipe: Any, kind: str, tiny_models: Models, folder: Path
) -> None:
    size = "10GB" if kind == "single" else "200KB"
    pipe.unet.save_pretrained(folder / "unet", variant="fp16", max_shard_size=size)
    if "old" in kind:
        (folder / f"{UNET}.index.fp16.json").rename(folder / f"{UNET}.fp16.index.json")
    fp16 = [path for path in (folder / "unet").iterdir() if "fp16" in path.name]
    for path in fp16:
        if path.suffix == ".safetensors":
            change_weights(path, lambda tensors: {k: v.half() for k, v in tensors.items()})

    plain, _ = read_folder(folder)
    assert plain.metadata["unet"] == UNET
    assert {e.dtype for e in plain.entries.values()} == {torch.float32}

    (folder / UNET).unlink()
    archive, _ = read_folder(folder)
    assert "fp16" in archive.metadata["unet"]
    assert torch.float16 in {e.dtype for e in archive.entries.values()}
    halved = {key: value.half().float() for key, value in tiny_models["unet"].state_dict().items()}
    for key, value in loaded(folder)["unet"].state_dict().items():
        assert torch.equal(value, halved[key])


def test_keys_that_nobody_knows_keep_their_names(folder: Path) -> None:
    change_weights(folder / UNET, lambda tensors: tensors | {"strange.weight": torch.ones(1)})
    change_weights(
        folder / VAE,
        lambda tensors: tensors | {"encoder.mid_block.attentions.0.query.bias": torch.ones(32)},
    )
    before = official_keys("vae", tiny_config()).values()
    archive, _ = read_folder(folder)
    strangers = {key for key in archive.entries if "/" in key}
    assert "unet/strange.weight" in strangers
    # Of a parameter that is there under its old name and its new one, one of them is too many.
    assert len(strangers) == 2 and sum(s.startswith("vae/encoder.mid_block") for s in strangers)
    assert "first_stage_model.encoder.mid.attn_1.q.bias" in before


@pytest.mark.parametrize("stage", STAGES)
def test_one_part_is_enough(stage: str, tiny_models: Models, folder: Path) -> None:
    expected = {stage: tiny_models[stage]}
    # The part itself,
    archive, config = read_folder(folder / FOLDERS[stage])
    assert list(archive.metadata.values()) == [WEIGHTS[stage][0]]
    assert config.name == FOLDERS[stage]
    assert getattr(config, stage) == getattr(tiny_config(), stage)
    assert_equal_weights(loaded(folder / FOLDERS[stage], [stage]), expected)
    # and a folder in which it is alone.
    for other in set(STAGES) - {stage}:
        shutil.rmtree(folder / FOLDERS[other])
    archive, config = read_folder(folder)
    assert archive.metadata.keys() == {stage}
    assert getattr(config, stage) == getattr(tiny_config(), stage)
    assert_equal_weights(loaded(folder, [stage]), expected)


def test_a_folder_without_the_parts_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(MissingPartsError) as caught:
        read_folder(tmp_path)
    assert all(name in str(caught.value) for name in (UNET, VAE, TEXT))
    assert "\n" not in str(caught.value)


def test_what_is_a_diffusers_folder(folder: Path, tmp_path: Path) -> None:
    assert is_diffusers_folder(folder)
    assert all(is_diffusers_folder(folder / name) for name in FOLDERS.values())
    for name in ("model_index.json", "vae", "text_encoder", UNET):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert is_diffusers_folder(folder), "a part without its weights"

    other = tmp_path / "other"
    (other / "vae").mkdir(parents=True)  # a user's own folder of autoencoders, beside other files
    (other / "model.safetensors").touch()
    (other / "config.json").write_text(json.dumps({"name": "horizon"}))
    assert not is_diffusers_folder(other)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def sharded(where: Any) -> Callable[[Path], None]:
    """The UNet's weights as the two shards a and b, with an index that says `where`."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / UNET)
        (folder / UNET).unlink()
        keys = sorted(tensors)
        save_file({k: tensors[k] for k in keys[:9]}, folder / "unet" / "a.safetensors")
        save_file({k: tensors[k] for k in keys[8:]}, folder / "unet" / "b.safetensors")
        found = where(keys) if callable(where) else where
        (folder / f"{UNET}.index.json").write_text(json.dumps({"weight_map": found}))

    return change


DAMAGES: dict[str, tuple[Callable[[Path], None], type[CheckpointError], str]] = {
    "no-config": (remove("unet/config.json"), MissingPartsError, "unet/config.json is missing"),
    "no-json": (write("vae/config.json", "{"), UnreadableError, "vae/config.json is not readable"),
    "deep-json": (write("vae/config.json", "[" * 10**5), UnreadableError, "is not readable JSON"),
    "list": (write("unet/config.json", "[]"), UnreadableError, "it holds no JSON object"),
    "binary": (write("unet/config.json", "\x00"), UnreadableError, "is not readable JSON"),
    "empty-weights": (write(UNET, ""), CheckpointError, "is empty"),
    "flux": (
        write("model_index.json", json.dumps({"_class_name": "FluxPipeline"})),
        FamilyError,
        "this is diffusers' 'FluxPipeline'",
    ),
    "controlnet": (
        write("config.json", json.dumps({"_class_name": "ControlNetModel"})),
        FamilyError,
        "this is diffusers' 'ControlNetModel'",
    ),
    "no-map": (sharded(None), UnreadableError, "weight_map must be"),
    "empty-map": (sharded({}), UnreadableError, "weight_map must be"),
    "way-out": (
        sharded({"a": "../vae/diffusion_pytorch_model.safetensors"}),
        UnreadableError,
        "weight_map must be",
    ),
    "no-shard": (
        sharded({"a": "a.safetensors", "c": "c.safetensors"}),
        MissingPartsError,
        "c.safetensors is missing",
    ),
    "twice": (
        sharded(lambda keys: {k: "ab"[n > 8] + ".safetensors" for n, k in enumerate(keys)}),
        UnreadableError,
        "do not agree about the key",
    ),
    "not-in-it": (
        sharded(lambda keys: dict.fromkeys([*keys[8:], "strange"], "b.safetensors")),
        UnreadableError,
        "do not agree about the key 'strange'",
    ),
}


@pytest.mark.parametrize("damage, error, told", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_says_what_is_wrong(
    damage: Callable[[Path], None], error: type[CheckpointError], told: str, folder: Path
) -> None:
    damage(folder)
    with pytest.raises(error) as caught:
        read_folder(folder)
    assert told in str(caught.value), caught.value
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


# --- Writing ---------------------------------------------------------------------------------


def test_saved_loaded_and_saved_again_is_byte_identical(written: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(written / "tokenizer")
    again = save(tmp_path / "again", loaded(written), tiny_config(), tokenizer=tokenizer)
    assert hashes(again) == hashes(written)
    assert len(hashes(again)) == 12 and list(tmp_path.iterdir()) == [again]
    for name in (UNET, VAE, TEXT):  # one entry, which transformers 4 asks for
        with safe_open(again / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_folder_in_half_precision(
    diffusers: Any, dtype: torch.dtype, tiny_models: Models, tmp_path: Path
) -> None:
    half = save(tmp_path / "half", tiny_models, tiny_config(), dtype=dtype)
    archive, _ = read_folder(half)
    assert {entry.dtype for entry in archive.entries.values()} == {dtype}
    assert tiny_models["unet"].conv_in.weight.dtype == torch.float32  # the model stays as it was
    theirs = diffusers.UNet2DConditionModel.from_pretrained(half / "unet", torch_dtype=dtype)
    expected = tiny_models["unet"].conv_in.weight.to(dtype)
    assert torch.equal(theirs.conv_in.weight, expected)


def test_nothing_is_written_over(tiny_models: Models, folder: Path, tmp_path: Path) -> None:
    before = hashes(folder)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in (folder.name, "empty", "file", "link"):
        with pytest.raises(ValueError, match=rf"{name} exists already: .*"):
            save(tmp_path / name, tiny_models, tiny_config())
    assert hashes(folder) == before
    assert {p.name for p in tmp_path.iterdir()} == {folder.name, "empty", "file", "link"}


def test_a_folder_that_cannot_be_is_a_line(tiny_models: Models, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be written: No such file or directory$"):
        save(tmp_path / "no" / "folder", tiny_models, tiny_config())


def test_a_folder_appears_whole_or_not_at_all(
    tiny_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def full_disk(tensors: dict[str, Tensor], target: Path, **options: Any) -> None:
        seen.append(target.name)
        if len(seen) == 2:
            raise OSError(28, "No space left on device")
        save_file(tensors, target, **options)

    monkeypatch.setattr("ldm.checkpoints.diffusers_layout.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path / "model", tiny_models, tiny_config())
    assert len(seen) == 2 and list(tmp_path.iterdir()) == []


def test_stages_and_tokenizer_must_be_the_configs(tiny_models: Models, tmp_path: Path) -> None:
    config = tiny_config()
    with pytest.raises(ValueError, match="the tokenizer is not the one of the model 'tiny'"):
        save(tmp_path / "x", tiny_models, config, tokenizer=tokenizer_of(small_config()))
    wrong = dataclasses.replace(config, vae=dataclasses.replace(config.vae, scaling_factor=1.0))
    with pytest.raises(ValueError, match="not built from the config 'tiny'"):
        save(tmp_path / "x", tiny_models, wrong)
    assert list(tmp_path.iterdir()) == []
