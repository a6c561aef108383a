"""Mistakes that code for Stable Diffusion has been known to make, planted one at a time.

    python -m tests.evaluate.mistakes > docs/measured/mistakes.md

plants each in a model of Stable Diffusion v1's size with random weights, and prints how far it
moves the numbers that `ldm verify` compares: so it says which of them four published decimals can
show.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.clip import modeling_clip

from ldm import attention, layers, presets, schedule, unet, vae
from ldm.checkpoints.opening import open_archive
from ldm.checkpoints.planning import plan
from ldm.checkpoints.recognise import Weights, recognise
from ldm.config import SD_V1
from ldm.evaluate import verify as verifying
from ldm.evaluate import verify_stages
from ldm.evaluate.verify_published import Published, published
from ldm.samplers import SAMPLERS
from ldm.text import CLIPTextEncoder
from tests.helpers import random_checkpoint

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Mistake:
    """A mistake, the rows of `ldm verify` that must tell it (a whole picture may, too), and how it
    is made."""

    name: str
    rows: tuple[str, ...]
    plant: Callable[[Patch], None]


TEXT, UNET, DECODER, AUTOENCODER, PICTURE = "text", "unet", "decoder", "autoencoder", "picture"

# --- Text ------------------------------------------------------------------------------------


def plain_gelu(patch: Patch) -> None:
    def forward(self: Any, h: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(h)))

    patch.setattr(modeling_clip.CLIPMLP, "forward", forward)


def encode_with(patch: Patch, change: Callable[[Any, Patch], None]) -> None:
    """Text states of a transformer that is changed while it runs."""
    right = CLIPTextEncoder.encode

    def encode(self: CLIPTextEncoder, ids: Tensor) -> Tensor:
        with Patch.context() as inner:
            change(self.transformer, inner)
            return right(self, ids)

    patch.setattr(CLIPTextEncoder, "encode", encode)


def no_final_norm(patch: Patch) -> None:
    def change(transformer: Any, inner: Patch) -> None:
        inner.setattr(transformer.final_layer_norm, "forward", lambda states: states)

    encode_with(patch, change)


def layer_before_the_last(patch: Patch) -> None:
    def change(transformer: Any, inner: Patch) -> None:
        inner.setattr(transformer.encoder.layers[-1], "forward", lambda states, *_, **__: states)

    encode_with(patch, change)


def no_places(patch: Patch) -> None:
    def forward(self: Any, input_ids: Tensor, **_: Any) -> Tensor:
        return self.token_embedding(input_ids)

    patch.setattr(modeling_clip.CLIPTextEmbeddings, "forward", forward)


# --- UNet ------------------------------------------------------------------------------------


def sines_first(patch: Patch) -> None:
    right = layers.sinusoidal_embedding

    def embedding(t: Tensor, dim: int) -> Tensor:
        cosines, sines = right(t, dim).chunk(2, dim=-1)
        return torch.cat([sines, cosines], dim=-1)

    patch.setattr(layers, "sinusoidal_embedding", embedding)


def gate_first(patch: Patch) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        gate, value = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate))

    patch.setattr(attention.FeedForward, "forward", forward)


def tanh_gelu(patch: Patch) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate, approximate="tanh"))

    patch.setattr(attention.FeedForward, "forward", forward)


def scale_of_all_heads(patch: Patch) -> None:
    def attend(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        width = q.shape[1] * q.shape[-1]
        return F.scaled_dot_product_attention(q, k, v, scale=width**-0.5)

    patch.setattr(attention.AttentionWeights, "attend", attend)


def bilinear(patch: Patch) -> None:
    def forward(self: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="bilinear"))

    patch.setattr(layers.Upsample, "forward", forward)


# --- Autoencoder -----------------------------------------------------------------------------


def symmetric_pad(patch: Patch) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (1, 1, 1, 1)))

    patch.setattr(layers.Downsample, "forward", forward)


def no_post_quant_conv(patch: Patch) -> None:
    patch.setattr(vae.AutoencoderKL, "decode", lambda self, z: self.decoder(z))


def no_quant_conv(patch: Patch) -> None:
    def encode(self: Any, x: Tensor) -> vae.Posterior:
        return vae.Posterior(*self.encoder(x).chunk(2, dim=1))

    patch.setattr(vae.AutoencoderKL, "encode", encode)


# --- The chain -------------------------------------------------------------------------------


def guidance_turned_round(patch: Patch) -> None:
    right = verify_stages.guide
    patch.setattr(verify_stages, "guide", lambda model, a, b, scale: right(model, b, a, scale))


def off_by_one(patch: Patch) -> None:
    def timesteps(steps: int, total: int) -> list[int]:
        return [k * (total // steps) for k in reversed(range(steps))]

    patch.setattr(presets, "even_timesteps", timesteps)


def end_in_the_clean_picture(patch: Patch) -> None:
    patch.setitem(SAMPLERS, "ddim", dataclasses.replace(SAMPLERS["ddim"], end=-1))


def linear_betas(patch: Patch) -> None:
    def tables(config: Any) -> tuple[Tensor, Tensor]:
        steps, kind = config.num_train_timesteps, torch.float64
        betas = torch.linspace(config.beta_start, config.beta_end, steps, dtype=kind)
        return betas, torch.cumprod(1 - betas, dim=0)

    patch.setattr(schedule, "exact_tables", tables)


def another_scaling_factor(patch: Patch) -> None:
    def understood(*args: Any) -> Weights:
        found = recognise(*args)
        wrong = dataclasses.replace(found.config.vae, scaling_factor=0.13025)
        return dataclasses.replace(found, config=dataclasses.replace(found.config, vae=wrong))

    patch.setattr(verifying, "recognise", understood)


MISTAKES = (
    Mistake("the text encoder: GELU for quick GELU", ("text-mlp", TEXT), plain_gelu),
    Mistake("the text encoder: no final layer norm", (TEXT,), no_final_norm),
    Mistake("the text encoder: states of the layer before", (TEXT,), layer_before_the_last),
    Mistake("the text encoder: places not added", ("text-embeddings", TEXT), no_places),
    Mistake("the UNet: sines before cosines", (UNET,), sines_first),
    Mistake("the UNet: GEGLU's gate before its value", (UNET,), gate_first),
    Mistake("the UNet: GELU by tanh", (UNET,), tanh_gelu),
    Mistake("the UNet: attention scaled by all heads' width", (UNET,), scale_of_all_heads),
    Mistake(
        "the UNet: norms with the autoencoder's epsilon",
        (UNET,),
        lambda patch: patch.setattr(unet, "NORM_EPS", 1e-6),
    ),
    Mistake("both: upsampling bilinear, not nearest", (UNET, DECODER, AUTOENCODER), bilinear),
    Mistake(
        "the autoencoder: norms with the UNet's epsilon",
        (DECODER, AUTOENCODER),
        lambda patch: patch.setattr(vae, "NORM_EPS", 1e-5),
    ),
    Mistake("the autoencoder: a symmetric pad on the way down", (AUTOENCODER,), symmetric_pad),
    Mistake("the autoencoder: no post_quant_conv", (DECODER, AUTOENCODER), no_post_quant_conv),
    Mistake("the autoencoder: no quant_conv", (AUTOENCODER,), no_quant_conv),
    Mistake("the chain: guidance turned round", (PICTURE,), guidance_turned_round),
    Mistake("the chain: timesteps off by one", (PICTURE,), off_by_one),
    Mistake("the chain: the last step to alpha_bar 1", (PICTURE,), end_in_the_clean_picture),
    Mistake("the chain: betas linear, not their roots", (PICTURE,), linear_betas),
    Mistake("the chain: another scaling factor", (PICTURE,), another_scaling_factor),
)


# --- How far they move the numbers -----------------------------------------------------------


SIDE = 128
"""Of the picture, in pixels: what a mistake of the chain moves shows in a small one as well."""
COLUMNS = (
    *("mistake", "row", "moved by, of the row's std", "of the published row's"),
    *("allowed", "shown?"),
)


def table(
    path: Path, numbers: tuple[Published, ...], mistakes: Sequence[Mistake] = MISTAKES
) -> Iterator[str]:
    """The lines of a Markdown table, one by one as they are measured."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"|{' --- |' * len(COLUMNS)}"
    rows = {row for mistake in mistakes for row in mistake.rows}
    right = measured(path, tuple(number for number in numbers if kind(number) in rows))
    for mistake in mistakes:
        wanted = tuple(one for one in numbers if kind(one) in mistake.rows)
        with Patch.context() as patch:
            mistake.plant(patch)
            wrong = measured(path, wanted)
        for number in wanted:
            a, b = (torch.tensor(found[number.name]) for found in (right, wrong))
            moved = ((a - b).abs().max() / spread(a)).item()
            absolute = moved * spread(torch.tensor(number.values)).item()
            seen = "yes" if absolute > 2 * number.atol else "no"
            if number.atol < absolute <= 2 * number.atol:
                seen = "perhaps"
            cells = (mistake.name, number.name, f"{moved:.1e}", f"{absolute:.1e}")
            yield f"| {' | '.join(cells)} | {number.atol:g} | {seen} |"


