"""CUDA without a GPU: tensors that say "cuda:0" and are computed by the CPU.

    with pretended_cuda() as gpu:
        pipe.to("cuda")
        with gpu.without_waiting():
            next(run)  # a RuntimeError with file and line, if the program waits for the GPU

What a GPU would refuse is refused: operands on two devices. What would make the program wait for it
is counted in `gpu.waits`: to look at a number, and to copy between the two memories, unless from
pinned memory and asked not to wait. CUDA graphs are as real ones are: what was captured is computed
again, on the same tensors and with the same numbers, and runs no Python.

What it cannot show: how fast, how exact, or in how much memory a GPU computes; and no gradients,
since autograd asks for the device itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    return_and_correct_aliasing,
)

CUDA = torch.device("cuda", 0)
OURS = tuple(str(Path(__file__).parents[1] / room) + "/" for room in ("ldm", "tests"))

PROPERTIES = SimpleNamespace(name="pretended", total_memory=0, major=0, minor=0)

aten = torch.ops.aten
LOOKS = (
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
)
COPY, CONVERT = aten.copy_.default, aten._to_copy.default
INDEXING = (
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
)

# PyTorch asks for each device's guard before it makes a tensor there. A build without CUDA has
# none for it, so one that does nothing is registered.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}
"""


@functools.cache
def why_not() -> str | None:
    """Why there can be no stand-in here, or None. At the first call the guard is compiled, and
    stays in this process."""
    if torch.cuda.is_available():
        return "there is a real GPU"
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "needs a C++ compiler"
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(GUARD, encoding="utf-8")
        flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{root / 'include'}"]
        command = [compiler, *flags, str(source), "-o", str(library), f"-L{root / 'lib'}", "-lc10"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"the compiler failed: {done.stderr[:200]!r}"
        ctypes.CDLL(str(library))
    return None


@contextlib.contextmanager
def pretended_cuda() -> Iterator[Gpu]:
    """A machine with one GPU; skips the test where there can be none."""
    if reason := why_not():
        pytest.skip(reason)
    import transformers.models.clip.modeling_clip  # noqa: F401 (it asks torch.cuda as it is loaded)

    gpu = Gpu()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") copies, as there
    try:
        with mock.patch.object(Pretended, "gpu", gpu), patched(gpu), gpu:
            yield gpu
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


@contextlib.contextmanager
def patched(gpu: Gpu) -> Iterator[None]:
    """What the program asks of `torch.cuda`, answered."""
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "pretended",
        "is_bf16_supported": True,
        "get_device_properties": SimpleNamespace(
            name="pretended", total_memory=0, major=0, minor=0
        ),
        "max_memory_allocated": 0,
        "reset_peak_memory_stats": None,
        "synchronize": None,
        "empty_cache": None,
        "_lazy_init": None,
    }
    change = torch.__future__.set_overwrite_module_params_on_conversion
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        for name, answer in answers.items():
            enter(mock.patch.object(torch.cuda, name, functools.partial(said, answer)))
        for name, stand_in in {
            "is_current_stream_capturing": lambda: gpu.captured is not None,
            "current_stream": lambda *_: mock.MagicMock(),
            "Stream": mock.MagicMock,
            "stream": lambda _: contextlib.nullcontext(),
            "set_sync_debug_mode": gpu.set_sync_debug_mode,
            "Event": Event,
            "CUDAGraph": functools.partial(Graph, gpu),
            "device": lambda _: contextlib.nullcontext(),
            "graph": lambda graph, **_: graph.capturing(),
        }.items():
            enter(mock.patch.object(torch.cuda, name, stand_in))
        enter(mock.patch.object(torch, "Generator", Generator))
        change(True)  # a parameter's data cannot become another kind of tensor: take a new one
        stack.callback(change, False)
        yield


def said(answer: Any, *args: Any, **kwargs: Any) -> Any:
    """An answer, whatever is asked."""
    return answer


class Generator(torch.Generator):
    """A generator that says where it was asked to be; its numbers are the CPU's."""

    place: torch.device

    def __new__(cls, device: Any = "cpu") -> Generator:
        self = super().__new__(cls, "cpu")
        self.place = torch.device("cpu") if torch.device(device).type == "cpu" else CUDA
        return self

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place


