"""Which device to compute on, and in what precision, unless the caller says."""

from __future__ import annotations

import torch


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
        raise ValueError(f"unknown device {device!r}: try cpu, cuda or mps") from error
    there = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }.get(checked.type, 0)
    if (checked.index or 0) >= there:
        raise ValueError(f"there is no device {str(checked)!r} on this machine")
    return checked


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """A floating-point type, or a ValueError in one line."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"dtype must be a floating-point type such as torch.float16, not {dtype!r}"
        )
    return dtype
