"""Official weights and CLIP's vocabulary, fetched from Hugging Face's Hub and checked.

The Hub's own library does the work and shows its progress. Here stand the files that are known by
their SHA-256 (`known_files.json`, and CLIP's vocabulary), what is checked before and after, and
what goes wrong, in words: each error is one line that says what to do. No file stands under its own
name before it was found to be the right one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ldm.checkpoints.tokenizer_files import (
    CLIP_REPO,
    CLIP_VOCAB_SIZE,
    find_tokenizer,
    read_tokenizer,
    tokenizer_beside,
)
from ldm.files import writing, written_whole
from ldm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from io import BufferedRandom, BufferedReader

    from huggingface_hub import HfFileMetadata

    from ldm.config import TextConfig


class DownloadError(OSError):
    """A file that cannot be fetched, or is not the one that was asked for; one line says why."""


@dataclass(frozen=True)
class KnownFile:
    """An official file of weights, or of CLIP's vocabulary.

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


# CLIP's vocabulary as it is published for transformers. The bytes follow from OpenAI's own file:
# its merges, a pair per line, and the tokens that they make, as Python's `json` writes them.
VOCABULARY = tuple(
    KnownFile("CLIP's vocabulary", CLIP_REPO, file, size, sha256, licence="MIT")
    for file, size, sha256 in (
        ("vocab.json", 961_143, "3f0c4f7d2086b61b38487075278ea9ed04edb53a03cbb045b86c27190fa8fb69"),
        ("merges.txt", 524_619, "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"),
    )
)


def known_files() -> tuple[KnownFile, ...]:
    """All official files of weights that are known, as `known_files.json` lists them."""
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


# What to do about a file that is not the known one: of the user's, or fetched just now.
MOVE_AWAY = "move it away to fetch the official one"
FETCH_AGAIN = "it was removed: fetch it again"


# --- Fetching --------------------------------------------------------------------------------


def download(model: str, folder: str | Path = "weights") -> Path:
    """Fetch an official model's weights, and CLIP's vocabulary, into `folder/model`.

    A file that is there and right is not fetched again, and then nothing asks the network. After an
    interruption the same call goes on where it stopped. While another process fetches the same file
    it is waited for.

    Returns:
        the file of weights, checked against its SHA-256.

    Raises:
        ValueError: the model is not known; the message lists those that are.
        DownloadError: offline, no permission, no space, or another file than the known one.
    """
    known = known_file(model)
    path = Path(folder) / known.model / known.file
    fetch_weights(known, path)
    if tokenizer_beside(path) is None:
        for file in VOCABULARY:
            fetch_small(file, path.with_name(file.file))
    find_tokenizer(path, CLIP_VOCAB_SIZE)  # a ValueError if it is not CLIP's
    return path


def chosen_tokenizer(
    chosen: Tokenizer | str | Path | Literal[False] | None, weights: str | Path, config: TextConfig
) -> Tokenizer | None:
    """The tokenizer of some weights: the one that was chosen, or of a folder that was; None has it
    looked for, and fetched (`require_tokenizer`); and False is none at all.

    Raises:
        FileNotFoundError, ValueError: as `require_tokenizer`, or what was chosen is another
            model's.
    """
    from ldm.text import check_tokenizer  # and torch, which a download does not need

    if chosen is False:
        return None
    if chosen is None:
        return require_tokenizer(weights, config.vocab_size)
    tokenizer = chosen if isinstance(chosen, Tokenizer) else read_tokenizer(chosen)
    check_tokenizer(tokenizer, config)
    return tokenizer


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
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    for known in VOCABULARY:
        is_there = isinstance(try_to_load_from_cache(known.repo, known.file), str)
        check_offer(known)
        with in_one_line(known, "the download stopped"):
            path = Path(hf_hub_download(known.repo, known.file))
        try:
            check_file(path, known, MOVE_AWAY if is_there else FETCH_AGAIN)
        except DownloadError:
            if not is_there:  # the cache would hold it for the right one from now on
                path.resolve().unlink()
                path.unlink(missing_ok=True)
            raise
    return path.parent


