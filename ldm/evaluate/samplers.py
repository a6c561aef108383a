"""How few calls of the UNet make a good picture: every sampler, by the number of its calls.

A sampler is worth what its pictures are worth for the time they take, and nearly all of that is
calls of the UNet: two to a guided step, and twice as many of them for heun. So each sampler draws
the same prompts from the same noise in a few, and in many, steps. Of its pictures is asked

- do they show what the prompts state (`ldm.evaluate.prompts`)?
- could any scene have made them (`ldm.worlds.possible`)?
- how far are their latents from the end of the path, where DDIM comes in 1,000 steps? Samplers that
  add noise go other ways: of these nobody can say.

    print(evaluate_samplers(ldm.load()).as_markdown())
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.evaluate.distribution_tables import markdown
from ldm.evaluate.prompts import Prompt, fresh_prompts, lower_bound, verdicts
from ldm.pipeline import TextToImage
from ldm.samplers import SAMPLERS
from ldm.settings import Settings
from ldm.worlds.possible import fit

STEPS = (5, 10, 15, 20, 30, 50)
REFERENCE_STEPS = 1000
BATCH = 32
ANY_MODELS = tuple(name for name in SAMPLERS if name != "lcm")  # which needs a model made for it


@dataclass(frozen=True)
class Measured:
    """The pictures of one sampler with one number of steps.

    Attributes:
        sampler, steps: what drew them.
        calls: of the UNet, for one picture.
        right, total: how many claims of the prompts the pictures show, of how many.
        impossible, pictures: how many pictures no scene could have made, of how many.
        distance: root mean square difference of the latents, whose size is about 1, from the end of
            the path; NaN for samplers that add noise.
    """

    sampler: str
    steps: int
    calls: float
    right: int
    total: int
    impossible: int
    pictures: int
    distance: float


@dataclass(frozen=True)
class SamplerResults:
    """All of them, and what they were drawn with."""

    measured: Sequence[Measured]
    settings: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For programs; what is not a number is null."""
        rows = [asdict(one) for one in self.measured]
        for row in rows:
            row["distance"] = None if math.isnan(row["distance"]) else row["distance"]
        return {"settings": self.settings, "measured": rows}

    def as_markdown(self) -> str:
        """For people: by the number of calls, few first."""
        settings = ", ".join(f"{name} {value:g}" for name, value in self.settings.items())
        rows = []
        for one in sorted(self.measured, key=lambda one: (one.calls, one.sampler)):
            share, bound = one.right / one.total, lower_bound(one.right, one.total)
            rows.append(
                [
                    f"{one.calls:g}",
                    one.sampler,
                    str(one.steps),
                    f"{share:.1%} (at least {bound:.1%})",
                    f"{one.impossible} / {one.pictures}",
                    "" if math.isnan(one.distance) else f"{one.distance:.3f}",
                ]
            )
        heads = ["calls", "sampler", "steps", "as the prompt says", "impossible", "distance"]
        return (
            f"Pictures by the number of calls of the UNet ({settings}):\n\n{markdown(heads, rows)}"
        )

    def curves(self, figure: str) -> dict[str, dict[float, float]]:
        """`{sampler: {calls: figure}}` for `ldm.viz.curves`: "right" and "impossible" are shares,
        "distance" has only the samplers that have one."""
        lines: dict[str, dict[float, float]] = {}
        for one in sorted(self.measured, key=lambda one: one.calls):
            shares = {"right": one.right / one.total, "impossible": one.impossible / one.pictures}
            value = shares.get(figure, one.distance)
            if not math.isnan(value):
                lines.setdefault(one.sampler, {})[one.calls] = value
        return lines


def evaluate_samplers(
    pipe: TextToImage,
    *,
    samplers: Sequence[str] = ANY_MODELS,
    steps: Sequence[int] = STEPS,
    prompts: int = 96,
    reference_steps: int = REFERENCE_STEPS,
    guidance_scale: float | None = None,
    seed: int = 0,
) -> SamplerResults:
    """Draw the same prompts from the same noise with each sampler in each number of steps.

    Args:
        prompts: how many; each is drawn once, and picture i from `seed + i`.
        reference_steps: of DDIM, to the end of the path.
        guidance_scale: None is the model's own.

    Raises:
        ValueError: before the first picture, for settings that `Settings.of` refuses.
    """
    if prompts < 1:
        raise ValueError(f"prompts must be 1 or more, not {prompts}")
    asked = fresh_prompts(1 + prompts // 8, seed)[:prompts]
    runs = [
        Settings.of(
            pipe.config,
            [prompt.text for prompt in asked],
            steps=count,
            sampler=name,
            guidance_scale=guidance_scale,
            seed=seed,
        )
        for name in samplers
        for count in steps
    ]
    path = replace(runs[0], sampler="ddim", steps=reference_steps)
    path.check(pipe.config)
    end, _ = latents_of(pipe, path)
    bar = tqdm(runs, desc="drawing", unit="run", disable=None)  # None: on a terminal only
    measured = [measure(pipe, run, asked, end) for run in bar]
    told = {"guidance_scale": path.guidance_scale, "prompts": len(asked), "seed": seed}
    return SamplerResults(measured, told)


def measure(pipe: TextToImage, run: Settings, asked: Sequence[Prompt], end: Tensor) -> Measured:
    """The pictures of one run; `end` are the latents at the end of the path."""
    latents, calls = latents_of(pipe, run)
    right, total, impossible = 0, 0, 0
    for image, prompt in zip(pipe.decode(latents), asked, strict=True):
        found = fit(image)
        claims = [so for *_, so in verdicts(prompt.stated, found.scene.attributes)]
        right, total = right + sum(claims), total + len(claims)
        impossible += found.impossible
    distance = math.nan if run.adds_noise else (latents - end).square().mean().sqrt().item()
    counts = (right, total, impossible, len(asked))
    return Measured(run.sampler, run.steps, calls / len(asked), *counts, distance)


def latents_of(pipe: TextToImage, run: Settings) -> tuple[Tensor, int]:
    """What a run ends with, (B, C, h, w), and how often it asked the UNet, of all pictures."""
    parts = []
    with counted(pipe.unet) as calls:
        for start in range(0, run.num_images, BATCH):
            prompts = run.prompts[start : start + BATCH]
            for step in pipe.run(replace(run, prompts=prompts, seed=run.seed + start)):
                latents = step.x_prev
            parts.append(latents)
    return torch.cat(parts), sum(calls)


@contextlib.contextmanager
def counted(unet: nn.Module) -> Iterator[list[int]]:
    """How many latents the UNet is asked about, call by call."""
    calls: list[int] = []

    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.append(len(inputs[0]))

    handle = unet.register_forward_pre_hook(count)
    try:
        yield calls
    finally:
        handle.remove()
