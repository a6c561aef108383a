"""How the Horizon world looks: its colours, its shapes, and the order in which they are painted.

A scene's names and numbers (`ldm.worlds.distribution`) say *what* there is; this module turns them
into pixels, from back to front: sky, stars, glow, clouds, sun or moon, ground, tree, house. Lengths
are fractions of the picture's width, `x` to the right and `y` upwards, so the same scene looks the
same at every size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm.worlds.distribution import Parameters

Array = npt.NDArray[np.float32]

# ------------------------------------------------------------------------------------ colours


def rgb(code: str) -> Array:
    """A colour's hexadecimal code as numbers in [0, 1]: "ff0000" is (1.0, 0.0, 0.0)."""
    return np.array([int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)], np.float32)  # (3,)


def ramp(stops: tuple[str, ...], t: Array) -> Array:
    """Colour along evenly spaced stops: t (...) in [0, 1] -> (..., 3)."""
    at = np.linspace(0, 1, len(stops))
    table = np.stack([rgb(code) for code in stops])  # (stops, 3)
    return np.stack([np.interp(t, at, table[:, c]) for c in range(3)], -1).astype(np.float32)


# The colours of each hour, as they look in its light.
# The sky's: at the horizon, half way up, at the top.
SKY = {
    "day": ("c2e4f7", "8cc8f0", "58a4e2"),
    "sunset": ("ffd48a", "f08a76", "6a5a9c"),
    "night": ("4f62a0", "2a3a74", "131d48"),
}
# The ground's: far, middle and near.
GROUND = {
    "day": {
        "grass": ("a8d27e", "86c05c", "6dae4c"),
        "sand": ("f0d9a2", "e8c987", "dfba72"),
        "snow": ("f1f6fb", "e4edf6", "f5fafe"),
        "sea": ("5fb4cf", "2f93bc", "1f75a3"),
    },
    "sunset": {
        "grass": ("b0ae58", "8fa046", "738f3a"),
        "sand": ("eab478", "e2a666", "d4955a"),
        "snow": ("cdb6cc", "dcc5d4", "ead6dc"),
        "sea": ("e09684", "96698c", "5a4f80"),
    },
    "night": {
        "grass": ("5d8c86", "4a7d6c", "3b6c58"),
        "sand": ("b0a08a", "a39074", "938064"),
        "snow": ("8794c6", "949fd0", "a2add9"),
        "sea": ("2f5888", "1d4472", "143154"),
    },
}
# The house's.
WALL = {
    "day": {"red": "d6483e", "blue": "3f6fd0", "white": "fbf6ea", "yellow": "f6cc45"},
    "sunset": {"red": "d2402f", "blue": "4860b4", "white": "fff0da", "yellow": "f8bc3a"},
    "night": {"red": "b04450", "blue": "4264cc", "white": "d4d4ea", "yellow": "d2ae54"},
}
ROOF = {"day": "5d4a4c", "sunset": "573b3a", "night": "42384e"}
GLASS = {"day": "bfe0ee", "sunset": "ffdf90", "night": "ffd766"}
# The sun's or moon's disc, the glow around it, and what it shines on.
LIGHT = {"day": "fff3b0", "sunset": "fff0c0", "night": "f6f2da"}
GLOW = {"day": "fff6d0", "sunset": "ffc070", "night": "8fa4dc"}
CLOUD = {"day": "fbfdff", "sunset": "ffb49a"}
FOAM = {"day": "d6f1f7", "sunset": "ffc9a0", "night": "7f9bd0"}
# Every other colour is given as it looks by day; the light of the hour multiplies it.
AMBIENT = {"day": "ffffff", "sunset": "ffd2b4", "night": "8c92c8"}
LEAF = {"grass": "2f7d46", "sand": "3d8a4a", "snow": "2c6a5c"}


def _lit(scene: Parameters, code: str) -> Array:
    """A surface's colour in the light of the hour."""
    return rgb(code) * rgb(AMBIENT[scene.sky])


