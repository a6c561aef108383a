"""Our configs in the words of diffusers and transformers, whose models ours are held against.

It imports neither of them, and no test: whoever measures the other side's memory can use it too.
"""

from __future__ import annotations

from typing import Any

from ldm.config import TextConfig, UNetConfig, VAEConfig


def unet(config: UNetConfig) -> dict[str, Any]:
    """For diffusers' `UNet2DConditionModel`."""
    levels = range(len(config.channel_mult))
    down = [f"{'CrossAttn' * (i in config.attention_levels)}DownBlock2D" for i in levels]
    return dict(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=[config.model_channels * m for m in config.channel_mult],
        down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
        layers_per_block=config.num_res_blocks,
        cross_attention_dim=config.context_dim,
        # diffusers' name for the number of heads, which differs between the levels of SD 2.
        attention_head_dim=[config.heads(config.model_channels * m) for m in config.channel_mult],
        use_linear_projection=config.linear_projections,
        norm_num_groups=config.norm_groups,
    )


def vae(config: VAEConfig) -> dict[str, Any]:
    """For diffusers' `AutoencoderKL`."""
    levels = len(config.channel_mult)
    return dict(
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        latent_channels=config.latent_channels,
        block_out_channels=[config.model_channels * m for m in config.channel_mult],
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=config.num_res_blocks,
        norm_num_groups=config.norm_groups,
    )


def text(config: TextConfig) -> dict[str, Any]:
    """For transformers' `CLIPTextConfig`: what openai/clip-vit-large-patch14 says, but for the
    sizes. The end token is its real 49407's counterpart, since `eos_token_id=2` (an old default) is
    a special case in transformers."""
    return dict(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.mlp_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.max_length,
        hidden_act="gelu" if config.open_clip else "quick_gelu",
        layer_norm_eps=1e-5,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )
