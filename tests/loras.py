"""LoRA files under all the names that there are, from the same random numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ldm.checkpoints.diffusers.names import diffusers_unet_names
from tests.helpers import rng

Pairs = dict[tuple[str, str], tuple[Tensor, Tensor]]
LAYERS = {
    "unet": (
        "down.1.blocks.0.transformer.self_attention.to_q",
        "down.1.blocks.0.transformer.cross_attention.to_k",
        "mid.transformer.cross_attention.to_out",
        "mid.transformer.feed_forward.proj_in",
        "mid.transformer.proj_in",
        "up.1.blocks.1.transformer.self_attention.to_v",
    ),
    "text": (
        "transformer.encoder.layers.1.self_attn.q_proj",
        "transformer.encoder.layers.0.mlp.fc1",
    ),
}
CONVOLUTIONS = (
    "down.0.blocks.0.res.conv1",
    "down.0.downsample.conv",
    "up.1.blocks.0.res.skip",
    "up.1.upsample.conv",
    "up.0.blocks.1.res.conv2",
)


def pairs(stages: Mapping[str, nn.Module], rank: int = 3, convolutions: bool = True) -> Pairs:
    """(down, up) of some layers of a tiny model."""
    generator, found = rng(11), {}
    names = LAYERS | {"unet": LAYERS["unet"] + CONVOLUTIONS * convolutions}
    for stage, layers in names.items():
        for name in layers:
            weight = stages[stage].get_submodule(name).weight
            down = torch.randn(rank, *weight.shape[1:], generator=generator) / 4
            up = torch.randn(weight.shape[0], rank, generator=generator) / 4
            found[stage, name] = (down, up)
    return found


def theirs(
    stages: Mapping[str, nn.Module], found: Pairs
) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """Stage, diffusers' name of a layer, down, and up in the shape in which files have it."""
    names = diffusers_unet_names(stages["unet"].config)  # type: ignore[arg-type]
    for (stage, name), (down, up) in found.items():
        layer = (
            names[name] if stage == "unet" else "text_model." + name.removeprefix("transformer.")
        )
        shape = (*up.shape, *[1] * (down.ndim - 2))
        yield stage, layer, down, up.reshape(shape)


def kohya(stages: Mapping[str, nn.Module], found: Pairs, alpha: float = 1.5) -> dict[str, Tensor]:
    tensors = {}
    for stage, layer, down, up in theirs(stages, found):
        start = {"unet": "lora_unet_", "text": "lora_te_"}[stage] + layer.replace(".", "_")
        tensors[f"{start}.lora_down.weight"] = down
        tensors[f"{start}.lora_up.weight"] = up
        tensors[f"{start}.alpha"] = torch.tensor(alpha)
    return tensors


def peft(stages: Mapping[str, nn.Module], found: Pairs) -> dict[str, Tensor]:
    tensors = {}
    for stage, layer, down, up in theirs(stages, found):
        start = {"unet": "unet.", "text": "text_encoder."}[stage] + layer
        tensors |= {f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up}
    return tensors


def diffusers(stages: Mapping[str, nn.Module], found: Pairs) -> dict[str, Tensor]:
    """As diffusers wrote them before it had PEFT."""
    tensors = {}
    for stage, layer, down, up in theirs(stages, found):
        start = {"unet": "unet.", "text": "text_encoder."}[stage] + layer
        joint = {"unet": "lora", "text": "lora_linear_layer"}[stage]
        tensors |= {f"{start}.{joint}.down.weight": down, f"{start}.{joint}.up.weight": up}
    return tensors


def processors(stages: Mapping[str, nn.Module], found: Pairs) -> dict[str, Tensor]:
    """As the first versions wrote those of attention: beside the layers, in a processor."""
    tensors = {}
    for stage, layer, down, up in theirs(stages, found):
        if stage == "unet" and ".attn" in layer:
            block, _, name = layer.removesuffix(".0").rpartition(".")
            block, name = (
                (block, name) if name.startswith("to_") else (block.rpartition(".")[0], "")
            )
            start = f"{block}.processor.{name}_lora"
            tensors |= {f"{start}.down.weight": down, f"{start}.up.weight": up}
    return tensors
