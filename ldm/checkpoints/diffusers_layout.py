"""A diffusers folder: the same model in other files, under other names.

    model_index.json                              which class reads which folder
    unet/          config.json, diffusion_pytorch_model.safetensors
    vae/           config.json, diffusion_pytorch_model.safetensors
    text_encoder/  config.json, model.safetensors
    tokenizer/     vocab.json, merges.txt, tokenizer_config.json, special_tokens_map.json
    scheduler/     scheduler_config.json

Its layers are ours, renamed: the tables below do that, unrolled along the config as those of the
official names are. Its config files say more than ours, since diffusers' classes can be many other
models: a field that our classes have no number for must hold what Stable Diffusion v1 has there.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.checkpoints.archive import Archive, Entry, open_archive
from ldm.config import SD_V1, ModelConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from ldm.errors import FamilyError, MissingPartsError, UnreadableError
from ldm.files import folder_written_whole, write_text, written_whole
from ldm.checkpoints.keys import POSITION_IDS, PREFIXES, TRANSFORMER, under, unet_names, vae_names
from ldm.checkpoints.recognise import OTHER_INPUTS
from ldm.text import CLIPTextEncoder
from ldm.tokenizer import BOS, EOS, Tokenizer
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

# Where each stage lies in a folder, and what its weights are called there.
FOLDERS = {"unet": "unet", "vae": "vae", "text": "text_encoder"}
WEIGHTS = {
    "unet": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "vae": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "text": ("model.safetensors", "pytorch_model.bin"),
}
# What the config files that we write are written for.
DIFFUSERS_VERSION = "0.34.0"
LOADS = "ldm loads Stable Diffusion v1 models"

# --- Names -----------------------------------------------------------------------------------

VAE_RES_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
}
RES_BLOCK = VAE_RES_BLOCK | {"time_proj": "time_emb_proj"}
VAE_ATTENTION = {
    "norm": "group_norm",
    "to_q": "to_q",
    "to_k": "to_k",
    "to_v": "to_v",
    "to_out": "to_out.0",
}
OLD_VAE_ATTENTION = {  # early versions of diffusers had a class of its own for it
    "norm": "group_norm",
    "to_q": "query",
    "to_k": "key",
    "to_v": "value",
    "to_out": "proj_attn",
}
TEXT_PREFIXES = ("", "text_model.")  # of transformers 5, and of transformers 4
TEXT_EMBEDDINGS = ("embeddings.token_embedding", "embeddings.position_embedding")
TEXT_BLOCK = (
    "layer_norm1",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "layer_norm2",
    "mlp.fc1",
    "mlp.fc2",
)


def diffusers_unet_names(config: UNetConfig) -> dict[str, str]:
    """Our layer -> diffusers' layer, for every layer that a UNet of this config can have.

    diffusers counts levels in the order in which they run, so its way up starts at the smallest.
    Inside a spatial transformer its names are the official ones.
    """
    last = len(config.channel_mult) - 1
    names = {
        "time_embedding.linear1": "time_embedding.linear_1",
        "time_embedding.linear2": "time_embedding.linear_2",
        "conv_in": "conv_in",
    }
    for level in range(last + 1):
        for block in range(config.num_res_blocks):
            ours, theirs = f"down.{level}.blocks.{block}", f"down_blocks.{level}"
            names |= under(f"{ours}.res", f"{theirs}.resnets.{block}", RES_BLOCK)
            names |= under(f"{ours}.transformer", f"{theirs}.attentions.{block}", TRANSFORMER)
        if level < last:
            names[f"down.{level}.downsample.conv"] = f"down_blocks.{level}.downsamplers.0.conv"

    names |= under("mid.res1", "mid_block.resnets.0", RES_BLOCK)
    names |= under("mid.transformer", "mid_block.attentions.0", TRANSFORMER)
    names |= under("mid.res2", "mid_block.resnets.1", RES_BLOCK)

    for level in range(last + 1):
        for block in range(config.num_res_blocks + 1):
            ours, theirs = f"up.{level}.blocks.{block}", f"up_blocks.{last - level}"
            names |= under(f"{ours}.res", f"{theirs}.resnets.{block}", RES_BLOCK)
            names |= under(f"{ours}.transformer", f"{theirs}.attentions.{block}", TRANSFORMER)
        names[f"up.{level}.upsample.conv"] = f"up_blocks.{last - level}.upsamplers.0.conv"

    return names | {"norm_out": "conv_norm_out", "conv_out": "conv_out"}


def diffusers_vae_names(
    config: VAEConfig, attention: Mapping[str, str] = VAE_ATTENTION
) -> dict[str, str]:
    """Our layer -> diffusers' layer, for every layer that an autoencoder of this config can have.

    `attention` names the attention in the middle: as today, or `OLD_VAE_ATTENTION`.
    """
    last = len(config.channel_mult) - 1
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side, ups, extra in (("encoder", "down", 0), ("decoder", "up", 1)):
        names |= {
            f"{side}.conv_in": f"{side}.conv_in",
            f"{side}.norm_out": f"{side}.conv_norm_out",
            f"{side}.conv_out": f"{side}.conv_out",
        }
        names |= under(f"{side}.mid.res1", f"{side}.mid_block.resnets.0", VAE_RES_BLOCK)
        names |= under(f"{side}.mid.attention", f"{side}.mid_block.attentions.0", attention)
        names |= under(f"{side}.mid.res2", f"{side}.mid_block.resnets.1", VAE_RES_BLOCK)
        for level in range(last + 1):
            place = level if ups == "down" else last - level
            ours, theirs = f"{side}.{ups}.{level}", f"{side}.{ups}_blocks.{place}"
            for block in range(config.num_res_blocks + extra):
                names |= under(f"{ours}.blocks.{block}", f"{theirs}.resnets.{block}", VAE_RES_BLOCK)
            names[f"{ours}.{ups}sample.conv"] = f"{theirs}.{ups}samplers.0.conv"
    return names


def text_layers(config: TextConfig) -> list[str]:
    """The layers of the text encoder, as transformers and the official file both call them."""
    layers = [*TEXT_EMBEDDINGS, "final_layer_norm"]
    for n in range(config.num_layers):
        layers += [f"encoder.layers.{n}.{layer}" for layer in TEXT_BLOCK]
    return layers


def diffusers_names(model: nn.Module) -> dict[str, str]:
    """Our parameter key -> the key in a diffusers folder, for one stage: a bijection.

    Args:
        model: a UNet, an AutoencoderKL or a CLIPTextEncoder, on any device (meta is enough).
    """
    if isinstance(model, CLIPTextEncoder):  # with transformers 4's prefix: every version reads it
        return {k: "text_model." + k.removeprefix("transformer.") for k in model.state_dict()}
    if isinstance(model, UNet):
        names = diffusers_unet_names(model.config)
    elif isinstance(model, AutoencoderKL):
        names = diffusers_vae_names(model.config)
    else:
        raise TypeError(f"no diffusers names for {type(model).__name__}")
    layers_and_kinds = {key: key.rsplit(".", 1) for key in model.state_dict()}
    return {key: f"{names[layer]}.{kind}" for key, (layer, kind) in layers_and_kinds.items()}


def official_keys(stage: str, config: ModelConfig) -> dict[str, str]:
    """Every key that a diffusers folder may hold for a stage -> the official key.

    Several keys can mean one parameter: the autoencoder's attention has new names and old ones,
    and the text encoder's keys come with a prefix and without.
    """
    if stage == "unet":
        official = unet_names(config.unet)
        variants = [diffusers_unet_names(config.unet)]
    elif stage == "vae":
        official = vae_names(config.vae)
        tables = (VAE_ATTENTION, OLD_VAE_ATTENTION)
        variants = [diffusers_vae_names(config.vae, table) for table in tables]
    else:
        official = {layer: layer for layer in text_layers(config.text)}
        variants = [{layer: prefix + layer for layer in official} for prefix in TEXT_PREFIXES]
    keys = {
        f"{theirs}.{kind}": f"{PREFIXES[stage]}{official[ours]}.{kind}"
        for names in variants
        for ours, theirs in names.items()
        for kind in ("weight", "bias")
    }
    if stage == "text":
        keys |= {f"{prefix}embeddings.position_ids": POSITION_IDS for prefix in TEXT_PREFIXES}
    return keys


# --- Reading configs -------------------------------------------------------------------------

# A damaged number must not make us unroll names for hours.
MOST_LAYERS = 100
LARGEST = 2**20

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
TEXT_FIXED = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "model_type": "clip_text_model"}
SCHEDULE_FIXED = {
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "trained_betas": None,
}

VAE_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}


@dataclass(frozen=True)
class ConfigFile:
    """One JSON file of a folder, and the questions that we ask it.

    What no model can have is an UnreadableError; what another kind of model has, a FamilyError.
    """

    path: Path
    fields: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> ConfigFile:
        """Read the file, or raise an UnreadableError if it holds no JSON object."""
        try:
            fields = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise UnreadableError(f"{path} is not readable JSON: {error}") from error
        if not isinstance(fields, dict):
            raise UnreadableError(f"{path} is not a config: it holds no JSON object")
        return cls(path, fields)

    def get(self, name: str, default: object = None) -> Any:
        """A field; a list with one value per level is that value, if all levels have the same."""
        value = self.fields.get(name, default)
        if isinstance(value, list) and value and all(one == value[0] for one in value):
            return value[0]
        return value

    def whole(self, name: str, default: int, most: int = LARGEST) -> int:
        """A field that is a whole number from 1 to `most`."""
        value = self.get(name, default)
        if isinstance(value, list) and len(value) > 1:
            raise self.other(name, value, "one number")
        if type(value) is not int or not 1 <= value <= most:
            raise self.unreadable(name, value, f"a whole number from 1 to {most}")
        return value

    def positive(self, name: str, default: float) -> float:
        """A field that is a positive number."""
        value = self.get(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.unreadable(name, value, "a positive number")
        return float(value)

    def widths(self, default: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """`block_out_channels`: the width of the first level, and each level's multiple of it."""
        widths = self.fields.get("block_out_channels", list(default))
        listed = isinstance(widths, list) and 1 <= len(widths) <= MOST_LAYERS
        if not listed or not all(type(w) is int and 1 <= w <= LARGEST for w in widths):
            raise self.unreadable("block_out_channels", widths, "a list of whole numbers")
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
        UnreadableError: no model can be this.
    """
    file.check_class(CLASSES["unet"])
    in_channels, out_channels = file.whole("in_channels", 4), file.whole("out_channels", 4)
    context_dim = file.whole("cross_attention_dim", 1280)
    if added := file.get("addition_embed_type"):
        raise file.family(f"Stable Diffusion XL (addition_embed_type {added!r:.80})")
    if in_channels != out_channels:
        what = f"a model with {in_channels} input and {out_channels} output channels"
        raise file.family(OTHER_INPUTS.get(in_channels, what))
    if context_dim == 1024 or file.get("use_linear_projection"):
        raise file.family(f"Stable Diffusion 2 (cross_attention_dim {context_dim})")
    file.check_fixed(UNET_FIXED)
    file.check_rest(UNET_READ | UNET_IGNORED | UNET_FIXED.keys())

    sd_v1_down, sd_v1_up = unet_block_types(SD_V1.unet)
    down_types = file.strings("down_block_types", sd_v1_down)
    up_types = file.strings("up_block_types", sd_v1_up)
    model_channels, channel_mult = file.widths((320, 640, 1280, 1280))
    config = UNetConfig(
        in_channels=in_channels,
        out_channels=out_channels,
        model_channels=model_channels,
        channel_mult=channel_mult,
        num_res_blocks=file.whole("layers_per_block", 2, MOST_LAYERS),
        attention_levels=tuple(
            level for level, name in enumerate(down_types) if name == "CrossAttnDownBlock2D"
        ),
        num_heads=file.whole("attention_head_dim", 8),  # so diffusers calls the number of heads
        context_dim=context_dim,
        norm_groups=file.whole("norm_num_groups", 32),
    )
    down, up = unet_block_types(config)
    if down_types != down:
        raise file.other("down_block_types", down_types, "CrossAttnDownBlock2D or DownBlock2D")
    if up_types != up:
        raise file.other("up_block_types", up_types, f"{up}, the mirror of the way down")
    return config


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
    return VAEConfig(
        in_channels=in_channels,
        latent_channels=file.whole("latent_channels", 4),
        model_channels=model_channels,
        channel_mult=channel_mult,
        num_res_blocks=file.whole("layers_per_block", 1, MOST_LAYERS),
        norm_groups=file.whole("norm_num_groups", 32),
        scaling_factor=file.positive("scaling_factor", 0.18215),
    )


def read_text_config(file: ConfigFile) -> TextConfig:
    """`text_encoder/config.json` as our config.

    Raises: as `read_unet_config`.
    """
    file.check_fixed(TEXT_FIXED)
    vocab_size = file.whole("vocab_size", 49408)
    # The official folders say that every CLIP ends with token 2. It never did: the start and the
    # end token are the last of its vocabulary.
    if file.get("eos_token_id") == 2:
        bos_token_id, eos_token_id = vocab_size - 2, vocab_size - 1
    else:
        bos_token_id = file.whole("bos_token_id", 49406)
        eos_token_id = file.whole("eos_token_id", 49407)
    return TextConfig(
        vocab_size=vocab_size,
        hidden_size=file.whole("hidden_size", 512),
        num_layers=file.whole("num_hidden_layers", 12, MOST_LAYERS),
        num_heads=file.whole("num_attention_heads", 8),
        mlp_size=file.whole("intermediate_size", 2048),
        max_length=file.whole("max_position_embeddings", 77),
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
    )


def read_schedule_config(file: ConfigFile) -> ScheduleConfig:
    """`scheduler/scheduler_config.json`, of whichever scheduler, as our noise schedule.

    Raises: as `read_unet_config`.
    """
    if (kind := file.get("prediction_type", "epsilon")) == "v_prediction":
        raise file.family(f"a model that predicts v, as Stable Diffusion 2 does ({kind})")
    file.check_fixed(SCHEDULE_FIXED)
    if (betas := file.get("beta_schedule", "linear")) != "scaled_linear":
        raise file.other("beta_schedule", betas, "'scaled_linear'")
    return ScheduleConfig(
        num_train_timesteps=file.whole("num_train_timesteps", 1000),
        beta_start=file.positive("beta_start", 0.0001),
        beta_end=file.positive("beta_end", 0.02),
    )


def model_config(name: str, files: Mapping[str, ConfigFile]) -> ModelConfig:
    """A whole config of the files that there are ("unet", "vae", "text", "schedule"), and for the
    others Stable Diffusion v1's. It has that name too where all its numbers are.

    Raises: as `read_unet_config`.
    """
    unet = read_unet_config(files["unet"]) if "unet" in files else SD_V1.unet
    vae = read_vae_config(files["vae"]) if "vae" in files else SD_V1.vae
    text = read_text_config(files["text"]) if "text" in files else SD_V1.text
    schedule = read_schedule_config(files["schedule"]) if "schedule" in files else SD_V1.schedule
    image_size = SD_V1.image_size
    if "unet" in files and files["unet"].get("sample_size") is not None:
        image_size = files["unet"].whole("sample_size", 64) * vae.factor
    config = ModelConfig(SD_V1.name, image_size, unet, vae, text, schedule)
    return config if config == SD_V1 else dataclasses.replace(config, name=name)


# --- Reading folders -------------------------------------------------------------------------


def read_folder(folder: str | Path) -> tuple[Archive, ModelConfig]:
    """What a diffusers folder holds: its tensors by their official keys, and its config.

    A part may be missing, but not all of them; the folder may also be one part itself (a lone
    autoencoder, say). Of several files with the same weights, safetensors come before pickles, and
    the fp16 variant is read only where there is no other: the archive's metadata says, for each
    stage, which file it was. A key that has no official one keeps its own, below its part's name:
    `unet/lora.weight`. No tensor is read yet.

    Raises:
        MissingPartsError: no part is there, or a part without its config or one of its files.
        FamilyError: it is another kind of model.
        UnreadableError: a file is damaged.
    """
    folder = Path(folder)
    parts = find_parts(folder)
    if not parts:
        told = ", ".join(f"{FOLDERS[stage]}/{names[0]}" for stage, names in WEIGHTS.items())
        raise MissingPartsError(f"{folder} holds no model: it has none of {told}")

    files = {stage: ConfigFile.read(part.with_name("config.json")) for stage, part in parts.items()}
    if (scheduler := folder / "scheduler" / "scheduler_config.json").is_file():
        files["schedule"] = ConfigFile.read(scheduler)
    config = model_config(folder.resolve().name, files)

    entries: dict[str, Entry] = {}
    stubs: dict[str, None] = {}  # in order, each once
    for stage, weights in parts.items():
        official = official_keys(stage, config)
        for archive in open_files(weights):
            stubs |= dict.fromkeys(archive.stubs)
            for theirs, entry in archive.entries.items():
                key = official.get(theirs)
                if key is None or key in entries:  # both the old and the new name: one is too many
                    entries[f"{FOLDERS[stage]}/{theirs}"] = entry
                else:
                    entries[key] = entry
    chosen = {stage: str(weights.relative_to(folder)) for stage, weights in parts.items()}
    return Archive(folder, "diffusers folder", entries, chosen, tuple(stubs)), config


def is_diffusers_folder(path: str | Path) -> bool:
    """Whether this is a diffusers folder, or one part of it, by what lies in it; it may lack most.

    Raises:
        FamilyError: it is a part that no Stable Diffusion v1 has.
    """
    folder = Path(path)
    return (
        (folder / "model_index.json").is_file()
        or any((folder / name / "config.json").is_file() for name in FOLDERS.values())
        or any(find_weights(stage, folder / name) for stage, name in FOLDERS.items())
        or own_stage(folder) is not None
    )


def find_parts(folder: Path) -> dict[str, Path]:
    """Stage -> its file of weights (or the index of several), for the stages that a folder has.

    Raises:
        MissingPartsError: there are weights without their config.
        FamilyError: the folder says that it is another kind of model.
    """
    if (index := folder / "model_index.json").is_file():
        file = ConfigFile.read(index)
        if file.fields.get("unet") != ["diffusers", CLASSES["unet"]]:
            raise file.family(f"diffusers' {file.fields.get('_class_name')!r:.80}")
    stage = own_stage(folder)
    places = {stage: folder} if stage else {s: folder / name for s, name in FOLDERS.items()}
    found = {stage: find_weights(stage, place) for stage, place in places.items()}
    parts = {stage: weights for stage, weights in found.items() if weights is not None}
    for weights in parts.values():
        if not (config := weights.with_name("config.json")).is_file():
            raise MissingPartsError(f"{config} is missing: the weights beside it need it")
    return parts


def own_stage(folder: Path) -> str | None:
    """The stage that a folder is itself, by its own config; None where it has no such config."""
    if not (folder / "config.json").is_file():
        return None
    file = ConfigFile.read(folder / "config.json")
    if file.fields.get("model_type") == TEXT_FIXED["model_type"]:
        return "text"
    for stage, name in CLASSES.items():
        if file.fields.get("_class_name") == name:
            return stage
    if "_class_name" in file.fields:
        raise file.family(f"diffusers' {file.fields['_class_name']!r:.80}")
    return None


def find_weights(stage: str, folder: Path) -> Path | None:
    """The file with a stage's weights, or the index of several such files, or None."""
    for variant in ("", ".fp16"):
        for name in WEIGHTS[stage]:
            stem, _, kind = name.rpartition(".")
            single = f"{stem}{variant}.{kind}"
            # diffusers has changed its mind about the place of the variant in an index's name.
            for candidate in (single, f"{name}.index{variant}.json", f"{name}{variant}.index.json"):
                if (folder / candidate).is_file():
                    return folder / candidate
    return None


