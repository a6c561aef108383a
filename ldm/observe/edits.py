"""Attention edits: what a word does to a picture, seen by taking it away, weighing it or moving it.

    words = group_words(pipe.text.tokenizer, ids)
    with strike(pipe.unet, find_word(words, "tree", prompt).tokens):
        pipe(prompt)                                  # as if nobody looked at the word

All three change the weights of cross-attention, softmax(q k^T / sqrt(d)), while the UNet runs, and
leave the context itself alone: the text encoder has read the whole prompt, so what other words know
of a struck one stays. They are `ldm.edit` with the arithmetic of a paper, in each layer and step,
and in the half of a guided batch that has the prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from difflib import SequenceMatcher

import torch
from torch import Tensor, nn

from ldm.observe.hooks import edit
from ldm.observe.maps import Word

CROSS_ATTENTION = "*cross_attention.weights"


def strike(
    unet: nn.Module, tokens: Collection[int], *, images: int = 1
) -> AbstractContextManager[None]:
    """Nobody looks at these tokens: minus infinity before the softmax.

    The softmax over the tokens that stay is the softmax over all, divided by what it gave to those:
    w_j / sum_k w_k, k among those that stay.

    Args:
        unet: whose cross-attention to edit.
        tokens: their places in the prompt, from 0 (the start token); `find_word(...).tokens`.
        images: how many images share a call of the UNet: 1 in a pipeline on a CPU, which asks each
            image alone; the batch's size elsewhere.

    Raises:
        ValueError: there is no such token, or none would be left to look at; a batch is neither of
            `images` rows nor of two halves of them.
    """

    def change(weights: Tensor) -> Tensor:
        struck = places_of(tokens, weights)
        if len(struck) == weights.shape[-1]:
            raise ValueError("no token would be left to look at")
        kept = weights.float().index_fill(-1, struck, 0.0)
        total = kept.sum(dim=-1, keepdim=True)
        return (kept / total.clamp(min=torch.finfo(total.dtype).tiny)).to(weights.dtype)

    return _edited(unet, lambda name, weights: change(weights), images)


def weigh(
    unet: nn.Module, tokens: Collection[int], factor: float, *, images: int = 1
) -> AbstractContextManager[None]:
    """Look at these tokens `factor` times as much: their maps multiplied after the softmax, and not
    renormalised (prompt-to-prompt, Hertz et al. 2022, arXiv:2208.01626, section 3.2, "attention
    re-weighting"). 0 takes them away and leaves a gap; below 0 is away from them.

    Args and errors are those of `strike`.
    """

    def change(weights: Tensor) -> Tensor:
        scale = torch.ones(weights.shape[-1], device=weights.device, dtype=weights.dtype)
        return weights * scale.index_fill(0, places_of(tokens, weights), factor)

    return _edited(unet, lambda name, weights: change(weights), images)


def replace(
    unet: nn.Module,
    maps: Mapping[str, Sequence[Tensor]],
    *,
    share: float = 1.0,
    places: Sequence[int | None] | None = None,
    images: int = 1,
) -> AbstractContextManager[None]:
    """Look where another run looked, over the first part of this one: another prompt then draws in
    the other's layout (prompt-to-prompt, section 3.2, "word swap" and "adding a new phrase").

        with ldm.record(pipe.unet, CROSS_ATTENTION) as maps:
            pipe("a red house", seed=3)
        with replace(pipe.unet, maps, share=0.8):
            pipe("a blue house", seed=3)

    Args:
        maps: of the other run, as `ldm.record` gives them: one for each call of the UNet.
        share: of its calls, from the first on, from 0 to 1; what this run asks after them is its
            own.
        places: for each token of this prompt the token of the other whose map it takes, or None to
            keep its own (`aligned`); without it, each takes that of its own place.
        images: as in `strike`, of both runs.

    Raises:
        ValueError: the share is not within 0 and 1; `maps` has no such layer, or of another size;
            `places` is not one for each token.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must be between 0 and 1, not {share}")
    calls: Counter[str] = Counter()

    def change(name: str, weights: Tensor) -> Tensor:
        call, theirs = calls[name], maps.get(name, ())
        calls[name] += 1
        if not theirs:
            raise ValueError(f"maps has nothing of {name}")
        if call >= share * len(theirs):
            return weights
        other = of_the_prompt(theirs[call], images)
        if other.shape != weights.shape:
            raise ValueError(
                f"maps of {name} are {tuple(other.shape)}, those of this run {tuple(weights.shape)}"
            )
        other = other.to(weights)
        if places is None:
            return other
        if len(places) != weights.shape[-1]:
            raise ValueError(f"places are {len(places)}, for {weights.shape[-1]} tokens")
        columns = [
            weights[..., i] if place is None else other[..., place]
            for i, place in enumerate(places)
        ]
        return torch.stack(columns, dim=-1)  # (images, heads, places, tokens)

    return _edited(unet, change, images)


def aligned(source: Sequence[Word], target: Sequence[Word]) -> list[int | None]:
    """For each token of `target` the token of `source` whose map it takes, as `replace` wants it.

    Words that both prompts have take each other's, as do words that stand in each other's place;
    what is only in the target keeps its own.

        a red house in the snow  ->  a blue house: "blue" takes the map of "red"
    """
    places: list[int | None] = [None] * sum(len(word.tokens) for word in target)
    matcher = SequenceMatcher(a=[word.text for word in source], b=[word.text for word in target])
    for kind, i, i_end, j, j_end in matcher.get_opcodes():
        if kind == "equal" or (kind == "replace" and i_end - i == j_end - j):
            for theirs, ours in zip(source[i:i_end], target[j:j_end], strict=True):
                for k, token in enumerate(ours.tokens):
                    places[token] = theirs.tokens[min(k, len(theirs.tokens) - 1)]
    return places


def places_of(tokens: Collection[int], weights: Tensor) -> Tensor:
    """The tokens as an index, (n,) int64, or a ValueError: there is none of that number."""
    most = weights.shape[-1] - 1
    for token in tokens:
        if not 0 <= token <= most:
            raise ValueError(f"tokens are numbered from 0 to {most}: there is no {token}")
    return torch.tensor(sorted(set(tokens)), device=weights.device, dtype=torch.int64)


def of_the_prompt(weights: Tensor, images: int) -> Tensor:
    """The rows with the prompt, (images, heads, places, tokens): all, or the second half of a
    guided batch (`ldm.samplers.guidance.guide`)."""
    if len(weights) not in (images, 2 * images):
        raise ValueError(
            f"a call of the UNet has {len(weights)} rows: with images={images} it has {images}, or "
            f"{2 * images} where it is guided"
        )
    return weights[-images:]


def _edited(
    unet: nn.Module, change: Callable[[str, Tensor], Tensor], images: int
) -> AbstractContextManager[None]:
    """Change the rows with the prompt; those without, if there are any, stay."""

    def by(name: str, weights: Tensor) -> Tensor:
        ours = of_the_prompt(weights, images)
        return torch.cat([weights[: len(weights) - images], change(name, ours)])

    return edit(unet, CROSS_ATTENTION, by=by)
