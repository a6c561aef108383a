"""A scene of the Horizon world, and all that follows from its names and numbers.

    scene = Scene.sample(np.random.default_rng(0), house="red")
    scene.render(128)      # the picture
    scene.masks(128)       # which pixel shows what
    scene.describe(rng)    # a caption, and what it states
    scene.edited(house="blue")    # the same scene with one thing changed

How scenes are distributed, and what each name and number means, is told in
`ldm.worlds.distribution`; how they look in `ldm.worlds.painting`; how they are put into words in
`ldm.worlds.captions`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ldm.worlds import painting
from ldm.worlds.captions import describe
from ldm.worlds.distribution import ATTRIBUTES, Parameters, continuous, draw

if TYPE_CHECKING:
    from PIL.Image import Image

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Scene(Parameters):
    """One picture of the Horizon world: eight names, then eleven numbers."""

    @staticmethod
    def sample(rng: np.random.Generator, **fixed: str | float) -> Scene:
        """Draw from the whole world, given any names or numbers in `fixed`.

        Fixed names condition the distribution exactly: `house="red"` never meets the sea. A fixed
        number conditions the names only on allowing it (`ldm.worlds.distribution.continuous`): with
        `house_x=0.5` the house is in the middle. Raises ValueError for unknown or impossible
        values, as for a house on the sea.
        """
        return Scene(**vars(draw(rng, fixed)))

    def edited(self, **names: str) -> Scene:
        """The same scene with some names changed: the right answer to an edit.

        All else stays, the numbers too, as many standard deviations from their means as they were:
        a house that goes to the other side stands as far from its middle as before. What was not
        there comes at the means. What cannot stay without the changed names goes: without a house
        there is no place and size of one.

            scene.edited(house="blue")          # painted blue
            scene.edited(house_position="left", tree="none")

        Raises:
            ValueError: a name is unknown, or no scene has these names together.
        """
        wanted = self.attributes | names
        for name in names:
            if name not in ATTRIBUTES:
                raise ValueError(f"unknown {name!r}: a scene has {', '.join(ATTRIBUTES)}")
        if names.get("house") == "none":
            wanted |= dict.fromkeys({"house_position", "house_size"} - names.keys(), "none")
        Scene.sample(np.random.default_rng(0), **wanted)  # or it says why there is no such scene
        old = continuous(self.attributes)
        numbers = {}
        for name, (mean, sd) in continuous(wanted).items():
            was, its_sd = old[name]
            away = (getattr(self, name) - was) / its_sd if its_sd else 0.0
            numbers[name] = mean + sd * away
        return dataclasses.replace(self, **wanted, **numbers)  # type: ignore[arg-type]

    def render(self, size: int = 128) -> Image:
        """The scene as an RGB picture of size x size pixels. Raises ValueError below 8 pixels."""
        from PIL import Image

        pixels = painting.paint(self, size)
        return Image.fromarray((np.clip(pixels, 0.0, 1.0) * 255 + 0.5).astype(np.uint8))

    def masks(self, size: int = 128) -> dict[str, Mask]:
        """Which pixel shows what: `{name: (size, size) bool}`, disjoint and covering everything.

        "sky" (with its clouds, stars and glow) and "ground" (with its shadows) are always there;
        "sun" or "moon", "house" and "tree" are there when the scene has them. Raises ValueError
        below 8 pixels.
        """
        shapes = painting.silhouettes(self, painting.Grid.of(size))
        shapes = {"sky": np.ones((size, size), np.float32)} | shapes
        label = np.zeros((size, size), np.int8)
        for index, alpha in enumerate(shapes.values()):  # in the order of painting: back to front
            label[alpha >= 0.5] = index
        return {name: label == index for index, name in enumerate(shapes)}

    def describe(
        self, rng: np.random.Generator, keep: Collection[str] | None = None
    ) -> tuple[str, dict[str, str]]:
        """A caption, and what it states, at random or of the attributes to `keep`: see
        `ldm.worlds.captions.describe`, which raises ValueError for others."""
        return describe(self.attributes, rng, keep)

    def caption(self, rng: np.random.Generator) -> str:
        """The text of `describe(rng)`."""
        return self.describe(rng)[0]


def training_scene(rng: np.random.Generator, **fixed: str | float) -> Scene:
    """Like `Scene.sample`, from the world without its `HELD_OUT` combinations.

    Raises ValueError where `Scene.sample` does, and when `fixed` itself is held out.
    """
    return Scene(**vars(draw(rng, fixed, training=True)))
