"""From a path to what lies there: files are known by their content, folders by what is in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.checkpoints.loading import load_unet
from ldm.checkpoints.opening import open_archive
from ldm.errors import (
    EmptyFileError,
    MissingPartsError,
    PointerError,
    TruncatedError,
    UnreadableError,
    WebPageError,
)
from tests.helpers import (
    CONTAINERS,
    randn,
    write_weights,
)

TENSORS = {
    "a": randn(3, 5),
    "b": randn(7, seed=1).half(),
    "c": torch.arange(6).view(2, 3),
    "scalar": torch.tensor(2.5),
    "none": torch.zeros(0, 4),
}


# --- What a file is --------------------------------------------------------------------------

WRONG = {
    "empty": (b"", EmptyFileError, "is empty"),
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4265380512\n",
        PointerError,
        "git-lfs pointer: fetch the file with `git lfs pull`",
    ),
    "web page": (b"<!DOCTYPE html><html>Sign in</html>", WebPageError, "is a web page"),
    "web page with a mark": (b"\xef\xbb\xbf\r\n  <HTML lang=en>", WebPageError, "is a web page"),
    "XML": (b'<?xml version="1.0"?><Error>AccessDenied</Error>', WebPageError, "is a web page"),
    "text": (b"weights {not here}", UnreadableError, "neither safetensors nor torch's"),
    "JSON": (b'{"error": "not found"}', UnreadableError, "neither safetensors nor torch's"),
    "zeros": (bytes(1000), UnreadableError, "neither safetensors nor torch's"),
    "GGUF": (b"GGUF\x03" + bytes(100), UnreadableError, "neither safetensors nor torch's"),
    "one byte": (b"\x00", UnreadableError, "neither safetensors nor torch's"),
}


@pytest.mark.parametrize("content, error, told", WRONG.values(), ids=WRONG)
def test_what_is_no_file_of_weights_is_said(tmp_path: Path, content, error, told) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(error, match=told) as caught:
        open_archive(path)
    assert type(caught.value) is error and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_archive(tmp_path / "none")


@pytest.mark.parametrize("container", CONTAINERS)
def test_cut_file_says_that_it_is_cut(tmp_path: Path, container: str) -> None:
    path = write_weights(tmp_path / "file", TENSORS | {"big": torch.zeros(1000)}, container)
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) - 100, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(TruncatedError, match=f"is cut off: .*found {length:,}"):
            open_archive(path)


def test_cut_safetensors_says_expected_and_found_bytes(tmp_path: Path) -> None:
    path = write_weights(tmp_path / "file", TENSORS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(
        TruncatedError,
        match=rf"expected {len(whole)} bytes, found {len(whole) - 10}; fetch it again",
    ):
        open_archive(path)
    header = 8 + int.from_bytes(whole[:8], "little")
    path.write_bytes(whole[:60])
    with pytest.raises(TruncatedError, match=f"its header alone takes {header} bytes, found 60;"):
        open_archive(path)


# --- Through a stage's door ------------------------------------------------------------------


def test_nothing_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_unet(tmp_path / "none.safetensors")


def test_folder_without_weights_says_what_it_should_hold(tmp_path: Path) -> None:
    with pytest.raises(MissingPartsError, match=r"holds no weights: .*unet/, vae/, text_encoder/"):
        load_unet(tmp_path)


def test_folder_with_several_files_names_them(tmp_path: Path) -> None:
    for name in ("b.ckpt", "a.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(MissingPartsError, match=r"pass one of a\.safetensors, b\.ckpt"):
        load_unet(tmp_path)


@pytest.mark.parametrize("content", ["empty", "garbage", "text", "header", "data"])
def test_broken_file_is_unreadable(saved, content: str) -> None:
    path, _ = saved
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "garbage": torch.arange(256, dtype=torch.uint8).numpy().tobytes() * 10,
            "text": b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 10,
            "header": whole[:100],  # cut in the middle of the header
            "data": whole[:-100],  # cut in the middle of the last tensor
        }[content]
    )
    with pytest.raises(UnreadableError, match=path.name):
        load_unet(path)
