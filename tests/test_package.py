"""The package as people get it: what an import costs, what a wheel holds, whose weights count."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

import ldm
from ldm.config import HORIZON
from tests.places import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def python(program: str, *path: Path) -> str:
    """The output of a program in a fresh interpreter that finds `ldm` in these folders first.

    It runs in the first of them: Python looks in the working folder before anywhere else.
    """
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, env=env, cwd=path[0], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


USED = "import ldm; ldm.load, ldm.load_unet, ldm.record, ldm.trace, ldm.inspect"


def test_using_ldm_costs_at_most_a_tenth_of_importing_torch() -> None:
    """Its names come when they are asked for: so they are asked for."""
    program = (
        "from time import perf_counter as now; a = now(); import torch; b = now(); "
        f"{USED}; print((now() - b) / (b - a))"
    )
    # The best of a few: another process on the machine can only make one slower.
    assert any(float(python(program, ROOT)) <= 0.10 for _ in range(4))


def test_using_ldm_leaves_the_global_generator_and_grad_mode_alone() -> None:
    program = (
        f"import torch; before = torch.get_rng_state().sum(), torch.is_grad_enabled(); {USED}; "
        "print(before == (torch.get_rng_state().sum(), torch.is_grad_enabled()))"
    )
    assert python(program, ROOT) == "True"


def test_core_dependencies_are_the_seven_and_no_other() -> None:
    names = [re.split(r"[<>=!~ ]", line)[0] for line in PYPROJECT["project"]["dependencies"]]
    assert names == ["torch", "numpy", "safetensors", "transformers", "pillow", "einops", "tqdm"]


def test_constraints_pin_every_core_dependency_within_its_bounds() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = dict(line.split("==") for line in text.splitlines() if "==" in line)
    for line in PYPROJECT["project"]["dependencies"]:
        name, bound = line.split(">=")
        pinned = tuple(map(int, pins[name].split(".")[:2]))
        assert pinned >= tuple(map(int, bound.split(".")[:2])), line
    assert pins["torch"] == "2.13.0"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built with the environment's own build backend: no network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    run = subprocess.run(
        [*command, "-w", str(folder), str(ROOT)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    (path,) = folder.glob("ldm_from_scratch-*.whl")
    return path


def test_the_wheel_holds_the_shipped_weights_and_the_type_marker(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        weights = archive.read("ldm/weights/horizon/model.safetensors")
    shipped = ROOT / "weights" / "horizon"
    assert {f"ldm/weights/horizon/{path.name}" for path in shipped.iterdir()} <= names
    assert weights == (shipped / "model.safetensors").read_bytes()
    player = {f"ldm/viz/player/{name}" for name in ("page.html", "page.css", "script/start.js")}
    tables = {"ldm/checkpoints/known_files.json", "ldm/evaluate/published.json"}
    assert {"ldm/py.typed", *tables, *player} <= names
    assert not any(name.startswith(("tests/", "weights/")) for name in names)


@pytest.mark.slow
def test_an_installed_wheel_draws_with_the_weights_inside_it(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = (
        "import ldm; print(ldm.shipped_weights()); "
        "print(ldm.load(device='cpu')('green grass at night', steps=2)[0].size)"
    )
    path, size = python(program, tmp_path).splitlines()
    assert Path(path) == tmp_path / "ldm" / "weights" / "horizon" / "model.safetensors"
    assert size == str((HORIZON.image_size, HORIZON.image_size))


@pytest.mark.slow
def test_a_checkout_reads_its_own_weights_and_sees_a_changed_file(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "ldm", tmp_path / "ldm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "weights" / "horizon", tmp_path / "weights" / "horizon")
    shipped, own = (root / "weights/horizon/model.safetensors" for root in (ROOT, tmp_path))
    before = shipped.read_bytes()
    pipe = ldm.load(own, device="cpu")
    torch.nn.init.ones_(pipe.unet.conv_in.weight)
    pipe.save(own)
    program = (
        "import ldm; p = ldm.load(device='cpu'); print(ldm.shipped_weights()); "
        "print(p.config.name, (p.unet.conv_in.weight == 1).all().item())"
    )
    assert python(program, tmp_path).splitlines() == [str(own), "horizon True"]
    assert shipped.read_bytes() == before  # the test changed its own copy alone


def test_the_readmes_two_commands_are_the_ones_that_are_run() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    picture = 'ldm generate "a red house on green grass at night"\n'
    tests = 'pip install -c constraints.txt -e ".[dev]" && pytest\n'
    assert f"```\npip install -c constraints.txt . && {picture}```" in readme
    assert f"```\n{tests}```" in readme
    assert tests in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
