"""The same layers, faster on a CPU: what `pipe.optimize()` puts in the place of the plain ones.

The plain layers say what is computed; the ones here say how a processor likes to compute it. Each
is a subclass of a plain layer with another `forward`, and `optimize` gives every layer of a model
its fast class:

    part.__class__ = FastLinear  # where it was nn.Linear

In Python an object may change its class while it lives. What a layer has (parameters, children,
hooks) is in the object and stays; what it does is in its class, and that is what changes. So the
model is the same object before and after, with the same names and the same file, and nobody who
holds a part of it need know. Whatever a fast `forward` is not made for it hands to
`super().forward`, the plain one: another device, another type than float32, gradients, or someone
who watches a value that it would skip or overwrite.

Four things make it fast (docs/performance.md has what each of them brings):

1.  All products go through oneDNN. PyTorch sends some to MKL, which uses the wide instructions of
    Intel's processors only.
2.  Maps lie in memory with the channels of a place side by side ("channels last"), as oneDNN's
    convolution and the products of the transformers read them. Where places are few, a convolution
    is a product of windows, since its weights would be laid out anew at each call.
3.  Memory is used again: what a block has just computed is overwritten, and what was freed is kept
    for the next who asks. Fresh memory costs more than a SiLU.
4.  No pixel that was repeated is multiplied twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.attention import AttentionWeights, FeedForward, Pointwise
from ldm.layers import ResBlock, Upsample, is_watched
from ldm.speed.memory import keep_freed, release, trim

BLOCK = 1 << 21
"""How many attention weights exist at once: 8 MB, which a processor's cache still holds."""

PIECE = 1 << 18
"""How many numbers of a map are added up at once: 1 MB, for the same reason."""

CHANNELS = 32
"""How many channels a convolution adds up at once, since a longer sum is less exact."""

FEW = 1024
HEAVY = 1 << 22
"""Up to so many places in a batch of maps, and from so many weights on, a convolution is a product
with all windows, since to lay out its weights would take longer."""

LARGE = 64 * 64
"""Beyond so many places PyTorch's GroupNorm for channels last is not exact enough."""

WORTHWHILE = 1 << 16
"""From how many attention weights a head on blocks pay: below, PyTorch's kernel is faster."""


def optimize(model: nn.Module) -> None:
    """Let a stage of ours compute faster, in place. Its parameters, names and hooks stay what they
    are; to call it again changes nothing. What this process frees it keeps from now on."""
    if not has_onednn():
        return
    keep_freed()
    for part in model.modules():
        if fast := FAST.get(type(part)):
            part.__class__ = fast


def rest(model: nn.Module) -> None:
    """Give back the memory that a model can do without until it runs again."""
    for weight in model.parameters():
        release(weight)
    trim()


def has_onednn() -> bool:
    """Whether this PyTorch has the operators that this file calls; those that `torch.compile`
    makes of the same layers, once their weights are frozen."""
    names = ("_linear_pointwise", "_convolution_pointwise", "_convolution_pointwise_")
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in names
    )


