"""Numbers that others published for the official weights, with who did: `published.json`, read.

Tests of other projects hold their code to the official weights by a few numbers. Their inputs are
constants, so the same numbers hold ours, wherever the weights are: on the user's machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.checkpoints.download import identify


@dataclass(frozen=True)
class Published:
    """A few numbers that somebody else's code made of official weights.

    Attributes:
        name: "unet-v1-4".
        stage: "text", "unet", "vae", or "picture", which takes all three.
        measure: which function of `ldm.evaluate.verify_stages` measures it; inputs: what that takes
            besides the stage.
        of: the versions whose weights it is about; measured_on: the one that it was published for.
        told: the inputs, in words.
        source: repository, file, and commit where that is known.
        atol: how far a number may be off.
        values: (N,), rows after rows.
    """

    name: str
    stage: str
    measure: str
    of: tuple[str, ...]
    measured_on: str
    told: str
    source: str
    atol: float
    values: tuple[float, ...]
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """The source, and of which version's weights, for people."""
        shared = f"; all of v1 have these weights, it is of {self.measured_on}"
        return self.source + (shared if len(self.of) > 1 else "")


def published() -> tuple[Published, ...]:
    """All numbers that are known, in the order of `published.json`."""
    return tuple(
        Published(**entry | {"of": tuple(entry["of"]), "values": tuple(entry["values"])})
        for entry in read_json()["numbers"]
    )


def versions() -> tuple[str, ...]:
    """The official versions: v1-1 to v1-5."""
    return tuple(read_json()["versions"])


def version_by_hash(sha256: str) -> str | None:
    """Which version an official file is of, by its SHA-256; None if it is none that is known."""
    for known in identify(0, sha256):
        return known.model.removeprefix("sd-")[:4]
    found: str | None = read_json()["sha256"].get(sha256)
    return found


def read_json() -> dict[str, Any]:
    """`published.json`, as it is."""
    text = Path(__file__).with_name("published.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found