# ------------------------------------------------------------------------------------ geometry
#
# A shape is its coverage: an array (n, n) that is 1 inside, 0 outside, and at an edge the share of
# the pixel that is inside. It comes from a signed distance d (positive inside, in picture widths):
# an edge blurs over exactly one pixel, whatever the size of the picture.


@dataclass(frozen=True)
class Grid:
    """Pixel centres of an n x n picture: x (1, n) to the right and y (n, 1) upwards."""

    n: int
    x: Array
    y: Array

    @staticmethod
    def of(n: int) -> Grid:
        """Raises ValueError below 8 pixels a side, where nothing can be seen."""
        if n < 8:
            raise ValueError(f"a picture needs at least 8 pixels a side, not {n}")
        centres = ((np.arange(n) + 0.5) / n).astype(np.float32)
        return Grid(n, centres[None, :], centres[::-1, None].copy())

    def cover(self, inside: npt.NDArray[np.floating[Any]], softness: float = 0.0) -> Array:
        """Coverage from a signed distance; the edge is `softness` wide, or a pixel if more."""
        width = max(softness, 1.0 / self.n)
        coverage: Array = np.clip(0.5 + inside / np.float32(width), 0.0, 1.0, dtype=np.float32)
        return coverage

    def box(self, x: float, y: float, width: float, height: float) -> Array:
        """A rectangle standing on (x, y)."""
        return self.cover(width / 2 - abs(self.x - x)) * self.cover(
            height / 2 - abs(self.y - (y + height / 2))
        )

    def disc(self, x: float, y: float, radius: float, softness: float = 0.0) -> Array:
        """A disc around (x, y)."""
        return self.cover(
            np.float32(radius) - np.hypot(self.x - np.float32(x), self.y - np.float32(y)), softness
        )

    def ellipse(self, x: float, y: float, a: float, b: float, softness: float) -> Array:
        """An ellipse around (x, y) with half axes a and b; softness in units of the shorter, b."""
        r = np.sqrt(((self.x - x) / a) ** 2 + ((self.y - y) / b) ** 2)
        return self.cover((1.0 - r) * b, softness * b)

    def wedge(self, x: float, y: float, bottom: float, top: float, height: float) -> Array:
        """A trapezoid standing on (x, y), `bottom` wide below and `top` wide above."""
        slope = (bottom - top) / 2 / height
        half = bottom / 2 - slope * (self.y - y)
        side = (half - abs(self.x - x)) / np.float32(np.hypot(1.0, slope))
        return self.cover(side) * self.cover(height / 2 - abs(self.y - (y + height / 2)))

    def glow(self, x: float, y: float, radius: float) -> Array:
        """A Gaussian around (x, y), 1 at its centre; `radius` is its standard deviation."""
        d2 = (self.x - x) ** 2 + (self.y - y) ** 2
        return np.exp(-d2 / np.float32(2 * radius * radius))


# ---------------------------------------------------------------------------------- silhouettes


def _ridge(scene: Parameters, grid: Grid, depth: float) -> Array:
    """The height (1, n) of a ridge of the land: depth 1 is the horizon, 0 the lower edge."""
    if scene.ground == "sea":
        return np.full_like(grid.x, scene.horizon_height * depth)
    # Hills are round, dunes long and steep on one side, snow drifts long and low.
    swing, waves = {"grass": (0.016, 1.1), "sand": (0.013, 0.8), "snow": (0.011, 0.9)}[scene.ground]
    phase = 2 * np.pi * (scene.roll + 2.6 * depth)
    turn = 2 * np.pi * waves * grid.x + np.float32(phase)
    curve: Array = np.sin(turn) + 0.45 * np.sin(1.9 * turn + np.float32(1.7 * phase))
    if scene.ground == "sand":
        curve = np.sin(turn + 0.6 * np.sin(turn))
    height: Array = scene.horizon_height * depth + np.float32(swing) * curve
    return height


