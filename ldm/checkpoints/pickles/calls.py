"""What a pickle may ask of the world outside of it, and what it gets: all that is allowed is here.

A pickle names globals, refers to what is stored outside of it, and calls functions. Nothing is
imported and nothing is run: a name is a pair of words, a storage is a key and a count, and a call
is looked up among the few that PyTorch uses to say "a tensor of this shape lies there". What comes
out is that sentence, as data. A call of anything else leaves a `Dropped` where its result would be.
"""

from __future__ import annotations

import math

import torch

from ldm.checkpoints.pickles.limits import CALL, DEPTH, TENSOR, Purse
from ldm.checkpoints.pickles.values import (
    Dict,
    Dropped,
    Global,
    Malformed,
    Storage,
    View,
    brief,
    is_size,
    key_text,
)
from ldm.errors import UnreadableError, UnsafePickleError

STORAGES = {
    Global("torch", "DoubleStorage"): torch.float64,
    Global("torch", "FloatStorage"): torch.float32,
    Global("torch", "HalfStorage"): torch.float16,
    Global("torch", "BFloat16Storage"): torch.bfloat16,
    Global("torch", "LongStorage"): torch.int64,
    Global("torch", "IntStorage"): torch.int32,
    Global("torch", "ShortStorage"): torch.int16,
    Global("torch", "CharStorage"): torch.int8,
    Global("torch", "ByteStorage"): torch.uint8,
    Global("torch", "BoolStorage"): torch.bool,
    Global("torch", "ComplexFloatStorage"): torch.complex64,
    Global("torch", "ComplexDoubleStorage"): torch.complex128,
    Global("torch.storage", "UntypedStorage"): torch.uint8,
}
# Types that came after the last typed storage: an untyped one, and the type beside it.
DTYPES = {
    Global("torch", "float8_e4m3fn"): torch.float8_e4m3fn,
    Global("torch", "float8_e5m2"): torch.float8_e5m2,
    Global("torch", "float8_e4m3fnuz"): torch.float8_e4m3fnuz,
    Global("torch", "float8_e5m2fnuz"): torch.float8_e5m2fnuz,
    Global("torch", "uint16"): torch.uint16,
    Global("torch", "uint32"): torch.uint32,
    Global("torch", "uint64"): torch.uint64,
}
# Understood, and so no stubs. What is done with them is in `Calls.call`.
KNOWN = {
    *STORAGES,
    *DTYPES,
    Global("collections", "OrderedDict"),
    Global("collections", "defaultdict"),
    Global("torch", "Size"),
    Global("torch", "Tensor"),
    Global("torch._utils", "_rebuild_tensor"),
    Global("torch._utils", "_rebuild_tensor_v2"),
    Global("torch._utils", "_rebuild_tensor_v3"),
    Global("torch._utils", "_rebuild_parameter"),
    Global("torch._utils", "_rebuild_parameter_with_state"),
    Global("torch._tensor", "_rebuild_from_type_v2"),
}


