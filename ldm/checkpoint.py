"""Weights on disk: one safetensors file in the official Stable Diffusion v1 layout.

Our modules have names that teach (`down.1.blocks.0.res.conv1`); the official file has its own
(`input_blocks.4.0.in_layers.2`). The two differ by names alone: nothing is fused, split or
reshaped. The tables below, unrolled along the config, rename one into the other and back, for
Stable Diffusion v1 and for Horizon alike. Loading is strict: every key is used, or the error says
which one was not.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.config import (
    SD_V1,
    ModelConfig,
    ScheduleConfig,
    TextConfig,
    UNetConfig,
    VAEConfig,
)
from ldm.device import check_device, check_dtype
from ldm.files import written_whole
from ldm.schedule import exact_tables
from ldm.text import CLIPTextEncoder
from ldm.tokenizer import Tokenizer
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text": "cond_stage_model.transformer.text_model.",
}
POSITION_IDS = PREFIXES["text"] + "embeddings.position_ids"


class CheckpointError(ValueError):
    """A file that cannot be loaded. Each message is one line that says what is wrong."""


class UnreadableError(CheckpointError):
    """Not a safetensors file, or not a whole one."""


class KeysError(CheckpointError):
    """Keys are missing, unexpected, or of the wrong shape."""


# --- The key map -----------------------------------------------------------------------------

RES_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
TRANSFORMER = {
    "norm_in": "norm",
    "proj_in": "proj_in",
    "norm1": "transformer_blocks.0.norm1",
    "self_attention.to_q": "transformer_blocks.0.attn1.to_q",
    "self_attention.to_k": "transformer_blocks.0.attn1.to_k",
    "self_attention.to_v": "transformer_blocks.0.attn1.to_v",
    "self_attention.to_out": "transformer_blocks.0.attn1.to_out.0",
    "norm2": "transformer_blocks.0.norm2",
    "cross_attention.to_q": "transformer_blocks.0.attn2.to_q",
    "cross_attention.to_k": "transformer_blocks.0.attn2.to_k",
    "cross_attention.to_v": "transformer_blocks.0.attn2.to_v",
    "cross_attention.to_out": "transformer_blocks.0.attn2.to_out.0",
    "norm3": "transformer_blocks.0.norm3",
    "feed_forward.proj_in": "transformer_blocks.0.ff.net.0.proj",
    "feed_forward.proj_out": "transformer_blocks.0.ff.net.2",
    "proj_out": "proj_out",
}
VAE_RES_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "nin_shortcut",
}
VAE_MIDDLE = (
    {f"res1.{ours}": f"block_1.{theirs}" for ours, theirs in VAE_RES_BLOCK.items()}
    | {"attention.norm": "attn_1.norm", "attention.to_q": "attn_1.q", "attention.to_k": "attn_1.k"}
    | {"attention.to_v": "attn_1.v", "attention.to_out": "attn_1.proj_out"}
    | {f"res2.{ours}": f"block_2.{theirs}" for ours, theirs in VAE_RES_BLOCK.items()}
)


def under(ours: str, theirs: str, table: Mapping[str, str]) -> dict[str, str]:
    """A table of names, moved under a prefix on either side."""
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in table.items()}


def unet_names(config: UNetConfig) -> dict[str, str]:
    """Our layer -> the official layer, for every layer that a UNet of this config can have.

    The official layout counts all blocks in one row, down- and upsampling included.
    """
    num_levels = len(config.channel_mult)
    names = {
        "time_embedding.linear1": "time_embed.0",
        "time_embedding.linear2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
    }
    n = 1
    for level in range(num_levels):
        for block in range(config.num_res_blocks):
            ours, theirs = f"down.{level}.blocks.{block}", f"input_blocks.{n}"
            names |= under(f"{ours}.res", f"{theirs}.0", RES_BLOCK)
            names |= under(f"{ours}.transformer", f"{theirs}.1", TRANSFORMER)
            n += 1
        if level < num_levels - 1:
            names[f"down.{level}.downsample.conv"] = f"input_blocks.{n}.0.op"
            n += 1

    names |= under("mid.res1", "middle_block.0", RES_BLOCK)
    names |= under("mid.transformer", "middle_block.1", TRANSFORMER)
    names |= under("mid.res2", "middle_block.2", RES_BLOCK)

    n = 0
    for level in reversed(range(num_levels)):
        for block in range(config.num_res_blocks + 1):
            ours, theirs = f"up.{level}.blocks.{block}", f"output_blocks.{n}"
            names |= under(f"{ours}.res", f"{theirs}.0", RES_BLOCK)
            names |= under(f"{ours}.transformer", f"{theirs}.1", TRANSFORMER)
            n += 1
        # The upsampling stands in the last block of its level, after the transformer if any.
        place = 2 if level in config.attention_levels else 1
        names[f"up.{level}.upsample.conv"] = f"output_blocks.{n - 1}.{place}.conv"

    return names | {"norm_out": "out.0", "conv_out": "out.2"}


def vae_names(config: VAEConfig) -> dict[str, str]:
    """Our layer -> the official layer, for every layer that an autoencoder can have."""
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side, ups, extra in (("encoder", "down", 0), ("decoder", "up", 1)):
        names |= {
            f"{side}.{name}": f"{side}.{name}" for name in ("conv_in", "norm_out", "conv_out")
        }
        names |= under(f"{side}.mid", f"{side}.mid", VAE_MIDDLE)
        for level in range(len(config.channel_mult)):
            for block in range(config.num_res_blocks + extra):
                names |= under(
                    f"{side}.{ups}.{level}.blocks.{block}",
                    f"{side}.{ups}.{level}.block.{block}",
                    VAE_RES_BLOCK,
                )
            resample = f"{side}.{ups}.{level}.{ups}sample.conv"
            names[resample] = resample
    return names


def key_map(model: nn.Module) -> dict[str, str]:
    """Our parameter key -> the official key, for one stage: a bijection.

    Args:
        model: a UNet, an AutoencoderKL or a CLIPTextEncoder, on any device (meta is enough).
    """
    if isinstance(model, CLIPTextEncoder):  # the official file holds transformers' own names
        return {k: PREFIXES["text"] + k.removeprefix("transformer.") for k in model.state_dict()}
    if isinstance(model, UNet):
        prefix, names = PREFIXES["unet"], unet_names(model.config)
    elif isinstance(model, AutoencoderKL):
        prefix, names = PREFIXES["vae"], vae_names(model.config)
    else:
        raise TypeError(f"no key map for {type(model).__name__}")
    layers_and_kinds = {key: key.rsplit(".", 1) for key in model.state_dict()}
    return {key: f"{prefix}{names[a]}.{kind}" for key, (a, kind) in layers_and_kinds.items()}


def schedule_entries(config: ScheduleConfig) -> dict[str, Tensor]:
    """The 12 tables that official files carry beside the parameters, (T,) float32 each.

    They all follow from the betas (DDPM eq. 4 and 7), so they are ignored when a file is read.
    As in the official files, everything is computed in float64 and cast once.
    """
    betas, alpha_bar = exact_tables(config)
    alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    variance = betas * (1 - alpha_bar_prev) / (1 - alpha_bar)
    tables = {
        "betas": betas,
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": alpha_bar_prev,
        "sqrt_alphas_cumprod": alpha_bar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alpha_bar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alpha_bar).log(),
        "sqrt_recip_alphas_cumprod": (1 / alpha_bar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alpha_bar - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * alpha_bar_prev.sqrt() / (1 - alpha_bar),
        "posterior_mean_coef2": (1 - alpha_bar_prev) * (1 - betas).sqrt() / (1 - alpha_bar),
    }
    return {name: table.float() for name, table in tables.items()}


# --- Reading ---------------------------------------------------------------------------------


def load_unet(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: ModelConfig | None = None,
) -> UNet:
    """The UNet of a checkpoint, alone. See `load_stages` for arguments and errors."""
    (unet,) = load_stages(path, ("unet",), device=device, dtype=dtype, config=config)
    assert isinstance(unet, UNet)
    return unet


def load_vae(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: ModelConfig | None = None,
) -> AutoencoderKL:
    """The autoencoder of a checkpoint, alone. See `load_stages` for arguments and errors."""
    (vae,) = load_stages(path, ("vae",), device=device, dtype=dtype, config=config)
    assert isinstance(vae, AutoencoderKL)
    return vae


def load_text_encoder(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: ModelConfig | None = None,
) -> CLIPTextEncoder:
    """The text encoder of a checkpoint, alone, with the tokenizer that lies beside the file."""
    (text,) = load_stages(path, ("text",), device=device, dtype=dtype, config=config)
    assert isinstance(text, CLIPTextEncoder)
    return text


def load_stages(
    path: str | Path,
    stages: Sequence[str] = ("unet", "vae", "text"),
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    config: ModelConfig | None = None,
) -> tuple[nn.Module, ...]:
    """Build the asked stages without weights, then fill them from the file, strictly.

    Args:
        path: a safetensors file in the official layout, or a folder with `model.safetensors`.
        stages: any of "unet", "vae", "text"; the file may lack the others.
        device, dtype: where the weights go, and as what.
        config: the model's config; without it the file's own metadata says, and a file that has
            none is taken for Stable Diffusion v1.

    Raises:
        FileNotFoundError: nothing is there.
        UnreadableError: it is not a safetensors file, or its metadata is not ours.
        KeysError: keys are missing, unexpected, or of the wrong shape.
        ValueError: the device is not there, or the tokenizer beside the file does not fit.
    """
    path, device, dtype = find_file(path), check_device(device), check_dtype(dtype)
    folder = find_tokenizer(path) if "text" in stages else None
    tokenizer = None if folder is None else Tokenizer.from_folder(folder)
    with open_file(path) as file:
        config = config or stored_config(file) or SD_V1
        try:
            with torch.device("meta"):  # no memory, no random numbers: the file has the values
                models = [build_stage(stage, config, tokenizer) for stage in stages]
        except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
            raise CheckpointError(f"no model can be built for {path}: {error}") from error
        names = [key_map(model) for model in models]
        check_keys(path, file, stages, models, names)
        for model, ours_to_theirs in zip(models, names, strict=True):
            tensors = {
                ours: file.get_tensor(theirs).to(device=device, dtype=dtype)
                for ours, theirs in ours_to_theirs.items()
            }
            model.load_state_dict(tensors, strict=True, assign=True)
            if isinstance(model, CLIPTextEncoder):
                model.rebuild_buffers()
    return tuple(model.eval() for model in models)


def load_config(path: str | Path) -> ModelConfig:
    """The config of a checkpoint: its own metadata's, or Stable Diffusion v1's where it has none.

    Raises: as `load_stages`.
    """
    with open_file(find_file(path)) as file:
        return stored_config(file) or SD_V1


def find_file(path: str | Path) -> Path:
    """The safetensors file that a path means: itself, or the one in this folder."""
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no weights at {file}")
    return file


def open_file(path: Path) -> safe_open:
    """Open a safetensors file; no tensor is read yet."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UnreadableError(f"{path} is not a readable safetensors file: {error}") from error


