"""Cross-attention maps: what is kept of them, which tokens make a word, and the two ways in which
papers sum them up.

Cross-attention has a weight for every token, layer, head and step. All here are functions of
tensors and token ids; `ldm.observe.traces` records a run's maps.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.tokenizer import Tokenizer, split_words


def conditional_mean(weights: Tensor) -> Tensor:
    """What a trace keeps of a layer's weights (1 or 2, heads, places, L): (places, L), of the half
    with the prompt, which is the last in a guided batch; the mean over heads. It stays on the
    device, so that no step waits for it."""
    return weights[-1].mean(dim=0).to(torch.float16)


def map_size(places: int, latent_size: tuple[int, int]) -> tuple[int, int]:
    """The (rows, columns) of a layer that has so many places. Each level of the UNet halves both
    sides of the latents and rounds up, so no two of different size have as many.

    Raises:
        ValueError: no level has so many.
    """
    rows, columns = latent_size
    while rows * columns > max(places, 1):
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
    if rows * columns != places:
        raise ValueError(f"no level of latents {latent_size} has {places} places")
    return rows, columns


@dataclass(frozen=True)
class Word:
    """A word of the prompt: its text, and the places of its tokens among the prompt's tokens."""

    text: str
    tokens: tuple[int, ...]


def group_words(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[Word, ...]:
    """The words of a padded row of token ids: the start token, the prompt's words, the end token
    and what fills the row behind it.

    A token that is marked so ends its word; punctuation and single digits are words of their own,
    as CLIP's tokenizer splits them. A prompt that is too long may be cut in the middle of a word,
    of which "…" then stands for the rest.
    """
    strings = tokenizer.strings(ids)
    end = len(ids)
    for token in (ids[-1], tokenizer.eos_token_id):  # what fills the row may be another
        while ids[end - 1] == token:
            end -= 1
    words, group = [Word(strings[0], (0,))], []
    for place in range(1, end):
        group.append(place)
        is_special = ids[place] in (tokenizer.bos_token_id, tokenizer.eos_token_id)
        if strings[place].endswith("</w>") or is_special or place == end - 1:
            text = tokenizer.decode(ids[i] for i in group) or strings[place]
            is_whole = strings[place].endswith("</w>") or is_special
            words.append(Word(text if is_whole else text + "…", tuple(group)))
            group = []
    return (*words, Word(strings[end], tuple(range(end, len(ids)))))


def find_word(words: Sequence[Word], text: str, prompt: str) -> Word:
    """The one of a prompt's words (`group_words`) that is spelled so, in upper or lower case.

    Raises:
        ValueError: the prompt has no such word, or has it more than once, or has it beyond the
            tokens that the model reads, so that it was cut off.
    """
    found = [word for word in words if word.text == text.lower()]
    if len(found) > 1:
        raise ValueError(f"the prompt says {text!r} {len(found)} times: pass one of `words`")
    if found:
        return found[0]
    if text.lower() in split_words(prompt) and len(words[-1].tokens) == 1:
        raise ValueError(
            f"{text!r} was cut off: the prompt is longer than the {words[-1].tokens[0] + 1} tokens "
            f"that the model reads, which end with {words[-2].text!r}"
        )
    spelled = [word.text for word in words]
    near = difflib.get_close_matches(text.lower(), spelled, n=3) or spelled[1:-1]
    raise ValueError(f"the prompt has no word {text!r}; it has {', '.join(near)}")


def daam(maps: Sequence[Tensor], *, heads: int, size: tuple[int, int]) -> Tensor:
    """Diffusion attentive attribution maps (Tang et al. 2022, arXiv:2210.04885, section 2.2): the
    weights of a word, brought to one size and summed over steps j, layers l and heads i,

        D[x, y] = sum_j sum_l sum_i upscale(F[j, l, i])[x, y],

    with bicubic upscaling, which can overshoot a little below 0.

    Upscaling is linear, so sums over heads and steps may come first; a sum over heads is their
    number times their mean.

    Args:
        maps: per layer (S, rows, columns), the mean over heads.
        heads: the number of heads per layer.
        size: of the result, e.g. the latents' (h, w).

    Returns:
        (h, w) float32.
    """
    upscaled = [
        F.interpolate(
            layer.float().sum(dim=0)[None, None], size=size, mode="bicubic", align_corners=False
        )[0, 0]
        for layer in maps
    ]
    return heads * torch.stack(upscaled).sum(dim=0)


def prompt_to_prompt(maps: Sequence[Tensor]) -> Tensor:
    """The averaged maps of prompt-to-prompt (Hertz et al. 2022, arXiv:2208.01626, section 3, and
    the code released with it): the layers l of one resolution alone, over steps j and heads i,

        M[x, y] = mean_j mean_l mean_i F[j, l, i][x, y].

    Args:
        maps: per layer (S, rows, columns), the mean over heads, all of one size.

    Returns:
        (rows, columns) float32.
    """
    return torch.stack([layer.float() for layer in maps]).mean(dim=(0, 1))