def open_files(path: Path) -> list[Archive]:
    """The archives of a file of weights, or of all files that an index names.

    Raises:
        MissingPartsError: a file that the index names is not there.
        UnreadableError: the index is damaged, or the files do not hold what it says.
    """
    if path.suffix != ".json":
        return [open_archive(path)]
    index = ConfigFile.read(path)
    where = index.fields.get("weight_map")
    if not isinstance(where, dict) or not where or not all(map(is_file_name, where.values())):
        raise index.unreadable("weight_map", where, "an object that gives each key's file")
    names = sorted(set(where.values()))
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        raise MissingPartsError(f"{path.parent / missing[0]} is missing: {path.name} names it")
    archives = [open_archive(path.parent / name) for name in names]
    found = Counter(key for archive in archives for key in archive.entries)
    if odd := sorted(k for k in found.keys() | where.keys() if found[k] != 1 or k not in where):
        raise UnreadableError(f"{path} and its files do not agree about the key {odd[0]!r:.80}")
    return archives


def is_file_name(name: object) -> bool:
    """Whether this names a file beside us: an index must not lead out of its folder."""
    plain = isinstance(name, str) and name.isascii() and name.isprintable() and len(name) < 256
    return plain and Path(str(name)).name == name


# --- Writing folders -------------------------------------------------------------------------


