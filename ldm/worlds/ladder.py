"""A ladder of small worlds: pictures whose distribution is known exactly, from two to endless.

| world           | a picture is            | its probability                              |
| --------------- | ----------------------- | -------------------------------------------- |
| `Checkerboards` | one of two              | 1/2 each; all other pictures' is 0           |
| `Sea`           | one number              | a Gaussian's: the height of the horizon      |
| `House`         | four numbers            | four Gaussians': horizon, x, y, size         |
| `Scenes`        | eight names, 11 numbers | a table's for the names, Gaussians' for the  |
|                 |                         | numbers given the names                      |

All have the same members (`World`), so that one training function climbs the ladder, and what
a model has learnt can be read back and held against the truth:

    world = Sea()
    truth = world.sample(generator, 1000)             # (1000, 1): heights
    pictures = world.render(truth, 16)                # (1000, 3, 16, 16) in [-1, 1]
    world.log_prob(truth)                             # (1000,)
    world.read(pictures)                              # the heights again

As in `ldm.worlds.distribution`, `x` runs from 0 (left) to 1 (right) and `y` from 0 (bottom) to 1
(top), and a Gaussian number lies within three standard deviations of its mean: a horizon stays in
its picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from ldm.pictures import to_levels
from ldm.worlds import painting
from ldm.worlds.batches import pictures
from ldm.worlds.distribution import ATTRIBUTES, HOUSE_PROBABILITY, TRUNCATION, continuous
from ldm.worlds.scenes import Scene


class World(Protocol):
    """What every rung of the ladder has.

    `names` are the P parameters of a picture, `channels` is 1 (grey) or 3 (colour).
    """

    names: ClassVar[tuple[str, ...]]
    channels: ClassVar[int]

    def sample(self, generator: torch.Generator, n: int) -> Tensor:
        """n pictures' parameters, drawn on the CPU: (n, P) float64."""

    def render(self, parameters: Tensor, size: int) -> Tensor:
        """Parameters (n, P) -> pictures (n, channels, size, size) float32 in [-1, 1]."""

    def log_prob(self, parameters: Tensor) -> Tensor:
        """The natural logarithm of their probability, or density: (n, P) -> (n,) float64; -inf for
        what is never drawn."""

    def read(self, pictures: Tensor) -> Tensor:
        """Parameters from pixels alone: (n, channels, size, size) -> (n, P) float64. Those that a
        picture was rendered from come back; any other picture has some too."""


# --------------------------------------------------------------------------------- checkerboards


@dataclass(frozen=True)
class Checkerboards:
    """Two of the 2^9 = 512 black-and-white pictures of 3 x 3 cells, each with probability 1/2.

    The parameter is 1 where the corners are white, 0 where they are black.
    """

    names: ClassVar[tuple[str, ...]] = ("white_corners",)
    channels: ClassVar[int] = 1

    cells: int = 3
    """Along each side: 2 of 2^(cells x cells) pictures are checkerboards."""

    def sample(self, generator: torch.Generator, n: int) -> Tensor:
        """See `World`."""
        return torch.randint(2, (n, 1), generator=generator).double()

    def render(self, parameters: Tensor, size: int) -> Tensor:
        """See `World`. Cells are as equal as whole pixels allow.

        Raises:
            ValueError: a cell would have no pixel, or the shape of the parameters is wrong.
        """
        (white,) = columns(parameters, self.names)
        return (2 * white.float() - 1).view(-1, 1, 1, 1) * self._board(size)

    def log_prob(self, parameters: Tensor) -> Tensor:
        """See `World`: a probability."""
        (white,) = columns(parameters, self.names)
        return math.log(0.5) + ((white == 0) | (white == 1)).double().log()

    def read(self, pictures: Tensor) -> Tensor:
        """See `World`: the nearer of the two."""
        likeness = (pictures * self._board(pictures.shape[-1])).flatten(1).sum(dim=1)
        return (likeness > 0).double()[:, None]

    def log_prob_of_pictures(self, pictures: Tensor) -> Tensor:
        """Log 1/2 for a checkerboard, -inf for any other: (n, 1, size, size) -> (n,) float64. Each
        pixel is black or white, whichever is nearer."""
        both = self.render(torch.tensor([[0.0], [1.0]]), pictures.shape[-1])  # (2, 1, size, size)
        same = (pictures[:, None] > 0) == (both > 0)  # (n, 2, 1, size, size)
        found = same.flatten(2).all(dim=2).any(dim=1)
        return math.log(0.5) + found.double().log()

    def _board(self, size: int) -> Tensor:
        """The board with white corners, (size, size): 1 and -1."""
        if size < self.cells:
            raise ValueError(f"{self.cells} cells need {self.cells} pixels a side, not {size}")
        cell = torch.arange(size) * self.cells // size
        return 1.0 - 2.0 * ((cell[:, None] + cell) % 2)


