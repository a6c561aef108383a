"""Safetensors: a header that says where each tensor lies, and the tensors' bytes."""

from __future__ import annotations

import json

import torch
from safetensors import SafetensorError, safe_open

from ldm.checkpoints.entries import SAFETENSORS, Archive, Entry, MappedFile
from ldm.errors import TruncatedError, UnreadableError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Python's objects take twenty times the bytes of the JSON that they are read from. The header of an
# official file, with a second set of weights and the optimizer's states, has 250,000.
MAX_HEADER = 2_000_000


def read_safetensors(file: MappedFile) -> Archive:
    """A safetensors file: 8 bytes with the length of a header, the header (JSON: for every tensor
    its type, shape and place), and the tensors' bytes.

    Raises:
        UnreadableError: it is no such file, or a damaged one.
        TruncatedError: its end is missing.
    """
    path = file.path
    data = 8 + int.from_bytes(file.bytes[:8], "little")  # where the tensors' bytes begin
    if data > len(file):
        raise TruncatedError(
            f"{path} is cut off: its header alone takes {data:,} bytes, found {len(file):,}; "
            "fetch it again"
        )
    if data > MAX_HEADER:
        raise UnreadableError(
            f"{path} has a header of {data} bytes; that of a model has {MAX_HEADER} at most"
        )
    try:
        header = json.loads(file.bytes[8:data])
        metadata = header.pop("__metadata__", {})
        end = data + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UnreadableError(f"{path} has a broken safetensors header: {error}") from error
    if end > len(file):
        raise TruncatedError(
            f"{path} is cut off: expected {end:,} bytes, found {len(file):,}; fetch it again"
        )
    try:
        with safe_open(path, framework="pt"):  # the library's own checks of every number
            pass
    except (SafetensorError, OSError) as error:
        raise UnreadableError(f"{path} has a broken safetensors header: {error}") from error
    if strange := {tensor["dtype"] for tensor in header.values()} - DTYPES.keys():
        raise UnreadableError(f"{path} holds types that ldm does not read: {sorted(strange)}")
    entries = {
        key: Entry(
            file,
            data + tensor["data_offsets"][0],
            DTYPES[tensor["dtype"]],
            tuple(tensor["shape"]),
        )
        for key, tensor in header.items()
    }
    return Archive(path, SAFETENSORS, entries, metadata)
