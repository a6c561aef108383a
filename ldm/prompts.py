"""How a prompt is read before it is tokenized: weights in brackets, and what does not fit.

    parts_of("a (red:1.3) house")  # "a ", 1.0; "red", 1.3; " house", 1.0

The weights are those of AUTOMATIC1111's program ("Attention/emphasis" in its documentation): the
text encoder reads the words alone, and what it makes of each token is multiplied (`weighed`). That
is another thing than to weigh a word's attention (`ldm.observe.edits.weigh`). All of it is off
unless asked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ldm.config import TextConfig

BRACKET = {"(": 1.1, "[": 1 / 1.1}
"""What an opening bracket multiplies the weights within by, unless a number says otherwise."""

HEAVIEST = 1000.0
"""Weights go so far, below 0 too: what is beyond is a mistake, and would overflow."""

MOST_CHUNKS = 32
"""Chunks of a prompt that a run reads at most: 2,400 tokens of Stable Diffusion's. Attention to
words takes time and memory with their number."""

# An escaped character, a weight with the bracket that it closes, a bracket, or text without any.
PIECES = re.compile(
    r"\\(?P<escaped>[()\[\]\\])"
    r"|:\s*(?P<weight>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)"
    r"|(?P<bracket>[()\[\]])"
    r"|[^\\()\[\]:]+|[\\:]",
    re.ASCII,
)


@dataclass(frozen=True)
class Reading:
    """How the prompts of a run are read.

    Attributes:
        weighting: whether brackets weigh words (`parts_of`), or are text as any other.
        clip_skip: how many of the text encoder's last layers are left out.
        long_prompts: whether what does not fit is read in further chunks, or left out.
    """

    weighting: bool = False
    clip_skip: int = 0
    long_prompts: bool = False

    def check(self, config: TextConfig) -> None:
        """A ValueError in one line for what a text encoder of this config cannot do."""
        for name in ("weighting", "long_prompts"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, not {getattr(self, name)!r:.80}")
        if not 0 <= self.clip_skip < config.num_layers:
            most = config.num_layers - 1
            raise ValueError(f"clip_skip must be between 0 and {most}, not {self.clip_skip}")
        if self.long_prompts and config.max_length < 3:
            raise ValueError("long_prompts: no token fits between a start and an end token here")


@dataclass(frozen=True)
class Part:
    """A part of a prompt whose tokens share a weight."""

    text: str
    weight: float = 1.0


def parts_of(prompt: str) -> tuple[Part, ...]:
    """A prompt cut where the weight changes, without its brackets; what weighs the same is joined.

    - `(red)` weighs 1.1 times as much, `((red))` 1.1 * 1.1 times, `[red]` 1 / 1.1 times;
    - `(red:1.3)` weighs 1.3 times as much; square brackets take no number;
    - a bracket that nothing closes holds to the end; one that closes nothing is text, and so is a
      number without its round bracket;
    - a backslash before a bracket, or before another one, makes that a character; any other
      backslash is left out.

    Round and square brackets are matched apart from each other, and weights multiply.

    Raises:
        ValueError: in one line, if a weight is beyond `HEAVIEST`, or a number far beyond.
    """
    pieces = list(PIECES.finditer(prompt))
    factors = matched(pieces)
    weights = {"(": [1.0], "[": [1.0]}  # of the brackets that are open, each with those around it
    texts: list[tuple[str, float]] = []
    for place, piece in enumerate(pieces):
        if place not in factors:
            text, weight = text_of(piece), weights["("][-1] * weights["["][-1]
            if not abs(weight) <= HEAVIEST:
                raise ValueError(
                    f"{text!r:.80} weighs {weight:.4g} times as much: {HEAVIEST:g} is the most"
                )
            texts.append((text, weight))
            continue
        kind, factor = factors[place]
        if factor is None:
            weights[kind].pop()
        else:
            weights[kind].append(weights[kind][-1] * factor)
    joined = groupby(texts, key=lambda one: one[1])
    parts = [Part("".join(text for text, _ in same), weight) for weight, same in joined]
    return tuple(parts) or (Part(""),)


def text_of(piece: re.Match[str]) -> str:
    """The text that a piece stands for, where it is no bracket that weighs."""
    if piece[0].startswith("\\"):
        return piece["escaped"] or ""
    return piece[0]


def matched(pieces: list[re.Match[str]]) -> dict[int, tuple[str, float | None]]:
    """Of the pieces that are brackets and no text: which of the two kinds each is, and what an
    opening one multiplies by; None closes."""
    factors: dict[int, tuple[str, float | None]] = {}
    unclosed: dict[str, list[int]] = {"(": [], "[": []}
    for place, piece in enumerate(pieces):
        bracket = ")" if piece["weight"] else piece["bracket"]
        if bracket is None:
            continue
        if bracket in BRACKET:
            unclosed[bracket].append(place)
            factors[place] = bracket, BRACKET[bracket]
            continue
        kind = "(" if bracket == ")" else "["
        if unclosed[kind]:
            start = unclosed[kind].pop()
            factors[place] = kind, None
            if piece["weight"]:
                factors[start] = kind, float(piece["weight"])
    return factors


def weighed(context: Tensor, weights: Tensor) -> Tensor:
    """A context with each token's states multiplied by its weight, and then all of it by what gives
    each row the mean that it had: of the states h and the weights w of a row,

        h'[i] = w[i] h[i] * mean(h) / mean(w h),

    over all its places and channels. A row whose weights are all 1 stays as it is.

    Args:
        context: (B, L, D).
        weights: (B, L).

    Returns:
        (B, L, D), in the context's dtype.
    """
    states = context.float()
    scaled = states * weights.to(states)[..., None]  # (B, L, D)
    before, after = (h.mean(dim=(1, 2), keepdim=True) for h in (states, scaled))  # (B, 1, 1)
    restored = scaled * torch.where(after == before, 1.0, before / after)
    return restored.to(context.dtype)
