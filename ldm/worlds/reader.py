"""The reader: from a picture of the Horizon world back to its names, by hand-written vision.

Nothing here is learned. The reader knows the world's colours and shapes (`ldm.worlds.painting`) and
explains a picture from back to front, as it was painted:

1. the *sky* is the hour whose upper edge looks most like the picture's;
2. the *ground* is the one whose lower edge, at that hour, looks most like the picture's;
3. the *horizon* is where a backdrop of that sky over that ground fits best;
4. the *light* is the disc, in the sky on either side, that its colour explains best;
5. *house* and *tree* are where a small drawing of one explains what the backdrop does not: the
   clearer of the two first, the other in what is left. What explains too little is "none": a smear
   is not a house.

It works at 64 x 64 pixels whatever the picture's size, and reads sums over many pixels only, so
that blur, noise and the marks of a lossy autoencoder move it little.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ldm.worlds import painting
from ldm.worlds.distribution import ATTRIBUTES
from ldm.worlds.painting import CLOUD, GROUND, LIGHT, SKY
from ldm.worlds.scenes import Scene

if TYPE_CHECKING:
    from PIL.Image import Image

Array = npt.NDArray[np.float32]

N = 64  # pixels a side, while reading
Y = ((np.arange(N)[::-1] + 0.5) / N).astype(np.float32)  # the height of each row of pixels

SOFT = np.float32(20.0)  # grey levels: differences below this are noise (see `_distance`)

RIM = 2  # pixels around a thing that belong to no other of several
RADIUS = 2  # pixels; a light's disc is nearly 4, but blur eats it from the rim

# How much of what stands before the backdrop a shape must explain to count as seen; 1 is all.
SEEN_LIGHT = 0.40
SEEN_HOUSE = 0.50
SEEN_TREE = 0.50
COUNTED = 0.65  # and to count as one of several
SHAPED = 0.30  # how much of what stands before a patch of one colour a house must explain
CONTRAST = 20.0  # grey levels: and how far, at least, that must bring the pixels it covers


def read(image: Image | npt.NDArray[np.uint8]) -> dict[str, str]:
    """Every attribute of `ldm.worlds.distribution.ATTRIBUTES`, read from the pixels alone.

    `image` is an RGB picture or a uint8 array (height, width, 3), square, of any size (32 and more
    make sense). Sky, ground and horizon are always the nearest of their values; light, house and
    tree are "none" unless they are clearly there. Raises ValueError for another shape or type.
    """
    return look(image).names


@dataclass(frozen=True)
class Seen:
    """What the reader makes of a picture.

    Attributes:
        pixels: the picture, (64, 64, 3) float32 from 0 to 255.
        names: every attribute, as `read` gives them.
        numbers: where things are, to a pixel: the horizon's height, and the places of what is
            there, as in `ldm.worlds.distribution`.
    """

    pixels: Array
    names: dict[str, str]
    numbers: dict[str, float]


def look(image: Image | npt.NDArray[np.uint8]) -> Seen:
    """`read`, with places. Raises ValueError as it does."""
    pixels, sky, ground, height, backdrop = _explained(image)
    horizon = "low" if height < 0.38 else "middle" if height < 0.54 else "high"
    house, tree = _things(smooth(pixels), backdrop, sky, ground, height)
    light, place = _light(pixels, backdrop, sky, height)
    names = {
        "sky": sky,
        "light": light,
        "horizon": horizon,
        "ground": ground,
        "house": house.colour,
        "house_position": house.position,
        "house_size": house.size,
        "tree": tree.position,
    }
    numbers = {"horizon_height": height}
    if light != "none":
        numbers |= {"light_x": place[0], "light_y": place[1]}
    if house.colour != "none":
        numbers |= {"house_x": house.foot[0], "house_y": house.foot[1]}
    if tree.position != "none":
        numbers["tree_x"] = tree.foot[0]
    return Seen(pixels, names, numbers)


def count(image: Image | npt.NDArray[np.uint8]) -> dict[str, int]:
    """How many houses, trees, suns and moons there are: `{"house": n, "tree": n, "sun": n,
    "moon": n}`.

    Any number, anywhere along the horizon, where a scene has one of each at most: a model may draw
    more. Where there are several they have one size at least between them, and what is half hidden
    is not counted. It takes more to be counted than to be read, as nothing else speaks for what
    should not be there. Raises ValueError as `read` does.
    """
    pixels, sky, ground, height, backdrop = _explained(image)
    found = {"house": 0, "tree": 0, "sun": 0, "moon": 0}
    seen, _ = _discs(pixels, backdrop, sky, height)
    while seen.max() >= SEEN_LIGHT:
        found["moon" if sky == "night" else "sun"] += 1
        i, j = np.unravel_index(int(seen.argmax()), seen.shape)
        around = 4 * RADIUS  # a disc across
        seen[max(i - around, 0) : i + around + 1, max(j - around, 0) : j + around + 1] = -1.0
    if ground == "sea":
        return found
    # The clearest first, as in `_things`; then again, in what it leaves.
    names, free = {"sky": sky, "ground": ground}, np.ones((N, N), np.float32)
    soft = smooth(pixels)
    while True:
        house = _house(soft, backdrop, free, names, height)
        tree = _tree(soft, backdrop, free, names, height, reach=0.5)
        first = max(house, tree, key=lambda thing: thing.explained)
        if first.explained < COUNTED:
            return found
        found["house" if first is house else "tree"] += 1
        # With a rim: the fringe of a palm looks a little like another palm.
        taken = np.zeros((N, N), np.float32)
        taken[first.box] = first.cover
        free[_near(taken, RIM)] = 0.0


def _near(shape: Array, pixels: int) -> npt.NDArray[np.bool_]:
    """Where (N, N) a shape is, or is so many pixels away."""
    wide = np.pad(shape, pixels)
    span = 2 * pixels + 1
    near: npt.NDArray[np.bool_] = (
        np.lib.stride_tricks.sliding_window_view(wide, (span, span)).max((2, 3)) > 0
    )
    return near


def _explained(
    image: Image | npt.NDArray[np.uint8],
) -> tuple[Array, str, str, float, Array]:
    """The picture's pixels (N, N, 3); its sky, its ground, the height of its horizon; and the
    backdrop (N, 3) that these make."""
    pixels = _at_reading_size(image)
    sky = _nearest(np.median(pixels[Y > 0.92], (0, 1)), {k: v[-1] for k, v in SKY.items()})
    ground = _nearest(
        np.median(pixels[Y < 0.08], (0, 1)), {k: v[-1] for k, v in GROUND[sky].items()}
    )
    return pixels, sky, ground, *_horizon(pixels, sky, ground)


def _at_reading_size(image: Image | npt.NDArray[np.uint8]) -> Array:
    """Any picture as (N, N, 3), 0 to 255."""
    from PIL import Image as PILImage

    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"an array to read is (height, width, 3) of uint8, not {image.shape} {image.dtype}"
            )
        image = PILImage.fromarray(image)
    small = image.convert("RGB")
    if small.width != small.height:
        raise ValueError(f"a picture to read is square, not {small.width} x {small.height}")
    if small.width != N:
        # Averaging whole boxes is what rendering at N pixels does too.
        by = PILImage.Resampling.BOX if small.width > N else PILImage.Resampling.BILINEAR
        small = small.resize((N, N), by)
    return np.asarray(small, np.float32)


def _rgb(code: str) -> Array:
    """A colour's hexadecimal code in grey levels (3,)."""
    return 255 * painting.rgb(code)


