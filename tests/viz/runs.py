"""Runs and models that the tests of pictures share: small, made by hand, and known exactly."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ldm.observe.maps import Word
from ldm.observe.traces import Trace
from ldm.pipeline import TextToImage
from ldm.samplers import Step
from ldm.schedule import NoiseSchedule
from ldm.settings import Settings
from tests.helpers import randn, random_stage, tiny_config

STEPS, CHANNELS, ROWS, COLUMNS = 5, 4, 8, 6
HOT = {"red": (0, 0), "house": (6, 4)}
"""Where a word looks in a made trace: the row and column of its brightest place."""

MADE = Settings(
    prompts=("a red house",),
    negative_prompt="",
    sampler="ddim",
    steps=STEPS,
    guidance_scale=3.0,
    eta=0.0,
    seed=7,
    height=32,
    width=24,
)


def made_trace(**changes: Any) -> Trace:
    """A run of "a red house" that nobody ran. "red" gets 0.3 of the attention at its hot place and
    "house" 0.6 at its own; "a" gets 0.1 everywhere, the end nothing, the start what is left."""
    x, eps_uncond = randn(STEPS, CHANNELS, ROWS, COLUMNS), randn(STEPS, CHANNELS, ROWS, COLUMNS)
    eps_cond = eps_uncond + 0.1 * randn(STEPS, CHANNELS, ROWS, COLUMNS, seed=1)
    maps = {}
    for layer, shrink in (("fine", 1), ("coarse", 2)):
        weights = torch.zeros(STEPS, ROWS // shrink, COLUMNS // shrink, 6)
        weights[..., 1] = 0.1
        for place, share, word in ((2, 0.3, "red"), (3, 0.6, "house")):
            row, column = HOT[word]
            weights[:, row // shrink, column // shrink, place] = share
        weights[..., 0] = 1 - weights.sum(dim=3)
        maps[layer] = weights.half()
    picture = (torch.arange(32 * 24 * 3) % 251).view(32, 24, 3).byte()
    facts: dict[str, Any] = dict(
        model="tiny",
        settings=MADE,
        tokens=("<start>", "a</w>", "red</w>", "house</w>", "<end>", "<end>"),
        words=(
            Word("<start>", (0,)),
            Word("a", (1,)),
            Word("red", (2,)),
            Word("house", (3,)),
            Word("<end>", (4, 5)),
        ),
        heads=2,
        t=(801, 601, 401, 201, 1),
        t_prev=(601, 401, 201, 1, 0),
        alpha_bar=(0.1, 0.3, 0.5, 0.7, 0.99),
        x=x,
        eps=eps_cond,
        x0=x / 2,
        latents=randn(1, CHANNELS, ROWS, COLUMNS, seed=2),
        maps=maps,
        eps_cond=eps_cond,
        eps_uncond=eps_uncond,
        picture=picture,
    )
    return Trace(**(facts | changes))


def steps_of(trace: Trace) -> list[Step]:
    """The same run as a list of steps."""

    def at(tensor: Tensor | None, i: int) -> Any:
        return None if tensor is None else tensor[i : i + 1]

    return [
        Step(
            index=i,
            t=trace.t[i],
            t_prev=trace.t_prev[i],
            alpha_bar=trace.alpha_bar[i],
            alpha_bar_prev=1.0,
            x=trace.x[i : i + 1],
            eps=trace.eps[i : i + 1],
            eps_cond=at(trace.eps_cond, i),
            eps_uncond=at(trace.eps_uncond, i),
            x0=trace.x0[i : i + 1],
            x_prev=trace.x[i : i + 1],
        )
        for i in range(len(trace))
    ]


class Lookup(nn.Module):
    """In the place of a text encoder: random states for each prompt, at once."""

    def forward(self, prompts: list[str], *_: object, **__: object) -> Tensor:
        config = tiny_config().text
        size = (config.max_length, config.hidden_size)
        return torch.stack([randn(*size, seed=sum(map(ord, prompt))) for prompt in prompts])


def tiny_pipe(vae: nn.Module | None = None) -> TextToImage:
    """A random UNet and autoencoder, 16 x 16 pixels, that understand no word."""
    config = tiny_config()
    vae = random_stage("vae", config) if vae is None else vae
    unet = random_stage("unet", config)
    return TextToImage(unet, vae, Lookup(), NoiseSchedule(config.schedule), config)  # type: ignore


def without_guidance(trace: Trace) -> Trace:
    return dataclasses.replace(trace, eps_cond=None, eps_uncond=None)
