"""Where a sampler's random numbers come from: explicit generators, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.device import sent

Generators = torch.Generator | Sequence[torch.Generator]
"""A generator per image, or a single one that draws for the whole batch."""


NONE_GIVEN = "this sampler draws noise: pass generators=[...], one per image"


def draw_noise(generators: Generators | None, like: Tensor) -> Tensor:
    """Standard normal noise of the shape, device and dtype of `like`, (B, ...).

    Args:
        generators: one CPU generator per image, so that a seed means the same noise on every device
            and an image does not depend on its neighbours in the batch. Or a single generator, on
            any device: it draws the whole batch at once, in `like`'s dtype.
        like: what the noise is for; not read.

    Raises:
        ValueError: there are no generators.
    """
    if generators is None:
        raise ValueError(NONE_GIVEN)
    if isinstance(generators, torch.Generator):
        device = generators.device
        noise = torch.randn(like.shape, generator=generators, device=device, dtype=like.dtype)
    else:
        noise = torch.stack([torch.randn(like.shape[1:], generator=g) for g in generators])
    return sent(noise, like.device, like.dtype)


def check_generators(generators: Generators | None, x: Tensor) -> None:
    """One generator per image or a single one for all, or a ValueError that says so."""
    if generators is None:
        raise ValueError(NONE_GIVEN)
    if not isinstance(generators, torch.Generator) and len(generators) != x.shape[0]:
        raise ValueError(f"{x.shape[0]} images need as many generators, not {len(generators)}")
