"""Does the model draw what the prompt says? Pictures of fresh captions are read back.

The reader (`ldm.worlds.reader`) recovers a scene's attributes from pixels alone, so every claim of
a prompt is right or wrong; what a prompt leaves open is not judged. Prompts are drawn until every
value of every attribute has been asked for often enough. No prompt, picture or seed here was ever
trained on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ldm.pipeline import TextToImage
from ldm.settings import Settings
from ldm.train.clip import CLIPPair
from ldm.worlds.batches import pictures
from ldm.worlds.captions import SOME
from ldm.worlds.distribution import ATTRIBUTES, HELD_OUT
from ldm.worlds.reader import read
from ldm.worlds.scenes import Scene, training_scene

EVALUATION_STREAM = 1_000_000
"""Training draws from the streams [seed, step]; no training takes this many steps."""

CHOICES = 64  # captions that CLIP chooses from

DRAWN, NOT_DRAWN = "house drawn when asked", "no house when none is asked, or at sea"
ROWS = {  # attribute -> row of the table
    "sky": "sky",
    "ground": "ground",
    "house": "house colour",
    "house_position": "house position",
    "house_size": "house size",
    "light": "sun or moon",
    "tree": "tree",
    "horizon": "horizon",
}


@dataclass(frozen=True)
class Prompt:
    """A caption, what it states (`Scene.describe`), and whether it asks for what training never
    showed together."""

    text: str
    stated: dict[str, str]
    held_out: bool = False


@dataclass
class Score:
    """How often something was right: counts, by the value that was asked for."""

    right: dict[str, int] = field(default_factory=dict)
    total: dict[str, int] = field(default_factory=dict)

    def add(self, value: str, right: bool) -> None:
        """Count one case."""
        self.right[value] = self.right.get(value, 0) + bool(right)
        self.total[value] = self.total.get(value, 0) + 1


def lower_bound(right: int, total: int) -> float:
    """The lower end of the 95% confidence interval of a share (Wilson 1927); NaN of nothing."""
    if not total:
        return math.nan
    z, p = 1.96, right / total
    centre = p + z * z / (2 * total)
    margin = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return (centre - margin) / (1 + z * z / total)


@dataclass(frozen=True)
class Results:
    """Everything that `evaluate` measures.

    Attributes:
        prompts: by what was judged, how often a picture shows what its prompt states.
        held_out: the same, of combinations that training never showed.
        autoencoder: per attribute, how often it survives encoding and decoding.
        psnr: of the autoencoder on fresh scenes, in dB.
        clip: how often the CLIP pair picks a picture's own caption; None without the pair.
        settings: what the pictures were drawn with.
    """

    prompts: dict[str, Score]
    held_out: dict[str, Score]
    autoencoder: dict[str, Score]
    psnr: float
    clip: Score | None
    settings: dict[str, float | str]

    def as_dict(self) -> dict[str, Any]:
        """For programs: per row, and per value in it, counts and the 95% lower bound."""

        def counts(right: int, total: int) -> dict[str, float]:
            return {"right": right, "total": total, "lower_bound": lower_bound(right, total)}

        def rows(scores: Mapping[str, Score]) -> dict[str, Any]:
            return {
                name: counts(sum(s.right.values()), sum(s.total.values()))
                | {"values": {v: counts(s.right[v], s.total[v]) for v in sorted(s.total)}}
                for name, s in scores.items()
            }

        return {
            "settings": self.settings,
            "prompts": rows(self.prompts),
            "held_out": rows(self.held_out),
            "autoencoder": rows(self.autoencoder),
            "autoencoder_psnr_db": self.psnr,
            "clip": rows({f"right of {CHOICES}": self.clip} if self.clip else {}),
        }

    def as_markdown(self) -> str:
        """For people."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        parts = [
            f"Pictures that show what the prompt says ({settings}):",
            table(self.prompts),
            "The same, of combinations that training never showed:",
            table(self.held_out),
            f"Scenes after encoding and decoding (PSNR {self.psnr:.1f} dB):",
            table(self.autoencoder),
        ]
        if self.clip:
            parts += [
                "CLIP picks a picture's own caption, of those and others that are false of it:",
                table({f"the right one of {CHOICES}": self.clip}),
            ]
        return "\n\n".join(parts)


