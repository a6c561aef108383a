"""Files of textual inversion: a word, as vectors that the text encoder reads (Gal et al. 2022,
arXiv:2208.01618).

Two programs' files are read: A1111's, whose word is the file's name (`string_to_param`, or
`emb_params` in safetensors), and those of diffusers, whose only key is the word.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoints.families import addition_in, other_family
from ldm.checkpoints.opening import open_archive
from ldm.errors import FamilyError, NonFiniteError, ShapeError, UnreadableError, printable

A1111 = ("string_to_param.", "emb_params")  # beginnings of keys
MOST_VECTORS = 75  # a prompt has no more places
WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "Stable Diffusion XL"}


def read_embedding(path: str | Path, width: int) -> tuple[str, Tensor]:
    """The word of a file, and its vectors, (n, width) float32.

    Args:
        path: a file, as `open_archive` takes it; nothing in it is executed.
        width: of the text encoder.

    Raises:
        FileNotFoundError, UnreadableError: as `open_archive`; or there are too many vectors.
        FamilyError: it is no textual inversion, or that of a model of another width.
        ShapeError: it holds no row of vectors.
        NonFiniteError: it holds NaN or infinity.
    """
    archive = open_archive(path)
    keys = [key for key in archive.entries if key.startswith(A1111)] or list(archive.entries)
    kind = addition_in(archive.entries) or other_family(archive.entries)
    is_one = len(keys) == 1 and (keys[0].startswith(A1111) or "." not in keys[0])
    if not is_one or (kind is not None and kind != "a textual inversion"):
        told = kind if kind and kind != "a textual inversion" else f"{len(keys)} tensors"
        raise FamilyError(f"{archive.path} is {told}; a textual inversion of one word is wanted")
    (key,) = keys
    entry = archive.entries[key]
    shape = entry.shape if len(entry.shape) != 1 else (1, *entry.shape)
    if len(shape) != 2 or 0 in shape or not entry.dtype.is_floating_point:
        raise ShapeError(
            f"{archive.path}: {printable(key, 200)} is {list(shape)}, no row of vectors"
        )
    if shape[1] != width:
        model = f", that of {WIDTHS[shape[1]]}" if shape[1] in WIDTHS else ""
        raise FamilyError(
            f"{archive.path} is a word of width {shape[1]}{model}; the model reads {width}"
        )
    if shape[0] > MOST_VECTORS:
        raise UnreadableError(f"{archive.path} has {shape[0]} vectors, more than {MOST_VECTORS}")
    vectors = entry.map().to(torch.float32, copy=True).reshape(shape)
    if not vectors.isfinite().all():
        raise NonFiniteError(f"{archive.path}: {printable(key, 200)} holds NaN or infinity")
    return archive.path.stem if key.startswith(A1111) else key, vectors
