"""LoRA files: low-rank corrections of a model's weights (Hu et al. 2021, arXiv:2106.09685).

For a layer with the weight W such a file holds two thin matrices, `down` (rank, in) and `up`
(out, rank), and perhaps a number `alpha`; what is meant is W + scale * alpha / rank * up @ down.
Three programs' names are read: kohya's (`lora_unet_down_blocks_0_..._to_q.lora_down.weight`),
those of diffusers and PEFT (`unet.down_blocks.0...to_q.lora_A.weight`), and diffusers' older ones
(`unet...attn1.processor.to_q_lora.down.weight`). What is read here is held against the model's
layers; how it is computed is told in `ldm.adapters`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoints.diffusers.names import diffusers_unet_names, text_layers
from ldm.checkpoints.entries import Archive, Entry
from ldm.checkpoints.families import addition_in, other_family
from ldm.checkpoints.keys import unet_names
from ldm.checkpoints.opening import open_archive
from ldm.config import TextConfig, UNetConfig
from ldm.errors import (
    FamilyError,
    KeysError,
    NonFiniteError,
    ShapeError,
    did_you_mean,
    printable,
    some,
)

LARGEST = 1000.0  # scale, of either sign
LORA = "a LoRA"  # as `families` calls it
# How keys end, and what they are; the beginning names the layer. A dot that joins is part of it.
ENDINGS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
}
# Kinds that a plain LoRA's names do not tell, by a part of their keys.
OTHER_KINDS = {
    "dora_scale": "a DoRA, a kind of LoRA",
    "lora_magnitude_vector": "a DoRA, a kind of LoRA",
    "lora_mid.": "a LoRA with a third factor (CP decomposition)",
    "lora_te1_": "a LoRA of Stable Diffusion XL",
    "lora_te2_": "a LoRA of Stable Diffusion XL",
    "text_encoder_2.": "a LoRA of Stable Diffusion XL",
    "add_embedding": "a LoRA of Stable Diffusion XL",
    "transformer_blocks_9_": "a LoRA of Stable Diffusion XL",
    "joint_transformer_blocks": "a LoRA of Stable Diffusion 3",
    "single_transformer_blocks": "a LoRA of Flux",
    "double_blocks": "a LoRA of Flux",
    "boft_": "a BOFT, a kind of OFT",
    "ia3": "an (IA)^3",
    ".diff": "full differences of weights",
}
CROSS = re.compile(r"attn2[._](?:processor\.)?to_k")
VERSIONS = {768: "1", 1024: "2", 2048: "XL"}  # of Stable Diffusion, by the width of text states


@dataclass(frozen=True)
class Factors:
    """The correction of one layer.

    Attributes:
        down: (rank, in) for a linear layer, (rank, in, h, w) for a convolution; float32.
        up: (out, rank), float32.
        alpha: None where the file says nothing: then it is the rank.
    """

    down: Tensor
    up: Tensor
    alpha: float | None

    @property
    def factor(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / len(self.down)


Layer = tuple[str, str]  # a stage, and our name of one of its layers


def read_lora(path: str | Path, stages: Mapping[str, nn.Module]) -> dict[Layer, Factors]:
    """The corrections in a file, for the layers of a model.

    Args:
        path: a file, as `open_archive` takes it; nothing in it is executed.
        stages: "unet" and "text", the model's.

    Raises:
        FileNotFoundError, UnreadableError: as `open_archive`.
        FamilyError: it is no LoRA, another kind of it, or that of another model.
        KeysError: a key means no layer of this model, or one of a layer's matrices is missing.
        ShapeError: a matrix does not fit its layer.
        NonFiniteError: it holds NaN or infinity.
    """
    archive = open_archive(path)
    check_kind(archive, stages["unet"])
    names = layer_names(stages)
    found: dict[Layer, dict[str, Entry]] = {}
    for key, entry in archive.entries.items():
        layer, role = meaning(key)
        if role is None or layer not in names:
            near = did_you_mean(layer, names)
            told = f"{archive.path}: {printable(key, 200)} means no layer of this model{near}"
            raise KeysError(told)
        if found.setdefault(names[layer], {}).setdefault(role, entry) is not entry:
            raise KeysError(f"{archive.path} holds {printable(key, 200)} under two names")
    alphas = peft_alphas(archive)
    return {
        (stage, name): factors(archive.path, stages, (stage, name), roles, alphas.get(stage))
        for (stage, name), roles in found.items()
    }


def bake(path: str | Path, scale: float, stages: Mapping[str, nn.Module]) -> None:
    """Give the layers of "unet" and "text" the weights that a LoRA means, each by its scale.

    Raises:
        ValueError: the scale is none.
        FileNotFoundError, CheckpointError: as `read_lora`, before any weight is changed.
    """
    check_scale(scale)
    for (stage, name), found in read_lora(path, stages).items():
        layer = stages[stage].get_submodule(name)
        assert isinstance(layer.weight, nn.Parameter)
        layer.weight = merged(layer.weight, found.down, found.up, scale * found.factor)


@torch.no_grad()
def merged(weight: nn.Parameter, down: Tensor, up: Tensor, factor: float) -> nn.Parameter:
    """W + factor * up @ down, computed in float32, in the dtype of W."""
    delta = up.float() @ down.float().flatten(1)  # (out, in h w)
    result = weight.float() + factor * delta.to(weight.device).view(weight.shape)
    return nn.Parameter(result.to(weight.dtype), weight.requires_grad)


def check_scale(scale: float) -> None:
    """A ValueError unless a LoRA can count so strongly."""
    if not isinstance(scale, int | float) or not abs(scale) <= LARGEST:
        raise ValueError(f"scale must be between -{LARGEST:g} and {LARGEST:g}, not {scale!r:.80}")


def check_kind(archive: Archive, unet: nn.Module) -> None:
    """A FamilyError unless these are the keys of a LoRA, and of this version of the model."""
    keys = list(archive.entries)
    kind = next((name for part, name in OTHER_KINDS.items() if any(part in k for k in keys)), None)
    kind = kind or addition_in(archive.entries) or other_family(archive.entries)
    if kind != LORA:
        told = kind or "not a LoRA"
        raise FamilyError(f"{archive.path} is {told}; a LoRA of Stable Diffusion 1 or 2 is wanted")
    width = getattr(unet.config, "context_dim", None)
    for key, entry in archive.entries.items():
        if CROSS.search(key) and meaning(key)[1] == "down" and len(entry.shape) > 1:
            theirs = entry.shape[1]
            if theirs != width and theirs in VERSIONS:
                told = f"a LoRA of Stable Diffusion {VERSIONS[theirs]} (text states of width"
                raise FamilyError(f"{archive.path} is {told} {theirs}), the model reads {width}")


def meaning(key: str) -> tuple[str, str | None]:
    """The layer that a key names, in the words of the file, and what it is of that layer."""
    key = key.removeprefix("base_model.model.")
    for ending, role in ENDINGS.items():
        if key.endswith(ending):
            layer = key.removesuffix(ending)
            if ".processor." in layer:  # beside the layers that it is for
                layer = re.sub(r"\.processor\.to_out$", ".to_out.0", layer)
                layer = layer.replace(".processor.", ".")
            # The text encoder's, under the names of the UNet's.
            layer = re.sub(r"\.self_attn\.to_(\w+)$", r".self_attn.\1_proj", layer)
            return layer, role
    return key, None


def layer_names(stages: Mapping[str, nn.Module]) -> dict[str, Layer]:
    """Every name that a file may have for a layer of this model -> the layer."""
    names: dict[str, Layer] = {}
    for stage, ours, theirs in layers(stages):
        for one in theirs:
            names[one] = (stage, ours)
    return names


def layers(stages: Mapping[str, nn.Module]) -> Iterator[tuple[str, str, list[str]]]:
    """The layers with a matrix that there are: stage, our name, and the names in files."""
    unet, text = stages["unet"], stages["text"]
    assert isinstance(unet.config, UNetConfig) and isinstance(text.config, TextConfig)
    official = unet_names(unet.config)
    there = dict(unet.named_modules())
    for ours, theirs in diffusers_unet_names(unet.config).items():
        if isinstance(there.get(ours), nn.Linear | nn.Conv2d):
            flat = [f"lora_unet_{name.replace('.', '_')}" for name in (theirs, official[ours])]
            yield "unet", ours, [f"unet.{theirs}", theirs, *flat]
    there = dict(text.named_modules())
    for layer in text_layers(text.config):
        ours = f"transformer.{layer}"
        if isinstance(there.get(ours), nn.Linear):
            whole = f"text_model.{layer}"
            flat = [f"lora_te_{name.replace('.', '_')}" for name in (whole, layer)]
            yield "text", ours, [f"text_encoder.{whole}", f"text_encoder.{layer}", *flat]


def peft_alphas(archive: Archive) -> dict[str, float]:
    """What diffusers writes beside the weights: stage -> alpha, where it is one number for all."""
    try:
        told = json.loads(archive.metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        return {}
    found = {}
    for stage, part in {"unet": "unet", "text": "text_encoder"}.items():
        alpha = told.get(f"{part}.lora_alpha") if isinstance(told, dict) else None
        if isinstance(alpha, int | float) and not isinstance(alpha, bool):
            found[stage] = float(alpha)
    return found


def factors(
    path: Path,
    stages: Mapping[str, nn.Module],
    layer: Layer,
    roles: Mapping[str, Entry],
    alpha: float | None,
) -> Factors:
    """The matrices of one layer, read, and held against the weight that they correct."""
    stage, name = layer
    weight = stages[stage].get_submodule(name).weight
    assert isinstance(weight, Tensor)
    if missing := sorted({"down", "up"} - roles.keys()):
        raise KeysError(f"{path}: of {stage}.{name} there is no {some(missing)}")
    down, up = read(path, layer, roles["down"]), read(path, layer, roles["up"])
    rank = down.shape[0] if down.ndim > 1 else 0
    wanted = {"down": (rank, *weight.shape[1:]), "up": (weight.shape[0], rank)}
    for role, found in {"down": down, "up": up}.items():
        if rank < 1 or without_ones(found.shape) != without_ones(wanted[role]):
            told = f"{role} is {list(found.shape)}, expected {list(wanted[role])}"
            raise ShapeError(f"{path} does not fit the model; of {stage}.{name}, {told}")
    if "alpha" in roles:
        number = read(path, layer, roles["alpha"])
        if number.numel() != 1:
            raise ShapeError(f"{path}: alpha of {stage}.{name} is {list(number.shape)}, no number")
        alpha = float(number)
    return Factors(down.reshape(wanted["down"]), up.reshape(wanted["up"]), alpha)


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without ones at its end, behind the second: a linear layer is a 1x1 convolution."""
    shape = tuple(shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def read(path: Path, layer: Layer, entry: Entry) -> Tensor:
    """A tensor of the file in memory of its own, float32."""
    if not entry.dtype.is_floating_point:
        kind = str(entry.dtype).removeprefix("torch.")
        if entry.shape:
            raise ShapeError(f"{path}: {'.'.join(layer)} is stored as {kind}, not as real numbers")
    value = entry.map().to(torch.float32, copy=True)
    if not value.isfinite().all():
        raise NonFiniteError(f"{path}: {'.'.join(layer)} holds NaN or infinity")
    return value
