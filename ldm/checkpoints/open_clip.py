"""The text encoder under OpenCLIP's names, as official files of Stable Diffusion 2 have it.

Two things differ from the layers that our text encoder has, and both are told here:

1.  Names: `transformer.resblocks.0.mlp.c_fc` is `encoder.layers.0.mlp.fc1`.
2.  What asks, what answers and what is fetched are one matrix, `attn.in_proj_weight`: the rows of
    `q_proj`, then those of `k_proj`, then those of `v_proj`. On the way in it is split into thirds,
    on the way out the three are joined; no number changes. `in_proj_bias` likewise.

OpenCLIP has one block more than Stable Diffusion 2 runs, and a projection behind it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.checkpoints.entries import Entry, contiguous
from ldm.checkpoints.keys import PREFIXES

TEXT = PREFIXES["text"]
OPEN_CLIP = "cond_stage_model.model."
BLOCKS = f"{OPEN_CLIP}transformer.resblocks."
LAYERS = f"{TEXT}encoder.layers."

# OpenCLIP's key -> ours, outside the blocks and in each of them.
OUTSIDE = {
    f"{OPEN_CLIP}token_embedding.weight": f"{TEXT}embeddings.token_embedding.weight",
    f"{OPEN_CLIP}positional_embedding": f"{TEXT}embeddings.position_embedding.weight",
    f"{OPEN_CLIP}ln_final.weight": f"{TEXT}final_layer_norm.weight",
    f"{OPEN_CLIP}ln_final.bias": f"{TEXT}final_layer_norm.bias",
}
BLOCK = {
    f"{theirs}.{kind}": f"{ours}.{kind}"
    for theirs, ours in {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }.items()
    for kind in ("weight", "bias")
}
FUSED = {
    f"attn.in_proj_{kind}": tuple(f"self_attn.{part}_proj.{kind}" for part in "qkv")
    for kind in ("weight", "bias")
}


def split(entries: Mapping[str, Entry], num_layers: int) -> dict[str, Entry]:
    """The tensors of a file, those of OpenCLIP's first `num_layers` blocks under our text encoder's
    official names; nothing is read. All other keys stay as they are."""
    found: dict[str, Entry] = {}
    for key, entry in entries.items():
        number, _, rest = key.removeprefix(BLOCKS).partition(".")
        is_in_block = key.startswith(BLOCKS) and number.isascii() and number.isdecimal()
        if not is_in_block or len(number) > 4 or int(number) >= num_layers:
            found[OUTSIDE.get(key, key)] = entry
        elif rest in FUSED and entry.shape and entry.shape[0] % 3 == 0:
            names = [f"{LAYERS}{number}.{name}" for name in FUSED[rest]]
            found |= zip(names, thirds(entry), strict=True)
        else:
            found[f"{LAYERS}{number}.{BLOCK.get(rest, rest)}"] = entry
    return found


def thirds(entry: Entry) -> list[Entry]:
    """The first, the second and the last third of a tensor's rows."""
    rows = entry.shape[0] // 3
    stride = entry.stride or contiguous(entry.shape)
    step = rows * stride[0] * entry.dtype.itemsize  # bytes
    shape = (rows, *entry.shape[1:])
    return [
        dataclasses.replace(entry, offset=entry.offset + n * step, shape=shape) for n in range(3)
    ]


def joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `split`, for the tensors of a whole model by official names."""
    outside = {ours: theirs for theirs, ours in OUTSIDE.items()}
    block = {ours: theirs for theirs, ours in BLOCK.items()}
    fused = {names[0]: (theirs, names) for theirs, names in FUSED.items()}
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(LAYERS):
            found[outside.get(key, key)] = tensor
            continue
        number, _, rest = key.removeprefix(LAYERS).partition(".")
        if rest in block:
            found[f"{BLOCKS}{number}.{block[rest]}"] = tensor
        elif rest in fused:  # the queries' stand for all three
            theirs, names = fused[rest]
            parts = [tensors[f"{LAYERS}{number}.{name}"] for name in names]
            found[f"{BLOCKS}{number}.{theirs}"] = torch.cat(parts)
    return found
