"""How prompts are read: weights in brackets, by hand and in closed forms."""

from __future__ import annotations

import random
import re
import time

import pytest
import torch

from ldm.prompts import HEAVIEST, Part, Reading, parts_of, weighed
from tests.helpers import rng, tiny_config

# What is written, and by the rule each part and its weight.
BRACKETS = {
    "none": ("a red house", [("a red house", 1.0)]),
    "nothing": ("", [("", 1.0)]),
    "round": ("a (red) house", [("a ", 1.0), ("red", 1.1), (" house", 1.0)]),
    "twice": ("a ((red)) house", [("a ", 1.0), ("red", 1.1 * 1.1), (" house", 1.0)]),
    "square": ("[red] house", [("red", 1 / 1.1), (" house", 1.0)]),
    "number": ("(red:1.3) house", [("red", 1.3), (" house", 1.0)]),
    "below 1": ("(red:.25) house", [("red", 0.25), (" house", 1.0)]),
    "below 0": ("(red:-2)", [("red", -2.0)]),
    "spaces": ("(red: 1.5 )", [("red", 1.5)]),
    "nested": (
        "(the (red:2) house:1.5)",
        [("the ", 1.5), ("red", 2 * 1.5), (" house", 1.5)],
    ),
    "undone": ("a ([red])", [("a red", 1.0)]),
    "number of square": ("[red:1.3]", [("red:1.3", 1 / 1.1)]),
    "unclosed": ("a (red house", [("a ", 1.0), ("red house", 1.1)]),
    "unclosed square": ("a [red [house", [("a ", 1.0), ("red ", 1 / 1.1), ("house", 1 / 1.1**2)]),
    "unopened": ("red) house]", [("red) house]", 1.0)]),
    "number alone": ("red:1.3) at 12:30", [("red:1.3) at 12:30", 1.0)]),
    "no number": ("(red:big) house", [("red:big", 1.1), (" house", 1.0)]),
    "two points": ("(red:1.2.3)", [("red:1.2.3", 1.1)]),
    "escaped": (r"a \(red\) \[house\] \\", [(r"a (red) [house] " + "\\", 1.0)]),
    "escaped within": (r"(red \(deep\):2)", [("red (deep)", 2.0)]),
    "other backslash": (r"red\house", [("redhouse", 1.0)]),
    "alike are joined": ("(red)( house)", [("red house", 1.1)]),
    "emptied": ("()a[]", [("a", 1.0)]),
    "kinds are apart": (
        "(red [green) blue]",
        [("red ", 1.1), ("green", 1.1 / 1.1), (" blue", 1 / 1.1)],
    ),
}


@pytest.mark.parametrize("case", BRACKETS)
def test_brackets_weigh_what_is_in_them(case: str) -> None:
    written, expected = BRACKETS[case]
    parts = parts_of(written)
    assert [part.text for part in parts] == [text for text, _ in expected]
    assert [part.weight for part in parts] == pytest.approx([weight for _, weight in expected])


def test_any_text_with_its_brackets_escaped_is_itself() -> None:
    letters = random.Random(0)
    for _ in range(500):
        text = "".join(letters.choices("ab ()[]:.1\\\n", k=letters.randrange(30)))
        assert parts_of(re.sub(r"([()\[\]\\])", r"\\\1", text)) == (Part(text),), text


def test_any_text_is_read_and_only_brackets_numbers_and_backslashes_go() -> None:
    letters = random.Random(1)
    for _ in range(500):
        text = "".join(letters.choices("ab ()[]:.1\\\n", k=letters.randrange(30)))
        read = "".join(part.text for part in parts_of(text))
        assert [c for c in read if c in "ab"] == [c for c in text if c in "ab"], text


TOO_HEAVY = {
    "above": "(red:1001)",
    "below": "(red:-1001)",
    "brackets": "(" * 80 + "red",
    "no float": "(red:" + "9" * 400 + ")",
    "no number": "((red:0):" + "9" * 400 + ")",
}


@pytest.mark.parametrize("case", TOO_HEAVY)
def test_a_weight_beyond_all_use_is_refused_in_one_line(case: str) -> None:
    with pytest.raises(ValueError, match=f"times as much: {HEAVIEST:g} is the most$") as error:
        parts_of(TOO_HEAVY[case])
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_a_page_of_brackets_is_read_in_no_time() -> None:
    start = time.perf_counter()
    for prompt in ("[" * 20_000, "[(" * 10_000 + "])" * 10_000, ":" * 20_000, "(a:" + "1" * 20_000):
        parts_of(prompt)
    assert time.perf_counter() - start < 10


def test_weighed_states_are_multiplied_and_keep_their_rows_mean() -> None:
    context = torch.tensor([[[1.0, 3.0], [2.0, 6.0]], [[1.0, 3.0], [2.0, 6.0]]])
    weights = torch.tensor([[1.0, 2.0], [1.0, 1.0]])
    expected = torch.tensor([[[1.0, 3.0], [4.0, 12.0]]]) * (12 / 20)
    torch.testing.assert_close(weighed(context, weights)[:1], expected)
    assert torch.equal(weighed(context, weights)[1], context[1])


def test_weighing_leaves_what_it_is_given_and_its_dtype() -> None:
    context = torch.randn(2, 5, 3, generator=rng(0)).half()
    before = context.clone()
    weights = torch.ones(2, 5).index_fill(1, torch.tensor([2]), 1.3)
    after = weighed(context, weights)
    assert after.dtype == torch.float16 and torch.equal(context, before)
    means = [states.float().mean((1, 2)) for states in (after, before)]
    torch.testing.assert_close(*means, atol=1e-3, rtol=1e-2)
    unchanged = weighed(torch.zeros(1, 5, 3), weights[:1])
    assert torch.equal(unchanged, torch.zeros(1, 5, 3))  # and not 0 / 0


@pytest.mark.parametrize(
    "reading, match",
    [
        (Reading(clip_skip=2), "^clip_skip must be between 0 and 1, not 2$"),
        (Reading(clip_skip=-1), "^clip_skip must be between 0 and 1, not -1$"),
        (Reading(weighting=1), "^weighting must be True or False, not 1$"),
        (Reading(long_prompts="yes"), "^long_prompts must be True or False, not 'yes'$"),
    ],
    ids=["all layers", "below 0", "weighting", "long"],
)
def test_a_reading_that_the_encoder_cannot_do_is_refused(reading: Reading, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        reading.check(tiny_config().text)