def kind(number: Published) -> str:
    """What a row is called in `Mistake.rows`: without the version."""
    return number.stage if number.stage in (UNET, PICTURE) else number.name


def spread(numbers: Tensor) -> Tensor:
    """The standard deviation of several numbers; 1 for a sum, which has none."""
    return numbers.std() if len(numbers) > 1 else torch.tensor(1.0)


def measured(path: Path, numbers: tuple[Published, ...]) -> Mapping[str, tuple[float, ...]]:
    """What `ldm verify` measures, by the names of the rows; only the stages that these need."""
    weights = verifying.recognise(open_archive(path))
    config = dataclasses.replace(weights.config, image_size=SIDE)
    weights = dataclasses.replace(weights, config=config)
    stages = {number.stage for number in numbers}
    needed = [stage for stage in verifying.ORDER if stages & {stage, PICTURE}]
    plans = {stage: plan(weights, stage) for stage in needed}
    return verifying.measure(plans, numbers, weights, torch.device("cpu"))[0]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.evaluate.mistakes")
    parser.add_argument("--weights", type=Path, help="of that size (default: random ones are made)")

    parser.add_argument("--only", default="", help="mistakes that begin so: 'the chain'")
    args = parser.parse_args()
    mistakes = [mistake for mistake in MISTAKES if mistake.name.startswith(args.only)]
    kept = ("picture-ddim-v1-4", "unet-v1-1", "unet-v1-4")
    numbers = tuple(
        number for number in published() if number.stage in ("text", "vae") or number.name in kept
    )
    with tempfile.TemporaryDirectory(prefix="ldm-mistakes-") as folder:
        path = args.weights or Path(folder) / "model.safetensors"
        if args.weights is None:
            random_checkpoint(path, SD_V1, seed=1)
        for line in table(path, numbers, mistakes):
            print(line, flush=True)


if __name__ == "__main__":
    main()