class Calls:
    """Answers what pickles ask for, on data alone.

    Attributes:
        storages: key -> the storages that were named so far.
        stubs: the globals that were dropped so far; a dict, for its order.
        num_views: how many tensors were made so far, kept or dropped.
    """

    def __init__(self, purse: Purse) -> None:
        self.purse = purse
        self.storages: dict[str, Storage] = {}
        self.stubs: dict[str, None] = {}
        self.num_views = 0

    def name(self, module: str, name: str) -> Global:
        """A global by its name: two words, and no import."""
        if not f"{module}{name}".isprintable():
            raise Malformed
        self.purse.spend(300 + 2 * len(module) + 2 * len(name))
        found = Global(module, name)
        if found not in KNOWN:
            self.stubs[str(found)] = None
        return found

    def persistent(self, saved: object) -> object:
        """What torch keeps outside of the pickle: storages."""
        if isinstance(saved, tuple) and len(saved) == 6 and saved[-1] is None:
            saved = saved[:-1]  # the legacy container's place for a part of a storage
        match saved:
            case (b"storage", Global() as kind, bytes() as key, _, numel):
                if kind not in STORAGES:
                    raise UnsafePickleError(f"keeps tensors in {kind}, which ldm does not know")
                if not is_size(numel):
                    raise UnreadableError(f"says that a storage has {brief(numel)} numbers")
                storage = Storage(key_text(key), STORAGES[kind], numel)
                if self.storages.setdefault(storage.key, storage) != storage:
                    raise UnreadableError(f"describes storage {storage.key!r} in two ways")
                self.purse.spend(TENSOR)
                return storage
            case (b"module", Global() as cls, _, _):  # a whole model: its class, and its source
                return cls
        raise UnsafePickleError(f"refers to something outside of its pickle: {brief(saved)}")

    def call(self, function: object, args: object) -> object:
        """What comes out where a pickle calls a function. All that is ever "called" is here."""
        self.purse.spend(CALL)
        if not isinstance(function, Global | Dropped) or not isinstance(args, tuple):
            raise Malformed
        match function, args:
            case Global("collections", "OrderedDict"), ():
                return Dict()
            case Global("collections", "OrderedDict"), (list() as pairs,):  # Python 2
                self.purse.spend(100 * len(pairs))
                return Dict(self.pair(pair) for pair in pairs)
            case Global("collections", "defaultdict"), (_,):
                return Dict()
            case Global("torch", "Size"), (tuple() as sizes,):
                return sizes
            case Global("torch._utils", "_rebuild_tensor"), (Storage() as of, offset, size, stride):
                return self.view(of, offset, size, stride, of.dtype)
            case (
                Global("torch._utils", "_rebuild_tensor_v2"),
                (Storage() as of, offset, size, stride, _, _),
            ):
                return self.view(of, offset, size, stride, of.dtype)
            case (
                Global("torch._utils", "_rebuild_tensor_v3"),
                (Storage() as of, offset, size, stride, _, _, Global() as dtype),
            ):
                if dtype not in DTYPES:
                    raise UnsafePickleError(f"holds tensors of {dtype}, which ldm does not read")
                return self.view(of, offset, size, stride, DTYPES[dtype])
            case Global("torch._utils", "_rebuild_parameter"), (View() as data, _, _):
                return data
            case Global("torch._utils", "_rebuild_parameter_with_state"), (View() as data, _, _, _):
                return data
            case (  # a tensor with attributes, or of a class that adds methods to the same bytes
                Global("torch._tensor", "_rebuild_from_type_v2"),
                (Global("torch._utils") as rebuild, Global(), inner, _),
            ):
                return self.call(rebuild, inner)
            case Global("torch._utils" | "torch._tensor", name), _ if name.startswith("_rebuild"):
                raise UnsafePickleError(f"makes a tensor by {function}, in a way ldm does not know")
        self.check_dropped(function, args)
        if isinstance(function, Dropped):
            return function
        self.stubs[str(function)] = None
        return Dropped(function)

    def pair(self, value: object) -> tuple[object, object]:
        match value:
            case [key, item]:
                return key, item
        raise Malformed

    def check_dropped(self, function: object, operands: object) -> None:
        """A call, or an object's state, may be left out; unless it is the only way to a tensor."""
        if isinstance(operands, list | tuple):
            self.purse.spend(8 * len(operands))
            if any(isinstance(operand, Storage) for operand in operands):
                raise UnsafePickleError(f"makes a tensor by {brief(function)}, which is not called")

    def view(
        self, storage: Storage, offset: object, shape: object, stride: object, dtype: torch.dtype
    ) -> View:
        """A tensor, once it is sure to lie inside of its storage, and to be no larger."""
        self.purse.spend(TENSOR)
        self.num_views += 1
        if (
            not is_size(offset)
            or not isinstance(shape, tuple)
            or not isinstance(stride, tuple)
            or not len(shape) == len(stride) <= DEPTH
            or not all(is_size(n) for n in (*shape, *stride))
        ):
            raise UnreadableError("describes a tensor by something other than sizes and strides")
        room = storage.nbytes // dtype.itemsize
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if 0 in shape:  # no bytes; but even then torch wants to count them
            fits = math.prod(max(n, 1) for n in shape) < 2**56
        else:  # a stride of 0 could make terabytes out of one number
            fits = last < room and math.prod(shape) <= room
        if not fits:
            raise UnreadableError(
                f"describes a tensor of shape {list(shape)[:8]}, strides {list(stride)[:8]} and"
                f" offset {offset} in storage {storage.key!r}, which has {room} numbers"
            )
        return View(storage, offset, shape, stride, dtype)