def _distance(a: Array, b: Array) -> Array:
    """Over the last axis, in grey levels: Euclidean, but flat within SOFT of 0.

    Noise turns every distance of 0 into one of its own size; a flat bottom hides that.
    """
    distance: Array = np.sqrt(((a - b) ** 2).sum(-1) + SOFT**2) - SOFT
    return distance


def _nearest(colour: Array, codes: dict[str, str]) -> str:
    """The name of the colour that is closest to `colour` (3,)."""
    return min(codes, key=lambda name: float(_distance(colour, _rgb(codes[name]))))


# ----------------------------------------------------------------------------------- backdrop


@lru_cache(maxsize=1024)
def _backdrop(sky: str, ground: str, height: float) -> Array:
    """What each row (N, 3) shows where nothing stands in front of it."""
    above = 255 * painting.ramp(SKY[sky], (Y - height) / (1 - height))
    if ground == "sea":
        below = 255 * painting.ramp(GROUND[sky]["sea"], 1 - Y / height)
    else:
        ridges = np.digitize(Y / height, (0.42, 0.80))  # 0 near, 1 middle, 2 far
        below = np.stack([_rgb(code) for code in GROUND[sky][ground][::-1]])[ridges]
    share = np.clip((height - Y) * N + 0.5, 0, 1)[:, None]  # of the row that lies below
    rows: Array = (share * below + (1 - share) * above).astype(np.float32)
    return rows


