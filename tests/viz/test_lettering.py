"""Text fits its width, whatever its letters."""

from __future__ import annotations

import re

import pytest

from ldm.viz import lettering


@pytest.mark.parametrize("width", [20, 60, 300])
@pytest.mark.parametrize(
    "text", ["a red house on green grass", "x" * 90, "one\ntwo", "ein größeres Haus"]
)
def test_text_is_broken_to_its_width_and_nothing_of_it_lost(text: str, width: int) -> None:
    wrapped = lettering.Text.wrapped(text, width)
    assert wrapped.width <= width + 1
    assert re.sub(r"\s", "", "".join(wrapped.lines)) == re.sub(r"\s", "", text)
    assert wrapped.height >= len(wrapped.lines) * lettering.TEXT


def test_words_that_fit_are_not_broken() -> None:
    assert lettering.Text.wrapped("a red house", 500).lines == ("a red house",)
    assert lettering.Text.wrapped("red house", 45).lines == ("red", "house")
    assert lettering.Text.wrapped("one\ntwo", 500).lines == ("one", "two")


def test_letters_that_the_built_in_font_lacks_are_drawn_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("matplotlib")
    assert lettering.Text.wrapped("größer", 500).font.getname()[0] == "DejaVu Sans"
    assert lettering.Text.wrapped("larger", 500).font.getname()[0] != "DejaVu Sans"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    lettering.font.cache_clear()  # DejaVu is in it
    plain = lettering.Text.wrapped("größer", 500)
    lettering.font.cache_clear()
    assert plain.lines == ("gro?er",) and plain.font.getname()[0] == "Aileron"