def silhouettes(scene: Parameters, grid: Grid) -> dict[str, Array]:
    """Coverage (n, n) of everything that stands before the sky, back to front.

    The names are those of the scene's masks: "sun" or "moon", "ground", "tree", "house".
    """
    shapes: dict[str, Array] = {}
    if scene.light != "none":
        shapes["moon" if scene.sky == "night" else "sun"] = grid.disc(
            scene.light_x, scene.light_y, _light_radius(scene)
        )
    shapes["ground"] = grid.cover(_ridge(scene, grid, 1.0) - grid.y)
    if scene.tree != "none":
        trunk, crown = _tree_parts(scene, grid)
        shapes["tree"] = np.maximum(trunk, crown)
    if scene.house != "none":
        parts = _house_parts(scene, grid)
        shapes["house"] = np.maximum(np.maximum(parts["wall"], parts["roof"]), parts["chimney"])
    return shapes


def _light_radius(scene: Parameters) -> float:
    return {"day": 0.062, "sunset": 0.068, "night": 0.058}[scene.sky]


def _house_parts(scene: Parameters, grid: Grid) -> dict[str, Array]:
    """Coverage of the parts of the house, which stands on (house_x, house_y)."""
    x, y, w = scene.house_x, scene.house_y, scene.house_width
    chimney_side = 0.24 if scene.roll < 0.5 else -0.24
    windows = np.maximum(
        grid.box(x - 0.245 * w, y + 0.19 * w, 0.17 * w, 0.19 * w),
        grid.box(x + 0.245 * w, y + 0.19 * w, 0.17 * w, 0.19 * w),
    )
    return {
        "chimney": grid.box(x + chimney_side * w, y + 0.6 * w, 0.11 * w, 0.31 * w),
        "wall": grid.box(x, y, 0.86 * w, 0.52 * w),
        "roof": grid.wedge(x, y + 0.49 * w, 1.04 * w, 0.56 * w, 0.35 * w),
        "windows": windows,
        "door": grid.box(x, y, 0.16 * w, 0.33 * w),
    }


def _tree_parts(scene: Parameters, grid: Grid) -> tuple[Array, Array]:
    """Coverage of trunk and crown: a round tree on grass, a palm on sand, a fir on snow."""
    x, y, h = scene.tree_x, _tree_foot(scene), scene.tree_height
    if scene.ground == "grass":
        crown = grid.ellipse(x, y + 0.66 * h, 0.24 * h, 0.30 * h, 0.0)
        for dx, dy, r in ((-0.15, 0.53, 0.17), (0.16, 0.56, 0.17), (0.04, 0.82, 0.18)):
            crown = np.maximum(crown, grid.disc(x + dx * h, y + dy * h, r * h))
        return grid.box(x, y, 0.10 * h, 0.45 * h), crown
    if scene.ground == "snow":
        crown = grid.wedge(x, y + 0.14 * h, 0.50 * h, 0.16 * h, 0.30 * h)
        crown = np.maximum(crown, grid.wedge(x, y + 0.38 * h, 0.42 * h, 0.12 * h, 0.28 * h))
        crown = np.maximum(crown, grid.wedge(x, y + 0.62 * h, 0.33 * h, 0.0, 0.38 * h))
        return grid.box(x, y, 0.09 * h, 0.2 * h), crown
    # The palm leans towards the middle of the picture; its fronds are arcs that hang from the top.
    lean = 0.10 * h if x < 0.5 else -0.10 * h
    v = np.clip((grid.y - y) / np.float32(0.76 * h), 0.0, 1.0)  # (n, 1): 0 at the foot, 1 on top
    across = abs(grid.x - (x + lean * v * v))
    trunk = grid.cover((0.055 - 0.015 * v) * h - across) * grid.cover(
        0.38 * h - abs(grid.y - (y + 0.38 * h))
    )
    cx, cy = x + lean, y + 0.76 * h
    crown = grid.disc(cx, cy, 0.07 * h)
    for reach, lift, drop in (
        (0.34, 0.55, 1.00),
        (-0.34, 0.55, 1.00),
        (0.30, 0.25, 1.15),
        (-0.30, 0.25, 1.15),
        (0.24, 1.00, 0.80),
        (-0.24, 1.00, 0.80),
    ):
        s = (grid.x - cx) / np.float32(reach * h)  # (1, n): 0 at the top, 1 at the tip
        curve = cy + abs(reach) * h * (lift * s - drop * s * s)
        slope = lift - 2 * drop * s
        thick = 0.075 * h * np.sqrt(np.clip(s * (1.06 - s) * 4, 0.0, 1.0))
        frond = (thick - abs(grid.y - curve) / np.sqrt(1 + slope * slope)).astype(np.float32)
        crown = np.maximum(crown, grid.cover(np.where((s > 0) & (s < 1.06), frond, -1.0)))
    return trunk, crown


