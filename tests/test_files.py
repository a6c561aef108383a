"""Files and folders appear whole or not at all, and anybody may read them who may read others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm.files import check_writable, folder_written_whole, write_text, written_whole


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