def build_stage(stage: str, config: ModelConfig, tokenizer: Tokenizer | None = None) -> nn.Module:
    """A stage by its name, freshly initialised (or, under `torch.device("meta")`, empty)."""
    if stage == "unet":
        return UNet(config.unet)
    if stage == "vae":
        return AutoencoderKL(config.vae)
    if stage == "text":
        return CLIPTextEncoder(config.text, tokenizer)
    raise ValueError(f"no stage {stage!r}: there are {', '.join(PREFIXES)}")


def find_tokenizer(path: Path) -> Path | None:
    """The folder with CLIP's `vocab.json` and `merges.txt` for a file: its own, or `tokenizer` in
    it; None where neither has them."""
    for folder in (path.parent, path.parent / "tokenizer"):
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return folder
    return None


def check_keys(
    path: Path,
    file: safe_open,
    stages: Sequence[str],
    models: Sequence[nn.Module],
    names: Sequence[Mapping[str, str]],
) -> None:
    """Every key of the models in the file, every key of theirs in the file used, every shape equal;
    otherwise a KeysError that names them."""
    found = set(file.keys())
    expected = {
        theirs: tuple(model.state_dict()[ours].shape)
        for model, ours_to_theirs in zip(models, names, strict=True)
        for ours, theirs in ours_to_theirs.items()
    }
    # A stage alone answers for its own keys; a whole model for everything in the file.
    prefixes = tuple(PREFIXES[stage] for stage in stages)
    mine = "" if len(prefixes) == len(PREFIXES) else prefixes
    known = expected.keys() | computed_entries()
    missing = sorted(expected.keys() - found)
    unexpected = sorted(key for key in found - known if key.startswith(mine))
    shapes = {key: tuple(file.get_slice(key).get_shape()) for key in expected.keys() & found}
    misshapen = [
        f"{key} (found {list(shape)}, expected {list(expected[key])})"
        for key, shape in sorted(shapes.items())
        if shape != expected[key]
    ]
    problems = {"missing": missing, "unexpected": unexpected, "wrongly shaped": misshapen}
    told = [f"{kind}: {_some(keys)}" for kind, keys in problems.items() if keys]
    if told:
        raise KeysError(f"{path} does not fit the model; " + "; ".join(told))


