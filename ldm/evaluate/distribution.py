"""Does the model draw what its world holds, as often as its world holds it?

A prompt leaves most of a picture open. Whoever asks for "a tree" should get, over many seeds, a
third of each sky, sun and no sun, the horizon at every height, and one tree: the law of training
scenes given what the prompt states (`ldm.worlds.law`), which is known exactly. For each kind of
prompt many pictures are drawn, and each is

- counted: two trees or two suns are in no scene (`ldm.worlds.reader.count`);
- explained by the scene that fits best: where even that fits badly, no scene could have made it
  (`ldm.worlds.possible`);
- read. Over all pictures of a kind, the shares of what was read are held against the law: every
  attribute that the prompt leaves open, and every pair of them; and so are the heights of the
  horizon and the places and sizes of houses, as far as names leave them open.

    results = evaluate_distribution(ldm.load(), per_kind=200, out=Path("drawn.jsonl"))
    print(results.as_markdown())

What was seen goes to a file, a line for each picture; asked again, only what is missing is drawn.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ldm.evaluate.distribution_tables import DistributionResults, KindResults
from ldm.evaluate.kept import kept
from ldm.evaluate.prompts import EVALUATION_STREAM, verdicts
from ldm.evaluate.statistics import (
    diversity,
    interval,
    kolmogorov_smirnov,
    nearest,
    share_below,
    shift,
)
from ldm.files import append_text
from ldm.pipeline import TextToImage
from ldm.settings import Settings
from ldm.worlds.captions import SOME
from ldm.worlds.distribution import continuous
from ldm.worlds.law import Law, law
from ldm.worlds.possible import LIMIT, fit
from ldm.worlds.reader import count
from ldm.worlds.scenes import Scene, training_scene

if TYPE_CHECKING:
    from PIL.Image import Image

NO_HOUSE = dict.fromkeys(("house", "house_position", "house_size"), "none")
KINDS: dict[str, dict[str, str]] = {  # prompt -> what it states
    "green grass": {"ground": "grass"},
    "a sandy beach": {"ground": "sand"},
    "snow": {"ground": "snow"},
    "the calm sea": {"ground": "sea"},
    "a blue sky": {"sky": "day"},
    "sunset": {"sky": "sunset"},
    "night": {"sky": "night"},
    "a tree": {"tree": SOME},
    "a tree on the left": {"tree": "left"},
    "a fir tree in the snow": {"tree": SOME, "ground": "snow"},
    "the sun": {"light": SOME},
    "the moon": {"light": SOME, "sky": "night"},
    "night with the moon on the left": {"light": "left", "sky": "night"},
    "a low horizon": {"horizon": "low"},
    "a house": {"house": SOME},
    "a small house": {"house": SOME, "house_size": "small"},
    "a house on the left": {"house": SOME, "house_position": "left"},
    "a red house on green grass": {"house": "red", "ground": "grass"},
    "no house": NO_HOUSE,
    "no tree": {"tree": "none"},
    "an empty meadow": {**NO_HOUSE, "tree": "none", "ground": "grass"},
    "a yellow house": {"house": "yellow"},
    "a house on the sand": {"house": SOME, "ground": "sand"},
    "a small yellow house at night": {"house": "yellow", "house_size": "small", "sky": "night"},
}
TOUCHED = 0.2
"""A prompt for which so large a share of the whole world was held out of training is listed apart:
whether a model then follows the training scenes or the world is no fault."""

NUMBERS = ("horizon_height", "house_x", "house_y", "house_width")
THUMB = 16  # pixels a side of the small pictures that are kept, to compare them
BATCH = 8  # pictures that an interrupted run may lose


@dataclass(frozen=True)
class Drawn:
    """What was seen of one picture.

    Attributes:
        prompt, seed: what it was drawn from.
        names: every attribute, as read.
        counts: of houses, trees, suns and moons.
        numbers: of the scene that fits best: `NUMBERS`.
        residual: how badly that fits, in grey levels (`ldm.worlds.possible`).
        thumb: the picture at `THUMB` pixels a side, RGB in base64.
    """

    prompt: str
    seed: int
    names: dict[str, str]
    counts: dict[str, int]
    numbers: dict[str, float]
    residual: float
    thumb: str

    @property
    def doubled(self) -> bool:
        """Whether there are two of anything, or more."""
        return max(self.counts.values()) > 1

    @property
    def impossible(self) -> bool:
        """Whether no scene could have made the picture."""
        return self.residual > LIMIT

    @property
    def pixels(self) -> npt.NDArray[np.float64]:
        """The small picture as one row, 0 to 255."""
        return np.frombuffer(base64.b64decode(self.thumb), np.uint8).astype(np.float64)


def evaluate_distribution(
    pipe: TextToImage,
    *,
    per_kind: int = 200,
    kinds: Mapping[str, Mapping[str, str]] = KINDS,
    steps: int | None = None,
    guidance_scale: float | None = None,
    sampler: str | None = None,
    seed: int = 0,
    out: Path | None = None,
    weights: str = "",
    training: Sequence[Scene] = (),
) -> DistributionResults:
    """Draw `per_kind` pictures of each kind of prompt, with the seeds from `seed` on, and hold them
    against the law. Settings that are None are the model's own.

    Args:
        kinds: prompt -> what it states, as `ldm.worlds.law` takes it.
        out: a file of JSON lines, where what is seen of each picture is kept, and looked up when
            asked again.
        weights: tells one model from another in that file, such as a hash.
        training: scenes that the model was trained on, if it is to be told how near to the nearest
            of them its pictures are.

    Raises:
        ValueError: before the first picture, for settings that `Settings.of` refuses, for what no
            caption states, for an `out` that cannot be written to or holds pictures of another
            model or other settings.
    """
    if per_kind < 1:
        raise ValueError(f"per_kind must be 1 or more, not {per_kind}")
    laws = {prompt: law_of(stated) for prompt, stated in kinds.items()}
    settings = Settings.of(
        pipe.config,
        list(kinds),
        steps=steps,
        guidance_scale=guidance_scale,
        sampler=sampler,
        seed=seed,
    )
    told: dict[str, float | str] = {
        name: getattr(settings, name) for name in ("sampler", "steps", "guidance_scale")
    }
    header, what = {"weights": weights, **told}, "pictures of this model and these settings"
    before = [] if out is None else kept(out, header, lambda line: Drawn(**line), what)
    known = {(one.prompt, one.seed): one for one in before}
    rng = np.random.default_rng([seed, EVALUATION_STREAM, 4])
    atoms = np.stack([thumb(scene.render(64)) for scene in training]) if training else None
    results = []
    for prompt in tqdm(kinds, desc="drawing", unit="kind", disable=None):  # None: on a terminal
        wanted = [(prompt, seed + i) for i in range(per_kind)]
        for drawn in draw_and_see(pipe, settings, [one for one in wanted if one not in known]):
            known |= {(one.prompt, one.seed): one for one in drawn}
            if out is not None:
                append_text(out, "".join(json.dumps(asdict(one)) + "\n" for one in drawn))
        pictures = [known[one] for one in wanted]
        results.append(summarise(pictures, kinds[prompt], laws[prompt], rng, atoms))
    return DistributionResults(tuple(results), {"per_kind": per_kind, **told, "seed": seed})


def law_of(stated: Mapping[str, str]) -> Law:
    """The law of training scenes given what is stated; where all of that is held out, of the whole
    world's."""
    whole = law(stated, whole_world=True)
    return whole if whole.held_out > 1 - 1e-9 else law(stated)


