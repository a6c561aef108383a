"""Weights in a byte each, computed with as 32-bit floats: a fourth of the size, and sums as before.

A weight tensor of many numbers is kept as int8 with one float per channel, the largest of the
channel divided by 127:

    scale_c = max |w_c| / 127,    q_c = round(w_c / scale_c),    w_c is taken for scale_c q_c

so that no number moves by more than half a scale. The graph multiplies them out itself, once, when
a runtime loads it. "Cast" and "Mul" say that, and not ONNX's own "DequantizeLinear": runtimes fold
the former into the weights when they load a graph, and leave the latter to every call.

A few layers matter more than all others: those at the full size or near it, beside a network's
input and output, whose error no later layer evens out. They are few numbers, and are kept in half
precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

SMALLEST = 1024
"""Tensors of fewer numbers stay as they are: they weigh nothing."""

Floats = NDArray[np.float32]


def to_int8(weights: Floats, axis: int) -> tuple[NDArray[np.int8], Floats]:
    """A tensor of any shape as (q, scale): scale has its shape but for 1 on all axes except `axis`,
    and scale * q is the tensor, to half a scale."""
    others = tuple(i for i in range(weights.ndim) if i != axis)
    most = np.abs(weights).max(axis=others, keepdims=True)
    scale = (np.maximum(most, np.finfo(np.float32).tiny * 127) / 127).astype(np.float32)
    q = np.round(weights / scale).astype(np.int8)
    return q, scale


def error_of(weights: Floats, axis: int) -> float:
    """How far int8 moves a tensor: the root of the mean square, relative to the tensor's own."""
    q, scale = to_int8(weights, axis)
    moved = np.square(q * scale - weights, dtype=np.float64).mean()
    return float(np.sqrt(moved / max(np.square(weights, dtype=np.float64).mean(), 1e-60)))


def channel_axis(weights: Floats) -> int:
    """The axis of the channels that a tensor is scaled by. Output channels come first in a
    convolution, and second in a matrix that stands at the right of a product: whichever of the two
    moves the numbers less."""
    return min((0, 1), key=lambda axis: error_of(weights, axis))


def with_int8_weights(graph: onnx.ModelProto, half: Sequence[str] = ()) -> onnx.ModelProto:
    """The same graph with its large weights in a byte each, but for those whose names begin with
    one of `half`: these are in float16. The given one stays as it is."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    small = onnx.ModelProto()
    small.CopyFrom(graph)
    kept: list[Any] = []
    nodes: list[Any] = []
    for tensor in small.graph.initializer:
        weights = numpy_helper.to_array(tensor)
        is_large = weights.ndim >= 2 and weights.size >= SMALLEST
        if tensor.data_type != TensorProto.FLOAT or not is_large:
            kept.append(tensor)
            continue
        name = tensor.name
        if name.startswith(tuple(half)):
            kept.append(numpy_helper.from_array(weights.astype(np.float16), f"{name}.half"))
            nodes.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
            continue
        q, scale = to_int8(weights, channel_axis(weights))
        kept += [
            numpy_helper.from_array(q, f"{name}.int8"),
            numpy_helper.from_array(scale, f"{name}.scale"),
        ]
        nodes += [
            helper.make_node("Cast", [f"{name}.int8"], [f"{name}.float"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{name}.float", f"{name}.scale"], [name]),
        ]
    nodes += small.graph.node
    for field, values in ((small.graph.initializer, kept), (small.graph.node, nodes)):
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        del field[:]
        field.extend(copies)
    return small
