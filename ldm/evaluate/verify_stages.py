"""What is measured on each stage: the very inputs of those who published their numbers.

Constants, but for the latents of a picture, so that nothing has to be fetched. Sizes that a model
decides (channels, the width of a context) are its own, so that a small random model can be measured
as well as the official weights. Each function returns the few numbers that were published, (N,).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.presets import PRESETS
from ldm.samplers import SAMPLERS, guide, sample
from ldm.schedule import NoiseSchedule
from ldm.text import CLIPTextEncoder
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

# --- Text: sums, over all that comes out -----------------------------------------------------


def text_embeddings(text: CLIPTextEncoder, *, ids: Sequence[Sequence[int]]) -> Tensor:
    """The sum of what tokens and their places begin as. ids: (B, L) -> (1,)."""
    rows = torch.tensor(ids, device=text.device)  # (B, L)
    return total(text.transformer.embeddings(input_ids=rows))


def text_mlp(text: CLIPTextEncoder) -> Tensor:
    """The sum of two tokens of ones after the MLP of the first layer, (1,): which GELU it has."""
    first: Any = text.transformer.encoder.layers[0]
    return total(first.mlp(ones(text)))


def text_norm(text: CLIPTextEncoder) -> Tensor:
    """The sum of two tokens of ones after the final layer norm, (1,): twice that of its bias."""
    return total(text.transformer.final_layer_norm(ones(text)))


def text_states(text: CLIPTextEncoder, *, ids: Sequence[Sequence[int]]) -> Tensor:
    """The sum of the states that the UNet would read. ids: (B, L), without padding -> (1,)."""
    return total(text.encode(torch.tensor(ids, device=text.device)))


def ones(text: CLIPTextEncoder) -> Tensor:
    """Two tokens, all ones: (1, 2, hidden_size)."""
    return torch.ones_like(text.transformer.final_layer_norm.weight).expand(1, 2, -1)


def total(states: Tensor) -> Tensor:
    """A sum that does not depend on the order of adding up: (...) -> (1,)."""
    return states.sum(dtype=torch.float64)[None]


# --- UNet ------------------------------------------------------------------------------------


def unet_corner(unet: UNet, *, x: float, side: int, t: int, context: float, tokens: int) -> Tensor:
    """eps of constant latents (1, C, side, side) and a constant context (1, tokens, D), in rows and
    columns 1 to 3: (9 C,)."""
    return corner(unet_eps(unet, x=x, side=side, t=t, context=context, tokens=tokens))


def unet_row(unet: UNet, *, x: float, side: int, t: int, context: float, tokens: int) -> Tensor:
    """The same in the first six places of the first row of the first channel: (6,)."""
    eps = unet_eps(unet, x=x, side=side, t=t, context=context, tokens=tokens)
    return eps[0, 0, 0, :6]


def unet_eps(unet: UNet, *, x: float, side: int, t: int, context: float, tokens: int) -> Tensor:
    """(1, C, side, side)."""
    like = unet.conv_in.weight
    latents = like.new_full((1, unet.config.in_channels, side, side), x)
    states = like.new_full((1, tokens, unet.config.context_dim), context)
    return unet(latents, torch.tensor([t], device=like.device), states)


# --- Autoencoder -----------------------------------------------------------------------------


def decoded_corner(vae: AutoencoderKL, *, z: float, side: int) -> Tensor:
    """The picture of constant latents (1, C, side, side), not divided by the scaling factor, in
    rows and columns 1 to 3: (27,)."""
    shape = (1, vae.config.latent_channels, side, side)
    return corner(vae.decode(vae.post_quant_conv.weight.new_full(shape, z)))


def autoencoded_corner(vae: AutoencoderKL, *, x: float, side: int) -> Tensor:
    """A constant picture (1, 3, side, side), to its most likely latents and back: (27,)."""
    shape = (1, vae.config.in_channels, side, side)
    return corner(vae.decode(vae.encode(vae.post_quant_conv.weight.new_full(shape, x)).mode()))


def corner(maps: Tensor) -> Tensor:
    """(1, C, H, W) -> (9 C,): away from the first row and column, and near them."""
    return maps[0, :, 1:4, 1:4].flatten()


MEASURES: Mapping[str, Callable[..., Tensor]] = {
    one.__name__: one
    for one in (
        *(text_embeddings, text_mlp, text_norm, text_states),
        *(unet_corner, unet_row),
        *(decoded_corner, autoencoded_corner),
    )
}
"""By the names that `published.json` has for them; each takes its stage, and its inputs."""


# --- A whole picture, stage by stage, so that one is in memory at a time ----------------------


def picture_contexts(text: CLIPTextEncoder, words: Sequence[int]) -> Tensor:
    """The states of no prompt and of one, from the ids of its words: (2, max_length, D)."""
    config = text.config
    rows = [
        [config.bos_token_id, *ids, *[config.eos_token_id] * (config.max_length - 1 - len(ids))]
        for ids in ([], words)
    ]
    return torch.cat([text.encode(torch.tensor([row], device=text.device)) for row in rows])


def picture_latents(
    unet: UNet,
    contexts: Tensor,
    schedule: NoiseSchedule,
    *,
    side: int,
    sampler: str,
    steps: int,
    guidance_scale: float,
    seed: int,
) -> Tensor:
    """The latents (1, C, side, side) that diffusers' grid ends in. They begin as NumPy's normal
    numbers of a seed, in float64, cast once; contexts: those of `picture_contexts`."""
    import numpy as np

    shape = (1, unet.config.in_channels, side, side)
    noise = np.random.RandomState(seed).standard_normal(shape)
    x = torch.from_numpy(noise).float().to(contexts)
    eps_fn = guide(unet, contexts[1:], contexts[:1], guidance_scale)
    grid = PRESETS["diffusers"].grid(sampler, steps, schedule, None)
    rule = SAMPLERS[sampler].rule
    options = {"eta": 0.0} if sampler == "ddim" else {}
    for step in sample(lambda known: rule(known, **options), eps_fn, x, grid, schedule):
        x = step.x_prev
    return x


def picture_corner(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """The blue of the last 3x3 pixels, from 0 to 1: (9,)."""
    pixels = vae.decode(latents / vae.config.scaling_factor)  # (1, 3, H, W)
    return ((pixels + 1) / 2).clamp(0, 1)[0, 2, -3:, -3:].flatten()
