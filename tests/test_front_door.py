"""The front door: `import ldm` is light and changes nothing; names come when they are asked for."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import ldm

ROOT = Path(ldm.__file__).parents[1]
HEAVY = {"torch", "numpy", "transformers", "tokenizers", "PIL", "matplotlib", "safetensors", "tqdm"}


def fresh(program: str) -> str:
    """What a program prints in a fresh interpreter."""
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_import_ldm_loads_nothing_heavy_and_changes_no_environment() -> None:
    program = (
        "import os, sys; before = dict(os.environ); import ldm; "
        "print(before == dict(os.environ), *sys.modules)"
    )
    same, *loaded = fresh(program).split()
    assert same == "True"
    assert not {name.split(".")[0] for name in loaded} & HEAVY


def test_asking_for_a_model_loads_torch_and_nothing_else_that_is_slow() -> None:
    loaded = fresh("import ldm, sys; ldm.load, ldm.trace, ldm.inspect; print(*sys.modules)").split()
    slow = {"transformers", "tokenizers", "PIL", "matplotlib", "diffusers"}
    assert "torch" in loaded
    assert not {name.split(".")[0] for name in loaded} & slow


@pytest.mark.parametrize("name", ldm.__all__)
def test_each_public_name_is_what_its_home_defines(name: str) -> None:
    home = importlib.import_module(f"ldm.{ldm.HOME[name]}")
    assert getattr(ldm, name) is getattr(home, name)
    assert name in dir(ldm)


def test_the_types_that_a_checker_sees_are_the_names_that_are_there() -> None:
    tree = ast.parse(Path(ldm.__file__).read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module.removeprefix("ldm.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ldm.")
        for alias in node.names
        if alias.name in ldm.__all__
    }
    assert seen == ldm.HOME
    assert set(ldm.__all__) == set(ldm.HOME)


def test_rooms_and_shelf_answer_after_import_ldm_alone() -> None:
    assert (
        fresh("import ldm; print(ldm.config.SD_V1.name, ldm.worlds.__name__)") == "sd-v1 ldm.worlds"
    )
    files = {path.stem for path in (ROOT / "ldm").glob("*.py")} - {"__init__"}
    rooms = {path.parent.name for path in (ROOT / "ldm").glob("*/__init__.py")} - {"cli"}
    assert set(ldm.SHELF) == files | rooms


def test_what_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'ldm' has no attribute 'lod'"):
        ldm.lod  # noqa: B018
    assert not hasattr(ldm, "__path__of_nothing")


def test_the_version_is_the_installed_ones() -> None:
    assert ldm.__version__ == importlib.metadata.version("ldm-from-scratch")
