"""The entry point: what it costs before the arguments are read, and how it says what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from ldm.cli import main as cli
from ldm.cli import options
from ldm.presets import PRESETS
from ldm.samplers import SAMPLERS
from ldm.version import ldm_version
from tests.places import ROOT

HEAVY = {"torch", "numpy", "PIL", "transformers", "tokenizers", "matplotlib", "safetensors", "tqdm"}


def fresh(program: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A program after `from ldm.cli.main import main`, in a fresh interpreter without
    OMP_WAIT_POLICY; `before` is its environment before that import."""
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    start = "import os, sys; before = {**os.environ}; from ldm.cli.main import main; "
    return subprocess.run(
        [sys.executable, "-c", start + program, *args],
        env=inherited | {"PYTHONPATH": str(ROOT)} | env,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--help"], 0, "draw pictures of a prompt"),
        (["--version"], 0, f"ldm {ldm_version()}\n"),
        (["generate", "--help"], 0, "ddim or ddpm"),
        (["generate", "--stepz", "3"], 2, "unrecognized arguments: --stepz"),
        (["evaluate", "--steps", "many"], 2, "invalid int value: 'many'"),
        (["generate"], 2, "pass a prompt"),
        (["train", "horizon", "--out", "x", "--steps", "3"], 2, "are for a single stage"),
        (["evaluate", "--attention", "--steps", "3"], 2, "leave out --steps"),
    ],
)
def test_help_and_mistakes_are_answered_before_torch_is_loaded(
    args: list[str], code: int, said: str
) -> None:
    told = "import atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); "
    run = fresh(told + "sys.exit(main(sys.argv[1:]))", *args)
    *printed, loaded = run.stderr.splitlines()
    assert run.returncode == code
    assert said in run.stdout + "\n".join(printed)
    assert "ldm.cli.generate" in loaded.split()
    assert not {name.split(".")[0] for name in loaded.split()} & HEAVY


@pytest.mark.parametrize("users", ["", "ACTIVE"])
def test_threads_wait_passively_unless_the_user_says_otherwise(users: str) -> None:
    program = (
        "print(os.environ == before); main(['evaluate', '--per-value', '0']); "
        "print('torch' in sys.modules, dict(os.environ.items() - before.items())); "
        "print(os.environ['OMP_WAIT_POLICY'])"
    )
    run = fresh(program, **({"OMP_WAIT_POLICY": users} if users else {}))
    changed = {} if users else {"OMP_WAIT_POLICY": "passive"}
    assert run.stdout.splitlines() == ["True", f"False {changed}", users or "passive"], run.stderr


def test_the_names_in_help_texts_are_those_that_there_are() -> None:
    assert tuple(SAMPLERS) == options.SAMPLERS
    assert {None, *options.LIKE} == PRESETS.keys()
    dtypes = [options.named_dtype(name) for name in options.DTYPES]
    assert dtypes == [torch.float32, torch.float16, torch.bfloat16]


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in cli.COMMANDS:
        name = command.__name__.rpartition(".")[2]
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code == 0
        assert f"usage: ldm {name}" in capsys.readouterr().out


@pytest.mark.parametrize("args", [["--dtype", "float8"], ["--steps", "many"], ["--magic"]])
def test_an_argument_of_the_wrong_kind_is_one_line_and_exit_code_2(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "red", *args])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
