"""Two names for every weight: ours, and the official Stable Diffusion v1 checkpoint's.

Our modules have names that teach (`down.1.blocks.0.res.conv1`); the official file has its own
(`input_blocks.4.0.in_layers.2`). The two differ by names alone: nothing is fused, split or
reshaped. The tables below, unrolled along the config, rename one into the other and back, for
Stable Diffusion v1 and for Horizon alike.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ldm.config import ScheduleConfig, UNetConfig, VAEConfig
from ldm.schedule import exact_tables
from ldm.text import CLIPTextEncoder
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text": "cond_stage_model.transformer.text_model.",
}
POSITION_IDS = PREFIXES["text"] + "embeddings.position_ids"

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


@functools.cache
def computed_entries() -> frozenset[str]:
    """Keys that official files carry and that we compute: ignored when read, written when saved."""
    return frozenset({POSITION_IDS, *schedule_entries(ScheduleConfig())})
