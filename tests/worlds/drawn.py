"""Scenes that the tests share."""

from __future__ import annotations

from functools import cache

import numpy as np

from ldm.worlds.scenes import Scene


@cache
def worlds() -> tuple[Scene, ...]:
    rng = np.random.default_rng(0)
    return tuple(Scene.sample(rng) for _ in range(6000))
