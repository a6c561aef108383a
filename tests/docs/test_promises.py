"""docs/promises.md: each promise names the tests that hold it, and they are there."""

from __future__ import annotations

import ast
import re

import pytest

from tests.places import ROOT

PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
ROWS = [  # of all tables, by their cells, without their heads
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith(("| promise ", "| warning ", "| --- "))
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_each_promise_is_held_by_tests_that_are_there(row: list[str]) -> None:
    named = TEST.findall(row[-1])
    assert named and row[-1] == ", ".join(f"`{file}::{name}`" for file, name in named)
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in tests and name.startswith("test_"), f"{file} has no {name}"


def test_there_are_promises_of_every_kind() -> None:
    kinds, *sections = zip(*(part.split("\n", 1) for part in PAGE.split("\n## ")[1:]), strict=True)
    assert kinds == (
        "What is never executed",
        "What is bounded",
        "What survives a kill",
        "What is refused",
        "What a warning means",
    )
    assert all(map(TEST.search, *sections))


def test_every_warning_of_the_library_is_told() -> None:
    """So that the page may say that nothing else warns."""
    told = [".*".join(map(re.escape, row[0].split("…"))) for row in ROWS if len(row) == 3]
    files = ROOT.glob("ldm/**/*.py")
    warned = [text for file in files for text in warnings_of(file.read_text(encoding="utf-8"))]
    assert len(warned) >= 4
    assert [text for text in warned if not any(re.search(one, text) for one in told)] == []


def warnings_of(code: str) -> list[str]:
    """The texts of all calls of `warnings.warn`, a letter for each number or name in them."""
    texts = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
            message = node.args[0]
            parts = message.values if isinstance(message, ast.JoinedStr) else [message]
            texts.append(
                "".join(str(p.value) if isinstance(p, ast.Constant) else "x" for p in parts)
            )
    return texts
