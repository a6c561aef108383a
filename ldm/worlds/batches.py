"""Scenes of the Horizon world as tensors: what a network is shown, or held against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.pictures import to_tensor
from ldm.worlds.scenes import Scene

OBJECTS = ("house", "tree", "sun", "moon")


def pictures(scenes: Sequence[Scene], size: int) -> Tensor:
    """Render scenes: (B, 3, size, size) float32 in [-1, 1].

    Raises:
        ValueError: the size is below 8 pixels.
    """
    levels = np.stack([np.asarray(scene.render(size)) for scene in scenes])  # (B, H, W, 3)
    return to_tensor(torch.from_numpy(levels))


def object_masks(scenes: Sequence[Scene], size: int) -> Tensor:
    """1 where a house, tree, sun or moon is, else 0: (B, 1, size, size) float32.

    Raises:
        ValueError: the size is below 8 pixels.
    """
    rows = []
    for scene in scenes:
        masks = scene.masks(size)
        rows.append(sum(masks[name].astype(np.float32) for name in OBJECTS if name in masks))
    empty = np.zeros((size, size), dtype=np.float32)
    return torch.from_numpy(np.stack([row + empty for row in rows]))[:, None]
