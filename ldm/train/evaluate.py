"""Does the model draw what the prompt says? Pictures of fresh captions are read back.

The reader (`ldm.reader`) recovers a scene's attributes from pixels alone; each attribute that a
prompt states is right or wrong. What a prompt leaves open is not judged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm.pipeline import TextToImage
from ldm.reader import read
from ldm.scenes import ATTRIBUTES, Scene, training_scene

EVALUATION_STREAM = 1_000_000
"""Training draws from the streams [seed, step]; no training takes this many steps."""


@dataclass(frozen=True)
class Score:
    """How often something was right.

    Attributes:
        name: what was judged.
        right, total: counts.
    """

    name: str
    right: int
    total: int

    @property
    def share(self) -> float:
        """The fraction that was right; NaN of nothing."""
        return self.right / self.total if self.total else math.nan

    @property
    def lower_bound(self) -> float:
        """The lower end of the 95% confidence interval of the share (Wilson 1927)."""
        if not self.total:
            return math.nan
        z, n, p = 1.96, self.total, self.share
        centre = p + z * z / (2 * n)
        margin = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (centre - margin) / (1 + z * z / n)


@dataclass(frozen=True)
class Judged:
    """One picture, judged: the prompt, what it states, and what the reader saw."""

    prompt: str
    stated: dict[str, str]
    seen: dict[str, str]


@dataclass(frozen=True)
class Results:
    """Everything that `evaluate` measures.

    Attributes:
        prompts: per attribute, how often a picture shows what its prompt states.
        autoencoder: per attribute, how often it survives encoding and decoding.
        psnr: of the autoencoder on fresh scenes, in dB.
        settings: what the pictures were drawn with.
    """

    prompts: list[Score]
    autoencoder: list[Score]
    psnr: float
    settings: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """For programs."""

        def rows(scores: list[Score]) -> dict[str, Any]:
            return {
                s.name: {"right": s.right, "total": s.total, "lower_bound": s.lower_bound}
                for s in scores
            }

        return {
            "settings": self.settings,
            "prompts": rows(self.prompts),
            "autoencoder": rows(self.autoencoder),
            "autoencoder_psnr_db": self.psnr,
        }

    def as_markdown(self) -> str:
        """For people."""
        settings = ", ".join(f"{name} {value:g}" for name, value in self.settings.items())
        return "\n".join(
            [
                f"Pictures that show what the prompt says ({settings}):",
                "",
                table(self.prompts),
                "",
                f"Scenes after encoding and decoding (PSNR {self.psnr:.1f} dB):",
                "",
                table(self.autoencoder),
            ]
        )


def evaluate(
    pipe: TextToImage,
    *,
    count: int = 300,
    steps: int = 50,
    guidance_scale: float = 7.5,
    seed: int = 0,
) -> Results:
    """Measure a Horizon model on `count` fresh prompts, of combinations that training
    does show, and the autoencoder on as many fresh scenes of the whole world."""
    prompts = fresh_prompts(count, seed)
    judged = judge_prompts(pipe, prompts, steps=steps, guidance_scale=guidance_scale, seed=seed)
    scores = prompt_scores(list(judged))
    kept, psnr = autoencoder_scores(pipe, count, seed)
    settings = {"prompts": count, "steps": steps, "guidance_scale": guidance_scale, "seed": seed}
    return Results(scores, kept, psnr, settings)


def fresh_prompts(count: int, seed: int) -> list[tuple[str, dict[str, str]]]:
    """Captions of scenes, each with the attributes that it states; from a stream of random numbers
    of its own, which training never draws from."""
    rng = np.random.default_rng([seed, EVALUATION_STREAM])
    prompts = []
    for _ in range(count):
        scene = training_scene(rng)
        text, stated = scene.describe(rng)
        prompts.append((text, {name: scene.attributes[name] for name in sorted(stated)}))
    return prompts


def judge_prompts(
    pipe: TextToImage,
    prompts: Sequence[tuple[str, dict[str, str]]],
    *,
    steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int = 32,
) -> Iterator[Judged]:
    """Draw each prompt once, picture i with seed + i, and read what it shows."""
    for start in tqdm(range(0, len(prompts), batch_size), desc="drawing", unit="batch"):
        batch = prompts[start : start + batch_size]
        images = pipe(
            [text for text, _ in batch],
            steps=steps,
            guidance_scale=guidance_scale,
            seed=seed + start,
        )
        for (text, stated), image in zip(batch, images, strict=True):
            yield Judged(text, stated, read(image))


def prompt_scores(judged: Sequence[Judged]) -> list[Score]:
    """One score per attribute, over the prompts that state it."""
    scores = []
    for name in ATTRIBUTES:
        cases = [case for case in judged if name in case.stated]
        right = sum(case.seen[name] == case.stated[name] for case in cases)
        scores.append(Score(name, right, len(cases)))
    return scores


def autoencoder_scores(pipe: TextToImage, count: int, seed: int) -> tuple[list[Score], float]:
    """What the autoencoder keeps of fresh scenes: one score per attribute, read back after encode
    and decode, and the mean PSNR in dB."""
    rng = np.random.default_rng([seed, EVALUATION_STREAM, 1])
    right = dict.fromkeys(ATTRIBUTES, 0)
    psnr = []
    for _ in range(count):
        scene = Scene.sample(rng)
        image = scene.render(pipe.config.image_size)
        (decoded,) = pipe.decode(pipe.encode(image))
        difference = np.asarray(image, dtype=np.float64) - np.asarray(decoded, dtype=np.float64)
        psnr.append(10 * math.log10(255**2 / max(float(np.mean(difference**2)), 1e-12)))
        seen = read(decoded)
        for name in ATTRIBUTES:
            right[name] += seen[name] == scene.attributes[name]
    return [Score(name, right[name], count) for name in ATTRIBUTES], float(np.mean(psnr))


def table(scores: Sequence[Score]) -> str:
    """Scores as a Markdown table."""
    lines = ["| what | right | share | 95% lower bound |", "| --- | --- | --- | --- |"]
    for s in scores:
        lines.append(f"| {s.name} | {s.right} / {s.total} | {s.share:.1%} | {s.lower_bound:.1%} |")
    return "\n".join(lines)
