"""What latents look like: pictures of them without the decoder, and statistics of their values.

    rgb = viz.fit_rgb(pipe, viz.scene_images(32, 128, np.random.default_rng(0)))
    rgb(step.x0)                            # a picture per latent, 16 x 16 pixels, at once

An autoencoder keeps a picture's layout: each place of the latents stands for one square of pixels,
and its few channels say, nearly linearly, which colour that square has. So three dot products a
place give a small picture at once, where the decoder takes as long as a step of the UNet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.config import SD_V1
from ldm.pictures import stack, to_images, to_tensor

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from ldm.observe.traces import Trace
    from ldm.pipeline import TextToImage

Draw = Callable[[Tensor], "list[Image]"]
"""Latents (B, C, h, w) -> B pictures: `pipe.decode`, or a `LatentRGB`."""


@dataclass(frozen=True)
class LatentRGB:
    """A linear map from the channels of scaled latents to red, green and blue.

    Attributes:
        weight: C rows of three numbers, what one unit of a channel adds to red, green and blue,
            which lie in [-1, 1].
        bias: the colour of latents that are zero.
    """

    weight: tuple[tuple[float, float, float], ...]
    bias: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def rgb(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) to colours (B, 3, h, w), near [-1, 1] but not clamped to it.

        Raises:
            ValueError: they have another number of channels.
        """
        if latents.ndim != 4 or latents.shape[1] != len(self.weight):
            channels = len(self.weight)
            raise ValueError(f"this map is for (B, {channels}, h, w), not {list(latents.shape)}")
        x = latents.float().cpu()
        colours = torch.einsum("bchw,cr->brhw", x, torch.tensor(self.weight))
        return colours + torch.tensor(self.bias).view(3, 1, 1)

    def __call__(self, latents: Tensor) -> list[Image]:
        """Scaled latents (B, C, h, w) to B pictures of h x w pixels."""
        return to_images(self.rgb(latents))

    @classmethod
    def fit(cls, latents: Tensor, pictures: Tensor) -> LatentRGB:
        """The map nearest to these pairs, by least squares over every place of every latent.

        Args:
            latents: scaled, (B, C, h, w).
            pictures: in [-1, 1], (B, 3, H, W); a place is compared with the mean colour of the
                pixels that it stands for.

        Raises:
            ValueError: the shapes do not belong together.
        """
        pairs = latents.ndim == pictures.ndim == 4 and len(latents) == len(pictures)
        if not pairs or pictures.shape[1] != 3:
            shapes = f"{list(latents.shape)} and {list(pictures.shape)}"
            raise ValueError(f"fitting needs (B, C, h, w) and (B, 3, H, W), not {shapes}")
        z = latents.detach().double().cpu().permute(0, 2, 3, 1).flatten(0, 2)  # (B h w, C)
        size = (latents.shape[2], latents.shape[3])
        small = F.adaptive_avg_pool2d(pictures.detach().double().cpu(), size)
        y = small.permute(0, 2, 3, 1).flatten(0, 2)  # (B h w, 3)
        with_one = torch.cat([z, torch.ones_like(z[:, :1])], dim=1)
        # "gelsd" takes the smallest solution where there are many, as for a channel that is zero.
        *weight, bias = torch.linalg.lstsq(with_one, y, driver="gelsd").solution.tolist()
        return cls(tuple(map(tuple, weight)), tuple(bias))


SD_V1_RGB = LatentRGB(
    (
        (0.298, 0.207, 0.208),
        (0.187, 0.286, 0.173),
        (-0.158, 0.189, 0.264),
        (-0.184, -0.271, -0.473),
    )
)
"""Stable Diffusion v1's, as keturn published it in November 2022 for version 1.4 ("Decoding latents
to RGB without upscaling", discuss.huggingface.co/t/23204); InvokeAI and others show previews by it.
"""


def fit_rgb(pipe: TextToImage, images: Sequence[Image]) -> LatentRGB:
    """The linear map of any model's autoencoder, from some dozens of pictures of its kind.

    The pictures are only encoded: what the decoder would make of their latents is nearly them.

    Args:
        images: of one size, e.g. `scene_images(32, 128, rng)` for Horizon.

    Raises:
        ValueError: no images, of several sizes, or a side is not a multiple of the VAE's factor.
    """
    pixels = to_tensor(stack(images))  # (B, 3, H, W)
    latents = torch.cat([pipe.encode(image) for image in images])
    return LatentRGB.fit(latents, pixels)