def fetch_weights(known: KnownFile, path: Path) -> None:
    """Download a known file, or what an interruption left of it to fetch. Only the right file ever
    stands at `path`.

    Until it is whole it is in a hidden file that ends in `.part`. Whoever holds the lock writes
    there, reads again what is there, and gives it its name: so the bytes that were found right are
    those that get the name.
    """
    if path.exists():
        check_file(path, known, MOVE_AWAY)
        return
    part = path.with_name(f".{path.name}.part")
    size = check_offer(known)
    check_room(path.parent, size - (part.stat().st_size if part.exists() else 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        if path.exists():  # by whoever had the lock before
            check_file(path, known, MOVE_AWAY)
            return
        with writing(part), open(part, "a+b", opener=follow_no_link) as file:
            fetch(known, file, size)
            file.seek(0)
            wrong = difference(file, known)
        if wrong:
            part.unlink()
            raise DownloadError(f"{part} is not {known.model}: {wrong}; {FETCH_AGAIN}")
        part.replace(path)


def fetch_small(known: KnownFile, path: Path) -> None:
    """As `fetch_weights`, for a file that need not go on where it stopped: nothing is left of it,
    and so it needs no lock."""
    if path.exists():
        check_file(path, known, MOVE_AWAY)
        return
    size = check_offer(known)
    with written_whole(path) as temporary, temporary.open("r+b") as file:
        fetch(known, file, size)
        file.seek(0)
        if wrong := difference(file, known):
            raise DownloadError(f"{path} would not be {known.model}: {wrong}; fetch it again")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """While this lasts no other process or thread fetches `path`. It waits for one that does, and
    says so. The file that is locked goes once `path` is there, and nothing is left to lock."""
    from filelock import FileLock, Timeout

    place = path.with_name(f".{path.name}.lock")
    lock = FileLock(place)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        warnings.warn(f"{path} is being fetched already: waiting for that to end", stacklevel=2)
        lock.acquire()
    try:
        yield
    finally:
        if path.exists():
            with contextlib.suppress(OSError):  # Windows removes no file that is open
                place.unlink()
        lock.release()


def follow_no_link(path: str, flags: int) -> int:
    """Open a file, and none that a link of this name leads to."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def offered(known: KnownFile) -> HfFileMetadata:
    """What the Hub says of a file. One question, so that a missing network, licence or token is
    noticed at once: the download itself tries again for half a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    with in_one_line(known, "the Hub cannot be reached"):
        return get_hf_file_metadata(hf_hub_url(known.repo, known.file))


def fetch(known: KnownFile, part: BufferedRandom, size: int) -> None:
    """Download what `part`, which stands at its end, lacks of a file of `size` bytes.

    `hf_hub_download` forgets what has arrived when it is interrupted (huggingface_hub 2 gives each
    download a new temporary file), and a file of weights is long; so one level deeper.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    with in_one_line(known, "the download stopped (repeat it to go on from there)"):
        if size and part.tell() > size:  # what is there is of another file
            part.truncate(part.seek(0))
        http_get(
            hf_hub_url(known.repo, known.file),
            part,
            resume_size=part.tell(),
            headers=build_hf_headers(),
            expected_size=size or None,
            displayed_filename=known.file,
        )
        part.flush()


@contextlib.contextmanager
def in_one_line(known: KnownFile, otherwise: str) -> Iterator[None]:
    """What the Hub's library raises, as a DownloadError; `otherwise` begins the line for an error
    that is not an answer of the Hub."""
    try:
        yield
    except Exception as error:  # of whichever HTTP library it is built on
        raise DownloadError(explain(error, known, otherwise)) from error


def explain(error: Exception, known: KnownFile, otherwise: str) -> str:
    """What happened, and what to do."""
    from huggingface_hub import constants, errors

    file, page = known.file, f"{constants.ENDPOINT}/{known.repo}"
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
    offer = offered(known)
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
    with path.open("rb") as file:
        wrong = difference(file, known)
    if wrong:
        raise DownloadError(f"{path} is not {known.model}: {wrong}; {advice}")


def difference(file: BufferedReader | BufferedRandom, known: KnownFile) -> str | None:
    """In what an open file differs from the known one, byte for byte; None where it does not."""
    size = os.fstat(file.fileno()).st_size
    if known.bytes not in (None, size):
        return f"it has {size:,} bytes, not {known.bytes:,}"
    if (sha256 := hashlib.file_digest(file, "sha256").hexdigest()) != known.sha256:
        return f"it has the SHA-256 {sha256}, not {known.sha256}"
    return None
