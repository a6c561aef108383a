"""The first step: from a path to the tensors that lie there, by the keys that their files have.

Containers and folders are known here, and no model: what the keys mean is `recognise`'s to tell.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ldm.checkpoints.entries import DIFFUSERS_FOLDER, Archive, Entry, MappedFile
from ldm.checkpoints.folders import (
    find_documents,
    find_file,
    find_parts,
    is_diffusers_folder,
    read_weight_map,
)
from ldm.checkpoints.safetensors_file import read_safetensors
from ldm.errors import EmptyFileError, PointerError, UnreadableError, WebPageError

# How a zip archive and a pickle (protocol 2 and up) begin, and what a browser shows.
ZIP, PICKLE = b"PK\x03\x04", b"\x80"
MARKUP = (b"<!doctype", b"<html", b"<head", b"<!--", b"<?xml")


def open_archive(path: str | Path) -> Archive:
    """What a file or a folder of weights holds. No tensor is read.

    Args:
        path: a safetensors file, a pickle of torch's, a diffusers folder or one part of it, or a
            folder that holds one file of weights.

    Raises:
        FileNotFoundError: nothing is there.
        MissingPartsError: a folder without weights, or without one of the files that it names.
        UnreadableError: it is no file of weights, or a damaged one; one line says how.
    """
    path = Path(path)
    if path.is_dir() and is_diffusers_folder(path):
        return open_folder(path)
    return open_file(find_file(path))


def open_file(path: Path) -> Archive:
    """What is in a file of weights: safetensors, or a pickle of torch's, old or new. The content
    tells which; a name may say anything.

    Raises:
        UnreadableError: it is none of these, or damaged; one line says how.
    """
    if path.stat().st_size == 0:
        raise EmptyFileError(f"{path} is empty: fetch it again")
    file = MappedFile(path)
    start = file.bytes[:512]
    # A header shorter than a terabyte: its length ends in zeros, which no text does.
    if start[5:9] == b"\0\0\0{":
        return read_safetensors(file)
    if start.startswith(ZIP):  # the machine for pickles is imported where there is one
        from ldm.checkpoints.pickles.zipped import read_torch_zip

        return read_torch_zip(file)
    if start.startswith(PICKLE):
        from ldm.checkpoints.pickles.legacy import read_torch_legacy

        return read_torch_legacy(file)
    if start.startswith(b"version https://git-lfs"):
        raise PointerError(f"{path} is a git-lfs pointer: fetch the file with `git lfs pull`")
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(MARKUP):
        raise WebPageError(f"{path} is a web page, not weights: log in there, and fetch it again")
    raise UnreadableError(f"{path} is not a file of weights: neither safetensors nor torch's")


def open_folder(folder: Path) -> Archive:
    """What a diffusers folder holds. A part may be missing, or all of them: who reads it tells.

    Raises:
        MissingPartsError: a file is missing that an index names.
        UnreadableError: a file is damaged.
    """
    parts = find_parts(folder)
    documents = find_documents(folder, list(parts))
    entries: dict[str, Entry] = {}
    stubs: dict[str, None] = {}  # in order, each once
    for part, weights in parts.items():
        for archive in open_files(weights):
            stubs |= dict.fromkeys(archive.stubs)
            entries |= {f"{part}/{k}" if part else k: e for k, e in archive.entries.items()}
    return Archive(
        path=folder,
        container=DIFFUSERS_FOLDER,
        entries=entries,
        stubs=tuple(stubs),
        documents=documents,
        parts={part: str(weights.relative_to(folder)) for part, weights in parts.items()},
    )


def open_files(path: Path) -> list[Archive]:
    """The archives of a file of weights, or of all files that an index names.

    Raises:
        MissingPartsError: a file that the index names is not there.
        UnreadableError: the index is damaged, or the files do not hold what it says.
    """
    if path.suffix != ".json":
        return [open_file(path)]
    where = read_weight_map(path)
    archives = [open_file(path.parent / name) for name in sorted(set(where.values()))]
    found = Counter(key for archive in archives for key in archive.entries)
    if odd := sorted(k for k in found.keys() | where.keys() if found[k] != 1 or k not in where):
        raise UnreadableError(f"{path} and its files do not agree about the key {odd[0]!r:.80}")
    return archives
