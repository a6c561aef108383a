"""Results that take long to come by, kept in a file as they come, a line of JSON each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ldm.files import check_writable, write_text

Kept = TypeVar("Kept")


def kept(
    out: Path, header: dict[str, Any], read: Callable[[dict[str, Any]], Kept], what: str
) -> list[Kept]:
    """What the file holds; without one it is begun, with its header: what all of it was made with.

    A last line that was cut off is dropped.

    Args:
        read: makes a result from what a line says; ValueError, TypeError or KeyError if it cannot.
        what: the file holds, for people.

    Raises:
        ValueError: the file has another header, or is no such file; or there is no such folder.
    """
    check_writable(out)
    first = json.dumps(header)
    if not out.exists():
        write_text(out, first + "\n")
        return []
    whole, _, cut = out.read_text(encoding="utf-8").rpartition("\n")
    lines = whole.split("\n")
    if lines[0] != first:
        raise ValueError(f"{out} holds no {what}: {first}")
    try:
        found = [read(json.loads(line)) for line in lines[1:]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{out} is damaged: {error}") from error
    if cut:
        write_text(out, whole + "\n")
    return found
