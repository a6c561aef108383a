"""The same model, faster on a CUDA device: what `pipe.optimize()` asks there in the UNet's place.

No GPU has run this file yet. The tests hold what can be held without one; `python -m tests.gpu`
holds and measures the rest, where there is one.

A step of the UNet is a thousand small kernels, and to launch them from Python takes longer than to
compute them. So the whole call is captured once, as a CUDA graph, and replayed at every step: the
sampler's own arithmetic stays outside, in the open. What is captured is a twin, a second UNet of
the very same parameters, which

1.  reads maps with the channels of a place side by side, as the GPU's matrix units want them;
2.  multiplies a place's q, k and v at once, by weights that are joined when it is made;
3.  gets the prompt's k and v ready-made: the prompt is the same at every step;
4.  is compiled, where it is large and Triton is there.

The plain UNet stays what one reads, records, edits and trains, and is asked whenever the twin would
not do: while anyone watches a part of it, with gradients, or under autocast. A weight that was
changed in place is noticed by its version, one that was replaced by its address (writes through
`.data` have neither), another prompt by its tensor.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.attention import Attention, SpatialTransformer
from ldm.layers import is_watched
from ldm.unet import UNet, check_inputs
from ldm.vae import AutoencoderKL

MOST = 4
"""How many graphs are kept, one for each shape of inputs: each holds the memory of a call."""

WARM = 3
"""How often a call runs before it is captured, so that libraries have chosen their kernels."""


@contextlib.contextmanager
def in_float32(device: torch.device, *, tf32: bool) -> Iterator[None]:
    """Let float32 mean float32 on a CUDA device: PyTorch's convolutions there keep 10 bits of each
    factor (TensorFloat-32) unless told otherwise. With `tf32` they may, and matrix products too.

    Whoever has chosen by PyTorch's newer `fp32_precision` has chosen: then nothing is changed.
    """
    products: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    try:
        before = [one.allow_tf32 for one in products] if device.type == "cuda" else []
    except RuntimeError:  # PyTorch does not answer the older question after the newer one
        before = []
    try:
        for one, _ in zip(products, before, strict=False):
            one.allow_tf32 = tf32
        yield
    finally:
        for one, was in zip(products, before, strict=False):
            one.allow_tf32 = was


def optimize_decoder(vae: AutoencoderKL) -> None:
    """Let an autoencoder on a GPU decode faster, in place; its weights and names stay. What is
    compiled runs as plain code while anyone records or edits (`ldm.observe.hooks`)."""
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if can_compile() and vae.decoder._compiled_call_impl is None:
        vae.decoder.compile(fullgraph=True, dynamic=False)


def can_compile() -> bool:
    """Whether torch.compile has what it writes a GPU's kernels in."""
    return importlib.util.find_spec("triton") is not None


# --- The twin ----------------------------------------------------------------------------------


class FusedSelfAttention(Attention):
    """q, k and v by one product."""

    fused: Tensor

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        return nn.functional.linear(x, self.fused).chunk(3, dim=-1)  # (B, N, dim) each

    def join(self) -> Tensor:
        """The three weights as one, (3 dim, dim)."""
        return torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight]).detach()


class PromptAttention(Attention):
    """k and v are there already: those of the context that the graph was told."""

    k: Tensor
    v: Tensor

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        return self.to_q(x), self.k, self.v


class Twin(NamedTuple):
    """A UNet that shares its parameters with another, and its attentions."""

    unet: UNet
    fused: list[FusedSelfAttention]
    prompted: list[PromptAttention]

    @torch.no_grad()
    def join(self) -> None:
        """Join q, k and v of the weights as they are now, where they were joined before."""
        for attention in self.fused:
            attention.fused.copy_(attention.join())


@torch.no_grad()
def twin_of(unet: UNet) -> Twin:
    """A twin of a UNet that nobody watches."""
    shared: dict[int, Any] = {id(weight): weight for weight in unet.parameters()}
    unet = copy.deepcopy(unet, shared)
    twin = Twin(unet, [], [])
    for part in unet.modules():
        part._forward_hooks.clear()  # of other threads, in which alone they mean anything
        part._forward_pre_hooks.clear()
        if isinstance(part, SpatialTransformer):
            part.self_attention.__class__ = FusedSelfAttention
            part.cross_attention.__class__ = PromptAttention
            twin.fused.append(part.self_attention)  # type: ignore[arg-type]
            twin.prompted.append(part.cross_attention)  # type: ignore[arg-type]
    for attention in twin.fused:
        attention.register_buffer("fused", attention.join(), persistent=False)
    return twin


# --- The graph ---------------------------------------------------------------------------------