def _horizon(pixels: Array, sky: str, ground: str) -> tuple[float, Array]:
    """The height at which the backdrop fits best, and that backdrop (N, 3)."""

    columns = pixels[:, ::2]  # half of them say as much, in half the time

    def misfit(height: float) -> float:
        # Whatever stands in front is equally wrong at any height: cap what it costs.
        rows = _backdrop(sky, ground, height)[:, None]  # (N, 1, 3)
        return float(np.minimum(_distance(columns, rows), 60.0).sum())

    best = min((percent / 100 for percent in range(22, 71)), key=misfit)
    return best, _backdrop(sky, ground, best)


# --------------------------------------------------------------------------------------- light


def _light(
    pixels: Array, backdrop: Array, sky: str, height: float
) -> tuple[str, tuple[float, float]]:
    """Which side the sun or moon is on, the disc that is best explained by its colour; and where
    its centre is."""
    seen, x = _discs(pixels, backdrop, sky, height)
    sides = {"left": abs(x - 0.17) < 0.09, "right": abs(x - 0.83) < 0.09}
    side = max(sides, key=lambda side: float(seen[:, sides[side]].max()))
    seen[:, ~sides[side]] = -1.0
    i, j = np.unravel_index(int(seen.argmax()), seen.shape)
    return side if seen[i, j] >= SEEN_LIGHT else "none", (float(x[j]), float(Y[RADIUS + i]))


def _discs(pixels: Array, backdrop: Array, sky: str, height: float) -> tuple[Array, Array]:
    """How much a disc of the light's colour explains, by its centre: (N - 4, N - 4), 1 for all
    and 0 or less for nothing, and the centres' x (N - 4,)."""
    lit = _rgb(LIGHT[sky])
    rows = np.broadcast_to(backdrop[:, None], pixels.shape)
    otherwise, most = _distance(pixels, rows), _distance(rows, lit)
    if sky != "night":
        # A cloud is bright too: what lies between sky and cloud speaks for a cloud.
        way = _rgb(CLOUD[sky]) - rows
        share = ((pixels - rows) * way).sum(-1) / (way * way).sum(-1)
        cloudy = (rows + np.clip(share, 0, 1)[..., None] * way).astype(np.float32)
        otherwise = _distance(pixels, cloudy)
        most = np.minimum(most, _distance(_rgb(CLOUD[sky]), lit))
    evidence = otherwise - _distance(pixels, lit)
    span = np.arange(-RADIUS, RADIUS + 1)
    disc = (np.hypot(span[:, None], span) <= RADIUS + 0.3).astype(np.float32)  # (5, 5)
    windows = np.lib.stride_tricks.sliding_window_view(
        np.stack([evidence, most]), disc.shape, (1, 2)
    )
    sums = np.einsum("kijhw,hw->kij", windows, disc)
    seen = sums[0] / sums[1]  # 1: all of the disc is light; 0 or less: none of it
    x = ((np.arange(seen.shape[1]) + RADIUS + 0.5) / N).astype(np.float32)
    seen[Y[RADIUS:-RADIUS] < height + 0.06] = -1.0
    return seen, x


# ---------------------------------------------------------------------------- house and tree
#
# Both are found by their looks: a small picture of the thing, cut out of a scene that shows it, is
# held against every place where it may stand.


def smooth(pixels: Array) -> Array:
    """A light blur: a sharp picture and a slightly blurred one then look alike."""
    wide = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")  # (N + 2, N + 2, 3)
    tall: Array = wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]  # (N + 2, N, 3)
    soft: Array = (tall[:-2] + 2 * tall[1:-1] + tall[2:]) / np.float32(16)
    return soft


