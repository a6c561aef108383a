"""Attention edits: a word struck, weighed or moved, in the half that has the prompt alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ldm.attention import AttentionWeights
from ldm.observe.edits import CROSS_ATTENTION, aligned, replace, strike, weigh
from ldm.observe.hooks import record
from ldm.observe.maps import Word
from ldm.unet import UNet
from tests.helpers import randn, random_stage, relative_error, tiny_config

TOKENS = 12


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def unet() -> UNet:
    unet = random_stage("unet", tiny_config())
    assert isinstance(unet, UNet)
    return unet


def ask(unet: UNet, seed: int = 1, rows: int = 2) -> Tensor:
    """A guided call for one image, unless of one row: without the prompt first."""
    x, context = randn(1, 4, 8, 8).expand(rows, -1, -1, -1), randn(rows, TOKENS, 24, seed=seed)
    return unet(x, torch.full((rows,), 501), context)


def maps_of(unet: UNet, seed: int = 1, rows: int = 2) -> dict[str, list[Tensor]]:
    with record(unet, CROSS_ATTENTION) as maps:
        ask(unet, seed, rows)
    return maps


def test_a_struck_word_is_minus_infinity_before_the_softmax(
    unet: UNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    with strike(unet, [3, 5]):
        found = ask(unet)

    def masked(self: AttentionWeights, q: Tensor, k: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        if k.shape[-2] == TOKENS:  # cross-attention: the second row has the prompt
            scores[1:, ..., [3, 5]] = -torch.inf
        return torch.softmax(scores, dim=-1)

    monkeypatch.setattr(AttentionWeights, "forward", masked)
    with record(unet, "*.weights"):  # so that the weights are made
        wanted = ask(unet)
    assert relative_error(found, wanted) < 1e-5
    assert relative_error(found[1], ask(unet)[1]) > 1e-3


def test_a_weighed_word_is_multiplied_after_the_softmax_and_nothing_else_is(unet: UNet) -> None:
    with record(unet, CROSS_ATTENTION) as before:
        pass_through = ask(unet)
    name = next(iter(before))  # the first layer sees the same queries either way
    with weigh(unet, [4], 2.5), record(unet, CROSS_ATTENTION) as after:
        changed = ask(unet)
    scale = torch.ones(TOKENS)
    scale[4] = 2.5
    torch.testing.assert_close(after[name][0][1], before[name][0][1] * scale)
    assert torch.equal(after[name][0][0], before[name][0][0])
    assert torch.equal(changed[0], pass_through[0])  # without the prompt
    assert relative_error(changed[1], pass_through[1]) > 1e-3
    with weigh(unet, [4], 1.0):
        assert torch.equal(ask(unet), pass_through)


def test_another_runs_maps_are_taken_for_its_first_part(unet: UNet) -> None:
    with record(unet, CROSS_ATTENTION) as theirs:
        for _ in range(4):
            ask(unet, seed=2)
    with replace(unet, theirs, share=0.5), record(unet, CROSS_ATTENTION) as ours:
        for _ in range(4):
            ask(unet)
    own = maps_of(unet)
    for name, calls in ours.items():
        for call in calls[:2]:
            assert torch.equal(call[1], theirs[name][0][1])
        for call in calls[2:]:
            assert torch.equal(call[1], own[name][0][1])
        for call in calls:
            assert torch.equal(call[0], own[name][0][0])  # without the prompt


def test_places_say_whose_map_a_token_takes(unet: UNet) -> None:
    theirs, own = maps_of(unet, seed=2), maps_of(unet)
    name = next(iter(own))
    places = [None, 7, *range(2, TOKENS)]
    with replace(unet, theirs, places=places), record(unet, CROSS_ATTENTION) as found:
        ask(unet)
    found_map = found[name][0][1]
    assert torch.equal(found_map[..., 0], own[name][0][1][..., 0])
    assert torch.equal(found_map[..., 1], theirs[name][0][1][..., 7])
    assert torch.equal(found_map[..., 2:], theirs[name][0][1][..., 2:])


def words(*texts: str) -> list[Word]:
    """Words of a token each, but for one with a hyphen, which has two."""
    found, place = [], 0
    for text in texts:
        count = 2 if "-" in text else 1
        found.append(Word(text, tuple(range(place, place + count))))
        place += count
    return found


def test_words_take_the_maps_of_those_that_stand_in_their_place() -> None:
    source = words("<start>", "a", "red", "house", "<end>")
    assert aligned(source, words("<start>", "a", "blue", "house", "<end>")) == [0, 1, 2, 3, 4]
    longer = words("<start>", "a", "light-blue", "house", "<end>")
    assert aligned(source, longer) == [0, 1, 2, 2, 3, 4]
    added = words("<start>", "a", "small", "red", "house", "<end>")
    assert aligned(source, added) == [0, 1, None, 2, 3, 4]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda u: strike(u, [TOKENS]), r"tokens are numbered from 0 to 11: there is no 12"),
        (lambda u: strike(u, range(TOKENS)), r"no token would be left to look at"),
        (lambda u: weigh(u, [-1], 2.0), r"tokens are numbered from 0 to 11: there is no -1"),
        (lambda u: weigh(u, [1], 2.0, images=3), r"2 rows: with images=3 it has 3, or 6"),
        (lambda u: replace(u, {}, share=1.5), r"share must be between 0 and 1, not 1.5"),
        (lambda u: replace(u, {}), r"maps has nothing of"),
        (lambda u: replace(u, maps_of(u), places=[0]), r"places are 1, for 12 tokens"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(unet: UNet, edit: object, message: str) -> None:
    with pytest.raises(ValueError, match=message), edit(unet):  # type: ignore[operator]
        ask(unet)