class Captured:
    """A twin's call on inputs of one shape: they are copied in, and the graph computes anew."""

    def __init__(self, twin: Twin, x: Tensor, t: Tensor, context: Tensor) -> None:
        self.prompted = twin.prompted
        self.x = x.clone(memory_format=torch.channels_last)
        self.t = t.clone()
        self.kv = [(part.to_k(context), part.to_v(context)) for part in self.prompted]
        self.told = context, context._version
        for part, (k, v) in zip(self.prompted, self.kv, strict=True):
            part.k, part.v = k, v  # whose addresses the graph will read
        with torch.cuda.device(x.device):
            self.output, self.replay = capture(lambda: twin.unet(self.x, self.t, context))

    def tell(self, context: Tensor) -> None:
        """Compute the prompt's k and v, in the place of the old ones."""
        for part, (k, v) in zip(self.prompted, self.kv, strict=True):
            k.copy_(part.to_k(context))
            v.copy_(part.to_v(context))
        self.told = context, context._version

    def __call__(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        known, version = self.told
        if known is not context or version != context._version:
            self.tell(context)
        self.x.copy_(x)
        self.t.copy_(t)
        self.replay()
        # A copy, in the plain UNet's layout: the next replay writes where this one did.
        return self.output.clone(memory_format=torch.contiguous_format)


def capture(call: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """A call as a CUDA graph: its output, and what computes that again from the same inputs."""
    side = torch.cuda.Stream()  # as PyTorch's notes on CUDA graphs want it
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on to use the GPU meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = call()
    return output, graph.replay


class FastUNet:
    """Asked like the UNet that it is made of, `fast(x, t, context)`."""

    def __init__(self, unet: UNet, *, compiled: bool) -> None:
        """`compiled`: have the twin compiled too, which takes a minute at the first step of every
        shape."""
        self.unet = unet
        self.compiled = compiled
        self.turn = threading.Lock()
        self.twin: Twin | None = None
        self.places: list[int] = []
        self.versions: list[int] = []
        self.graphs: dict[tuple[object, ...], Captured] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> FastUNet:
        """One of a copy of the UNet, which has captured nothing yet."""
        return FastUNet(copy.deepcopy(self.unet, memo), compiled=self.compiled)

    def __call__(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        parts = list(self.unet.modules())
        if any(is_watched(part) for part in parts) or not self.suits(x, t, context):
            return self.unet(x, t, context)
        check_inputs(x, t, context, self.unet.config, self.unet.num_timesteps)
        with self.turn:
            self.follow(parts)
            return self.graph(x, t, context)(x, t, context)

    def suits(self, *inputs: Tensor) -> bool:
        """Whether these are to be computed on a GPU now, and that is all."""
        weight = self.unet.conv_in.weight
        x, _, context = inputs
        return (
            all(a.is_cuda and a.device == weight.device for a in inputs)
            and x.dtype == context.dtype == weight.dtype
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cuda")
            and not context.is_inference()  # which has no version
            and not torch.cuda.is_current_stream_capturing()
        )

    def follow(self, parts: list[nn.Module]) -> None:
        """Have a twin of the weights as they are now."""
        places, versions = state_of(parts)
        if self.twin is None or places != self.places:
            self.graphs.clear()
            self.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.twin = twin_of(self.unet)
            if self.compiled:
                self.twin.unet.compile(fullgraph=True, dynamic=False)
            places, versions = state_of(parts)
        elif versions != self.versions:
            self.twin.join()
            for graph in self.graphs.values():
                graph.tell(graph.told[0])
        self.places, self.versions = places, versions

    def graph(self, x: Tensor, t: Tensor, context: Tensor) -> Captured:
        """The graph for inputs of this shape, captured if there is none yet."""
        assert self.twin is not None
        shape = x.shape, t.dtype, context.shape
        if shape not in self.graphs:
            if len(self.graphs) == MOST:
                del self.graphs[next(iter(self.graphs))]
            with compiling_each_shape() if self.compiled else contextlib.nullcontext():
                self.graphs[shape] = Captured(self.twin, x, t, context)
        return self.graphs[shape]


def state_of(parts: list[nn.Module]) -> tuple[list[int], list[int]]:
    """Where a model's parts and weights are, and how often each weight was written to."""
    weights = [w for part in parts for w in part._parameters.values() if w is not None]
    return [*map(id, parts), *(w.data_ptr() for w in weights)], [w._version for w in weights]


def compiling_each_shape() -> contextlib.AbstractContextManager[Any]:
    """Let torch.compile make code for each shape that is asked for: it gives up after 8."""
    import torch._dynamo.config as config  # seconds, where it has not been imported

    patched: contextlib.AbstractContextManager[Any] = config.patch(recompile_limit=64)
    return patched