def computed_entries() -> set[str]:
    """Keys that official files carry and that we compute: ignored when read, written when saved."""
    return {POSITION_IDS, *schedule_entries(ScheduleConfig())}


def _some(keys: Sequence[str], count: int = 8) -> str:
    """The first few of many keys, and how many more there are."""
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(keys[:count]) + more


# --- Writing ---------------------------------------------------------------------------------


def save_checkpoint(
    path: str | Path,
    *,
    unet: UNet,
    vae: AutoencoderKL,
    text: CLIPTextEncoder,
    config: ModelConfig,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a whole model as one safetensors file in the official layout.

    The parameters in their own dtype, or in `dtype`; beside them `position_ids` and the schedule's
    tables, as official files have them. The config travels in the metadata, as one entry of sorted
    JSON, so that the same model always gives the same bytes. The file appears whole or not at all.
    """
    tensors = {
        theirs: model.state_dict()[ours].to(device="cpu", dtype=dtype).contiguous()
        for model in (unet, vae, text)
        for ours, theirs in key_map(model).items()
    }
    tensors[POSITION_IDS] = torch.arange(config.text.max_length)[None]  # (1, L)
    tensors |= schedule_entries(config.schedule)
    with written_whole(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={"ldm": config_to_json(config)})


PARTS: dict[str, Callable[..., Any]] = {
    "unet": UNetConfig,
    "vae": VAEConfig,
    "text": TextConfig,
    "schedule": ScheduleConfig,
}


def config_to_json(config: ModelConfig, indent: int | None = None) -> str:
    """A config as sorted JSON."""
    return json.dumps(dataclasses.asdict(config), sort_keys=True, indent=indent)


def config_from_json(text: str) -> ModelConfig:
    """The inverse of `config_to_json`.

    Raises:
        UnreadableError: it is not such a config.
    """
    try:
        data = json.loads(text)
        parts = {
            name: part(**{k: tuple(v) if isinstance(v, list) else v for k, v in data[name].items()})
            for name, part in PARTS.items()
        }
        return ModelConfig(**(data | parts))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnreadableError(f"the file's metadata is not a config of ldm: {error}") from error


def stored_config(file: safe_open) -> ModelConfig | None:
    """The config in a file's metadata, or None where there is none."""
    text = (file.metadata() or {}).get("ldm")
    return None if text is None else config_from_json(text)
