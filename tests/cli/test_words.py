"""`ldm words`: what a model knows, and what is said of what it does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import ldm
from ldm.checkpoints.shipped import shipped_weights
from ldm.checkpoints.tokenizer_files import tokenizer_beside
from ldm.cli import main as cli
from ldm.tokenizer import split_words
from ldm.train.clip import captions_to_learn_from


def test_the_words_of_horizon_are_those_of_its_captions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["words"]) == 0
    words = capsys.readouterr().out.split()
    captions = captions_to_learn_from(seed=5, count=1000)
    assert set(filter(str.isalpha, split_words("\n".join(captions)))) <= set(words)
    assert {"house", "moonlit"} <= set(words) and "dog" not in words


def test_a_model_that_keeps_no_words_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tokenizer_beside(shipped_weights())
    assert folder is not None
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(folder / name, tmp_path)
    assert cli.main(["words", "--weights", str(tmp_path)]) == 2
    assert "does not say which words its model was trained on" in capsys.readouterr().err


def test_a_word_that_a_model_has_never_seen_is_told_where_it_is_read() -> None:
    text = ldm.load_text_encoder(shipped_weights())
    said = r"never seen 'hose'; did you mean house or houses\?; the 73 words that it knows"
    with torch.no_grad(), pytest.warns(UserWarning, match=said):
        text(["a red hose"])