def suits_onednn(*tensors: Tensor) -> bool:
    """Whether these float32 numbers on a CPU are to be multiplied now, and that is all."""
    return (
        all(a.device.type == "cpu" and a.dtype == torch.float32 for a in tensors)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def has_watched_parts(module: nn.Module) -> bool:
    """Whether someone looks at what goes into or out of a module's parts."""
    return any(is_watched(part) for part in module.children())


class FastLinear(nn.Linear):
    """x W^T + b by oneDNN, which takes the weights as they are."""

    def forward(self, x: Tensor) -> Tensor:
        if not suits_onednn(x, self.weight):
            return super().forward(x)
        return linear(x, self.weight, self.bias)


class FastConv2d(nn.Conv2d):
    """A product of all windows with all weights where these are many and places few, else oneDNN's
    convolution."""

    def forward(self, x: Tensor) -> Tensor:
        is_plain = self.groups == 1 and self.dilation == (1, 1) and self.padding_mode == "zeros"
        if not is_plain or isinstance(self.padding, str) or not suits_onednn(x, self.weight):
            return super().forward(x)
        padding, stride = (self.padding[0], self.padding[1]), (self.stride[0], self.stride[1])
        return convolution(x, self.weight, self.bias, padding, stride)


class FastPointwise(Pointwise):
    """A convolution of 1x1, by oneDNN."""

    def forward(self, x: Tensor) -> Tensor:
        if not suits_onednn(x, self.weight):
            return super().forward(x)
        return convolution(x, self.weight[:, :, None, None], self.bias, (0, 0), (1, 1))


class FastUpsample(Upsample):
    """Twice the size, then 3x3: of the nine pixels below the window only four differ, since each
    was repeated. So four 2x2 convolutions of the small map, one for each place of a pixel in its
    square of four, give the same sums: 4/9 of the products."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        height, width = x.shape[-2:]
        weight, bias = self.conv.weight, self.conv.bias
        is_doubled = tuple(size) == (2 * height, 2 * width)
        is_large = is_doubled and places(x) > FEW
        if has_watched_parts(self) or not is_large or not suits_onednn(x, weight):
            return super().forward(x, size)
        out = torch.empty(
            (len(x), len(weight), *size), memory_format=torch.channels_last
        )  # (B, C, 2 H, 2 W)
        for (i, j), kernel in zip(PLACES, merged(weight), strict=True):
            h = convolution(x, kernel, bias, padding=(1, 1), stride=(1, 1))  # (B, C, H + 1, W + 1)
            out[:, :, i::2, j::2] = h[:, :, i : i + height, j : j + width]
        return out


class FastGroupNorm(nn.GroupNorm):
    """PyTorch's kernel for channels last adds up a map's squares one by one in float32, and is off
    by 1e-5 where the map is large. Here float64 adds up what float32 added up of small pieces."""

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(x)

    def normalise(self, x: Tensor, *, silu: bool = False, in_place: bool = False) -> Tensor:
        """The normalised map, its SiLU if asked for, in the memory of `x` if that may be lost."""
        has_channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
        is_large = x.shape[2:].numel() > LARGE
        if not (has_channels_last and is_large and suits_onednn(x, self.weight)):
            h = super().forward(x)
            return F.silu(h, inplace=True) if silu else h
        out = x if in_place else torch.empty_like(x, memory_format=torch.channels_last)
        rows, out_rows = (a.permute(0, 2, 3, 1).flatten(1, 2) for a in (x, out))  # (B, H W, C)
        length = max(1, PIECE // (len(x) * self.num_channels))
        scale, shift = self.scale_and_shift(rows.split(length, dim=1))
        for piece, h in zip(rows.split(length, dim=1), out_rows.split(length, dim=1), strict=True):
            torch.addcmul(shift, piece, scale, out=h)
            if silu:
                F.silu(h, inplace=True)
        return out

    def scale_and_shift(self, pieces: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """What to multiply each channel by and what to add, (B, 1, C) each, so that a group's mean
        is 0 and its variance 1, and the learnt scale and shift follow. Pieces are (B, n, C)."""
        sums = torch.stack([piece.sum(dim=1) for piece in pieces])  # (pieces, B, C)
        squares = torch.stack([piece.square().sum(dim=1) for piece in pieces])
        count = sum(piece.shape[1] for piece in pieces)
        mean, mean_square = (
            a.double().sum(dim=0).unflatten(1, (self.num_groups, -1)).mean(dim=2) / count
            for a in (sums, squares)
        )  # (B, groups)
        variance = (mean_square - mean.square()).clamp(min=0)
        size = self.num_channels // self.num_groups
        scale = self.weight * (variance + self.eps).rsqrt().repeat_interleave(size, dim=1)
        shift = self.bias - mean.repeat_interleave(size, dim=1) * scale  # (B, C)
        return scale.float()[:, None], shift.float()[:, None]


class FastAttentionWeights(AttentionWeights):
    """Attention in blocks of queries: softmax between two products by oneDNN."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        is_small = q.shape[-2] * k.shape[-2] < WORTHWHILE
        if is_small or is_watched(self) or not suits_onednn(q, k, v):
            return super().attend(q, k, v)
        return attend_in_blocks(q, k, v)


class FastFeedForward(FeedForward):
    """Some places after others, so that what is between the two products stays in the cache, and
    the gate's own memory takes their product."""

    def forward(self, x: Tensor) -> Tensor:
        if has_watched_parts(self) or not suits_onednn(x, self.proj_in.weight):
            return super().forward(x)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        rows = max(1, BLOCK // self.proj_in.out_features)
        pieces = zip(x.flatten(0, 1).split(rows), out.flatten(0, 1).split(rows), strict=True)
        for some, done in pieces:  # (rows, dim) each
            value, gate = self.proj_in(some).chunk(2, dim=-1)
            done.copy_(self.proj_out(F.gelu(gate).mul_(value)))
        return out


class FastResBlock(ResBlock):
    """Every sum and SiLU in the memory of what came before it."""

    norm1: FastGroupNorm
    norm2: FastGroupNorm

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() or has_watched_parts(self):
            return super().forward(x, time)
        h = self.conv1(self.norm1.normalise(x, silu=True))
        if self.time_proj is not None:
            assert time is not None, "a block that was built with time_dim needs the time"
            h += self.time_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(self.norm2.normalise(h, silu=True, in_place=True))
        h += self.skip(x)
        return h


FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FastLinear,
    nn.Conv2d: FastConv2d,
    Pointwise: FastPointwise,
    nn.GroupNorm: FastGroupNorm,
    Upsample: FastUpsample,
    AttentionWeights: FastAttentionWeights,
    FeedForward: FastFeedForward,
    ResBlock: FastResBlock,
}

# --- What they call ----------------------------------------------------------------------------

# oneDNN's operators can apply one to what they return.
NO_ACTIVATION: tuple[str, list[float], str] = ("none", [], "")
ADD: tuple[Any, ...] = ("add", 1.0, None, [], None)  # to what is there, once, without activation
PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))  # of a pixel in its square of four
Pair = tuple[int, int]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, by oneDNN: x (..., I), weight (O, I), bias (O,) -> (..., O)."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, *NO_ACTIVATION)
    return result


