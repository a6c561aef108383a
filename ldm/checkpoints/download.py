"""Official weights and CLIP's vocabulary, fetched from Hugging Face's Hub and checked.

The Hub's own library does the work and shows its progress. Here stand the files that are known by
their SHA-256 (`known_files.json`), what is checked before and after, and what goes wrong, in words:
each error is one line that says what to do.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.checkpoints.tokenizer_files import (
    CLIP_REPO,
    CLIP_VOCAB_SIZE,
    find_tokenizer,
    read_tokenizer,
    tokenizer_beside,
)
from ldm.files import file_sha256
from ldm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

VOCABULARY = ("vocab.json", "merges.txt")


class DownloadError(OSError):
    """A file that cannot be fetched, or is not the one that was asked for; one line says why."""


@dataclass(frozen=True)
class KnownFile:
    """An official file of weights.

    Attributes:
        model: what `ldm download` calls it.
        repo, file: where it is on the Hub.
        bytes: its size; None where none was published.
        sha256: of its content, in hexadecimal.
        licence: the name of the licence that comes with it.
    """

    model: str
    repo: str
    file: str
    bytes: int | None
    sha256: str
    licence: str

    @property
    def terms(self) -> str:
        """One line for people, before they download: the licence, and where to read it."""
        return f"{self.model} comes under the licence {self.licence}: https://huggingface.co/{self.repo}"


def known_files() -> tuple[KnownFile, ...]:
    """All official files that are known, as `known_files.json` lists them."""
    text = Path(__file__).with_name("known_files.json").read_text(encoding="utf-8")
    table = json.loads(text)
    return tuple(KnownFile(**entry, licence=table["licence"]) for entry in table["files"])


def known_file(model: str) -> KnownFile:
    """The known file of a model, or a ValueError that lists the models."""
    files = {file.model: file for file in known_files()}
    if model not in files:
        raise ValueError(f"unknown model {model!r}: there are {', '.join(files)}")
    return files[model]


def identify(size: int, sha256: str | None = None) -> tuple[KnownFile, ...]:
    """The known files that a file may be: by its SHA-256 it is one or none; by its size alone, in
    bytes, it is probably one of these, since two official files have the same size."""
    if sha256 is not None:
        return tuple(file for file in known_files() if file.sha256 == sha256)
    return tuple(file for file in known_files() if file.bytes == size)


# --- Fetching --------------------------------------------------------------------------------


def download(model: str, folder: str | Path = "weights") -> Path:
    """Fetch an official model's weights, and CLIP's vocabulary, into `folder/model`.

    A file that is there and right is not fetched again, and then nothing asks the network. After an
    interruption the same call goes on where it stopped.

    Returns:
        the file of weights, checked against its SHA-256.

    Raises:
        ValueError: the model is not known; the message lists those that are.
        DownloadError: offline, no permission, no space, or another file than the known one.
    """
    known = known_file(model)
    path = Path(folder) / known.model / known.file
    if path.exists():
        check_file(path, known, "move it away to fetch the official one")
    else:
        fetch_weights(known, path)
    if tokenizer_beside(path) is None:
        for file in VOCABULARY:
            to = path.with_name(file)
            fetch(CLIP_REPO, file, part_of(to), offered(CLIP_REPO, file).size)
            part_of(to).replace(to)
    find_tokenizer(path, CLIP_VOCAB_SIZE)  # a ValueError if it is not CLIP's
    return path


def require_tokenizer(weights: str | Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of some weights: found (see `find_tokenizer`), or else, for CLIP's own
    vocabulary, fetched into the Hub's cache.

    Raises:
        FileNotFoundError: there is none to be had; one line says how to get it.
        ValueError: what was found cannot be read, or has another size.
    """
    tokenizer = find_tokenizer(weights, vocab_size)
    if tokenizer is not None:
        return tokenizer
    where = f"no tokenizer for {weights}: put vocab.json and merges.txt beside it"
    if vocab_size != CLIP_VOCAB_SIZE:
        raise FileNotFoundError(f"{where}; {vocab_size} tokens are not CLIP's vocabulary")
    try:
        return read_tokenizer(cache_vocabulary())
    except DownloadError as error:
        page = f"https://huggingface.co/{CLIP_REPO}"
        raise FileNotFoundError(f"{where}, from {page}; fetching them failed: {error}") from error


def cache_vocabulary() -> Path:
    """Fetch CLIP's vocabulary, 1.4 MB, into the Hub's cache; returns the folder that it is in."""
    from huggingface_hub import hf_hub_download

    for file in VOCABULARY:
        offered(CLIP_REPO, file)
        with in_one_line(CLIP_REPO, file, "the download stopped"):
            path = Path(hf_hub_download(CLIP_REPO, file))
    return path.parent