# ------------------------------------------------------------------------------------------ sea


@dataclass(frozen=True)
class Sea:
    """Sky over sea: all that differs is the height of the horizon, a Gaussian number."""

    names: ClassVar[tuple[str, ...]] = ("horizon",)
    channels: ClassVar[int] = 3
    numbers: ClassVar[Numbers] = {"horizon": (0.5, 0.1)}
    """{name: (mean, standard deviation)}."""

    def sample(self, generator: torch.Generator, n: int) -> Tensor:
        """See `World`."""
        return draw(self.numbers, generator, n)

    def render(self, parameters: Tensor, size: int) -> Tensor:
        """See `World`.

        Raises:
            ValueError: the shape of the parameters is wrong.
        """
        (horizon,) = columns(parameters, self.names)
        sea = covered(torch.zeros_like(horizon), horizon, size).flip(1)  # (n, rows), top first
        sea = sea[:, :, None].expand(-1, -1, size)
        return mixed(torch.stack([1 - sea, sea], dim=1), SEA_COLOURS)

    def log_prob(self, parameters: Tensor) -> Tensor:
        """See `World`: a density."""
        return log_density(self.numbers, columns(parameters, self.names))

    def read(self, pictures: Tensor) -> Tensor:
        """See `World`: the share of the picture that is sea."""
        return shares(pictures, SEA_COLOURS)[:, 1].mean(dim=(1, 2))[:, None]


# ---------------------------------------------------------------------------------------- house


@dataclass(frozen=True)
class House:
    """A house on grass: where the horizon is, where the house stands, and how large it is; four
    independent Gaussian numbers.

    (x, y) is the middle of the house's foot, `size` the width of its wall.
    """

    names: ClassVar[tuple[str, ...]] = ("horizon", "x", "y", "size")
    channels: ClassVar[int] = 3
    numbers: ClassVar[Numbers] = {
        "horizon": (0.55, 0.05),
        "x": (0.50, 0.08),
        "y": (0.20, 0.04),
        "size": (0.30, 0.03),
    }
    """{name: (mean, standard deviation)}."""

    WALL: ClassVar[float] = 0.6  # its height; this and the roof's sizes are in widths of the wall
    EAVES: ClassVar[float] = 1.2
    ROOF: ClassVar[float] = 0.5

    def sample(self, generator: torch.Generator, n: int) -> Tensor:
        """See `World`."""
        return draw(self.numbers, generator, n)

    def render(self, parameters: Tensor, size: int) -> Tensor:
        """See `World`.

        Raises:
            ValueError: the shape of the parameters is wrong.
        """
        horizon, x, y, width = columns(parameters, self.names)
        ground = covered(torch.zeros_like(horizon), horizon, size)[:, :, None]  # (n, rows, 1)
        eaves = y + self.WALL * width
        wall = (
            covered(y, eaves, size)[:, :, None]
            * covered(x - width / 2, x + width / 2, size)[:, None]
        )  # (n, rows, columns)
        # A roof narrows as it rises: exact along a line, averaged over fine lines in each row.
        fine = 8 * size
        height = ((torch.arange(fine) + 0.5) / fine - eaves[:, None]) / width[:, None]
        half = self.EAVES / 2 * (1 - height / self.ROOF).clamp(min=0) * (height >= 0)
        half = half * width[:, None]  # (n, fine)
        roof = covered(x[:, None] - half, x[:, None] + half, size)  # (n, fine, columns)
        roof = roof.unflatten(1, (size, 8)).mean(dim=2).minimum(1 - wall)
        behind = 1 - wall - roof
        weights = [behind * (1 - ground), behind * ground, wall, roof]
        return mixed(torch.stack(weights, dim=1).flip(2), HOUSE_COLOURS)

    def log_prob(self, parameters: Tensor) -> Tensor:
        """See `World`: a density."""
        return log_density(self.numbers, columns(parameters, self.names))

    def read(self, pictures: Tensor) -> Tensor:
        """See `World`: area and middle of the wall, and the share of grass beside the house. Size
        and horizon come back exactly, x and y within a tenth of a pixel: where in its pixel an edge
        lies, the middle cannot tell."""
        _, ground, wall, _ = shares(pictures, HOUSE_COLOURS).flip(2).unbind(dim=1)
        size = pictures.shape[-1]
        centres = (torch.arange(size, dtype=torch.float64) + 0.5) / size
        total = wall.sum(dim=(1, 2)).clamp(min=1e-6)  # no wall at all has no middle
        width = (total / size**2 / self.WALL).sqrt()
        x = (wall.sum(dim=1) * centres).sum(dim=1) / total
        y = (wall.sum(dim=2) * centres).sum(dim=1) / total - self.WALL * width / 2
        # No house reaches into the quarter of the picture that is on the other side of it.
        quarter = size // 4
        sides = torch.stack([ground[..., :quarter], ground[..., -quarter:]]).mean(dim=(2, 3))
        return torch.stack([torch.where(x < 0.5, sides[1], sides[0]), x, y, width], dim=1)