def places(x: Tensor) -> int:
    """How many places a batch of maps has."""
    return len(x) * x.shape[2:].numel()


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Pair, stride: Pair
) -> Tensor:
    """x (B, I, H, W), weight (O, I, h, w), bias (O,) -> (B, O, H', W'), with channels last."""
    height, width = weight.shape[2:]
    if height * width > 1 and places(x) <= FEW and weight.numel() >= HEAVY:
        seen = windows(x, (height, width), padding, stride)
        return linear(seen, weight.flatten(1), bias).permute(0, 3, 1, 2)  # (B, O, H', W')
    return convolution_in_groups(x, weight, bias, padding, stride)


def windows(x: Tensor, size: Pair, padding: Pair, stride: Pair) -> Tensor:
    """What each place's window sees: (B, C, H, W) -> (B, H', W', C h w)."""
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    seen = x.unfold(2, size[0], stride[0]).unfold(3, size[1], stride[1])  # (B, C, H', W', h, w)
    return seen.permute(0, 2, 3, 1, 4, 5).flatten(3)


def convolution_in_groups(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Pair, stride: Pair
) -> Tensor:
    """The same by oneDNN's convolution, some channels after others.

    It adds up all products of a place one by one: a sum of thousands is 4 times as far from the
    exact one as where each 16 channels are added up first, as PyTorch does with plain maps. So
    channels come in groups, whose sums are then added.
    """
    op = torch.ops.mkldnn
    how = (padding, stride, (1, 1), 1)  # without dilation, all of a group's channels together
    pairs = zip(x.split(CHANNELS, dim=1), weight.split(CHANNELS, dim=1), strict=True)
    groups = (
        (some.contiguous(memory_format=torch.channels_last), kernel.contiguous())
        for some, kernel in pairs
    )
    out: Tensor = op._convolution_pointwise(*next(groups), bias, *how, *NO_ACTIVATION)
    for group in groups:
        op._convolution_pointwise_.binary(out, *group, None, *how, *ADD)
    return out


def merged(weight: Tensor) -> list[Tensor]:
    """A 3x3 kernel on doubled pixels as kernels on single ones: (O, I, 3, 3) to four times
    (O, I, 2, 2), in the order of PLACES.

    The upper (or left) of two equal pixels has its twin below it, and the pair as one kernel value:
    a, b + c; the lower has its twin above it: a + b, c.
    """

    def pairs(kernel: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        a, b, c = kernel.unbind(dim)
        return torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)

    return [kernel for rows in pairs(weight, 2) for kernel in pairs(rows, 3)]


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, (B, heads, N, d), one head and some of its queries at a time."""
    batch, heads, places, width = q.shape
    rows = max(1, BLOCK // k.shape[-2])
    out = q.new_empty(batch, places, heads, width).transpose(1, 2)  # (B, heads, N, d)
    # Laid out so, joining the heads afterwards is free.
    for b in range(batch):
        for n in range(heads):
            keys = (k[b, n] * width**-0.5).contiguous()  # (M, d)
            values = v[b, n].T.contiguous()  # (d, M)
            pieces = zip(q[b, n].split(rows), out[b, n].split(rows), strict=True)
            for some, attended in pieces:  # (rows, d) each
                weights = torch.softmax(linear(some.contiguous(), keys), dim=-1)  # (rows, M)
                attended.copy_(linear(weights, values))
    return out