def fetch_weights(known: KnownFile, path: Path) -> None:
    """Download a known file to a path where nothing is. Only the right file ever stands there."""
    size = check_offer(known)
    part = part_of(path)
    check_room(path.parent, size - (part.stat().st_size if part.exists() else 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    fetch(known.repo, known.file, part, size)
    try:
        check_file(part, known, "it was removed: fetch it again")
    except DownloadError:
        part.unlink()
        raise
    part.replace(path)


def part_of(path: Path) -> Path:
    """Where a download is until it is whole."""
    return path.with_name(f".{path.name}.part")


def offered(repo: str, file: str) -> HfFileMetadata:
    """What the Hub says of a file. One question, so that a missing network, licence or token is
    noticed at once: the download itself tries again for half a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    with in_one_line(repo, file, "the Hub cannot be reached"):
        return get_hf_file_metadata(hf_hub_url(repo, file))


def fetch(repo: str, file: str, path: Path, size: int | None) -> None:
    """Download what `path` lacks of a file of `size` bytes.

    `hf_hub_download` forgets what has arrived when it is interrupted (huggingface_hub 2 gives each
    download a new temporary file), and a file of weights is long; so one level deeper.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    stopped = "the download stopped (repeat it to go on from there)"
    with in_one_line(repo, file, stopped), path.open("ab") as part:
        if size is not None and part.tell() > size:  # what is there is of another file
            part.truncate(part.seek(0))
        http_get(
            hf_hub_url(repo, file),
            part,
            resume_size=part.tell(),
            headers=build_hf_headers(),
            expected_size=size,
            displayed_filename=file,
        )


@contextlib.contextmanager
def in_one_line(repo: str, file: str, otherwise: str) -> Iterator[None]:
    """What the Hub's library raises, as a DownloadError; `otherwise` begins the line for an error
    that is not an answer of the Hub."""
    try:
        yield
    except Exception as error:  # of whichever HTTP library it is built on
        raise DownloadError(explain(error, repo, file, otherwise)) from error


def explain(error: Exception, repo: str, file: str, otherwise: str) -> str:
    """What happened, and what to do."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    token = f"set HF_TOKEN to a token from {constants.ENDPOINT}/settings/tokens"
    match error:
        case errors.OfflineModeIsEnabled():
            return f"offline, by HF_HUB_OFFLINE: {file} of {page} is not fetched"
        case errors.GatedRepoError():
            return f"{file} has a licence to accept: do so at {page}, logged in, then {token}"
        case errors.RepositoryNotFoundError():
            return f"{page} is not there, or not for everyone: open it, logged in, then {token}"
        case errors.HfHubHTTPError(response=response) if response is not None:
            if response.status_code == 404:
                return f"{page} has no file {file} (any more)"
            hint = f": {token}" if response.status_code in (401, 403) else ""
            return f"the Hub refuses {file} of {page} ({response.status_code}){hint}"
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return f"{otherwise}: {file} of {page}: {reason}"


# --- Checking --------------------------------------------------------------------------------


def check_offer(known: KnownFile) -> int:
    """How many bytes a download would have; a DownloadError if it would not be the known file."""
    offer = offered(known.repo, known.file)
    # The Hub names large files by their SHA-256, and others by something shorter.
    is_named = offer.etag is not None and len(offer.etag) == len(known.sha256)
    if (is_named and offer.etag != known.sha256) or (
        None not in (offer.size, known.bytes) and offer.size != known.bytes
    ):
        raise DownloadError(
            f"{known.file} of {known.repo} is another file now: it has {offer.size} bytes and "
            f"the hash {offer.etag}, not {known.bytes} and {known.sha256}"
        )
    return offer.size or known.bytes or 0


def check_room(folder: Path, size: int) -> None:
    """A DownloadError unless a folder can be made, and hold this many bytes more."""
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise DownloadError(f"no file can be written to {folder}: {place} is no writable folder")
    if (free := shutil.disk_usage(place).free) < size:
        raise DownloadError(f"{folder} has room for {free:,} bytes, {size:,} are to be fetched")


def check_file(path: Path, known: KnownFile, advice: str) -> None:
    """A DownloadError unless a file is, byte for byte, the known one."""
    size = path.stat().st_size
    if known.bytes not in (None, size):
        found, expected = f"{size:,} bytes", f"{known.bytes:,}"
    elif (sha256 := file_sha256(path)) != known.sha256:
        found, expected = f"the SHA-256 {sha256}", known.sha256
    else:
        return
    raise DownloadError(f"{path} is not {known.model}: it has {found}, not {expected}; {advice}")