def table(scores: Mapping[str, Score]) -> str:
    """Scores as a Markdown table: over all values, and of the value that fared worst."""
    lines = [
        "| what | right | share | 95% lower bound | worst value |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, score in scores.items():
        right, total = sum(score.right.values()), sum(score.total.values())
        worst = min(score.total, key=lambda v: score.right[v] / score.total[v])
        lines.append(
            f"| {name} | {right} / {total} | {right / total:.1%} "
            f"| {lower_bound(right, total):.1%} "
            f"| {worst}: {score.right[worst]} / {score.total[worst]} |"
        )
    return "\n".join(lines)


def evaluate(
    pipe: TextToImage,
    pair: CLIPPair | None = None,
    *,
    per_value: int = 100,
    steps: int | None = None,
    guidance_scale: float | None = None,
    sampler: str | None = None,
    seed: int = 0,
) -> Results:
    """Measure a Horizon model: its pictures on fresh prompts, `per_value` or more for every value
    of every attribute and for each held-out combination; the autoencoder, and the CLIP pair if
    given, on fresh scenes. Settings that are None are the model's own.

    Raises:
        ValueError: for settings that `Settings.of` refuses, before the first picture.
    """
    prompts = [*fresh_prompts(per_value, seed), *held_out_prompts(per_value, seed)]
    settings = Settings.of(
        pipe.config,
        [prompt.text for prompt in prompts],
        steps=steps,
        guidance_scale=guidance_scale,
        sampler=sampler,
        seed=seed,
    )
    judged = list(draw_and_read(pipe, prompts, settings))
    kept, psnr = autoencoder_scores(pipe, 3 * per_value, seed)
    return Results(
        prompts=prompt_scores((p, seen) for p, seen in judged if not p.held_out),
        held_out=prompt_scores((p, seen) for p, seen in judged if p.held_out),
        autoencoder=kept,
        psnr=psnr,
        clip=None if pair is None else clip_score(pair, 5 * per_value, seed),
        settings={
            "prompts": len(prompts),
            "sampler": settings.sampler,
            "steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "seed": settings.seed,
        },
    )


# ------------------------------------------------------------------------------------- prompts


def fresh_prompts(per_value: int, seed: int) -> list[Prompt]:
    """Captions of scenes of the training world, until every value of every attribute has been
    stated `per_value` times; a caption that states only what is full is passed over."""
    rng = np.random.default_rng([seed, EVALUATION_STREAM])
    wanted = {(name, value): per_value for name, values in ATTRIBUTES.items() for value in values}
    prompts = []
    while max(wanted.values()) > 0:
        text, stated = training_scene(rng).describe(rng)
        if any(wanted.get(claim, 0) > 0 for claim in stated.items()):
            prompts.append(Prompt(text, stated))
            for claim in stated.items():
                wanted[claim] = wanted.get(claim, 0) - 1
    return prompts


def held_out_prompts(per_case: int, seed: int) -> list[Prompt]:
    """Captions that ask for the held-out combinations, and say where the house is."""
    rng = np.random.default_rng([seed, EVALUATION_STREAM, 2])
    prompts = []
    for case in HELD_OUT:
        for _ in range(per_case):
            scene = Scene.sample(rng, **case)
            keep = {*case, "house_position", *(name for name in ATTRIBUTES if rng.random() < 0.5)}
            prompts.append(Prompt(*scene.describe(rng, keep), held_out=True))
    return prompts


def draw_and_read(
    pipe: TextToImage, prompts: Sequence[Prompt], settings: Settings, batch_size: int = 32
) -> Iterator[tuple[Prompt, dict[str, str]]]:
    """Draw each prompt once, by settings that hold their texts, picture i with seed + i, and read
    what it shows."""
    starts = range(0, len(prompts), batch_size)
    for start in tqdm(starts, desc="drawing", unit="batch", disable=None):  # None: on a terminal
        batch = prompts[start : start + batch_size]
        some = replace(
            settings,
            prompts=settings.prompts[start : start + batch_size],
            seed=settings.seed + start,
        )
        for prompt, image in zip(batch, pipe.draw(some), strict=True):
            yield prompt, read(image)


# ------------------------------------------------------------------------------------ judging


def verdicts(stated: Mapping[str, str], seen: Mapping[str, str]) -> Iterator[tuple[str, str, bool]]:
    """Everything that a prompt states, held against a picture: (what, asked value, right?).

    A house that is missing is wrong in all that was said of it.
    """
    house = [stated.get(name, "none") for name in ("house", "house_position", "house_size")]
    if set(house) != {"none"}:
        yield DRAWN, "house", seen["house"] != "none"
    elif stated.get("house") == "none":
        yield NOT_DRAWN, "none", seen["house"] == "none"
    elif stated.get("ground") == "sea":
        yield NOT_DRAWN, "sea", seen["house"] == "none"
    for name, value in stated.items():
        if name.startswith("house") and value in ("none", SOME):
            continue  # judged above
        right = seen[name] != "none" if value == SOME else seen[name] == value
        yield ROWS[name], value, right


def prompt_scores(judged: Iterator[tuple[Prompt, dict[str, str]]]) -> dict[str, Score]:
    """The verdicts on many pictures, counted."""
    scores = {what: Score() for what in (DRAWN, NOT_DRAWN, *ROWS.values())}
    for prompt, seen in judged:
        for what, value, right in verdicts(prompt.stated, seen):
            scores[what].add(value, right)
    return {what: score for what, score in scores.items() if score.total}


def autoencoder_scores(pipe: TextToImage, count: int, seed: int) -> tuple[dict[str, Score], float]:
    """What the autoencoder keeps of fresh scenes of the whole world: one score per attribute, read
    back after encode and decode, and the mean PSNR in dB."""
    rng = np.random.default_rng([seed, EVALUATION_STREAM, 1])
    scores = {name: Score() for name in ATTRIBUTES}
    psnr = []
    for _ in range(count):
        scene = Scene.sample(rng)
        image = scene.render(pipe.config.image_size)
        (decoded,) = pipe.decode(pipe.encode(image))
        difference = np.asarray(image, dtype=np.float64) - np.asarray(decoded, dtype=np.float64)
        psnr.append(10 * math.log10(255**2 / max(float(np.mean(difference**2)), 1e-12)))
        seen = read(decoded)
        for name, value in scene.attributes.items():
            scores[name].add(value, seen[name] == value)
    return scores, float(np.mean(psnr))


@torch.no_grad()
def clip_score(pair: CLIPPair, count: int, seed: int) -> Score:
    """How often the pair finds a picture's own caption among 64: the others differ from it and
    from each other, and each is false of the picture in something that it states."""
    rng = np.random.default_rng([seed, EVALUATION_STREAM, 3])
    scenes = [training_scene(rng) for _ in range(max(count, 4 * CHOICES))]
    told = [scene.describe(rng) for scene in scenes]
    captions = pair.embed_text(pair.text.tokenize([text for text, _ in told]))  # (N, D)
    score = Score()
    for i, scene in enumerate(scenes[:count]):
        others: dict[str, int] = {}
        for j in rng.permutation(len(scenes)):
            if len(others) < CHOICES - 1 and not is_true(told[j][1], scene):
                others.setdefault(told[j][0], int(j))
        choices = [i, *others.values()]
        picture = pair.embed_images(pictures([scene], pair.image_size).to(captions))  # (1, D)
        score.add("caption", int((captions[choices] @ picture[0]).argmax()) == 0)
    return score


def is_true(stated: Mapping[str, str], scene: Scene) -> bool:
    """Whether everything that a caption states holds of a scene."""
    true = scene.attributes
    return all(true[k] != "none" if v == SOME else true[k] == v for k, v in stated.items())
