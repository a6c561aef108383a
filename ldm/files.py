"""Files that appear whole or not at all, and the hashes that tell one from another."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path to write to; renamed to `path` at the end, or removed if anything fails.

    A crash, a full disk or Ctrl-C in the middle leaves what was at `path` before.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # as any new file's: safetensors writes for the owner alone
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """A temporary folder to write into; renamed to `path` at the end, or removed if anything fails.

    Raises:
        ValueError: in one line, before any work: there is something at `path`, or there can be
            nothing.
    """
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path} exists already: a new folder is never mixed with an old one")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def check_writable(path: Path) -> None:
    """A ValueError in one line if no file can be written at `path`; what is there stays."""
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} to write to")
    if path.is_dir():
        raise ValueError(f"{path} cannot be written: it is a folder")
    probe = path.with_name(f".{path.name}.tmp")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(paths: Sequence[Path]) -> str:
    """One file's SHA-256; of several files, that of their hashes in hexadecimal, one per line."""
    hashes = [file_sha256(path) for path in paths]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