class Pretended(Tensor):
    """A tensor that says it is on the GPU. `inner` has its numbers."""

    inner: Tensor
    gpu: Gpu | None = None
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real: Tensor, requires_grad: bool = False) -> Pretended:
        self = Tensor._make_wrapper_subclass(
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=CUDA,
            requires_grad=requires_grad,
        )
        self.inner = real
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretended({self.inner!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        new: Tensor = Pretended(self.inner.detach().clone(), self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            new = torch.nn.Parameter(new, self.requires_grad)
        memo[id(self)] = new
        return new

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        assert cls.gpu is not None, "a tensor of a GPU that is no longer there"
        return cls.gpu.run(func, args, kwargs or {})


class Gpu(TorchDispatchMode):
    """The stand-in.

    Attributes:
        waits: what would have made the program wait, and where: {(what, where): how often}.
        operations: how often each operation ran on the GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.operations: Counter[str] = Counter()
        self.strict = False
        self.pinned: dict[int, torch.Tensor] = {}  # held: no address is used anew
        self.captured: list[tuple[Any, ...]] | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self.run(func, args, kwargs or {})

    @contextlib.contextmanager
    def without_waiting(self) -> Iterator[None]:
        """An error at whatever waits, as `torch.cuda.set_sync_debug_mode("error")` has it."""
        self.strict = True
        try:
            yield
        finally:
            self.strict = False

    def set_sync_debug_mode(self, mode: str) -> None:
        """As `torch.cuda` has it, but that "warn" says nothing."""
        self.strict = mode == "error"

    def wait(self, what: str) -> None:
        where = here()
        self.waits[what, where] += 1
        if self.strict or self.captured is not None:
            raise RuntimeError(f"{where}: {what} waits for the device")

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute one operation, as seen from the GPU."""
        tensors = [a for a in leaves((args, kwargs)) if isinstance(a, Tensor)]
        there = any(isinstance(a, Pretended) for a in tensors)
        to = kwargs.get("device")
        on_gpu = there if to is None else torch.device(to).type == "cuda"
        if func is aten._pin_memory.default:
            with _disable_current_modes():
                pinned = args[0].clone()
            self.pinned[pinned.data_ptr()] = pinned
            return pinned
        if not there and not on_gpu:
            with _disable_current_modes():
                return func(*args, **kwargs)
        self.check(func, args, kwargs, tensors, on_gpu)
        real_args, real_kwargs = mapped(lambda a: a.inner, Pretended, (args, kwargs))
        if to is not None:
            real_kwargs["device"] = torch.device("cpu")
        with _disable_current_modes():
            out = func(*real_args, **real_kwargs)
        if not on_gpu or func in LOOKS:
            return out
        self.operations[str(func)] += 1
        if self.captured is not None:
            self.captured.append((func, real_args, real_kwargs, out))
        wrapped = mapped(Pretended, Tensor, out)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)

    def check(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        on_gpu: bool,
    ) -> None:
        """Count a wait, or refuse operands on two devices."""
        there = [a for a in tensors if isinstance(a, Pretended)]
        elsewhere = [a for a in tensors if not isinstance(a, Pretended) and a.ndim]
        if func in LOOKS and there:
            self.wait(f"a look ({func})")
        elif func in (COPY, CONVERT):
            source, target = (args[1], args[0]) if func is COPY else (args[0], None)
            arrives = isinstance(target, Pretended) if func is COPY else on_gpu
            if isinstance(source, Pretended) != arrives:
                asked = kwargs.get("non_blocking") or (func is COPY and len(args) > 2 and args[2])
                if not (asked and (not arrives or source.data_ptr() in self.pinned)):
                    self.wait(f"a copy {'to' if arrives else 'from'} the device")
        elif func in INDEXING and there:
            indices = [i for i in leaves(args[1]) if isinstance(i, Tensor)]
            if any(i.dtype == torch.bool for i in indices):
                self.wait("a mask as an index")
            if any(not isinstance(i, Pretended) for i in indices):
                self.wait("an index on the CPU")
        elif there and elsewhere:
            raise RuntimeError(f"{here()}: {func} has operands on cuda:0 and on cpu")


class Event:
    """What a GPU's clock says at a point of its work: here all takes a millisecond."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return 1.0


class Graph:
    """A CUDA graph: the operations of a capture, computed again into the same tensors."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.operations: list[tuple[Any, ...]] = []

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        assert self.gpu.captured is None, "captures do not nest"
        self.gpu.captured = self.operations
        try:
            yield
        finally:
            self.gpu.captured = None

    def replay(self) -> None:
        with _disable_current_modes(), torch.no_grad():
            for func, args, kwargs, out in self.operations:
                again = func(*args, **kwargs)
                for old, new in zip(leaves(out), leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def mapped(function: Callable[[Any], Any], kind: type, tree: Any) -> Any:
    """The arguments or results of an operation, with the function of each of one kind."""
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, dict):
        return {name: mapped(function, kind, value) for name, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(mapped(function, kind, value) for value in tree)
    return tree


def leaves(tree: Any) -> list[Any]:
    """What arguments or results of an operation consist of."""
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, tuple | list):
        return [leaf for value in tree for leaf in leaves(value)]
    return [tree]


def here() -> str:
    """The line of ours that is running: the innermost one outside of this file."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(OURS) and name != __file__:
            return f"{name.removeprefix(str(Path(__file__).parents[1]) + '/')}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "somewhere"
