"""What `ldm verify` found, as figures for programs and as a report that people can hand on."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ldm.errors import printable

AGREES, DIFFERS, NOT_MEASURED = "agrees", "DIFFERS", "NOT MEASURED"
NOT_PUBLISHED, NOT_DRAWN, NOT_THERE = "no number was published", "not drawn", "not in the file"
SHOWN = 3  # numbers of a row that a report shows; programs get all of them


@dataclass(frozen=True)
class Row:
    """One stage held against one published row of numbers.

    Attributes:
        stage: "text", "unet", "vae" or "picture".
        name: that of the `Published`; empty where there is none.
        told: the inputs, or what is to be said instead.
        measured, published: the numbers, (N,) each; none where nothing was compared.
        error: the largest difference between the two; atol: how large it may be.
        source: who published them.
        verdict: `AGREES`, `DIFFERS`, `NOT_MEASURED`, `NOT_PUBLISHED`, `NOT_DRAWN` or `NOT_THERE`.
    """

    stage: str
    verdict: str
    told: str
    name: str = ""
    measured: tuple[float, ...] = ()
    published: tuple[float, ...] = ()
    error: float | None = None
    atol: float | None = None
    source: str = ""


@dataclass(frozen=True)
class Fact:
    """What only the file itself can tell; `wrong`, if it is not as it must be."""

    name: str
    told: str
    wrong: bool = False


@dataclass(frozen=True)
class Verification:
    """All that was found.

    Attributes:
        path: of the file or the folder.
        version: which official weights they are, "v1-4"; None where nothing tells.
        told_by: how that is known, in words.
        rows: a row per stage and published number, in the order in which they were measured.
        facts: what only the file can tell.
        machine: what it was measured with: names and versions.
    """

    path: str
    version: str | None
    told_by: str
    rows: tuple[Row, ...]
    facts: tuple[Fact, ...]
    machine: Mapping[str, str]

    @property
    def proved(self) -> bool:
        """Whether some published number was compared, all that were agree, and no fact is wrong.
        What has no published number is not proved by that."""
        verdicts = {row.verdict for row in self.rows}
        wrong = {DIFFERS, NOT_MEASURED} & verdicts or any(fact.wrong for fact in self.facts)
        return AGREES in verdicts and not wrong

    @property
    def summary(self) -> str:
        """One line: how many numbers agree, and what has none."""
        compared = [row for row in self.rows if row.published]
        agree = sum(row.verdict == AGREES for row in compared)
        line = f"{agree} of {len(compared)} published rows agree"
        if without := [row.stage for row in self.rows if row.verdict == NOT_PUBLISHED]:
            line += f"; no number was published for {' and '.join(without)}: that is not proved"
        if self.version is None and any(row.stage == "unet" for row in compared):
            line += (
                "; the UNet agrees with none of them: it is of another version (--as says which), "
                "was trained further, or is computed wrongly"
            )
        if wrong := [fact.name for fact in self.facts if fact.wrong]:
            line += f"; not as it must be: {', '.join(wrong)}"
        return line

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self) | {"proved": self.proved, "summary": self.summary}

    def as_markdown(self) -> str:
        """For people, and to be handed on: it names no folder of this machine."""
        name = self.path.replace("\\", "/").rstrip("/").rpartition("/")[2]
        version = f"Stable Diffusion {self.version}" if self.version else "no version is known"
        machine = ", ".join(f"{what} {which}" for what, which in self.machine.items())
        parts = [
            printable(f"ldm verify: {name}: {version} ({self.told_by})"),
            rows_table(self.rows),
            facts_table(self.facts),
            f"{self.summary}.",
            printable(f"Measured with {machine}."),
        ]
        return "\n\n".join(parts)


def machine(device: str) -> dict[str, str]:
    """What numbers depend on, and no more than that of the user's machine."""
    import torch
    import transformers

    from ldm.version import ldm_version

    return {
        "ldm": ldm_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "Python": platform.python_version(),
        "on": f"{device} ({platform.machine()})",
        "in": "float32",
    }


def rows_table(rows: Sequence[Row]) -> str:
    """A line per row, as a Markdown table."""
    lines = [
        "| stage | verdict | measured | published | largest difference | source |",
        f"|{' --- |' * 6}",
    ]
    for row in rows:
        difference = ""
        if row.atol is not None:
            off = "" if row.error is None else f"{row.error:.2g}, "
            difference = f"{off}allowed {row.atol:g}"
        source = f"{row.told}; {row.source}" if row.source else row.told
        cells = (row.stage, row.verdict, few(row.measured), few(row.published), difference, source)
        lines.append(f"| {' | '.join(printable(cell) for cell in cells)} |")
    return "\n".join(lines)


def facts_table(facts: Sequence[Fact]) -> str:
    """A line per fact, as a Markdown table."""
    lines = ["| the file | |", "| --- | --- |"]
    for fact in facts:
        told = f"**{fact.told}**" if fact.wrong else fact.told
        lines.append(f"| {fact.name} | {printable(told)} |")
    return "\n".join(lines)


def few(numbers: Sequence[float]) -> str:
    """The first numbers of a row."""
    more = " …" if len(numbers) > SHOWN else ""
    return " ".join(f"{number:.4f}" for number in numbers[:SHOWN]) + more
