"""Where do words look? Cross-attention maps, held against the true masks of what the words name.

A fresh scene is encoded, noised to a timestep t, and shown to the UNet once, with its caption. Each
layer then has a map for each word: how much every place of the picture looked at it. A word that
points at its thing is looked at most by the places that the thing covers.

**From a map to a mask.** A map is cut to its k highest places, where k is the area of the mask it
is held against: no threshold to tune, and the map's scale does not matter. It keeps its own size,
since four by four places cannot outline a moon; the mask is brought to that size by area. Its own k
is the sum of the shares of all places that it covers (rounded, and 1 at least), and it becomes the
k places that it covers most.

**What would be luck.** Every map is also held against the masks of all other scenes that show such
a thing, by the same rule. Who only knows where trees usually stand does equally well on both.

**Where a word points best.** No layer serves every word, and none serves one at every timestep. So
each word also has the layer and timestep where its maps are furthest above luck. They are chosen on
every other scene and measured on the rest: on the same scenes, luck itself would be chosen.

**Which words.** "tree", and "tree + place": all words from the noun to the one that says where.
CLIP reads from left to right, so that what follows "tree" is not yet known there: in "a tree on the
left" only "left" knows both what to draw and where.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ldm.evaluate.attention_tables import (
    AttentionResults,
    Overlap,
    Sharpest,
    WordOverlaps,
    ratio,
)
from ldm.evaluate.prompts import EVALUATION_STREAM
from ldm.observe.hooks import record
from ldm.observe.maps import Word, group_words, map_size
from ldm.pipeline import TextToImage
from ldm.samplers import draw_noise
from ldm.worlds.batches import OBJECTS, pictures
from ldm.worlds.scenes import Scene, training_scene

Array = npt.NDArray[np.float64]

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # parts of the way from the picture to noise
RESAMPLES = 2000
LAYER_END = ".transformer.cross_attention.weights"

NAMES: dict[str, frozenset[str]] = {
    **{thing: frozenset({thing}) for thing in OBJECTS},
    "ground": frozenset(
        {"grass", "meadow", "field", "sand", "beach", "dunes", "snow", "sea", "ocean"}
    ),
    "sky": frozenset(
        {"sky", "day", "daylight", "daytime", "sunset", "evening", "dusk", "night", "stars"}
        | {"nighttime"}
    ),
}
"""What captions call each thing that has a mask (`ldm.worlds.scenes`)."""

SIDES = frozenset({"left", "right", "middle", "center", "centre"})
PLACE = " + place"


def evaluate_attention(
    pipe: TextToImage, *, per_value: int = 100, seed: int = 0
) -> AttentionResults:
    """Measure where the words of a Horizon model look, on fresh scenes: so many that each of
    house, tree, sun and moon is there `per_value` times or more.

    Raises:
        ValueError: no word is there twice, so that there is nothing to compare with.
    """
    told = told_scenes(per_value, seed)
    total = pipe.config.schedule.num_train_timesteps
    timesteps = [round(part * total) for part in TIMES]
    looks = watch(pipe, told, timesteps, seed)
    words = {
        name: overlaps(looks[name], timesteps, seed)
        for thing in NAMES
        for name in (thing, thing + PLACE)
        if name in looks and len(looks[name].masks) > 1
    }
    if not words:
        raise ValueError("nothing to compare: no thing is named in two captions; show more scenes")
    return AttentionResults(
        words, {"scenes": len(told), "objects of each kind, at least": per_value, "seed": seed}
    )


# -------------------------------------------------------------------------------- maps and masks


def told_scenes(per_object: int, seed: int) -> list[tuple[Scene, str]]:
    """Fresh scenes of the training world, each with a caption that states all that is there, until
    every object was there `per_object` times; a scene without a wanted one is passed over."""
    rng = np.random.default_rng([seed, EVALUATION_STREAM, 4])
    wanted = dict.fromkeys(OBJECTS, per_object)
    told = []
    while max(wanted.values()) > 0:
        scene = training_scene(rng)
        keep = [name for name, value in scene.attributes.items() if value != "none"]
        caption, _ = scene.describe(rng, keep)
        lamp = "moon" if scene.sky == "night" else "sun"
        values = {"house": scene.house, "tree": scene.tree, lamp: scene.light}
        there = [thing for thing, value in values.items() if value != "none"]
        if any(wanted[thing] > 0 for thing in there):
            told.append((scene, caption))
            for thing in there:
                wanted[thing] -= 1
    return told


def mentions(words: Sequence[Word]) -> dict[str, tuple[int, ...]]:
    """The tokens of everything that a caption names, {"tree": (3,), "tree + place": (3, 4, 5, 6)}:
    the first word for an object, and all up to its side where one follows; all words for ground
    and sky. It must be a caption that says of each object where it is, or a later one's side would
    be taken for it."""
    found: dict[str, tuple[int, ...]] = {}
    for thing, names in NAMES.items():
        at = [i for i, word in enumerate(words) if word.text in names]
        if at and thing not in OBJECTS:
            found[thing] = tuple(token for i in at for token in words[i].tokens)
        elif at:
            found[thing] = words[at[0]].tokens
            ends = [i for i in range(at[0], len(words)) if words[i].text in SIDES]
            if ends:
                phrase = words[at[0] : ends[0] + 1]
                found[thing + PLACE] = tuple(token for word in phrase for token in word.tokens)
    return found


@dataclass(frozen=True, eq=False)
class Looks:
    """The maps of one kind of word, and what they should show, over the n scenes that say it.

    Attributes:
        maps: {layer: (n, T, rows, columns)}, mean over heads, and over tokens where there are many.
        masks: (n, H, W) float32, 1 where the thing is, at the pictures' size.
        latent_size: (rows, columns).
    """

    maps: Mapping[str, Tensor]
    masks: Tensor
    latent_size: tuple[int, int]


@torch.no_grad()
def watch(
    pipe: TextToImage,
    told: Sequence[tuple[Scene, str]],
    timesteps: Sequence[int],
    seed: int,
    batch_size: int = 16,
) -> dict[str, Looks]:
    """Noise each scene to each timestep, denoise it one step with its caption, and keep the maps of
    the words for what it shows (`mentions`)."""
    size = pipe.config.image_size
    tokenizer = pipe.text.require_tokenizer()
    generator = torch.Generator().manual_seed(seed)
    maps: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    masks: dict[str, list[Tensor]] = defaultdict(list)
    starts = range(0, len(told), batch_size)
    for start in tqdm(starts, desc="looking", unit="batch", disable=None):  # None: on a terminal
        scenes = [scene for scene, _ in told[start : start + batch_size]]
        captions = [caption for _, caption in told[start : start + batch_size]]
        x = pictures(scenes, size).to(pipe.device, pipe.dtype)
        x0 = pipe.vae.encode(x).mode() * pipe.config.vae.scaling_factor  # (B, C, h, w)
        noise = draw_noise(generator, x0)
        ids = pipe.text.tokenize(captions)
        context = pipe.text.encode(ids)
        with record(
            pipe.unet, f"*{LAYER_END}", reduce=lambda weights: weights.mean(dim=1), max_bytes=None
        ) as recorded:
            for time in timesteps:
                t = torch.full((len(scenes),), time, device=pipe.device)
                pipe.unet(pipe.schedule.add_noise(x0, noise, t), t, context)

        latent_size = (x0.shape[2], x0.shape[3])
        layers = {
            name.removesuffix(LAYER_END): torch.stack(calls, 1)
            .float()
            .cpu()
            .unflatten(2, map_size(calls[0].shape[1], latent_size))  # (B, T, rows, columns, L)
            for name, calls in recorded.items()
        }
        for i, scene in enumerate(scenes):
            shown = scene.masks(size)
            for name, tokens in mentions(group_words(tokenizer, ids[i].tolist())).items():
                mask = shown.get(name.removesuffix(PLACE))
                if mask is None or not mask.any():  # another thing hides it
                    continue
                masks[name].append(torch.from_numpy(mask.astype(np.float32)))
                for layer, weights in layers.items():
                    maps[name][layer].append(weights[i][..., list(tokens)].mean(dim=-1))
    return {
        name: Looks(
            {layer: torch.stack(one) for layer, one in maps[name].items()},
            torch.stack(masks[name]),
            latent_size,
        )
        for name in masks
    }


# -------------------------------------------------------------------------------------- overlap


def overlaps(looks: Looks, timesteps: Sequence[int], seed: int) -> WordOverlaps:
    """Every layer and timestep, alone and together, held against the masks."""
    n = len(looks.masks)
    rng = np.random.default_rng(seed)
    counts = resamples(n, rng)
    times = [f"t = {t}" for t in timesteps]
    layers = layer_rows(looks)
    compared: dict[str, dict[str, tuple[Array, Array]]] = {}  # own and others', (n,) each
    luck: list[float] = []  # the others' IoU of maps that equal the masks, layer by layer
    for row, maps in (layers | joint_rows(looks)).items():
        covered = coverage(looks.masks, (maps.shape[2], maps.shape[3]))
        masks = most_covered(covered)  # (n, places)
        every = torch.cat([maps, maps.mean(dim=1, keepdim=True)], dim=1).flatten(2)
        compared[row] = {
            column: own_and_others(pairwise_iou(m, masks))
            for column, m in zip([*times, "all t"], every.unbind(dim=1), strict=True)
        }
        if row in layers:
            luck.append(float(own_and_others(pairwise_iou(covered, masks))[1].mean()))
    single = {(layer, time): compared[layer][time] for layer in layers for time in times}
    own, others = np.mean(list(single.values()), axis=0)  # (n,) each
    return WordOverlaps(
        scenes=n,
        mean=summed_up(own, others, counts),
        sharpest=sharpest(single, rng),
        best=ratio(1.0, float(np.mean(luck))),
        table={
            row: {column: summed_up(*pair, counts) for column, pair in cells.items()}
            for row, cells in compared.items()
        },
    )


def sharpest(
    single: Mapping[tuple[str, str], tuple[Array, Array]], rng: np.random.Generator
) -> Sharpest:
    """The (layer, timestep) that is most above luck on the scenes of even number, measured on those
    of odd number."""
    layer, time = max(single, key=lambda where: np.subtract(*single[where])[::2].mean())
    own, others = (iou[1::2] for iou in single[layer, time])
    overlap = summed_up(own, others, resamples(len(own), rng))
    return Sharpest(layer, time, len(own), overlap)


def layer_rows(looks: Looks) -> dict[str, Tensor]:
    """Each layer's maps, (n, T, rows, columns), with their size beside its name."""
    return {f"{layer} ({m.shape[2]}x{m.shape[3]})": m for layer, m in looks.maps.items()}


