"""Which device to compute on, and in what precision, unless the caller says."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def default_device() -> torch.device:
    """The fastest device of this machine: cuda, mps, or cpu."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """Half precision on a GPU, where it is faster and takes half the memory; float32 on a CPU."""
    return torch.float32 if device.type == "cpu" else torch.float16


def check_device(device: str | torch.device) -> torch.device:
    """A device that this machine has, or a ValueError in one line."""
    try:
        checked = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"unknown device {device!r:.80}: try cpu, cuda or mps") from error
    there = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }.get(checked.type, 0)
    if (checked.index or 0) >= there:
        raise ValueError(f"there is no device {str(checked)!r} on this machine")
    return checked


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What layers compute in. Smaller floating-point types can only be stored."""


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """A floating-point type that layers compute in, or a ValueError in one line."""
    if dtype not in DTYPES:
        names = ", ".join(str(one) for one in DTYPES)
        raise ValueError(f"dtype must be a floating-point type of {names}, not {dtype!r:.80}")
    return dtype


def sent(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device, as a copy where it is not there already. The program does not wait for
    a CUDA device to have got it: for that the copy starts from pinned memory."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, dtype, non_blocking=True)
    return tensor.to(device, dtype)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16: a CPU without them takes a hundred times as
    long as in float32. Where PyTorch cannot tell (before `torch.cpu.get_capabilities`), it has not.
    """
    if device.type != "cpu":
        return True
    known: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