# --------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Scenes:
    """The Horizon world (`ldm.worlds.distribution`) in the ladder's form: a scene is a row of 19
    numbers, the places of its names in `ATTRIBUTES`, then its numbers."""

    names: ClassVar[tuple[str, ...]] = tuple(Scene.__dataclass_fields__)
    channels: ClassVar[int] = 3

    def sample(self, generator: torch.Generator, n: int) -> Tensor:
        """See `World`: `Scene.sample`, seeded by the generator."""
        seed = int(torch.randint(2**62, (), generator=generator))
        rng = np.random.default_rng(seed)
        return torch.stack([as_row(Scene.sample(rng)) for _ in range(n)])

    def render(self, parameters: Tensor, size: int) -> Tensor:
        """See `World`.

        Raises:
            ValueError: the shape of the parameters is wrong, or a picture is below 8 pixels.
        """
        columns(parameters, self.names)
        return pictures([as_scene(row) for row in parameters], size)

    def log_prob(self, parameters: Tensor) -> Tensor:
        """See `World`: `scene_log_prob` of each."""
        columns(parameters, self.names)
        found = [scene_log_prob(as_scene(row)) for row in parameters]
        return torch.tensor(found, dtype=torch.float64)

    def read(self, pictures: Tensor) -> Tensor:
        """See `World`: the names alone (`ldm.worlds.reader`); the numbers are NaN."""
        from ldm.worlds.reader import read

        rows = torch.full((len(pictures), len(self.names)), math.nan, dtype=torch.float64)
        for row, picture in zip(rows, to_levels(pictures).cpu().numpy(), strict=True):
            seen = read(np.ascontiguousarray(picture))
            for place, (name, values) in enumerate(ATTRIBUTES.items()):
                row[place] = values.index(seen[name])
        return rows


def as_row(scene: Scene) -> Tensor:
    """A scene as numbers, (19,) float64, in the order of its fields."""
    places = [values.index(getattr(scene, name)) for name, values in ATTRIBUTES.items()]
    numbers = [getattr(scene, name) for name in Scenes.names[len(places) :]]
    return torch.tensor([*places, *numbers], dtype=torch.float64)


def as_scene(row: Tensor) -> Scene:
    """The scene of a row that `as_row` made."""
    values = dict(zip(Scenes.names, row.tolist(), strict=True))
    names = {name: known[int(values.pop(name))] for name, known in ATTRIBUTES.items()}
    return Scene(**names, **values)  # type: ignore[arg-type]


def scene_log_prob(scene: Scene) -> float:
    """The logarithm of the probability of a scene's names times the density of its numbers, given
    the names; -inf for a scene that `Scene.sample`, with nothing fixed, never draws."""
    gaussians = continuous(scene.attributes)
    absent = [name for name, (_, sd) in gaussians.items() if sd == 0]
    if any(getattr(scene, name) != 0 for name in absent):
        return -math.inf
    if not all(0 <= number < 1 for number in (scene.drift, scene.roll)):  # uniform: density 1
        return -math.inf
    there = {name: pair for name, pair in gaussians.items() if name not in absent}
    values = [torch.tensor([getattr(scene, name)], dtype=torch.float64) for name in there]
    return names_log_prob(scene.attributes) + log_density(there, values).item()