def _tree_foot(scene: Parameters) -> float:
    """A tree stands a little behind a house: higher up the picture."""
    return 0.62 * scene.horizon_height


# ------------------------------------------------------------------------------------ painting


def paint(scene: Parameters, size: int) -> Array:
    """The picture of a scene: (size, size, 3), 0 to 1 but for a little overshoot of the tint.

    Raises ValueError when `size` is below 8.
    """
    grid = Grid.of(size)
    shapes = silhouettes(scene, grid)
    canvas = np.empty((size, size, 3), np.float32)
    _paint_sky(scene, grid, canvas, shapes)
    _paint_ground(scene, grid, canvas, shapes["ground"])
    if scene.tree != "none":
        _paint_tree(scene, grid, canvas)
    if scene.house != "none":
        _paint_house(scene, grid, canvas)
    # The tint warms or cools everything a little: red up and blue down, or the reverse.
    canvas *= 1.0 + np.float32(0.012 * scene.tint) * np.array([1.0, 0.0, -1.0], np.float32)
    return canvas


def _lay(canvas: Array, alpha: Array, colour: Array) -> None:
    """Lay `colour`, (3,) or (n, n, 3), over `canvas` (n, n, 3) by `alpha` (n, n), in place."""
    canvas += alpha[..., None] * (colour - canvas)


def _paint_sky(scene: Parameters, grid: Grid, canvas: Array, shapes: dict[str, Array]) -> None:
    h = scene.horizon_height
    canvas[:] = ramp(SKY[scene.sky], np.clip((grid.y - h) / np.float32(1 - h), 0.0, 1.0))
    if scene.sky == "night":
        _paint_stars(scene, grid, canvas)
    if scene.light != "none":
        glow = grid.glow(scene.light_x, scene.light_y, 0.11)
        wide = grid.glow(scene.light_x, scene.light_y, 0.26)
        strength = {"day": 0.5, "sunset": 0.75, "night": 0.4}[scene.sky]
        _lay(canvas, np.float32(strength) * (0.6 * glow + 0.4 * wide), rgb(GLOW[scene.sky]))
    if scene.sky != "night":
        _paint_clouds(scene, grid, canvas)
    if scene.light != "none":
        disc = shapes["moon" if scene.sky == "night" else "sun"]
        _lay(canvas, disc, rgb(LIGHT[scene.sky]))
        if scene.sky == "night":
            r = _light_radius(scene)
            for dx, dy, s in ((-0.3, 0.25, 0.24), (0.3, -0.1, 0.18), (-0.05, -0.45, 0.14)):
                spot = grid.disc(scene.light_x + dx * r, scene.light_y + dy * r, s * r, 0.012)
                _lay(canvas, np.float32(0.5) * spot, rgb("d8d6c8"))


@cache
def _star_map() -> Array:
    """x, y, brightness (26, 3) of the world's stars: a fixed sky, which only drifts."""
    return np.random.default_rng(7).random((26, 3)).astype(np.float32)


def _paint_stars(scene: Parameters, grid: Grid, canvas: Array) -> None:
    h = scene.horizon_height
    n = grid.n
    for star_x, star_y, bright in _star_map():
        x, y = (star_x + scene.drift) % 1.0, h + (1 - h) * (0.12 + 0.88 * star_y)
        radius = 0.005 + 0.005 * bright
        # A star lights a handful of pixels only, so only those are touched.
        rows = slice(max(int((1 - y - 0.03) * n), 0), int((1 - y + 0.03) * n) + 2)
        columns = slice(max(int((x - 0.03) * n), 0), int((x + 0.03) * n) + 2)
        d2 = (grid.x[:, columns] - x) ** 2 + (grid.y[rows] - y) ** 2
        # At low resolution a star spreads over a pixel and dims by as much: the sum stays.
        spread = np.float32(radius**2 + (0.45 / n) ** 2)
        alpha = np.float32((0.5 + 0.5 * bright) * radius**2 / spread) * np.exp(-d2 / spread)
        _lay(canvas[rows, columns], alpha, rgb("fffbe8"))


