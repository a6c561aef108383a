"""Stage 1: the autoencoder learns to keep a picture in a few latents (LDM, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ldm.config import HORIZON
from ldm.device import sent
from ldm.train.data import draw_scenes, rng_at
from ldm.train.state import Optimisation, Record, TrainState, fast_step
from ldm.vae import AutoencoderKL, Posterior
from ldm.worlds.batches import object_masks, pictures
from ldm.worlds.scenes import Scene


@dataclass(frozen=True)
class AutoencoderSettings:
    """How the autoencoder is trained."""

    optimisation: Optimisation = field(
        default_factory=lambda: Optimisation(steps=4000, batch_size=16, learning_rate=1e-3)
    )
    image_size: int = HORIZON.image_size
    kl_weight: float = 1e-6
    object_weight: float = 3.0
    """How much more a pixel of a house, tree, sun or moon counts: they are a small part of the
    picture, and the first thing that an even-handed loss gives up."""


def train_autoencoder(state: TrainState, settings: AutoencoderSettings) -> Iterator[Record]:
    """Minimise |picture - reconstruction| and its square, plus a small KL to a standard normal.

    Yields one record per step, with `loss`, `l1`, `kl` (nats per latent number) and `std` (of the
    latents); ends when `settings.optimisation.steps` are done.
    """
    s = settings.optimisation
    while state.step < s.steps:
        rng = rng_at(s.seed, state.step)
        noise = torch.Generator().manual_seed(int(rng.integers(2**31)))
        scenes = draw_scenes(rng, s.batch_size)
        x = sent(pictures(scenes, settings.image_size), state.device)
        masks = sent(object_masks(scenes, settings.image_size), state.device)
        weight = 1.0 + settings.object_weight * masks

        with fast_step(state.device):
            reconstruction, posterior = state.model(x, noise)
        error = reconstruction.float() - x  # (B, 3, H, W)
        l1 = (weight * error.abs()).sum() / (weight.sum() * 3)
        mse = (weight * error.square()).sum() / (weight.sum() * 3)
        posterior = Posterior(posterior.mean.float(), posterior.logvar.float())
        kl = posterior.kl().sum() / posterior.mean.numel()
        loss = l1 + mse + settings.kl_weight * kl
        state.update(loss)
        yield Record(
            state.step,
            {
                "loss": loss.detach(),
                "l1": error.detach().abs().mean(),
                "kl": kl.detach(),
                "std": posterior.mean.detach().std(),
            },
        )


@torch.no_grad()
def encode_scenes(
    vae: AutoencoderKL, scenes: Sequence[Scene], image_size: int, batch_size: int = 64
) -> Tensor:
    """The unscaled latents (modes) of scenes, (N, latent_channels, h, w)."""
    device = next(vae.parameters()).device
    batches = [scenes[i : i + batch_size] for i in range(0, len(scenes), batch_size)]
    return torch.cat(
        [vae.encode(pictures(batch, image_size).to(device)).mode() for batch in batches]
    )


def measured_scaling_factor(
    vae: AutoencoderKL, image_size: int, seed: int = 0, count: int = 1024
) -> float:
    """1 / std of the latents of `count` scenes, as SD v1's 0.18215 was found (LDM, appendix G)."""
    scenes = draw_scenes(np.random.default_rng([seed, 1]), count)
    return round(1.0 / encode_scenes(vae, scenes, image_size).std().item(), 5)
