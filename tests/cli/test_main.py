"""The entry point: what it costs before the arguments are read, and how it says what is wrong."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from ldm.cli import main as cli
from ldm.cli import options
from ldm.config import PREDICTIONS
from ldm.errors import LINE
from ldm.presets import PRESETS
from ldm.recipe import MAX_SCALE
from ldm.samplers import SAMPLERS, SPACINGS
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
        (["generate", "--help"], 0, "ddim, ddpm, plms, euler"),
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


@pytest.mark.parametrize(("load", "users"), [(99, ""), (0, ""), (99, "ACTIVE")])
def test_how_threads_wait_is_chosen_by_the_load_before_torch_is_loaded(
    load: int, users: str
) -> None:
    program = (
        f"os.getloadavg = lambda: ({load}, 0, 0); "
        "print(os.environ == before); main(['evaluate', '--per-value', '0']); "
        "print('torch' in sys.modules, dict(os.environ.items() - before.items()))"
    )
    run = fresh(program, **({"OMP_WAIT_POLICY": users} if users else {}))
    changed = {"OMP_WAIT_POLICY": "passive"} if load and not users else {}
    assert run.stdout.splitlines() == ["True", f"False {changed}"], run.stderr


def test_the_names_in_help_texts_are_those_that_there_are() -> None:
    assert tuple(SAMPLERS) == options.SAMPLERS
    assert SPACINGS == options.SPACINGS
    assert PREDICTIONS == options.PREDICTIONS
    assert options.MAX_SCALE == MAX_SCALE
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


# --- What is said, and what is meant -----------------------------------------------------------


def test_without_a_command_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith("usage: ldm ") and "draw pictures of a prompt" in told


@pytest.mark.parametrize(
    ("args", "near"),
    [
        (["genrate", "a"], "did you mean generate?"),
        (["a red house"], 'did you mean ldm generate "a red house"?'),
        (["generate", "a", "--stepz", "3"], "did you mean --steps? (see ldm generate --help)"),
        (["generate", "a", "--sede=3"], "did you mean --seed?"),
        (["generate", "a", "--device", "cpu", "--sampler", "ddmi"], "did you mean ddim or ddpm?"),
    ],
)
def test_a_slip_is_told_with_what_may_have_been_meant(
    args: list[str], near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(args)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and near in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda one: one.__name__)
def test_help_has_examples_that_can_be_read(command, capsys: pytest.CaptureFixture[str]) -> None:
    name = command.__name__.rpartition(".")[2]
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    usage, _, examples = capsys.readouterr().out.partition("\nexamples:\n")
    parser, _ = cli.build_parser()
    lines = [shlex.split(line) for line in examples.splitlines() if line]
    assert any(line[:2] == ["ldm", name] for line in lines)
    for line in lines:
        assert line[0] == "ldm" and callable(parser.parse_args(line[1:]).run)
    assert not re.search(r"[A-Z]_[A-Z]", usage)  # each option's value has a word of its own


OWNED = "\x1b]0;owned\x07"


@pytest.mark.parametrize(
    "args",
    [
        ["show", f"{OWNED}.png"],
        ["inspect", f"no\n{OWNED}"],
        ["generate", "a", f"--{OWNED}"],
        ["generate", "a", "--sampler", OWNED, "--device", "cpu"],
        ["generate", "a", "--device", f"{OWNED}\n" + "x" * 10**5],
        [f"{OWNED} {OWNED}"],
    ],
)
def test_an_error_is_one_printable_line_whatever_it_names(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(args)
    except SystemExit as stop:
        code = stop.code
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and line.isprintable() and len(line) <= LINE
    assert line.startswith("ldm: ") and "owned" in line


def test_a_warning_is_one_printable_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # and back, afterwards
    assert cli.main(["show", "nothing.png"]) == 2
    told = warnings.formatwarning(f"the word\n{OWNED}", UserWarning, "a.py", 1)
    assert told == "ldm: the word\\n\\x1b]0;owned\\x07\n"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried\nto")])
def test_want_of_memory_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(cli.show, "run", fail)
    assert cli.main(["show", "a.png"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("ldm: there is not enough memory") and len(told.splitlines()) == 1


# --- Pipes, signals and shells -----------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="a pipe of POSIX")
@pytest.mark.parametrize(
    ("args", "codes"),
    [(["--help"], {0, 141}), (["show", "a.png"], {141}), (["download", "sd-v9"], {2, 141})],
)
def test_a_pipe_that_nobody_reads_is_quiet(args: list[str], codes: set[int]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    program = (
        "import sys; from ldm.cli import main, show; "
        "show.run = lambda args: print('much to tell ' * 10_000) or 0; sys.exit(main.main())"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, *args],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=writing,
        stderr=writing if args[0] == "download" else subprocess.PIPE,
        check=False,
    )
    os.close(writing)
    assert run.returncode in codes and not run.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk here is always full")
def test_results_that_cannot_be_written_are_one_line() -> None:
    program = (
        "import sys; from ldm.cli import main, show; "
        "show.run = lambda args: print('a result') or 0; sys.exit(main.main())"
    )
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(
            [sys.executable, "-c", program, "show", "a.png"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert run.returncode == 2
    assert run.stderr.startswith("ldm: ") and run.stderr.count("\n") == 1


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="signals of POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_to_end_ends_as_ctrl_c_does(
    number: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cleaned = []

    def work(args: argparse.Namespace) -> int:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            cleaned.append(True)
        return 0

    before = signal.getsignal(number)
    monkeypatch.setattr(cli.show, "run", work)
    signal.signal(number, signal.SIG_DFL)
    try:
        assert cli.main(["show", "a.png"]) == code
        assert signal.getsignal(number) is signal.SIG_DFL  # as it was
    finally:
        signal.signal(number, before)
    assert capsys.readouterr().err == "ldm: stopped\n" and cleaned


@pytest.mark.skipif(importlib.util.find_spec("argcomplete") is None, reason="no argcomplete here")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("ldm gen", {"generate"}),
        ("ldm generate a --num", {"--num-images"}),
        ("ldm generate a --ema ", {"auto", "yes", "no"}),
        ("ldm generate a --sampler dd", {"ddim", "ddpm"}),
    ],
)
def test_a_shell_that_asks_at_tab_is_told_without_torch(
    typed: str, offered: set[str], tmp_path: Path
) -> None:
    answer = tmp_path / "answer"
    run = fresh(
        "import atexit; atexit.register(lambda: print('torch' in sys.modules)); main()",
        _ARGCOMPLETE="1",
        _ARGCOMPLETE_IFS=" ",
        _ARGCOMPLETE_STDOUT_FILENAME=str(answer),
        COMP_LINE=typed,
        COMP_POINT=str(len(typed)),
    )
    assert {word.strip() for word in answer.read_text().split()} == offered, run.stderr