def names_log_prob(names: Mapping[str, str]) -> float:
    """The logarithm of the probability of a scene's eight names (`ldm.worlds.distribution`)."""
    house = [names[name] == "none" for name in ("house", "house_position", "house_size")]
    if any(house) != all(house):  # it has a colour, a place and a size, or none of them
        return -math.inf
    free = -math.log(3 * 3 * 3 * 4)  # sky, light, horizon and ground are uniform
    if names["ground"] == "sea":
        return free if all(house) and names["tree"] == "none" else -math.inf
    built = 1 - HOUSE_PROBABILITY if all(house) else HOUSE_PROBABILITY / (4 * 3 * 2)
    return free + math.log(built) - math.log(3)  # and the tree, on land


# ------------------------------------------------------------------------------- Gaussian numbers

Numbers = Mapping[str, tuple[float, float]]

INSIDE = math.erf(TRUNCATION / math.sqrt(2))  # the probability that no redraw was needed


def draw(numbers: Numbers, generator: torch.Generator, n: int) -> Tensor:
    """Independent Gaussian numbers within three standard deviations, (n, P) float64: a uniform
    number in the middle 99.73%, put through the inverse of the Gaussian's distribution function."""
    uniform = torch.rand(n, len(numbers), generator=generator, dtype=torch.float64)
    z = torch.special.ndtri(0.5 + INSIDE * (uniform - 0.5))
    mean, sd = torch.tensor(list(numbers.values()), dtype=torch.float64).unbind(dim=1)
    return mean + sd * z


def log_density(numbers: Numbers, values: list[Tensor]) -> Tensor:
    """Of independent Gaussian numbers that were redrawn until they lay within three standard
    deviations: P tensors (n,) -> (n,) float64."""
    total = torch.zeros_like(values[0], dtype=torch.float64)
    for (mean, sd), value in zip(numbers.values(), values, strict=True):
        z = (value.double() - mean) / sd
        density = -z.square() / 2 - math.log(math.sqrt(2 * math.pi) * sd * INSIDE)
        # The last bits of a value at its bound may be lost in adding and subtracting the mean.
        total = total + torch.where(z.abs() <= TRUNCATION + 1e-9, density, -math.inf)
    return total


def columns(parameters: Tensor, names: tuple[str, ...]) -> list[Tensor]:
    """Parameters (n, P) as P tensors (n,), or a ValueError that says what they should be."""
    if parameters.ndim != 2 or parameters.shape[1] != len(names):
        wanted = f"(n, {len(names)}): {', '.join(names)}"
        raise ValueError(f"parameters must be {wanted}; these are {list(parameters.shape)}")
    return list(parameters.unbind(dim=1))


# --------------------------------------------------------------------------------------- pixels


def palette(*codes: str) -> Tensor:
    """Colours by their hexadecimal codes, as pictures have them: (k, 3) in [-1, 1]."""
    return torch.from_numpy(np.stack([painting.rgb(code) for code in codes])) * 2 - 1


SEA_COLOURS = ("8cc8f0", "1f75a3")
HOUSE_COLOURS = ("8cc8f0", "6dae4c", "d6483e", "5d4a4c")  # sky, grass, wall, roof


def covered(low: Tensor, high: Tensor, size: int) -> Tensor:
    """How much of each of `size` equal parts of [0, 1] lies between low and high: (...) each ->
    (..., size). The picture's edge cuts off what is outside, and the sum is exact otherwise."""
    edges = torch.arange(size + 1, dtype=low.dtype) / size
    overlap = torch.minimum(high[..., None], edges[1:]) - torch.maximum(low[..., None], edges[:-1])
    return overlap.clamp(min=0) * size


def mixed(weights: Tensor, codes: tuple[str, ...]) -> Tensor:
    """Pixels from the share that each colour has in them: (n, k, h, w) -> (n, 3, h, w) float32."""
    return torch.einsum("nkhw,kc->nchw", weights.float(), palette(*codes))


def shares(pictures: Tensor, codes: tuple[str, ...]) -> Tensor:
    """The share that each colour has in each pixel, `mixed` turned around by least squares:
    (n, 3, h, w) -> (n, k, h, w) float64. They sum to 1; that of a foreign colour may be outside
    [0, 1]."""
    first, *others = palette(*codes).double().unbind()
    towards = torch.stack([colour - first for colour in others], dim=1)  # (3, k - 1)
    offset = pictures.double() - first.view(-1, 1, 1)
    rest = torch.einsum("kc,nchw->nkhw", torch.linalg.pinv(towards), offset)
    return torch.cat([1 - rest.sum(dim=1, keepdim=True), rest], dim=1)
