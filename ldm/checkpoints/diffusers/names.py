"""The names of diffusers' layers: ours, renamed.

The tables below do that, unrolled along the config as those of the official names are.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ldm.checkpoints.keys import POSITION_IDS, PREFIXES, TRANSFORMER, under, unet_names, vae_names
from ldm.config import ModelConfig, TextConfig, UNetConfig, VAEConfig
from ldm.text import CLIPTextEncoder
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

# The part of a folder that each stage is.
PART_OF = {"unet": "unet", "vae": "vae", "text": "text_encoder"}

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