# ------------------------------------------------------------------------------------- drawing


def draw_and_see(
    pipe: TextToImage, settings: Settings, wanted: Sequence[tuple[str, int]]
) -> Iterator[list[Drawn]]:
    """Draw and look at pictures of one prompt, given as (prompt, seed), some at a time."""
    for start in range(0, len(wanted), BATCH):
        batch = wanted[start : start + BATCH]
        while batch:  # as far as the seeds follow each other
            (prompt, seed), n = batch[0], 1
            while n < len(batch) and batch[n][1] == seed + n:
                n += 1
            images = pipe.draw(replace(settings, prompts=(prompt,) * n, seed=seed))
            yield [see(image, prompt, seed + i) for i, image in enumerate(images)]
            batch = batch[n:]


def see(image: Image, prompt: str, seed: int) -> Drawn:
    """Everything that is to be known of a picture."""
    found = fit(image)
    return Drawn(
        prompt=prompt,
        seed=seed,
        names=found.scene.attributes,
        counts=count(image),
        numbers={name: round(getattr(found.scene, name), 5) for name in NUMBERS},
        residual=round(found.residual, 3),
        thumb=base64.b64encode(thumb(image).astype(np.uint8).tobytes()).decode(),
    )


def thumb(image: Image) -> npt.NDArray[np.float64]:
    """A picture at `THUMB` pixels a side as one row, 0 to 255."""
    from PIL.Image import Resampling

    small = image.convert("RGB").resize((THUMB, THUMB), Resampling.BOX)
    return np.asarray(small, np.float64).ravel()


# ------------------------------------------------------------------------------------- judging


def summarise(
    pictures: Sequence[Drawn],
    stated: Mapping[str, str],
    asked: Law,
    rng: np.random.Generator,
    atoms: npt.NDArray[np.float64] | None = None,
) -> KindResults:
    """Pictures of one prompt held against the law that it asks for; `atoms` (N, D) are the small
    pictures of training scenes."""
    total = len(pictures)
    whole = law(stated, whole_world=True)
    names = [one.names for one in pictures]

    def counts(*attributes: str) -> Counter[tuple[str, ...]]:
        return Counter(tuple(one[name] for name in attributes) for one in names)

    below: dict[str, list[float]] = {name: [] for name in NUMBERS}
    for one in pictures:
        gaussians = continuous(one.names)
        for name in NUMBERS:
            mean, sd = gaussians[name]
            if sd:
                below[name].append(share_below((one.numbers[name] - mean) / sd))

    scene = training_scene if asked.held_out == 0 else Scene.sample
    fresh = [thumb(scene(rng, **some).render(64)) for some in asked.sample(rng, total)]
    rows, others = np.stack([one.pixels for one in pictures]), np.stack(fresh)
    bad = sum(one.doubled or one.impossible for one in pictures)
    return KindResults(
        prompt=pictures[0].prompt,
        stated=dict(stated),
        apart=whole.held_out >= TOUCHED,
        total=total,
        obeyed=sum(all(right for *_, right in verdicts(stated, one)) for one in names),
        doubled=sum(one.doubled for one in pictures),
        impossible=sum(one.impossible for one in pictures),
        bad=bad,
        bad_interval=interval(bad, total),
        attributes={name: shift(counts(name), asked.of(name), rng) for name in asked.open},
        pairs={
            pair: shift(counts(*pair), asked.of(*pair), rng) for pair in combinations(asked.open, 2)
        },
        numbers={name: kolmogorov_smirnov(some) for name, some in below.items() if some},
        diversity=diversity(rows, others),
        nearest=None
        if atoms is None
        else (float(nearest(rows, atoms).mean()), float(nearest(others, atoms).mean())),
    )
