"""Where a sampler's random numbers come from: explicit generators, or noise that is handed in; and
how two noises are mixed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.device import sent

Generators = torch.Generator | Sequence[torch.Generator] | Callable[[Tensor], Tensor]
"""A generator per image, or a single one that draws for the whole batch; or, instead of any, a
function that gives noise for a tensor like the one it is given: see `handed_in`."""

Noise = Sequence[Tensor] | Callable[[int, tuple[int, ...]], Tensor]
"""Noise that is handed in: all of a run's, in the order in which it is drawn, or noise(k, shape),
which gives the k-th of it. The 0th is the starting noise."""

NONE_GIVEN = "this sampler draws noise: pass generators=[...], one per image"


def draw_noise(generators: Generators | None, like: Tensor) -> Tensor:
    """Standard normal noise of the shape, device and dtype of `like`, (B, ...).

    Args:
        generators: one CPU generator per image, so that a seed means the same noise on every device
            and an image does not depend on its neighbours in the batch. Or a single generator, on
            any device: it draws the whole batch at once, in `like`'s dtype. Or a function.
        like: what the noise is for; not read.

    Raises:
        ValueError: there are no generators.
    """
    if generators is None:
        raise ValueError(NONE_GIVEN)
    if callable(generators):
        noise = generators(like)
    elif isinstance(generators, torch.Generator):
        device = generators.device
        noise = torch.randn(like.shape, generator=generators, device=device, dtype=like.dtype)
    else:
        noise = torch.stack([torch.randn(like.shape[1:], generator=g) for g in generators])
    return sent(noise, like.device, like.dtype)


def check_generators(generators: Generators | None, x: Tensor) -> None:
    """One generator per image or a single one for all, or a ValueError that says so."""
    if generators is None:
        raise ValueError(NONE_GIVEN)
    if callable(generators) or isinstance(generators, torch.Generator):
        return
    if len(generators) != x.shape[0]:
        raise ValueError(f"{x.shape[0]} images need as many generators, not {len(generators)}")


def handed_in(noise: Noise) -> Callable[[Tensor], Tensor]:
    """Noise of one's own in the place of generators, for one run: each draw takes the next.

    The function that is returned raises a ValueError where there is no next, or it has another
    shape than what it is for.
    """
    counter = itertools.count()

    def draw(like: Tensor) -> Tensor:
        k, shape = next(counter), tuple(like.shape)
        if not callable(noise) and k >= len(noise):
            raise ValueError(f"noise has {len(noise)} tensors, and the run draws one more")
        given = noise(k, shape) if callable(noise) else noise[k]
        if not isinstance(given, Tensor) or given.shape != like.shape:
            what = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"noise {k} must be a tensor {shape}, not {what}")
        return given

    return draw


def slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """From one noise to another along the sphere that both lie on (Shoemake 1985), image by image,
    (B, ...): at share 0 the one, at 1 the other.

    Noise of N numbers is sqrt(N) long, all but exactly. Half-way along a straight line it would be
    shorter by a factor of 1 / sqrt(2), noise of too small a variance, of which models make pictures
    without detail. Where both point the same way, or opposite ways, there is no arc: there it is
    the straight line.
    """
    dtype = torch.promote_types(start.dtype, torch.float32)
    flat, other = start.flatten(1).to(dtype), end.flatten(1).to(dtype)  # (B, N)
    cosine = torch.nn.functional.cosine_similarity(flat, other)[:, None].clamp(-1, 1)  # (B, 1)
    angle = cosine.acos()
    is_arc = angle.sin().abs() > 1e-3
    a, b = ((part * angle).sin() / angle.sin() for part in (1 - share, share))
    a, b = a.where(is_arc, 1 - share), b.where(is_arc, share)
    return (a * flat + b * other).view_as(start).to(start.dtype)
