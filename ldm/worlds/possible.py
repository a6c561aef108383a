"""Could any scene of the Horizon world have made this picture?

A model may draw what its world does not hold: two trees, half a house, a hill of a shape that no
hill has. So the scene that explains a picture best is looked for, and painted:

1. its names, and roughly the places of things, are the reader's (`ldm.worlds.reader.look`);
2. clouds and hills have drifted by what fits best of 16 values;
3. then all numbers are moved at once to where the squared error would be least, were the picture a
   linear function of them (Gauss-Newton), a few times over. They keep to the range that the names
   allow, so what is found is a scene of the world.

The *residual* is the mean absolute error, in grey levels, where it is largest: over any square of
8 of the picture's 64 pixels, an eighth of its width. Noise averages out in it, and what is wrong in
one place is not lost in a picture that is otherwise right.

A picture is *impossible* when its residual is above `LIMIT`: more than encoding and decoding by
Horizon's autoencoder does to true scenes. Of 840 of these half were below 4.1, 99% below 9.5, and
none above 13.8; with a second tree or sun it is 60 to 110.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ldm.worlds import painting
from ldm.worlds.distribution import TRUNCATION, UNIFORM, continuous
from ldm.worlds.reader import Array, N, look, smooth
from ldm.worlds.scenes import Scene

if TYPE_CHECKING:
    from PIL.Image import Image

LIMIT = 15.0
WINDOW = 8  # pixels of N: a square in which the error is averaged

SWEEP = 16  # values of drift and roll that are tried
ROUNDS = 6  # of Gauss-Newton, at most
ENOUGH = 5.0  # grey levels: a residual that need not get smaller
GAIN = 0.97  # nor does one that a round makes no smaller than by this factor
OUTLIER = 25.0  # grey levels: pixels that are more wrong pull no harder than that
NOISE = 27.0  # grey levels: how firmly the numbers' own Gaussians hold them


@dataclass(frozen=True)
class Fit:
    """The scene that explains a picture best.

    Attributes:
        scene: its names are as read, its numbers as fitted.
        residual: the mean absolute error in the worst square, in grey levels.
    """

    scene: Scene
    residual: float

    @property
    def impossible(self) -> bool:
        """Whether not even the best scene explains the picture."""
        return self.residual > LIMIT


def impossible(picture: Image | npt.NDArray[np.uint8]) -> bool:
    """Whether no scene could have made this picture: see `fit`, which tells by how much."""
    return fit(picture).impossible


def fit(picture: Image | npt.NDArray[np.uint8]) -> Fit:
    """The scene that explains a picture best, and how badly it does: about 0.15 s.

    `picture` is square, of any size, as `ldm.worlds.reader.read` takes it, which says what raises
    ValueError.
    """
    seen = look(picture)
    means = {number: mean for number, (mean, _) in continuous(seen.names).items()}
    scene = Scene(**seen.names, **means, drift=0.0, roll=0.0)  # type: ignore[arg-type]
    scene = _moved(scene, {k: value - means[k] for k, value in seen.numbers.items()})
    scene = _drifted(seen.pixels, scene)

    target = smooth(seen.pixels)
    shown = _painted(scene)
    best = Fit(scene, worst_square(target - shown))
    for i in range(ROUNDS):
        scene = _nearer(target, shown, scene, outlier=OUTLIER if i else 255.0)
        shown = _painted(scene)
        new = Fit(scene, worst_square(target - shown))
        stuck = i > 1 and new.residual > GAIN * best.residual
        best = min(best, new, key=lambda one: one.residual)
        if stuck or best.residual < ENOUGH:
            break
    return best


def worst_square(error: Array) -> float:
    """The largest mean absolute error (N, N, 3) over a square of `WINDOW` pixels."""
    total = np.pad(np.abs(error).mean(-1), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    k = WINDOW
    squares = total[k:, k:] - total[:-k, k:] - total[k:, :-k] + total[:-k, :-k]
    return float(squares.max()) / k**2


def _painted(scene: Scene) -> Array:
    """The scene as the reader smooths it: (N, N, 3), 0 to 255."""
    return smooth(255 * np.clip(painting.paint(scene, N), 0, 1))


def _moved(scene: Scene, by: Mapping[str, float], *, freely: bool = False) -> Scene:
    """The scene with some numbers changed, but within what its names allow unless `freely`."""
    numbers = {}
    for name, change in by.items():
        value = getattr(scene, name) + float(change)
        mean, sd = continuous(scene.attributes).get(name, (0.0, 0.0))
        if name in UNIFORM:
            value %= 1.0
        elif not freely:
            value = min(max(value, mean - TRUNCATION * sd), mean + TRUNCATION * sd)
        numbers[name] = value
    return replace(scene, **numbers)


def _drifted(pixels: Array, scene: Scene) -> Scene:
    """The scene with the drift and the roll that fit best, at half the size.

    The one shows above the horizon, the other below: so both are tried at the same time.
    """
    n = N // 2
    small = pixels.reshape(n, 2, n, 2, 3).mean((1, 3))
    tried = [i / SWEEP for i in range(SWEEP)]
    pictures = np.stack([painting.paint(replace(scene, drift=v, roll=v), n) for v in tried])
    errors = np.minimum(np.abs(255 * pictures - small).sum(-1), 60.0)  # (SWEEP, n, n)
    ridge = max(n - round(scene.horizon_height * n) - 2, 1)  # the first row that hills reach
    sky, ground = errors[:, :ridge].sum((1, 2)), errors[:, ridge:].sum((1, 2))
    return replace(scene, drift=tried[int(sky.argmin())], roll=tried[int(ground.argmin())])


def _nearer(target: Array, shown: Array, scene: Scene, outlier: float) -> Scene:
    """One step of Gauss-Newton: the scene with its numbers moved towards the target (N, N, 3)."""
    scale = {name: sd for name, (_, sd) in continuous(scene.attributes).items() if sd}
    scale |= {"drift": 0.02, "roll": 0.04}  # as far as their pictures are about linear
    slopes = [
        (_painted(_moved(scene, {name: 0.3 * sd}, freely=True)) - shown).ravel() / 0.3
        for name, sd in scale.items()
    ]
    slope = np.stack(slopes, 1)  # (N * N * 3, numbers): grey levels per scale
    error = target - shown
    size = np.sqrt((error**2).sum(-1, keepdims=True))
    weight = np.broadcast_to(outlier / np.maximum(size, outlier), error.shape).ravel()
    square = slope.T @ (slope * weight[:, None]) + NOISE**2 * np.eye(len(scale))
    step = np.linalg.solve(square, slope.T @ (error.ravel() * weight))
    return _moved(
        scene,
        {name: sd * z for (name, sd), z in zip(scale.items(), step.clip(-2, 2), strict=True)},
    )