@lru_cache(maxsize=1024)
def _looks(thing: str, size: float, **names: str) -> tuple[Array, Array]:
    """How a "house" or a "tree" looks (h, w, 3), and where it is (h, w): 1, elsewhere 0."""
    scene = Scene.sample(np.random.default_rng(0), light="none", horizon="middle", **names)
    if thing == "house":
        scene = replace(scene, house_x=0.5, house_y=0.25, house_width=size, roll=0.0)
        rows = slice(round((0.75 - 0.84 * size) * N), round(0.75 * N))  # without the chimney
        reach = round(0.53 * size * N)
        columns = slice(N // 2 - reach, N // 2 + reach)
    else:
        foot = 0.28  # where it is, as the scene says, given this horizon
        x = 10 if scene.tree == "left" else N - 10
        scene = replace(scene, tree_x=x / N, tree_height=size, horizon_height=foot / 0.62)
        rows = slice(round((1 - foot - size) * N), round((1 - foot) * N))
        columns = slice(x - 7, x + 7)
    picture = smooth(np.asarray(scene.render(N), np.float32))
    shape = scene.masks(N)[thing].astype(np.float32)
    return picture[rows, columns], shape[rows, columns]


@dataclass(frozen=True)
class _Found:
    """A house or a tree, as seen; nothing, by default."""

    explained: float = 0.0  # the share that it explains of what differs from the backdrop there
    colour: str = "none"
    size: str = "none"
    position: str = "none"
    box: tuple[slice, slice] = (slice(0), slice(0))
    cover: Array = field(default_factory=lambda: np.zeros((0, 0), np.float32))  # within the box
    foot: tuple[float, float] = (0.0, 0.0)  # the middle of its lower edge


def _things(
    pixels: Array, backdrop: Array, sky: str, ground: str, height: float
) -> tuple[_Found, _Found]:
    """The house and the tree.

    A house looks a little like a tree and a tree a little like a house. So the clearer of the two
    comes first, and the other is looked for again in what is left.
    """
    if ground == "sea":
        return _Found(), _Found()
    names = {"sky": sky, "ground": ground}
    free = np.ones((N, N), np.float32)
    house = _house(pixels, backdrop, free, names, height)
    tree = _tree(pixels, backdrop, free, names, height)
    first = max(house, tree, key=lambda found: found.explained)
    free[first.box] -= first.cover
    if first is house:
        return house, _tree(pixels, backdrop, free, names, height)
    return _house(pixels, backdrop, free, names, height), tree


def _fit(
    pixels: Array, backdrop: Array, free: Array, looks: Array, cover: Array
) -> tuple[Array, Array, Array]:
    """Hold things that cover the same pixels against a band of the picture, at every place.

    pixels (H, W, 3); backdrop (H, 3); free (H, W) is 0 where something else is known to stand;
    looks (things, h, w, 3) and cover (h, w) as in `_looks`. Returns three arrays
    (things, H - h + 1, W - w + 1): the error that the thing takes away from the backdrop's, in
    squared grey levels per pixel; the share of the backdrop's error that this is, 1 for a perfect
    explanation and 0 or less for none; and the same share against the best patch of one colour.
    """
    h, w = cover.shape
    planes = np.stack(
        [
            free,
            *np.moveaxis(pixels, -1, 0) * free,
            (pixels**2).sum(-1) * free,
            ((pixels - backdrop[:, None]) ** 2).sum(-1) * free,
        ]
    )  # (6, H, W)
    windows = np.lib.stride_tricks.sliding_window_view(planes, (h, w), (1, 2))
    places = windows.shape[1:3]
    windows = windows.reshape(6, -1, h * w)
    # Sums over the thing's pixels, of each plane: their number, p, p^2 and (p - backdrop)^2.
    sums = windows @ cover.reshape(-1)  # (6, places)
    visible, colour, squares, of_backdrop = sums[0], sums[1:4], sums[4], sums[5]
    # sum (p - mean p)^2 = sum p^2 - (sum p)^2 / n
    of_patch = squares - (colour**2).sum(0) / np.maximum(visible, 1)
    # sum (p - t)^2 = sum p^2 - 2 sum p t + sum t^2
    t = np.moveaxis(looks, -1, 0) * cover  # (3, things, h, w)
    terms = np.stack([(t * t).sum(0), *(-2 * t)]).reshape(4, len(looks), -1)
    of_thing = squares + np.einsum("cpn,ckn->kp", windows[:4], terms, optimize=True)

    gain: Array = (of_backdrop - of_thing) / cover.sum()
    unseen = visible < 0.6 * cover.sum()
    shares = [
        np.where(unseen, 0.0, 1 - of_thing / (np.maximum(e, 0) + 1))
        for e in (of_backdrop, of_patch)
    ]
    return (
        gain.reshape(-1, *places),
        shares[0].reshape(-1, *places),
        shares[1].reshape(-1, *places),
    )


def _clear(gain: Array, explained: Array, threshold: float) -> tuple[float, tuple[int, ...]]:
    """The best place of those that explain enough: how much it explains, and its index."""
    seen = np.where((explained > threshold) & (gain > CONTRAST**2), explained, 0.0)
    at = np.unravel_index(int(seen.argmax()), seen.shape)
    return float(seen[at]), tuple(map(int, at))


def _tree(
    pixels: Array,
    backdrop: Array,
    free: Array,
    names: dict[str, str],
    height: float,
    reach: float = 0.25,
) -> _Found:
    """The tree, in the pixels (N, N) that are free, as near to a side as `reach`."""
    # A tree may touch the edge: beyond it nothing is known, so nothing there is free.
    margin = 4
    pixels = np.pad(pixels, ((0, 0), (margin, margin), (0, 0)))
    free = np.pad(free, ((0, 0), (margin, margin)))
    best = _Found()
    for side in ("left", "right"):
        look, cover = _looks("tree", 0.31, **names, house="none", tree=side)
        h, w = cover.shape
        # Its top and its sides are where those of a tree may be, give or take a few pixels.
        top = max(round((1 - 0.62 * height - 0.31) * N) - 4, 0)
        band = slice(top, top + h + 9)
        gain, explained, _ = _fit(pixels[band], backdrop[band], free[band], look[None], cover)
        x = (np.arange(gain.shape[2]) + w / 2 - margin) / N
        explained[..., x > reach if side == "left" else x < 1 - reach] = 0.0
        share, (_, i, j) = _clear(gain, explained, SEEN_TREE)
        if share > best.explained:
            left = max(j - margin, 0)
            box = (slice(top + i, top + i + h), slice(left, j - margin + w))
            inside = cover[:, left - (j - margin) :][:, : N - left]
            foot = (float(x[j]), 1 - (top + i + h) / N)
            best = _Found(share, position=side, box=box, cover=inside, foot=foot)
    return best


def _house(
    pixels: Array, backdrop: Array, free: Array, names: dict[str, str], height: float
) -> _Found:
    """The house, in the pixels (N, N) that are free."""
    best = _Found()
    colours = ATTRIBUTES["house"][1:]
    for width in (0.21, 0.23, 0.345, 0.375):
        size = "small" if width < 0.29 else "large"
        drawn = [
            _looks("house", width, **names, tree="none", house=colour, house_size=size)
            for colour in colours
        ]
        looks, cover = np.stack([look for look, _ in drawn]), drawn[0][1]
        h, w = cover.shape
        # The foot stands a little over half way up the ground: search around there.
        top = max(round((1 - 0.545 * height) * N) - h - 4, 0)
        band = slice(top, top + h + 9)
        # A roof over a wall: a patch of one colour must not explain as much.
        gain, explained, shaped = _fit(pixels[band], backdrop[band], free[band], looks, cover)
        explained[shaped < SHAPED] = 0.0
        share, (k, i, j) = _clear(gain, explained, SEEN_HOUSE)
        if share > best.explained:
            x = (j + w / 2) / N
            position = "left" if x < 0.41 else "middle" if x < 0.59 else "right"
            box = (slice(top + i, top + i + h), slice(j, j + w))
            foot = (x, 1 - (top + i + h) / N)
            best = _Found(share, colours[k], size, position, box, cover, foot)
    return best
