"""The config files of a diffusers folder, read as our config.

They say more than ours, since diffusers' classes can be many other models: a field that our classes
have no number for must hold what Stable Diffusion v1 has there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.checkpoints.config_json import said_of
from ldm.checkpoints.diffusers.names import PART_OF
from ldm.checkpoints.entries import Archive
from ldm.checkpoints.families import LOADS, OTHER_INPUTS
from ldm.checkpoints.folders import CONFIG, INDEX, PARTS, SCHEDULER, SCHEDULER_BESIDE
from ldm.config import (
    OFFICIAL,
    SD_V1,
    ModelConfig,
    ScheduleConfig,
    TextConfig,
    UNetConfig,
    VAEConfig,
)
from ldm.errors import NAME, FamilyError, MissingPartsError, UnreadableError, printable
from ldm.schedule import ending_in_noise, exact_tables

# What our classes have built in where diffusers' have a choice. An absent field is diffusers'
# default, which is the same; of all other fields those that are null or false ask for nothing.
UNET_FIXED = {
    "act_fn": "silu",
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "resnet_out_scale_factor": 1.0,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "transformer_layers_per_block": 1,
}
UNET_READ = {
    "attention_head_dim",
    "block_out_channels",
    "cross_attention_dim",
    "down_block_types",
    "in_channels",
    "layers_per_block",
    "norm_num_groups",
    "out_channels",
    "sample_size",
    "up_block_types",
    "use_linear_projection",
}
VAE_FIXED = {
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
VAE_READ = {
    "block_out_channels",
    "down_block_types",
    "in_channels",
    "latent_channels",
    "layers_per_block",
    "norm_num_groups",
    "out_channels",
    "scaling_factor",
    "up_block_types",
}
# These change nothing of what trained weights compute, but for the rounding.
UNET_IGNORED = {"addition_embed_type_num_heads", "dropout", "upcast_attention"}
VAE_IGNORED = {"force_upcast", "sample_size"}
# transformers writes dozens of fields that mean nothing here, so only these are looked at; and so
# with the scheduler's, most of which are a sampler's, and ldm has its own samplers.
TEXT_FIXED = {"layer_norm_eps": 1e-5, "model_type": "clip_text_model"}
ACTIVATIONS = {False: "quick_gelu", True: "gelu"}  # whether a text encoder is OpenCLIP's
PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}

# diffusers' pipeline, by the UNet's channels, in and out, where they differ.
PIPELINES = {
    (9, 4): "StableDiffusionInpaintPipeline",
    (8, 4): "StableDiffusionInstructPix2PixPipeline",
}
VAE_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}


@dataclass(frozen=True)
class ConfigFile:
    """One JSON file of a folder, and the questions that we ask it.

    What no model can have is an UnreadableError; what another kind of model has, a FamilyError. The
    ranges of numbers are our configs' to check.
    """

    path: Path
    fields: Mapping[str, Any]

    def get(self, name: str, default: object = None) -> Any:
        """A field; a list with one value per level is that value, if all levels have the same."""
        value = self.fields.get(name, default)
        if isinstance(value, list) and value and all(one == value[0] for one in value):
            return value[0]
        return value

    def whole(self, name: str, default: int) -> int:
        """A field that is a whole number."""
        value = self.get(name, default)
        if isinstance(value, list) and len(value) > 1:
            raise self.other(name, value, "one number")
        if type(value) is not int:
            raise self.unreadable(name, value, "a whole number")
        return value

    def real(self, name: str, default: float) -> float:
        """A field that is a number."""
        value = self.get(name, default)
        if not isinstance(value, int | float):
            raise self.unreadable(name, value, "a number")
        return value

    def widths(self, default: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """`block_out_channels`: the width of the first level, and each level's multiple of it."""
        widths = self.fields.get("block_out_channels", list(default))
        listed = isinstance(widths, list) and widths
        if not listed or not all(type(width) is int and width > 0 for width in widths):
            raise self.unreadable("block_out_channels", widths, "a list of whole numbers above 0")
        if any(width % widths[0] for width in widths):
            raise self.other("block_out_channels", widths, "whole multiples of the first")
        return widths[0], tuple(width // widths[0] for width in widths)

    def strings(self, name: str, default: Sequence[str]) -> list[str]:
        """A field that is a list of strings."""
        value = self.fields.get(name, list(default))
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.unreadable(name, value, "a list of strings")
        return value

    def check_class(self, name: str) -> None:
        """A FamilyError unless this configures diffusers' class of that name."""
        found = self.fields.get("_class_name", name)
        if found != name:
            raise self.family(f"of the class {found!r:.80}, not {name}")

    def check_fixed(self, fixed: Mapping[str, object]) -> None:
        """A FamilyError for the first field that differs from what is fixed."""
        for name, ours in fixed.items():
            found = self.get(name, ours)
            if found != ours:
                raise self.other(name, found, repr(ours))

    def check_rest(self, known: set[str]) -> None:
        """A FamilyError for the first field that is not known and asks for something."""
        for name in sorted(self.fields.keys() - known):
            value = self.get(name)
            if not (name.startswith("_") or value is None or value is False):
                raise self.other(name, value, "absent")

    def family(self, what: str) -> FamilyError:
        """The error for another kind of model, where we know which."""
        return FamilyError(f"{self.path}: this is {what}; {LOADS}")

    def other(self, name: str, found: object, ours: str) -> FamilyError:
        """The error for a field that makes this another kind of model."""
        return FamilyError(f"{self.path}: {name} is {found!r:.80}, not {ours}; {LOADS}")

    def unreadable(self, name: str, found: object, wanted: str) -> UnreadableError:
        """The error for a field that no model can have so."""
        return UnreadableError(f"{self.path}: {name} must be {wanted}, not {found!r:.80}")


def read_unet_config(file: ConfigFile) -> UNetConfig:
    """`unet/config.json` as our config.

    Raises:
        FamilyError: our UNet cannot be this model.
        UnreadableError, ConfigError: no model can be this.
    """
    file.check_class(CLASSES["unet"])
    in_channels, out_channels = file.whole("in_channels", 4), file.whole("out_channels", 4)
    context_dim = file.whole("cross_attention_dim", 1280)
    if file.get("time_cond_proj_dim"):
        raise file.family("a latent consistency model (LCM)")
    if added := file.get("addition_embed_type"):
        raise file.family(f"Stable Diffusion XL (addition_embed_type {added!r:.80})")
    if in_channels != out_channels and (in_channels, out_channels) not in PIPELINES:
        what = f"a model with {in_channels} input and {out_channels} output channels"
        raise file.family(OTHER_INPUTS.get(in_channels, what))
    file.check_fixed(UNET_FIXED)
    file.check_rest(UNET_READ | UNET_IGNORED | UNET_FIXED.keys())

    sd_v1_down, sd_v1_up = unet_block_types(SD_V1.unet)
    down_types = file.strings("down_block_types", sd_v1_down)
    up_types = file.strings("up_block_types", sd_v1_up)
    model_channels, channel_mult = file.widths((320, 640, 1280, 1280))
    if len(down_types) != len(channel_mult):
        raise file.other("down_block_types", down_types, f"{len(channel_mult)} types of levels")
    linear = file.get("use_linear_projection", False)
    if not isinstance(linear, bool):
        raise file.unreadable("use_linear_projection", linear, "true or false")
    attention = [n for n, name in enumerate(down_types) if name == "CrossAttnDownBlock2D"]
    with said_of(file.path):
        config = UNetConfig(
            in_channels=in_channels,
            out_channels=out_channels,
            model_channels=model_channels,
            channel_mult=channel_mult,
            num_res_blocks=file.whole("layers_per_block", 2),
            attention_levels=tuple(attention),
            **read_heads(file, [model_channels * mult for mult in channel_mult]),
            linear_projections=linear,
            context_dim=context_dim,
            norm_groups=file.whole("norm_num_groups", 32),
        )
    down, up = unet_block_types(config)
    if down_types != down:
        raise file.other("down_block_types", down_types, "CrossAttnDownBlock2D or DownBlock2D")
    if up_types != up:
        raise file.other("up_block_types", up_types, f"{up}, the mirror of the way down")
    return config


def read_heads(file: ConfigFile, widths: Sequence[int]) -> dict[str, int]:
    """The number of heads, which diffusers calls `attention_head_dim`; or, where each level has its
    own, the width that they share.

    Raises: as `read_unet_config`.
    """
    heads = file.get("attention_head_dim", 8)
    if not isinstance(heads, list) or len(heads) <= 1:
        return {"num_heads": file.whole("attention_head_dim", 8)}
    if len(heads) != len(widths) or not all(type(one) is int and one > 0 for one in heads):
        raise file.unreadable("attention_head_dim", heads, f"{len(widths)} whole numbers above 0")
    shared = widths[0] // heads[0]
    if any(number * shared != width for number, width in zip(heads, widths, strict=True)):
        raise file.other("attention_head_dim", heads, "heads of one width, or of one number")
    return {"head_width": shared}


def read_vae_config(file: ConfigFile) -> VAEConfig:
    """`vae/config.json` as our config.

    Raises: as `read_unet_config`.
    """
    file.check_class(CLASSES["vae"])
    file.check_fixed(VAE_FIXED)
    file.check_rest(VAE_READ | VAE_IGNORED | VAE_FIXED.keys())
    in_channels, out_channels = file.whole("in_channels", 3), file.whole("out_channels", 3)
    if out_channels != in_channels:
        raise file.other("out_channels", out_channels, f"{in_channels} as in_channels")
    model_channels, channel_mult = file.widths((64,))
    for name, kind in VAE_BLOCKS.items():
        if (found := file.strings(name, [kind])) != [kind] * len(channel_mult):
            raise file.other(name, found, f"one {kind} per level")
    with said_of(file.path):
        return VAEConfig(
            in_channels=in_channels,
            latent_channels=file.whole("latent_channels", 4),
            model_channels=model_channels,
            channel_mult=channel_mult,
            num_res_blocks=file.whole("layers_per_block", 1),
            norm_groups=file.whole("norm_num_groups", 32),
            scaling_factor=file.real("scaling_factor", 0.18215),
        )


def read_text_config(file: ConfigFile) -> TextConfig:
    """`text_encoder/config.json` as our config.

    Raises: as `read_unet_config`.
    """
    file.check_fixed(TEXT_FIXED)
    activation = file.get("hidden_act", "quick_gelu")
    if activation not in ACTIVATIONS.values():
        raise file.other("hidden_act", activation, " or ".join(map(repr, ACTIVATIONS.values())))
    vocab_size = file.whole("vocab_size", 49408)
    # The official folders say that every CLIP ends with token 2. It never did: the start and the
    # end token are the last of its vocabulary.
    if file.get("eos_token_id") == 2:
        bos_token_id, eos_token_id = vocab_size - 2, vocab_size - 1
    else:
        bos_token_id = file.whole("bos_token_id", 49406)
        eos_token_id = file.whole("eos_token_id", 49407)
    with said_of(file.path):
        return TextConfig(
            vocab_size=vocab_size,
            hidden_size=file.whole("hidden_size", 512),
            num_layers=file.whole("num_hidden_layers", 12),
            num_heads=file.whole("num_attention_heads", 8),
            mlp_size=file.whole("intermediate_size", 2048),
            max_length=file.whole("max_position_embeddings", 77),
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            open_clip=activation == ACTIVATIONS[True],
        )


def read_schedule_config(file: ConfigFile) -> ScheduleConfig:
    """`scheduler/scheduler_config.json`, of whichever scheduler, as our noise schedule.

    Raises: as `read_unet_config`.
    """
    rescaled = file.get("rescale_betas_zero_snr", False)
    if not isinstance(rescaled, bool):
        raise file.unreadable("rescale_betas_zero_snr", rescaled, "true or false")
    if (table := file.fields.get("trained_betas")) is not None:
        return table_schedule(file, table, rescaled)
    if (betas := file.get("beta_schedule", "linear")) != "scaled_linear":
        raise file.other("beta_schedule", betas, "'scaled_linear'")
    with said_of(file.path):
        return ScheduleConfig(
            num_train_timesteps=file.whole("num_train_timesteps", 1000),
            beta_start=file.real("beta_start", 0.0001),
            beta_end=file.real("beta_end", 0.02),
            zero_terminal_snr=rescaled,
        )


def table_schedule(file: ConfigFile, table: object, rescaled: bool) -> ScheduleConfig:
    """`trained_betas`, the noise schedule as a table of its own."""
    if not isinstance(table, list) or not table:
        raise file.unreadable("trained_betas", table, "a list of numbers")
    with said_of(file.path):
        schedule = ScheduleConfig(len(table), table[0], table[-1], tuple(table))
        if not rescaled:
            return schedule
        betas = tuple(ending_in_noise(exact_tables(schedule)[0]).tolist())
        return ScheduleConfig(len(betas), betas[0], betas[-1], betas)


def read_prediction(file: ConfigFile) -> str:
    """What the UNet predicts, by the scheduler's config, as one of `ldm.config.PREDICTIONS`.

    Raises:
        FamilyError: it predicts something else.
    """
    found = file.get("prediction_type", PREDICTION_TYPES["eps"])
    for ours, theirs in PREDICTION_TYPES.items():
        if found == theirs:
            return ours
    raise file.other("prediction_type", found, ", ".join(PREDICTION_TYPES.values()))


def model_config(name: str, files: Mapping[str, ConfigFile]) -> ModelConfig:
    """A whole config of the files that there are ("unet", "vae", "text", "schedule"), and for the
    others Stable Diffusion v1's. It has the name of the official model that all its numbers are.

    Raises: as `read_unet_config`.
    """
    unet = read_unet_config(files["unet"]) if "unet" in files else SD_V1.unet
    vae = read_vae_config(files["vae"]) if "vae" in files else SD_V1.vae
    text = read_text_config(files["text"]) if "text" in files else SD_V1.text
    config = ModelConfig(SD_V1.name, SD_V1.image_size, unet, vae, text)
    if "schedule" in files:
        file = files["schedule"]
        schedule, prediction = read_schedule_config(file), read_prediction(file)
        with said_of(file.path):
            config = dataclasses.replace(config, schedule=schedule, prediction=prediction)
    if "unet" in files and files["unet"].get("sample_size") is not None:
        with said_of(files["unet"].path):
            image_size = files["unet"].whole("sample_size", 64) * vae.factor
            config = dataclasses.replace(config, image_size=image_size)
    known = (dataclasses.replace(config, name=one.name) for one in OFFICIAL)
    own = dataclasses.replace(config, name=name)
    return next((one for one in known if one in OFFICIAL), own)


def unet_block_types(config: UNetConfig) -> tuple[list[str], list[str]]:
    """diffusers' classes of the levels in the order in which they run: on the way down, and up."""
    levels = range(len(config.channel_mult))
    cross = ["CrossAttn" if level in config.attention_levels else "" for level in levels]
    down = [f"{attention}DownBlock2D" for attention in cross]
    return down, [f"{attention}UpBlock2D" for attention in reversed(cross)]


# --- Whole folders ---------------------------------------------------------------------------


def folder_config(archive: Archive) -> ModelConfig:
    """The config of a diffusers folder, by the files in it.

    Raises:
        MissingPartsError: no part is there, or a part without its config.
        FamilyError: it is another kind of model.
        UnreadableError, ConfigError: no model can be this.
    """
    stages = part_stages(archive)
    if not stages:
        told = ", ".join(f"{part}/{names[0]}" for part, names in PARTS.items())
        raise MissingPartsError(f"{archive.path} holds no model: it has none of {told}")
    files = {stage: part_config(archive, part) for part, stage in stages.items()}
    for name in {SCHEDULER, SCHEDULER_BESIDE} & archive.documents.keys():
        files["schedule"] = config_file(archive, name)
    return model_config(printable(archive.path.resolve().name, NAME), files)


def part_stages(archive: Archive) -> dict[str, str]:
    """Which stage each part of a diffusers folder is. One that was opened alone has no name: its
    config says what it is.

    Raises:
        FamilyError: the folder says that it is another kind of model.
    """
    if INDEX in archive.documents:
        index = config_file(archive, INDEX)
        if index.fields.get("unet") != ["diffusers", CLASSES["unet"]]:
            raise index.family(f"diffusers' {index.fields.get('_class_name')!r:.80}")
    stages = {part: stage for stage, part in PART_OF.items()}
    if CONFIG in archive.documents:
        stages = {"": own_stage(config_file(archive, CONFIG))}
    return {part: stages[part] for part in archive.parts}


def own_stage(file: ConfigFile) -> str:
    """The stage that a part is, by its own config.

    Raises:
        FamilyError: no Stable Diffusion v1 has this part.
    """
    if file.fields.get("model_type") == TEXT_FIXED["model_type"]:
        return "text"
    for stage, name in CLASSES.items():
        if file.fields.get("_class_name") == name:
            return stage
    raise file.family(f"diffusers' {file.fields.get('_class_name')!r:.80}")


def part_config(archive: Archive, part: str) -> ConfigFile:
    """The config file of a part, or a MissingPartsError."""
    name = f"{part}/{CONFIG}" if part else CONFIG
    if name not in archive.documents:
        raise MissingPartsError(f"{archive.path / name} is missing: the weights beside it need it")
    return config_file(archive, name)


def config_file(archive: Archive, name: str) -> ConfigFile:
    """One of the JSON files of a folder."""
    return ConfigFile(archive.path / name, archive.documents[name])
