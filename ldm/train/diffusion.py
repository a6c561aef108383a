"""Stage 3: the UNet learns to see the noise in a noisy latent (DDPM, algorithm 1; LDM, eq. 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ldm.config import HORIZON
from ldm.device import sent
from ldm.schedule import NoiseSchedule, noised, output_from
from ldm.text import CLIPTextEncoder
from ldm.train.autoencoder import encode_scenes
from ldm.train.data import draw_scenes, rng_at
from ldm.train.state import Optimisation, Record, TrainState, fast_step
from ldm.vae import AutoencoderKL
from ldm.worlds.batches import object_masks
from ldm.worlds.scenes import Scene

OBJECTS_FROM = 0.1
"""The alpha_bar from which on objects count more: below, it is being decided what there is."""

FEW = 2
"""Attributes that an open caption states, at most."""


@dataclass(frozen=True)
class DiffusionSettings:
    """How the UNet is trained."""

    optimisation: Optimisation = field(
        default_factory=lambda: Optimisation(steps=11000, batch_size=64, learning_rate=6e-4)
    )
    image_size: int = HORIZON.image_size
    num_scenes: int = 40_000
    """How many scenes are drawn and encoded, once, before the first step."""
    caption_dropout: float = 0.1
    """How often a caption is left empty: the model learns to draw without words as well, which
    guidance needs (Ho & Salimans 2022, algorithm 1)."""
    snr_gamma: float = 5.0
    """Nearly clean latents count less: min(SNR, gamma) / SNR (Hang et al. 2023,
    arXiv:2303.09556, section 3.4)."""
    noisy_from: float = 0.6
    """Where the noisiest timesteps begin, as a share of the table: there it is decided what a
    picture holds, and a wrong choice cannot be mended later."""
    noisy_share: float = 0.5
    """The share of each batch that is drawn from the noisiest timesteps alone; the rest is drawn
    from all."""
    detailed_kept: float = 0.2
    """How often a caption that states more than `FEW` attributes is kept; else another scene and
    caption are drawn. Most captions state five, and people write less. The choice looks at the
    caption alone, so that what there is, given a caption, is distributed as before."""
    measure_every: int = 1000
    """After how many steps the running mean's error is held against the least that any model could
    have (`ldm.train.excess`)."""
    validation: int = 192
    """How many scenes that is measured on; they are not trained on."""
    object_weight: float = 3.0
    """How much more a latent of a house, tree, sun or moon counts where there is no noise. It fades
    with alpha_bar: a weight that depends on x0 moves the mean that the model learns, and while
    the noise hides where the object is, that would be towards an object in every such place. So
    below `OBJECTS_FROM` all places count alike."""


@dataclass(frozen=True)
class LatentSet:
    """Scenes and what the autoencoder made of them, ready to be noised.

    Attributes:
        scenes: N of them.
        latents: (N, C, h, w), scaled to unit std.
        objects: (N, 1, h, w) in [0, 1], how much of each latent an object covers.
    """

    scenes: Sequence[Scene]
    latents: Tensor
    objects: Tensor


@torch.no_grad()
def encode_set(vae: AutoencoderKL, settings: DiffusionSettings) -> LatentSet:
    """Draw scenes and encode them once: the autoencoder is frozen, so every epoch would give the
    same latents again."""
    scenes = draw_scenes(rng_at(settings.optimisation.seed, 0), settings.num_scenes)
    device = next(vae.parameters()).device
    latents, objects = [], []
    starts = range(0, len(scenes), 64)
    for start in tqdm(starts, desc="encoding scenes", unit="batch", disable=None):
        batch = scenes[start : start + 64]
        with fast_step(device):
            latents.append(encode_scenes(vae, batch, settings.image_size).float())
        masks = object_masks(batch, settings.image_size)
        objects.append(F.avg_pool2d(masks, vae.config.factor).to(device))
    scaled = torch.cat(latents) * vae.config.scaling_factor
    return LatentSet(scenes, scaled, torch.cat(objects))


def train_diffusion(
    state: TrainState,
    settings: DiffusionSettings,
    data: LatentSet,
    text: CLIPTextEncoder,
    schedule: NoiseSchedule,
    prediction: str = "eps",
) -> Iterator[Record]:
    """Minimise the squared error of the prediction, one of `ldm.config.PREDICTIONS`, at random
    timesteps and captions.

    Yields one record per step, with the weighted `loss` and the plain `mse`.
    """
    s = settings.optimisation
    while state.step < s.steps:
        rng = rng_at(s.seed + 1, state.step)
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        told = [draw_caption(rng, data.scenes, settings) for _ in range(s.batch_size)]
        chosen = sent(torch.tensor([index for index, _ in told]), state.device)
        batch = Batch.drawn(data.latents[chosen], rng, generator, schedule, settings)

        with fast_step(state.device):
            with torch.no_grad():
                context = text([caption for _, caption in told])
            output = state.model(batch.x, batch.t, context)
        error = batch.error(output, prediction)  # (B, C, h, w)
        balance = min_snr_weight(prediction, batch.alpha_bar, settings.snr_gamma)  # (B, 1, 1, 1)
        visible = batch.alpha_bar.where(batch.alpha_bar >= OBJECTS_FROM, 0.0)
        weight = 1.0 + settings.object_weight * visible * data.objects[chosen]  # (B, 1, h, w)
        loss = (balance * weight * error).mean() / weight.mean()
        state.update(loss)
        yield Record(state.step, {"loss": loss.detach(), "mse": error.detach().mean()})


@dataclass(frozen=True)
class Batch:
    """Latents with noise on them, and so what a UNet should say of them.

    Attributes:
        x0, noise: (B, C, h, w).
        t: (B,) int64.
        alpha_bar: (B, 1, 1, 1).
    """

    x0: Tensor
    noise: Tensor
    t: Tensor
    alpha_bar: Tensor

    @classmethod
    def drawn(
        cls,
        x0: Tensor,
        rng: np.random.Generator,
        generator: torch.Generator,
        schedule: NoiseSchedule,
        settings: DiffusionSettings,
    ) -> Batch:
        """Timesteps from `rng`, and noise from `generator`, for clean latents."""
        t = draw_timesteps(rng, len(x0), len(schedule.alpha_bar), settings)
        noise = sent(torch.randn(x0.shape, generator=generator), x0.device, x0.dtype)
        alpha_bar = sent(schedule.alpha_bar[t], x0.device, x0.dtype).view(-1, 1, 1, 1)
        return cls(x0, noise, sent(t, x0.device), alpha_bar)

    @property
    def x(self) -> Tensor:
        """What the UNet is shown, (B, C, h, w)."""
        return noised(self.x0, self.noise, self.alpha_bar)

    def error(self, output: Tensor, prediction: str) -> Tensor:
        """The squared error of what it says, (B, C, h, w)."""
        target = output_from(prediction, self.x0, self.noise, self.alpha_bar)
        return (output.float() - target).square()


def draw_caption(
    rng: np.random.Generator, scenes: Sequence[Scene], settings: DiffusionSettings
) -> tuple[int, str]:
    """A scene, by its number, and a caption of it, which may be empty."""
    empty = rng.random() < settings.caption_dropout
    while True:
        index = int(rng.integers(len(scenes)))
        if empty:
            return index, ""
        caption, stated = scenes[index].describe(rng)
        if len(stated) <= FEW or rng.random() < settings.detailed_kept:
            return index, caption


def draw_timesteps(
    rng: np.random.Generator, count: int, total: int, settings: DiffusionSettings
) -> Tensor:
    """Timesteps of a batch, int64 (count,): `noisy_share` of them are among the noisiest. Both
    kinds are spread evenly, one in each of as many equal intervals: the loss is less noisy so."""
    noisy = round(count * settings.noisy_share)
    first = settings.noisy_from * total

    def spread(low: float, number: int) -> npt.NDArray[np.float64]:
        places = (np.arange(number) + rng.random(number)) / max(1, number)
        return low + (total - low) * places

    return torch.from_numpy(
        np.concatenate([spread(first, noisy), spread(0.0, count - noisy)])
    ).long()


def min_snr_weight(prediction: str, alpha_bar: Tensor, gamma: float) -> Tensor:
    """How much a squared error counts, of alpha_bar's shape.

    That of x0 counts min(SNR, gamma) (Hang et al. 2023, section 3.4), and where the model says
    other than the noise one more: as v's own error does, SNR + 1 times that of x0 (Salimans & Ho
    2022, section 4). Without it nothing would be learned in pure noise, where the SNR is 0. What a
    model says counts by as much as it moves x0 (`ldm.schedule.pair_from`).
    """
    snr = alpha_bar / (1 - alpha_bar)
    weight = snr.clamp(max=gamma)
    if prediction == "eps":
        return weight / snr
    if prediction == "v":
        return (weight + 1) / (snr + 1)
    if prediction == "x0":
        return weight + 1
    # x0 = (x - b u) / (a + b), and b / (a + b) = 1 / (sqrt(SNR) + 1)
    return (weight + 1) / (snr.sqrt() + 1) ** 2
