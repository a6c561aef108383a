"""Files that appear whole or not at all, and the hashes that tell one from another.

Everything that this library writes is written here: first under a name of its own in the folder
where it belongs, and then, in one step, under the name that was asked for. So two programs that
write one file leave one of the two, whole; and only a kill that no program hears of (SIGKILL, or a
power cut) leaves something behind: a hidden file that ends in `.tmp`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path


class WriteError(OSError, ValueError):
    """What cannot be written where it was asked for, or not to its end; one line says why.

    Attributes:
        reason: the line without the name.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be written: {reason}")
        self.reason = reason


# --- Writing ---------------------------------------------------------------------------------


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path to write to; renamed to `path` at the end, or removed if anything fails.

    A crash, a full disk or Ctrl-C in the middle leaves what was at `path` before. Where `path` is a
    link, what it points to is written.

    Raises:
        WriteError: it cannot be written there, or the disk is full.
    """
    with writing(path):
        target = linked_to(path)
        temporary = new_file_beside(target)
        try:
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # as any new file's: safetensors writes for the owner alone
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """A temporary folder to write into; renamed to `path` at the end, or removed if anything fails.

    Raises:
        ValueError: in one line, before any work: there is something at `path` already.
        WriteError: it cannot be written there, or the disk is full.
    """
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path} exists already: a new folder is never mixed with an old one")
    with writing(path):
        temporary = name_beside(path)
        temporary.mkdir()
        try:
            yield temporary
            temporary.rename(path)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, WriteError):  # of a file in it, by a name that is gone
                raise WriteError(path, error.reason) from error
            raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def append_text(path: Path, text: str) -> None:
    """Add to the end of a UTF-8 text file, which need not be there yet: a log."""
    with writing(path), path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(text)


def check_writable(path: Path) -> None:
    """A ValueError in one line if no file can be written at `path`; what is there stays."""
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} to write to")
    with writing(path):
        new_file_beside(linked_to(path)).unlink()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system says while `path` is written, itself or through safetensors, becomes a
    WriteError, without the temporary name of which it says so."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the system's word: that of somebody who knows more
            raise
        raise WriteError(path, os.strerror(error.errno)) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # told by its name: not all who write load it
            raise
        code = re.search(r"\(os error (\d+)\)", str(error))  # as libraries in Rust say it
        reason = os.strerror(int(code[1])) if code else str(error).partition("\n")[0]
        raise WriteError(path, reason) from error


def linked_to(path: Path) -> Path:
    """Where to write what shall be found at `path`: elsewhere if it is a link.

    Raises:
        WriteError: what is there is no file, and would be lost.
    """
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise WriteError(path, "it is a link that leads back to itself")
    if target.is_dir():
        raise WriteError(path, "it is a folder")
    if target.exists() and not target.is_file():
        raise WriteError(path, "it is not a plain file")
    return target


def new_file_beside(path: Path) -> Path:
    """A new, empty file in the folder of `path`, with any new file's permissions. It is made, and
    never one that was there: a name that anybody could guess might be a link that waits for it."""
    temporary = name_beside(path)
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    return temporary


def name_beside(path: Path) -> Path:
    """A name that nobody can guess; it begins like that of `path`, for people who find it."""
    return path.with_name(f".{path.name[:40]}.{os.urandom(8).hex()}.tmp")


# --- Hashes ----------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(paths: Sequence[Path]) -> str:
    """One file's SHA-256; of several files, that of their hashes in hexadecimal, one per line."""
    hashes = [file_sha256(path) for path in paths]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
