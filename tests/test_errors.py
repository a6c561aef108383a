"""What is told of a file's own words: one line that a terminal only shows, of bounded length."""

from __future__ import annotations

import pytest

from ldm import errors
from ldm.device import check_device
from ldm.errors import LINE, CheckpointError, did_you_mean, printable, some

OWNED = "\x1b]0;owned\x07"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a naïve house, 家", "a naïve house, 家"),
        (r"C:\weights", r"C:\weights"),
        (OWNED, r"\x1b]0;owned\x07"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x9b31m", r"\x9b31m"),  # a control sequence of one byte
        ("\u202egnp.exe", r"\u202egnp.exe"),  # which would be read from right to left
        ("\u2028\u200b", r"\u2028\u200b"),  # a line's end and a space of no width
        ("\ud800", r"\ud800"),  # half a character
        (ValueError("x\ny"), r"x\ny"),
    ],
)
def test_what_a_terminal_would_obey_is_spelled_out(text: object, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown  # told twice, it stays


@pytest.mark.parametrize("letter", ["a", "\x1b", "\U000e0001"])
def test_of_a_long_text_the_middle_is_left_out(letter: str) -> None:
    line = printable("begin " + letter * 3_000_000 + " end")
    assert len(line) <= LINE and line.isprintable()
    assert line.startswith("begin ") and " ... " in line and line.endswith(" end")


def test_every_error_about_weights_is_one_printable_line_by_itself() -> None:
    kinds = [one for one in vars(errors).values() if isinstance(one, type)]
    about_weights = [kind for kind in kinds if issubclass(kind, CheckpointError)]
    assert len(about_weights) > 10
    for kind in about_weights:
        message = str(kind(f"x.ckpt holds {OWNED}\n" + "y" * 10**6))
        assert message.isprintable() and len(message) <= LINE
        assert message.startswith(r"x.ckpt holds \x1b]0;owned\x07\n")


def test_of_many_names_a_few_are_told() -> None:
    assert some(["a", OWNED]) == r"a, \x1b]0;owned\x07"
    assert some([*"abcdefghij"]) == "a, b, c, d, e, f, g, h and 2 more"
    long = some(["x" * 10**6] * 100)
    assert len(long) <= LINE and long.endswith("and 92 more")


@pytest.mark.parametrize(
    ("name", "near"),
    [("dimm", "ddim"), ("DDPMM", "ddpm"), ("ddmi", "ddim or ddpm"), ("eul", ""), ("d" * 10**6, "")],
)
def test_the_nearest_name_is_offered_where_one_is_near(name: str, near: str) -> None:
    assert did_you_mean(name, ["ddim", "ddpm"]) == (f"; did you mean {near}?" if near else "")


def test_a_name_of_any_length_is_told_in_a_line_of_bounded_length() -> None:
    with pytest.raises(ValueError, match=r"^unknown device") as error:
        check_device("家" * 5000)
    assert len(str(error.value)) < 200
