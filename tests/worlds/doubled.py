"""Pictures that no scene could have made: what one scene shows, pasted into another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ldm.worlds.scenes import Scene

Pixels = npt.NDArray[np.uint8]


def pasted(scene: Scene, others: Sequence[Scene], thing: str, size: int = 128) -> Pixels:
    """The scene's picture with the others' things ("house", "tree", "sun", "moon") in it."""
    pixels = np.array(scene.render(size))
    for other in others:
        mask = other.masks(size)[thing]
        pixels[mask] = np.asarray(other.render(size))[mask]
    return pixels


def copies(thing: str, number: int, seed: int) -> Pixels:
    """A picture with so many of a thing, 0 to 3, side by side, and nothing else."""
    rng = np.random.default_rng(seed)
    bare = {"house": "none", "tree": "none", "light": "none"}
    if thing in ("sun", "moon"):
        bare["sky"] = "night" if thing == "moon" else str(rng.choice(["day", "sunset"]))
    land = str(rng.choice(["grass", "sand", "snow"]))
    empty = Scene.sample(rng, **bare, ground=land)
    same = {k: getattr(empty, k) for k in ("sky", "horizon", "ground", "horizon_height", "roll")}
    others = []
    for place in ("left", "right", "middle")[:number]:
        what = {**bare, **same, "tint": empty.tint, "drift": empty.drift}
        if thing == "house":
            what |= {"house": "red", "house_position": place, "house_size": "small"}
        elif thing == "tree":
            what["tree"] = "left" if place == "middle" else place
        else:
            what["light"] = "left" if place == "middle" else place
        other = Scene.sample(rng, **what)
        if place == "middle" and thing == "tree":
            other = Scene(**{**vars(other), "tree_x": 0.5})
        elif place == "middle" and thing != "house":
            other = Scene(**{**vars(other), "light_x": 0.5})
        others.append(other)
    first, *rest = others or [empty]
    return pasted(first, rest, thing)
