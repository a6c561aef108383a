"""Where words look, as figures for programs and tables for people: what
`ldm.evaluate.attention` measures, and how it is told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WANTED = 1.5  # times the IoU with the masks of other scenes


@dataclass(frozen=True)
class Overlap:
    """The mean IoU of maps with their own scenes' masks, and with those of the other scenes; and
    the 95% bootstrap interval of the mean difference, paired by scene."""

    own: float
    others: float
    low: float
    high: float

    @property
    def ratio(self) -> float:
        """How many times better than luck; NaN where luck gets nothing."""
        return ratio(self.own, self.others)

    @property
    def points(self) -> bool:
        """Whether the maps point at their things: by the wanted ratio, and surely above luck."""
        return self.own >= WANTED * self.others and self.low > 0

    def as_dict(self) -> dict[str, float | None]:
        """For programs."""
        return {
            "own": self.own,
            "others": self.others,
            "ratio": none_for_nan(self.ratio),
            "difference_low": self.low,
            "difference_high": self.high,
        }


@dataclass(frozen=True)
class Sharpest:
    """The layer and timestep at which a word points best, chosen on half of the scenes, and its
    overlap on the other half."""

    layer: str
    timestep: str
    scenes: int
    overlap: Overlap

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        where = {"layer": self.layer, "timestep": self.timestep, "scenes": self.scenes}
        return where | self.overlap.as_dict()


@dataclass(frozen=True)
class WordOverlaps:
    """How well one kind of word points.

    Attributes:
        scenes: how many say it.
        mean: over all layers and timesteps, each map on its own.
        sharpest: where it points best.
        best: the ratio that maps would have which equal the masks; NaN where no two overlap.
        table: {row: {column: Overlap}}. A row is a layer, or several as one map (`joint_rows`); a
            column is a timestep, or all of them (the mean of the maps).
    """

    scenes: int
    mean: Overlap
    sharpest: Sharpest
    best: float
    table: Mapping[str, Mapping[str, Overlap]]


@dataclass(frozen=True)
class AttentionResults:
    """What `evaluate_attention` measures, by kind of word."""

    words: Mapping[str, WordOverlaps]
    settings: Mapping[str, float | str]

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        words = {
            name: {
                "scenes": word.scenes,
                "mean": word.mean.as_dict(),
                "sharpest": word.sharpest.as_dict(),
                "best_ratio": none_for_nan(word.best),
                "table": {
                    row: {column: cell.as_dict() for column, cell in cells.items()}
                    for row, cells in word.table.items()
                },
            }
            for name, word in self.words.items()
        }
        return {"settings": dict(self.settings), "words": words}

    def as_markdown(self) -> str:
        """For people."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        parts = [
            "Where words look: IoU of attention maps with the true masks, and with the masks of "
            f"other scenes, over all layers and timesteps ({settings}). Bold: {WANTED} times the "
            "others' and more, and a difference whose 95% bootstrap interval is above 0. Best: "
            "the ratio of maps that equal the masks.",
            overview(self.words),
            "Where each points best, a layer and a timestep chosen on every other scene and "
            "measured on the rest:",
            sharpest_table(self.words),
        ]
        for name, word in self.words.items():
            parts += [f"{name}, by layer and timestep (own / others):", table(word)]
        return "\n\n".join(parts)


def ratio(own: float, others: float) -> float:
    """How many times `others` is in `own`; NaN for 0."""
    return own / others if others > 0 else math.nan


def none_for_nan(number: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(number) else number


def overview(words: Mapping[str, WordOverlaps]) -> str:
    """One line for every kind of word, as a Markdown table."""
    lines = [
        "| words | scenes | IoU | with others | ratio | best | difference, 95% interval |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, word in words.items():
        *ious, difference = cells_of(word.mean)
        cells = (name, str(word.scenes), *ious, f"{word.best:.2f}", difference)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sharpest_table(words: Mapping[str, WordOverlaps]) -> str:
    """The same of each word's best layer and timestep."""
    lines = [
        "| words | layer | timestep | scenes | IoU | with others | ratio "
        "| difference, 95% interval |",
        f"|{' --- |' * 8}",
    ]
    for name, word in words.items():
        there = word.sharpest
        cells = (name, there.layer, there.timestep, str(there.scenes), *cells_of(there.overlap))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cells_of(overlap: Overlap) -> tuple[str, str, str, str]:
    """Both IoUs, their ratio and their difference, as cells of a Markdown table."""
    mark = "**" if overlap.points else ""
    return (
        f"{overlap.own:.3f}",
        f"{overlap.others:.3f}",
        f"{mark}{overlap.ratio:.2f}{mark}",
        f"{overlap.own - overlap.others:+.3f} ({overlap.low:+.3f} to {overlap.high:+.3f})",
    )


def table(word: WordOverlaps) -> str:
    """All layers and timesteps of one kind of word, as a Markdown table."""
    columns = list(next(iter(word.table.values())))
    lines = [f"| {' | '.join(['layer', *columns])} |", f"|{' --- |' * (len(columns) + 1)}"]
    for row, cells in word.table.items():
        marks = ["**" if cell.points else "" for cell in cells.values()]
        shown = [
            f"{mark}{cell.own:.2f} / {cell.others:.2f}{mark}"
            for mark, cell in zip(marks, cells.values(), strict=True)
        ]
        lines.append(f"| {' | '.join([row, *shown])} |")
    return "\n".join(lines)