def _paint_clouds(scene: Parameters, grid: Grid, canvas: Array) -> None:
    h = scene.horizon_height
    clear = np.ones((), np.float32)
    if scene.light != "none":  # clouds keep off the sun
        clear = 1.0 - grid.glow(scene.light_x, scene.light_y, 0.075)
    for start, level, scale in ((0.1, 0.70, 1.0), (0.62, 0.47, 0.8), (0.95, 0.86, 0.65)):
        x = (start + scene.drift) % 1.0 * 1.4 - 0.2  # from beyond one edge to beyond the other
        y = h + (1 - h) * level
        if scene.sky == "day":
            alpha = np.zeros_like(canvas[..., 0])
            for dx, dy, a, b in (
                (0.0, 0.012, 0.085, 0.045),
                (-0.075, 0.0, 0.06, 0.03),
                (0.08, -0.002, 0.07, 0.033),
            ):
                puff = grid.ellipse(x + dx * scale, y + dy * scale, a * scale, b * scale, 0.9)
                alpha = np.maximum(alpha, puff)
            _lay(canvas, np.float32(0.85) * alpha * clear, rgb(CLOUD[scene.sky]))
        else:
            alpha = grid.ellipse(x, y, 0.24 * scale, 0.02 * scale, 1.6)
            alpha = np.maximum(alpha, grid.ellipse(x + 0.1, y - 0.025, 0.15 * scale, 0.013, 1.6))
            _lay(canvas, np.float32(0.55) * alpha * clear, rgb(CLOUD[scene.sky]))


def _paint_ground(scene: Parameters, grid: Grid, canvas: Array, ground: Array) -> None:
    if scene.ground == "sea":
        _paint_sea(scene, grid, canvas, ground)
        return
    far, middle, near = GROUND[scene.sky][scene.ground]
    _lay(canvas, ground, rgb(far))
    for depth, code in ((0.80, middle), (0.42, near)):
        ridge = _ridge(scene, grid, depth)
        below = grid.cover(ridge - grid.y)
        _lay(canvas, below, rgb(code))
        # A soft light runs along each ridge.
        crest = below * np.exp(-np.maximum(ridge - grid.y, 0.0) / np.float32(0.02))
        _lay(canvas, np.float32(0.25) * crest, _lit(scene, "ffffff"))
    # The lower edge darkens a little, which leads the eye to the middle.
    edge = ground * np.clip(1 - grid.y / np.float32(0.3), 0, 1)
    _lay(canvas, np.float32(0.16) * edge, canvas * rgb("8c90b0"))


def _paint_sea(scene: Parameters, grid: Grid, canvas: Array, ground: Array) -> None:
    h = scene.horizon_height
    depth = np.clip(1 - grid.y / np.float32(h), 0.0, 1.0)  # (n, 1): 0 at the horizon, 1 nearest
    _lay(canvas, ground, np.broadcast_to(ramp(GROUND[scene.sky]["sea"], depth), canvas.shape))
    # Waves are rows of soft strokes that grow towards the viewer.
    turn = np.float32(2 * np.pi)
    row = 9.0 * depth**0.6
    sway = np.float32(0.35) * np.sin(turn * (1.5 * grid.x + np.float32(scene.roll)) + row)
    wave = np.clip(np.sin(turn * row + 3 * sway) - 0.35, 0, 1)
    wave *= 0.5 + 0.5 * np.sin(turn * (2.3 * grid.x - np.float32(scene.roll)) + 2.1 * row)
    _lay(canvas, (np.float32(0.28) * ground * wave).astype(np.float32), rgb(FOAM[scene.sky]))
    if scene.light != "none":  # the light's path on the water
        width = 0.045 + 0.10 * depth
        path = np.exp(-(((grid.x - scene.light_x) / width) ** 2))
        strength = {"day": 0.35, "sunset": 0.7, "night": 0.5}[scene.sky]
        glitter = strength * (0.45 + 0.55 * np.clip(np.sin(turn * row + 3 * sway), 0, 1))
        colour = rgb("ffffff" if scene.sky == "day" else LIGHT[scene.sky])
        _lay(canvas, (ground * path * glitter).astype(np.float32), colour)