def scene_images(count: int, size: int, rng: np.random.Generator) -> list[Image]:
    """Pictures of the Horizon world, size x size pixels, e.g. to fit a map with."""
    from ldm.worlds.scenes import Scene

    return [Scene.sample(rng).render(size) for _ in range(count)]


def trace_rgb(trace: Trace) -> LatentRGB:
    """The map to show one run's latents by: fitted to its final latents and the picture that they
    were decoded to. A trace without its picture has Stable Diffusion v1's map if that made it, or
    false colours."""
    if trace.picture is not None:
        return LatentRGB.fit(trace.latents, to_tensor(trace.picture[None]))
    if trace.model == SD_V1.name:
        return SD_V1_RGB
    return false_colours(trace.latents.shape[1])


def false_colours(channels: int) -> LatentRGB:
    """The first three channels as red, green and blue, one alone as grey: what can be shown of
    latents when nothing is known of their model. For a model of pixels in [-1, 1], which has no
    autoencoder, these are the true colours.

    Raises:
        ValueError: there are no channels.
    """
    if channels < 1:
        raise ValueError(f"there are no colours without channels, and here are {channels}")
    if channels == 1:
        return LatentRGB(((1.0, 1.0, 1.0),))
    # Latents have a standard deviation of 1, pixels an end at 1: half keeps latents in sight.
    unit = 1.0 if channels == 3 else 0.5
    rows = [[0.0, 0.0, 0.0] for _ in range(channels)]
    for colour in range(min(channels, 3)):
        rows[colour][colour] = unit
    return LatentRGB(tuple((r, g, b) for r, g, b in rows))


def histogram(latents: Tensor, bins: int = 60) -> tuple[Tensor, Tensor]:
    """How often each value occurs, by channel, over all latents and places.

    Args:
        latents: (B, C, h, w).
        bins: of equal width, from the smallest value to the largest, the same for all channels.

    Returns:
        The bins + 1 edges, and densities (C, bins): over its bins, each channel's integrate to 1.
    """
    values = latents.detach().double().cpu().transpose(0, 1).flatten(1)  # (C, B h w)
    low, high = values.min().item(), values.max().item()
    if low == high:
        low, high = low - 0.5, high + 0.5  # all values are one
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    counts = torch.stack([torch.histc(channel, bins, low, high) for channel in values])
    return edges, counts / (values.shape[1] * (high - low) / bins)


@dataclass(frozen=True, eq=False)
class Components:
    """The directions along which the channels of latents vary most (their principal components).

    Attributes:
        mean: of each channel, (C,).
        directions: unit vectors in the channels, (K, C), the most important first; the largest
            entry of each is positive.
        variances: along each direction, (K,).
        shares: of the whole variance, (K,).
    """

    mean: Tensor
    directions: Tensor
    variances: Tensor
    shares: Tensor

    def project(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to their coordinates along the directions, (B, K, h, w)."""
        centred = latents.double().cpu() - self.mean.view(-1, 1, 1)
        return torch.einsum("bchw,kc->bkhw", centred, self.directions)

    def rgb(self, spread: float = 2.5) -> LatentRGB:
        """A map that shows the first three as red, green and blue: middle grey is the mean, full
        colour `spread` standard deviations from it."""
        weight = torch.zeros(len(self.mean), 3, dtype=torch.float64)
        for colour, direction in enumerate(self.directions[:3]):
            # A direction without variance is not shown.
            scale = spread * self.variances[colour].sqrt()
            weight[:, colour] = direction / scale if scale > 1e-12 else 0.0
        bias = -(self.mean @ weight)
        return LatentRGB(tuple(map(tuple, weight.tolist())), tuple(bias.tolist()))


def principal_components(latents: Tensor, count: int = 3) -> Components:
    """The `count` directions along which latents (B, C, h, w) vary most, over all places.

    Raises:
        ValueError: there are fewer channels.
    """
    channels = latents.shape[1]
    if not 1 <= count <= channels:
        raise ValueError(f"latents of {channels} channels have no {count} components")
    values = latents.detach().double().cpu().transpose(0, 1).flatten(1)  # (C, B h w)
    mean = values.mean(dim=1)
    centred = values - mean[:, None]
    variances, vectors = torch.linalg.eigh(centred @ centred.T / values.shape[1])  # ascending
    variances = variances.flip(0).clamp(min=0)
    directions = vectors.T.flip(0)  # (C, C), a direction a row
    largest = directions.abs().argmax(dim=1, keepdim=True)
    directions = directions * directions.gather(1, largest).sign()
    shares = variances / variances.sum() if variances.sum() > 0 else variances
    return Components(mean, directions[:count], variances[:count], shares[:count])
