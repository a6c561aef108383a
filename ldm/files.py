"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path to write to; renamed to `path` at the end, or removed if anything fails.

    A crash, a full disk or Ctrl-C in the middle leaves what was at `path` before.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
