"""Each stage of a model as an ONNX graph, by torch's exporter.

Batches are of any size; places and tokens are as many as the model was trained with.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ldm.export.steering import SteeredUNet
from ldm.settings import latent_shape

if TYPE_CHECKING:
    import onnx

    from ldm.pipeline import TextToImage
    from ldm.text import CLIPTextEncoder
    from ldm.vae import AutoencoderKL

BATCH = 2  # of the example that the exporter traces: 1 it would take for a constant


class TextGraph(nn.Module):
    """ids (B, L) -> context (B, L, D)."""

    def __init__(self, text: CLIPTextEncoder) -> None:
        super().__init__()
        self.text = text

    def forward(self, ids: Tensor) -> Tensor:
        return self.text.encode(ids)


class DecoderGraph(nn.Module):
    """Scaled latents, as samplers have them, (B, C, h, w) -> pictures near [-1, 1], (B, 3, H, W).

    The autoencoder's own latents are larger by the scaling factor: the graph divides by it.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / self.vae.config.scaling_factor)


def text_graph(pipe: TextToImage) -> onnx.ModelProto:
    """The text encoder: "ids" -> "context"."""
    ids = torch.zeros(BATCH, pipe.config.text.max_length, dtype=torch.int64)
    return graph_of(TextGraph(pipe.text), [ids], ["ids"], ["context"], batched=1)


def decoder_graph(pipe: TextToImage) -> onnx.ModelProto:
    """The decoder: "latents", scaled, -> "image"."""
    latents = torch.zeros(BATCH, *default_latents(pipe))
    return graph_of(DecoderGraph(pipe.vae), [latents], ["latents"], ["image"], batched=1)


def unet_graph(pipe: TextToImage) -> onnx.ModelProto:
    """The UNet with its insides: "x", "t", "context", "bias", "weight", "gates" -> "prediction",
    then "map:LAYER" of each cross-attention layer and "block:BLOCK" of each block: `SteeredUNet`.
    """
    unet = SteeredUNet(pipe.unet)
    text, length = pipe.config.text, pipe.config.text.max_length
    inputs = [
        torch.zeros(BATCH, *default_latents(pipe)),
        torch.zeros(BATCH, dtype=torch.int64),
        torch.zeros(BATCH, length, text.hidden_size),
        torch.zeros(BATCH, length),
        torch.ones(BATCH, length),
        torch.ones(len(unet.blocks)),
    ]
    names = ["x", "t", "context", "bias", "weight", "gates"]
    outputs = ["prediction", *(f"map:{name}" for name in unet.layers)]
    outputs += [f"block:{name}" for name in unet.blocks]
    return graph_of(unet, inputs, names, outputs, batched=5)


def alone(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with its first output alone: what else it computes, a runtime leaves out."""
    import onnx

    other = onnx.ModelProto()
    other.CopyFrom(graph)
    del other.graph.output[1:]
    return other


def default_latents(pipe: TextToImage) -> tuple[int, int, int]:
    """(C, h, w) of the latents of the model's own picture size."""
    side = pipe.config.image_size
    channels, height, width = latent_shape(pipe.config, side, side)
    return channels, height, width


def graph_of(
    module: nn.Module,
    inputs: Sequence[Tensor],
    names: Sequence[str],
    outputs: Sequence[str],
    *,
    batched: int,
) -> onnx.ModelProto:
    """A module as a graph; the first `batched` inputs have any batch size."""
    batch = torch.export.Dim("batch", min=1, max=1024)
    shapes = tuple({0: batch} if i < batched else {} for i in range(len(inputs)))
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # that torchvision is not installed is no news
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch about its own exporter
            program = torch.onnx.export(
                module.eval(),
                tuple(inputs),
                dynamo=True,
                external_data=False,
                optimize=True,
                verbose=False,
                input_names=list(names),
                output_names=list(outputs),
                dynamic_shapes=shapes,
            )
    finally:
        log.setLevel(level)
    assert program is not None
    return without_origins(program.model_proto)


def without_origins(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A graph whose nodes no longer say which lines of whose files they came from."""
    del graph.metadata_props[:], graph.graph.metadata_props[:]
    for named in (*graph.graph.node, *graph.graph.value_info, *graph.graph.initializer):
        del named.metadata_props[:]
        named.doc_string = ""
    for node in graph.graph.node:
        node.name = ""
    for value in (*graph.graph.input, *graph.graph.output):
        del value.metadata_props[:]
    del graph.graph.value_info[:]  # shapes in between, which every runtime finds for itself
    return graph
