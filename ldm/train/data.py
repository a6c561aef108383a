"""Scenes of the Horizon world to train on, drawn as they are needed: the training set has no end,
and a batch depends only on the seed and the step, so a resumed run sees the same pictures as one
that was never stopped. `ldm.worlds.batches` renders them."""

from __future__ import annotations

import numpy as np

from ldm.worlds.scenes import Scene, training_scene


def rng_at(seed: int, step: int) -> np.random.Generator:
    """The random numbers of one training step."""
    return np.random.default_rng([seed, step])


def draw_scenes(rng: np.random.Generator, count: int) -> list[Scene]:
    """Scenes to train on: the whole world but its held-out combinations."""
    return [training_scene(rng) for _ in range(count)]
