"""Batches from the Horizon world. Scenes are drawn and rendered as they are needed: the training
set has no end, and a batch depends only on the seed and the step, so a resumed run sees the same
pictures as one that was never stopped."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.worlds.scenes import Scene, training_scene

OBJECTS = ("house", "tree", "sun", "moon")


def rng_at(seed: int, step: int) -> np.random.Generator:
    """The random numbers of one training step."""
    return np.random.default_rng([seed, step])


def draw_scenes(rng: np.random.Generator, count: int) -> list[Scene]:
    """Scenes to train on: the whole world but its held-out combinations."""
    return [training_scene(rng) for _ in range(count)]


def pictures(scenes: Sequence[Scene], size: int) -> Tensor:
    """Render scenes: (B, 3, size, size) float32 in [-1, 1]."""
    pixels = np.stack([np.asarray(scene.render(size)) for scene in scenes])  # (B, H, W, 3)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def object_masks(scenes: Sequence[Scene], size: int) -> Tensor:
    """1 where a house, tree, sun or moon is, else 0: (B, 1, size, size) float32."""
    rows = []
    for scene in scenes:
        masks = scene.masks(size)
        rows.append(sum(masks[name].astype(np.float32) for name in OBJECTS if name in masks))
    empty = np.zeros((size, size), dtype=np.float32)
    return torch.from_numpy(np.stack([row + empty for row in rows]))[:, None]
