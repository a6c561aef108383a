"""How near the pictures of prompts are to the law, as figures for programs and tables for people:
what `ldm.evaluate.distribution` measures, and how it is told."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldm.evaluate.statistics import Closeness, Shift, interval
from ldm.worlds.distribution import ATTRIBUTES

UNLIKELY = 0.001  # a p-value below this is told in bold


@dataclass(frozen=True)
class KindResults:
    """The pictures of one prompt.

    Attributes:
        prompt, stated: what was asked for.
        apart: whether much of what it asks for was held out of training.
        total: how many pictures there are.
        obeyed: how many show all that the prompt states.
        doubled: how many show two of anything.
        impossible: how many no scene could have made.
        bad: how many are one of these two or both; `bad_interval` is the 95% interval of the share.
        attributes, pairs: how far what is open is from the law.
        numbers: how far the horizon's height, the house's place and its size are, as far as names
            leave them open.
        diversity: how different the pictures are from each other, 1 as by the law, and the 95%
            interval; NaN of too few.
        nearest: the mean distance to the nearest training scene, in grey levels, of these pictures
            and of fresh scenes; None where no training scenes were given.
    """

    prompt: str
    stated: dict[str, str]
    apart: bool
    total: int
    obeyed: int
    doubled: int
    impossible: int
    bad: int
    bad_interval: tuple[float, float]
    attributes: Mapping[str, Shift]
    pairs: Mapping[tuple[str, ...], Shift]
    numbers: Mapping[str, Closeness]
    diversity: tuple[float, float, float]
    nearest: tuple[float, float] | None

    def as_dict(self) -> dict[str, Any]:
        """For programs; what is not a number is null."""
        plain = ("prompt", "stated", "apart", "total", "obeyed", "doubled", "impossible", "bad")
        return {name: getattr(self, name) for name in plain} | {
            "bad_interval": list(self.bad_interval),
            "attributes": {name: one.as_dict() for name, one in self.attributes.items()},
            "pairs": {" and ".join(pair): one.as_dict() for pair, one in self.pairs.items()},
            "numbers": {name: one.as_dict() for name, one in self.numbers.items()},
            "diversity": [None if math.isnan(x) else x for x in self.diversity],
            "nearest": self.nearest and list(self.nearest),
        }


@dataclass(frozen=True)
class DistributionResults:
    """All prompts, and what they were drawn with."""

    kinds: Sequence[KindResults]
    settings: dict[str, float | str]

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {"settings": self.settings, "kinds": [kind.as_dict() for kind in self.kinds]}

    def as_markdown(self) -> str:
        """For people."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        plain = [kind for kind in self.kinds if not kind.apart]
        apart = [kind for kind in self.kinds if kind.apart]
        parts = []
        if plain:
            parts += [f"Pictures held against the law of their prompt ({settings}).", *told(plain)]
        if apart:
            if not plain:
                parts.append(f"Drawn with {settings}.")
            parts += [
                "The same, where much of what is asked was held out of training.",
                *told(apart),
            ]
        return "\n\n".join(parts)


def told(kinds: Sequence[KindResults]) -> list[str]:
    """Three tables, each with a line on how to read it."""
    shifts = [one for kind in kinds for one in kind.attributes.values()]
    excess = [one.excess for one in shifts]
    parts = [
        "Pictures that no scene could have made: with two of a thing, or unlike any scene:",
        wrong_table(kinds),
    ]
    if shifts:
        parts += [
            "Excess total variation of what is open (0: as the law; bold: chi-square with "
            f"p < {UNLIKELY}), and its 1.96 standard errors:",
            shift_table(kinds),
            f"Over all open attributes: median {statistics.median(excess):.3f}, "
            f"largest {max(excess):.3f}.",
        ]
    return [
        *parts,
        "Numbers given the names, by Kolmogorov-Smirnov distance and p-value; how different "
        "pictures are from each other (1: as by the law):",
        number_table(kinds),
    ]


def wrong_table(kinds: Sequence[KindResults]) -> str:
    """Doubled and impossible pictures, by prompt and of all together."""
    rows = [
        [
            kind.prompt,
            f"{kind.obeyed} / {kind.total}",
            str(kind.doubled),
            str(kind.impossible),
            *share(kind.bad, kind.total),
        ]
        for kind in kinds
    ]
    sums = {
        name: sum(getattr(kind, name) for kind in kinds)
        for name in ("total", "obeyed", "doubled", "impossible", "bad")
    }
    rows.append(
        [
            "all",
            f"{sums['obeyed']} / {sums['total']}",
            str(sums["doubled"]),
            str(sums["impossible"]),
            *share(sums["bad"], sums["total"]),
        ]
    )
    heads = ["prompt", "as stated", "doubled", "impossible", "either", "95% interval"]
    return markdown(heads, rows)


def share(right: int, total: int) -> list[str]:
    """A share and its interval."""
    low, high = interval(right, total)
    return [f"{right / total:.1%}", f"{low:.1%} to {high:.1%}"]


def shift_table(kinds: Sequence[KindResults]) -> str:
    """The excess total variation by prompt and attribute, and of the worst pair."""
    rows = []
    for kind in kinds:
        cells = [shift_cell(kind.attributes.get(name)) for name in ATTRIBUTES]
        worst = max(kind.pairs, key=lambda pair: kind.pairs[pair].excess, default=None)
        pair = "" if worst is None else f"{' and '.join(worst)}: {shift_cell(kind.pairs[worst])}"
        rows.append([kind.prompt, *cells, pair.replace("_", " ")])
    heads = ["prompt", *(name.replace("_", " ") for name in ATTRIBUTES), "worst pair"]
    return markdown(heads, rows)


def shift_cell(one: Shift | None) -> str:
    """An excess and its margin; nothing where the prompt states the attribute."""
    if one is None:
        return ""
    excess = f"{one.excess:+.3f}"
    return f"{f'**{excess}**' if one.p < UNLIKELY else excess} ± {one.margin:.3f}"


def number_table(kinds: Sequence[KindResults]) -> str:
    """Numbers, diversity and, if it was asked for, the nearest training scene, by prompt."""
    names = list(dict.fromkeys(name for kind in kinds for name in kind.numbers))
    near = any(kind.nearest for kind in kinds)
    rows = []
    for kind in kinds:
        row = [kind.prompt, *(closeness_cell(kind.numbers.get(name)) for name in names)]
        middle, low, high = kind.diversity
        row.append("" if math.isnan(middle) else f"{middle:.2f} ({low:.2f} to {high:.2f})")
        if near:
            row.append("{:.1f} / {:.1f}".format(*kind.nearest) if kind.nearest else "")
        rows.append(row)
    heads = ["prompt", *(name.replace("_", " ") for name in names), "diversity, 95% interval"]
    if near:
        heads.append("nearest training scene: of these / of fresh scenes")
    return markdown(heads, rows)


def closeness_cell(one: Closeness | None) -> str:
    """A distance and its p-value."""
    if one is None:
        return ""
    distance = f"{one.distance:.3f}"
    return f"{f'**{distance}**' if one.p < UNLIKELY else distance} (p {one.p:.3f})"


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
