"""Films, traces and pages that the tests of the player share."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.observe.maps import Word
from ldm.observe.traces import Trace
from ldm.schedule import NoiseSchedule
from ldm.settings import Settings
from ldm.viz.player.film import Film, shown_frames
from tests.helpers import randn, rng

PROMPT = "a red house, and a house </script><img src=x onerror=alert(1)> & {{data}}"
SETTINGS: dict[str, Any] = {"steps": 6, "seed": 5, "guidance_scale": 3.0, "height": 20, "width": 12}
ALPHA_BAR = NoiseSchedule().alpha_bar.tolist()
A_SETTINGS = Settings(
    prompts=("a house",),
    negative_prompt="",
    sampler="ddim",
    steps=3,
    guidance_scale=5.0,
    eta=0.0,
    seed=0,
    height=2,
    width=1,
)


def a_trace(**changes: Any) -> Trace:
    """Three steps of two by one latents, whose norms can be seen."""

    def steps(*values: tuple[float, float]) -> torch.Tensor:
        return torch.tensor(values)[:, None, :, None]  # (3, 1, 2, 1)

    parts: dict[str, Any] = dict(
        model="made up",
        settings=A_SETTINGS,
        tokens=("<s>", "a</w>", "house</w>", "</s>"),
        words=tuple(Word(t, (i,)) for i, t in enumerate(("<s>", "a", "house", "</s>"))),
        heads=1,
        t=(900, 500, 100),
        t_prev=(500, 100, 0),
        alpha_bar=(0.002, 0.25, 0.95),
        x=steps((3.0, 4.0), (0.0, 2.0), (1.0, 0.0)),
        eps=steps((0.0, 1.0), (0.0, 2.0), (0.0, 3.0)),
        x0=steps((0.0, 10.0), (0.0, 4.0), (0.0, 3.96)),
        eps_uncond=steps((0.0, 2.0), (4.0, 0.0), (0.0, 1.0)),
        eps_cond=steps((0.0, 2.5), (4.0, 3.0), (0.0, 1.02)),
        latents=torch.zeros(1, 1, 2, 1),
        maps={"layer": torch.full((3, 2, 1, 4), 0.25, dtype=torch.float16)},
    )
    return Trace(**(parts | changes))


def a_long_film(
    size: int, latent: int, levels: tuple[int, ...], words: int, steps: int = 50
) -> Film:
    """Noise wherever a run has numbers, which no format makes small: pictures of `size`, attention
    at the latents' size halved so often, a prompt of so many words."""
    numbers = np.random.default_rng(0)
    tokens = words + 2
    noise = randn(steps, 4, latent, latent)
    # A few pictures, taken in turn: what weighs is how many there are.
    noisy = [
        Image.fromarray(numbers.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(2)
    ]
    smooth = [image.resize((size // 8, size // 8)).resize((size, size)) for image in noisy]
    maps = {
        f"{level}": torch.rand(
            steps, latent >> level, latent >> level, tokens, generator=rng()
        ).half()
        for level in levels
    }
    run = a_trace(
        settings=dataclasses.replace(A_SETTINGS, height=size, width=size, steps=steps),
        tokens=tuple("x" * tokens),
        words=tuple(Word(f"word{i}", (i,)) for i in range(tokens)),
        t=tuple(range(20 * steps - 19, 0, -20)),
        t_prev=(0,) * steps,
        alpha_bar=tuple(ALPHA_BAR[t] for t in range(20 * steps - 19, 0, -20)),
        **dict.fromkeys(("x", "eps", "x0", "eps_cond"), noise),
        eps_uncond=noise.roll(1),
        latents=noise[:1],
        maps=maps,
    )
    shown = shown_frames(steps)
    return Film(
        run,
        shown,
        x=tuple(noisy[i % 2] for i in shown),
        x0=tuple(smooth[i % 2] for i in shown),
        picture=smooth[0],
    )


def page_data(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    data: dict[str, Any] = json.loads(text)
    return data


def numbers_of(text: str, dtype: str, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)


def picture_of(uri: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGB"))