def _shadow(scene: Parameters, grid: Grid, canvas: Array, x: float, y: float, width: float) -> None:
    """A soft shadow on the ground, away from the light."""
    away = {"none": 0.0, "left": 0.25, "right": -0.25}[scene.light] * width
    alpha = grid.ellipse(x + away, y - 0.004, 0.62 * width, 0.07 * width + 0.006, 1.2)
    _lay(canvas, np.float32(0.32) * alpha, canvas * rgb("40486a"))


def _paint_tree(scene: Parameters, grid: Grid, canvas: Array) -> None:
    x, y, h = scene.tree_x, _tree_foot(scene), scene.tree_height
    _shadow(scene, grid, canvas, x, y, 0.36 * h)
    trunk, crown = _tree_parts(scene, grid)
    _lay(canvas, trunk, _lit(scene, "8a6446"))
    _lay(canvas, crown, _lit(scene, LEAF[scene.ground]))
    # One side of the crown catches the light.
    side = -0.10 if scene.light == "left" else 0.10 if scene.light == "right" else 0.0
    shine = crown * grid.glow(x + side * h, y + 0.80 * h, 0.16 * h)
    _lay(canvas, np.float32(0.35) * shine, _lit(scene, "7fc36a"))
    if scene.ground == "snow":
        for level, wide in ((0.38, 0.16), (0.62, 0.13)):
            cap = crown * grid.ellipse(x, y + (level + 0.05) * h, wide * h, 0.05 * h, 0.8)
            _lay(canvas, np.float32(0.8) * cap, _lit(scene, "f4f9ff"))


def _paint_house(scene: Parameters, grid: Grid, canvas: Array) -> None:
    x, y, w = scene.house_x, scene.house_y, scene.house_width
    _shadow(scene, grid, canvas, x, y, w)
    parts = _house_parts(scene, grid)
    wall, wall_colour = parts["wall"], rgb(WALL[scene.sky][scene.house])
    _lay(canvas, parts["chimney"], _lit(scene, "7a5c58"))
    _lay(canvas, wall, wall_colour)
    # The wall is a little darker under the eaves and away from the light.
    _lay(canvas, wall * grid.cover(np.float32(y + 0.05 * w) - grid.y), _lit(scene, "8d8783"))
    eaves = wall * grid.cover(grid.y - np.float32(y + 0.44 * w), 0.10 * w)
    _lay(canvas, np.float32(0.30) * eaves, wall_colour * np.float32(0.45))
    _lay(canvas, parts["door"], _lit(scene, "6b4a38"))
    frame = _lit(scene, "fffaf0") if scene.house != "white" else _lit(scene, "a8b4bc")
    glass = rgb(GLASS[scene.sky])
    _lay(canvas, parts["windows"], frame)
    for dx in (-0.245, 0.245):
        _lay(canvas, grid.box(x + dx * w, y + 0.21 * w, 0.13 * w, 0.15 * w), glass)
    _lay(canvas, parts["roof"], rgb(ROOF[scene.sky]))
    top = parts["roof"] * grid.cover(grid.y - np.float32(y + 0.72 * w), 0.2 * w)
    _lay(canvas, np.float32(0.35) * top, _lit(scene, "8a7472"))
    if scene.sky == "night":  # lamplight falls out of the windows
        halo = grid.glow(x, y + 0.24 * w, 0.30 * w)
        _lay(canvas, np.float32(0.08) * halo, rgb("ffcf70"))