def joint_rows(looks: Looks) -> dict[str, Tensor]:
    """Several layers as one map, (n, T, rows, columns): all of one size by their mean, as in
    `ldm.observe.maps.prompt_to_prompt`, and all there are by their sum at the latents' size, as
    in `ldm.observe.maps.daam`."""
    maps = list(looks.maps.values())
    rows = {}
    for height, width in sorted({(m.shape[2], m.shape[3]) for m in maps}, reverse=True):
        same = [m for m in maps if (m.shape[2], m.shape[3]) == (height, width)]
        rows[f"all of {height}x{width}"] = torch.stack(same).mean(dim=0)
    height, width = looks.latent_size
    rows[f"all, upscaled to {height}x{width}"] = torch.stack(
        [F.interpolate(m, (height, width), mode="bicubic", align_corners=False) for m in maps]
    ).sum(dim=0)
    return rows


def coverage(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """The share of each place of a map that a mask covers: (n, H, W) -> (n, rows * columns)."""
    return F.adaptive_avg_pool2d(masks[:, None], size).flatten(1)


def most_covered(covered: Tensor) -> Tensor:
    """Masks of whole places, bool (n, places): as many as the shares add up to, but one at least,
    those that are covered most."""
    areas = covered.sum(dim=1).round().clamp(min=1)
    return ranks(covered) < areas[:, None]


def ranks(values: Tensor) -> Tensor:
    """0 for the highest of each row, then 1, ...: (n, m) -> int64 (n, m); of equals the first."""
    return values.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def pairwise_iou(maps: Tensor, masks: Tensor) -> Array:
    """Intersection over union of map i, cut to as many places as mask j has, with mask j.

    maps: (n, places); masks: bool (n, places), none empty -> [i, j], (n, n).
    """
    rank, areas = ranks(maps), masks.sum(dim=1)
    iou = torch.empty(len(maps), len(masks), dtype=torch.float64)
    for area in areas.unique():
        alike = areas == area
        shared = (rank < area).double() @ masks[alike].double().T  # both have `area` places
        iou[:, alike] = shared / (2 * area - shared)
    return iou.numpy()


def own_and_others(iou: Array) -> tuple[Array, Array]:
    """Of each map (n, n) the IoU with its own mask, and the mean with all others: (n,) each."""
    own = np.diagonal(iou).copy()
    return own, (iou.sum(axis=1) - own) / (len(iou) - 1)


def summed_up(own: Array, others: Array, counts: Array) -> Overlap:
    """Means over scenes, (n,) each, and the interval of their difference."""
    low, high = bootstrap_interval(own - others, counts)
    return Overlap(float(own.mean()), float(others.mean()), low, high)


def resamples(n: int, rng: np.random.Generator) -> Array:
    """How often each of n values is there when n are drawn from them with replacement: (R, n)."""
    return rng.multinomial(n, np.full(n, 1.0 / n), size=RESAMPLES).astype(np.float64)


def bootstrap_interval(values: Array, counts: Array) -> tuple[float, float]:
    """The 95% percentile interval of the mean of values (n,) under `resamples` (Efron 1979)."""
    low, high = np.percentile(counts @ values / len(values), [2.5, 97.5])
    return float(low), float(high)
