"""Files and folders appear whole or not at all, and anybody may read them who may read others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.files import (
    WriteError,
    append_text,
    check_writable,
    folder_written_whole,
    write_text,
    written_whole,
)
from tests.disk import FULL, full_disk
from tests.places import ROOT


@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_leaves_what_was_there(tmp_path: Path, existing: bool) -> None:
    path = tmp_path / "a.txt"
    if existing:
        path.write_text("before")
    with pytest.raises(KeyboardInterrupt), written_whole(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == (["a.txt"] if existing else [])
    if existing:
        assert path.read_text() == "before"


def test_text_is_utf8_with_unix_line_ends(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "naïve\n家\n")
    assert (tmp_path / "a.txt").read_bytes() == "naïve\n家\n".encode()


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
def test_a_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    path = tmp_path / "a.safetensors"
    with written_whole(path) as temporary:
        save_file({"a": torch.ones(2)}, temporary)
        temporary.chmod(0o600)  # as some versions of safetensors leave it
    assert path.stat().st_mode == plain.stat().st_mode != 0o100600


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), folder_written_whole(tmp_path / "f") as temporary:
        (temporary / "part").write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with folder_written_whole(tmp_path / "f") as temporary:
        (temporary / "part").write_text("whole")
        assert not (tmp_path / "f").exists()
    assert (tmp_path / "f" / "part").read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_an_existing_folder_is_never_mixed_with_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    with pytest.raises(ValueError, match="exists already"), folder_written_whole(tmp_path / "f"):
        pytest.fail("no work is done")


def test_what_cannot_be_written_is_said_before_any_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "a")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="there is no folder"):
        check_writable(tmp_path / "none" / "a")
    with pytest.raises(ValueError, match="it is a folder"):
        check_writable(tmp_path)


# --- Names, links, and what is somebody else's -----------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "n" * 251 + ".png", "家" * 80 + ".png"])
def test_any_name_that_a_file_may_have_can_be_written(tmp_path: Path, name: str) -> None:
    check_writable(tmp_path / name)
    write_text(tmp_path / name, "whole")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_name_too_long_is_said_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"n\.png cannot be written: File name too long$"):
        check_writable(tmp_path / ("n" * 252 + ".png"))


def test_a_file_that_is_named_as_a_temporary_one_might_be_is_left_alone(tmp_path: Path) -> None:
    others = [
        tmp_path / name for name in (".a.txt.tmp", ".a.txt.part", f".a.txt.{os.getpid()}.tmp")
    ]
    for other in others:
        other.write_text("precious")
    check_writable(tmp_path / "a.txt")
    write_text(tmp_path / "a.txt", "whole")
    with pytest.raises(RuntimeError), written_whole(tmp_path / "a.txt"):
        raise RuntimeError
    assert [other.read_text() for other in others] == ["precious"] * len(others)
    assert len(list(tmp_path.iterdir())) == 1 + len(others)


def test_a_link_that_waits_under_the_temporary_name_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever can guess the name can have a file of the user's overwritten: so nothing that is
    there is opened, were the name guessed even so."""
    monkeypatch.setattr(os, "urandom", bytes)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    trap = tmp_path / ".a.txt.0000000000000000.tmp"
    trap.symlink_to(victim)
    with pytest.raises(WriteError, match=r"a\.txt cannot be written: File exists$"):
        write_text(tmp_path / "a.txt", "whole")
    assert victim.read_text() == "precious" and trap.is_symlink()
    assert not (tmp_path / "a.txt").exists()


@pytest.mark.parametrize("existing", [True, False])
def test_writing_to_a_link_writes_where_it_points(tmp_path: Path, existing: bool) -> None:
    (tmp_path / "far").mkdir()
    far, link = tmp_path / "far" / "a.txt", tmp_path / "link.txt"
    link.symlink_to(far)
    if existing:
        far.write_text("before")
    check_writable(link)
    write_text(link, "whole")
    append_text(link, ", and more")
    assert link.is_symlink() and far.read_text() == "whole, and more"
    assert {path.name for path in tmp_path.rglob("*")} == {"far", "a.txt", "link.txt"}


def test_what_is_no_file_is_never_replaced_by_one(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    os.mkfifo(tmp_path / "pipe")
    reasons = {
        "loop": "it is a link that leads back to itself",
        "folder": "it is a folder",
        "link": "it is a folder",
        "pipe": "it is not a plain file",
    }
    for name, reason in reasons.items():
        for write in (check_writable, lambda path: write_text(path, "whole")):
            with pytest.raises(WriteError, match=rf"{name} cannot be written: {reason}$"):
                write(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == reasons.keys()
    assert (tmp_path / "pipe").is_fifo() and not list((tmp_path / "folder").iterdir())


def test_two_writers_of_one_name_leave_one_of_the_two_whole(tmp_path: Path) -> None:
    path, together = tmp_path / "a.txt", threading.Barrier(2)

    def write(letter: str) -> None:
        for _ in range(20):
            together.wait()
            with written_whole(path) as temporary, temporary.open("w") as file:
                for _ in range(10):
                    file.write(letter * 1000)
                    file.flush()

    writers = [threading.Thread(target=write, args=(letter,)) for letter in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert path.read_text() in ("a" * 10_000, "b" * 10_000)
    assert list(tmp_path.iterdir()) == [path]


def test_a_signal_that_python_hears_removes_what_was_begun(tmp_path: Path) -> None:
    """As the command does with SIGTERM: it becomes the exception that Ctrl-C is."""
    program = (
        "import signal, sys, pathlib, ldm.files; "
        "signal.signal(signal.SIGTERM, signal.default_int_handler); "
        "path = pathlib.Path(sys.argv[1]) / 'a.txt'\n"
        "with ldm.files.written_whole(path) as temporary:\n"
        "    temporary.write_text('half'); print('begun', flush=True); signal.pause()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        assert len(list(tmp_path.iterdir())) == 1
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors and process.returncode != 0
    assert not list(tmp_path.iterdir())


# --- A full disk -----------------------------------------------------------------------------

BIG = 100_000


def write_folder(path: Path) -> None:
    with folder_written_whole(path) as temporary:
        (temporary / "part").mkdir()
        write_text(temporary / "part" / "a.txt", "a" * BIG)


WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda path: write_text(path, "a" * BIG),
    "log": lambda path: append_text(path, "a" * BIG),
    "folder": write_folder,
}


def write_with(save: Callable[[Path], object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with written_whole(path) as temporary:
            save(temporary)

    return write


WRITERS["safetensors"] = write_with(lambda path: save_file({"a": torch.ones(BIG)}, path))
noise = Image.effect_noise((300, 300), 50)
WRITERS["png"] = write_with(lambda path: noise.save(path, format="PNG"))


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_one_line_with_the_files_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "name"
    with full_disk(), pytest.raises(WriteError) as error:
        WRITERS[kind](path)
    assert str(error.value) == f"{path} cannot be written: {FULL}"
    assert [file.name for file in tmp_path.iterdir()] == (["name"] if kind == "log" else [])


def test_what_has_nothing_to_do_with_the_disk_is_not_said_of_it(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), written_whole(tmp_path / "a"):
        raise ZeroDivisionError
    with pytest.raises(ValueError, match=r"^another$") as error, written_whole(tmp_path / "a"):
        raise ValueError("another")
    assert not isinstance(error.value, WriteError)