def save_folder(
    path: str | Path,
    *,
    unet: UNet,
    vae: AutoencoderKL,
    text: CLIPTextEncoder,
    config: ModelConfig,
    tokenizer: Tokenizer,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a whole model as a folder that `diffusers.StableDiffusionPipeline` reads.

    The parameters in their own dtype, or in `dtype`; the same model always gives the same bytes.
    The scheduler is diffusers' DDIM with the settings that make it our `ddim`. The folder appears
    whole or not at all.

    Raises:
        ValueError: there is something at `path` already, nothing can be written there, or the
            stages or the tokenizer are another model's.
        FamilyError: diffusers' config files cannot say this config.
    """
    path = Path(path)
    if (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id) != (
        config.text.vocab_size,
        config.text.bos_token_id,
        config.text.eos_token_id,
    ):
        raise ValueError(f"the tokenizer is not the one of the model {config.name!r}")
    if (unet.config, vae.config, text.config) != (config.unet, config.vae, config.text):
        raise ValueError(f"the stages were not built from the config {config.name!r}")
    files = config_files(config)
    with folder_written_whole(path) as temporary:
        for name, fields in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            write_text(temporary / name, json.dumps(fields, indent=2, sort_keys=True) + "\n")
        tokenizer.save(temporary / "tokenizer")
        models: dict[str, nn.Module] = {"unet": unet, "vae": vae, "text": text}
        for stage, model in models.items():
            tensors = diffusers_tensors(model, dtype)
            # diffusers asks for this entry; a single one has no order that could change.
            target = temporary / FOLDERS[stage] / WEIGHTS[stage][0]
            with written_whole(target) as whole:
                save_file(tensors, whole, metadata={"format": "pt"})


def diffusers_tensors(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The parameters of a stage by diffusers' names, on the CPU; None keeps their dtype."""
    state = model.state_dict()
    tensors = {}
    for ours, theirs in diffusers_names(model).items():
        tensor = state[ours].to(device="cpu", dtype=dtype)
        if ".mid.attention.to_" in ours and tensor.ndim == 4:  # the autoencoder's, a matrix there
            tensor = tensor.flatten(1)  # (C, C)
        tensors[theirs] = tensor.contiguous()
    return tensors


def unet_block_types(config: UNetConfig) -> tuple[list[str], list[str]]:
    """diffusers' classes of the levels in the order in which they run: on the way down, and up."""
    levels = range(len(config.channel_mult))
    cross = ["CrossAttn" if level in config.attention_levels else "" for level in levels]
    down = [f"{attention}DownBlock2D" for attention in cross]
    return down, [f"{attention}UpBlock2D" for attention in reversed(cross)]


def config_files(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The JSON files of a folder: name -> fields.

    Raises:
        FamilyError: diffusers' config files cannot say this config.
    """
    unet, vae, text, schedule = config.unet, config.vae, config.text, config.schedule
    down_types, up_types = unet_block_types(unet)
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS}
    files: dict[str, dict[str, Any]] = {
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": DIFFUSERS_VERSION,
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", CLASSES["unet"]],
            "vae": ["diffusers", CLASSES["vae"]],
        },
        "unet/config.json": {
            "_class_name": CLASSES["unet"],
            "_diffusers_version": DIFFUSERS_VERSION,
            "act_fn": "silu",
            "attention_head_dim": unet.num_heads,
            "block_out_channels": [unet.model_channels * mult for mult in unet.channel_mult],
            "cross_attention_dim": unet.context_dim,
            "down_block_types": down_types,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "in_channels": unet.in_channels,
            "layers_per_block": unet.num_res_blocks,
            "norm_eps": 1e-5,
            "norm_num_groups": unet.norm_groups,
            "out_channels": unet.out_channels,
            "sample_size": config.image_size // vae.factor,
            "up_block_types": up_types,
        },
        "vae/config.json": {
            "_class_name": CLASSES["vae"],
            "_diffusers_version": DIFFUSERS_VERSION,
            "act_fn": "silu",
            "block_out_channels": [vae.model_channels * mult for mult in vae.channel_mult],
            "in_channels": vae.in_channels,
            "latent_channels": vae.latent_channels,
            "layers_per_block": vae.num_res_blocks,
            "norm_num_groups": vae.norm_groups,
            "out_channels": vae.in_channels,
            "sample_size": config.image_size,
            "scaling_factor": vae.scaling_factor,
        }
        | {name: [kind] * len(vae.channel_mult) for name, kind in VAE_BLOCKS.items()},
        "text_encoder/config.json": {
            "architectures": ["CLIPTextModel"],
            "bos_token_id": text.bos_token_id,
            "eos_token_id": text.eos_token_id,
            "hidden_act": "quick_gelu",
            "hidden_size": text.hidden_size,
            "intermediate_size": text.mlp_size,
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": text.max_length,
            "model_type": "clip_text_model",
            "num_attention_heads": text.num_heads,
            "num_hidden_layers": text.num_layers,
            "pad_token_id": text.eos_token_id,
            "projection_dim": text.hidden_size,
            "vocab_size": text.vocab_size,
        },
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler",
            "_diffusers_version": DIFFUSERS_VERSION,
            "beta_end": schedule.beta_end,
            "beta_schedule": "scaled_linear",
            "beta_start": schedule.beta_start,
            "clip_sample": False,
            "num_train_timesteps": schedule.num_train_timesteps,
            "prediction_type": "epsilon",
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "timestep_spacing": "leading",
        },
        "tokenizer/tokenizer_config.json": special
        | {"model_max_length": text.max_length, "tokenizer_class": "CLIPTokenizer"},
        "tokenizer/special_tokens_map.json": special,
    }
    # What was written is read back, so that no folder can say another model than it holds.
    names = {stage: f"{folder}/config.json" for stage, folder in FOLDERS.items()}
    names["schedule"] = "scheduler/scheduler_config.json"
    again = model_config(config.name, {s: ConfigFile(Path(n), files[n]) for s, n in names.items()})
    if dataclasses.replace(again, name=config.name) != config:
        raise FamilyError(f"diffusers' config files cannot say the config {config.name!r}")
    return files
