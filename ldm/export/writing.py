"""A model as a folder of ONNX files, with what must be known to run them.

text.onnx            "ids" -> "context"
unet.onnx            "x", "t", "context", "bias", "weight", "gates" -> "prediction"
unet_insides.onnx    the same, and the cross-attention maps and what each block puts out
unet.weights         of both
decoder.onnx         "latents" -> "image"
model.json           the config, alpha_bar at each timestep, the names of layers and blocks
vocab.json, merges.txt   of the tokenizer
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ldm.export.graphs import alone, decoder_graph, text_graph, unet_graph
from ldm.export.int8 import with_int8_weights
from ldm.files import check_writable, folder_written_whole

if TYPE_CHECKING:
    import onnx

    from ldm.pipeline import TextToImage

NEEDED = ("onnx", "onnxscript")
WEIGHTS = "unet.weights"
HALF = (
    *("unet.conv_in.", "unet.down.0.", "unet.up.0.", "unet.conv_out."),
    *("unet.up.1.upsample.", "unet.up.1.blocks.1.res."),
    *("vae.decoder.conv_in.", "vae.decoder.up.0.", "vae.decoder.up.1.", "vae.decoder.conv_out."),
)
"""The weights that are kept in half precision where others are int8, by their beginnings."""


def check_installed() -> None:
    """A ValueError in one line unless the exporter's libraries are there; none is loaded."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"this needs {' and '.join(missing)}: pip install 'ldm-from-scratch[live]'"
        )


def check_target(folder: Path) -> None:
    """A ValueError in one line, before any work, unless a new folder can be made there and the
    exporter's libraries are installed."""
    check_installed()
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"{folder} exists already: a new folder is never mixed with an old one")
    check_writable(folder)


def export_onnx(pipe: TextToImage, folder: str | Path, *, int8: bool = True) -> None:
    """Write a model as ONNX files; the folder appears whole or not at all.

    Args:
        pipe: the model, on a CPU in float32.
        folder: a new one.
        int8: keep large weights in a byte each (`ldm.export.int8`); False keeps 32-bit floats.

    Raises:
        ValueError: before any work: the folder is there already, the model is elsewhere or in half
            precision, or onnx is not installed.
        WriteError: it cannot be written there.
    """
    check_target(Path(folder))
    if pipe.device.type != "cpu" or pipe.dtype != torch.float32:
        where = f"{pipe.device} in {pipe.dtype}"
        raise ValueError(f"a model is exported on the CPU in float32, not on {where}")
    with folder_written_whole(Path(folder)) as temporary:
        for name, content in exported(pipe, int8=int8).items():
            (temporary / name).write_bytes(content)


def exported(pipe: TextToImage, *, int8: bool = True) -> dict[str, bytes]:
    """The files of a model by their names."""
    graphs = {"text": text_graph(pipe), "decoder": decoder_graph(pipe), "unet": unet_graph(pipe)}
    outputs = [output.name for output in graphs["unet"].graph.output]
    if int8:
        graphs = {name: with_int8_weights(graph, HALF) for name, graph in graphs.items()}
    unet, weights = with_weights_apart(graphs["unet"])
    tokenizer = pipe.text.require_tokenizer()
    about = {
        "config": dataclasses.asdict(pipe.config),
        "alpha_bar": pipe.schedule.alpha_bar.tolist(),
        "layers": names_after("map:", outputs),
        "blocks": names_after("block:", outputs),
    }
    merges = "".join(f"{first} {second}\n" for first, second in tokenizer.merges)
    return {
        "text.onnx": graphs["text"].SerializeToString(),
        "decoder.onnx": graphs["decoder"].SerializeToString(),
        "unet.onnx": alone(unet).SerializeToString(),
        "unet_insides.onnx": unet.SerializeToString(),
        WEIGHTS: weights,
        "model.json": as_json(about),
        "vocab.json": as_json(tokenizer.vocab),
        "merges.txt": f"#version: 0.2\n{merges}".encode(),
    }


def with_weights_apart(graph: onnx.ModelProto) -> tuple[onnx.ModelProto, bytes]:
    """A graph without its weights, which it names by their places in the bytes that stand beside
    it: so two graphs share them."""
    import onnx

    bare = onnx.ModelProto()
    bare.CopyFrom(graph)
    weights = bytearray()
    for tensor in bare.graph.initializer:
        content = onnx.numpy_helper.to_array(tensor).tobytes()
        if len(content) < 1024:  # shapes and the like, which runtimes want to see at once
            continue
        places = {"location": WEIGHTS, "offset": str(len(weights)), "length": str(len(content))}
        weights += content
        for field in ("raw_data", "float_data", "int32_data", "int64_data"):
            tensor.ClearField(field)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        del tensor.external_data[:]
        for key, value in places.items():
            tensor.external_data.add(key=key, value=value)
    return bare, bytes(weights)


def names_after(prefix: str, outputs: list[str]) -> list[str]:
    """["map:a", "block:b"] -> ["a"] after "map:"."""
    return [name.removeprefix(prefix) for name in outputs if name.startswith(prefix)]


def as_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
