"""Downloads: the Hub's real library against a server on this machine that plays the Hub."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ldm.checkpoints import download as module
from ldm.checkpoints.download import (
    VOCABULARY,
    DownloadError,
    KnownFile,
    download,
    identify,
    known_files,
)
from ldm.checkpoints.tokenizer_files import (
    CLIP_MERGES,
    CLIP_REPO,
    CLIP_VOCAB_SIZE,
    read_tokenizer,
    write_tokenizer,
)
from ldm.tokenizer import Tokenizer, base_tokens, vocab_of
from tests.places import ROOT

CONTENT = bytes(range(256)) * 4096  # 1 MiB
KNOWN = KnownFile(
    model="small",
    repo="some/weights",
    file="small.ckpt",
    bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    licence="some licence",
)


class Hub(ThreadingHTTPServer):
    """As much of the Hub as a download asks for.

    Attributes:
        files: "repo/file" -> content.
        refusals: "repo/file" -> the status and headers to answer with, and no content.
        cut: "repo/file" -> after how many bytes the connection breaks; after that, the file is
            answered with an error of the server's, until it is taken out of here.
        pace: seconds to wait after each 64 KiB.
        asked: "GET repo/file", or "GET repo/file from 123", one for each question.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.refusals: dict[str, tuple[int, dict[str, str]]] = {}
        self.cut: dict[str, int] = {}
        self.pace = 0.0
        self.asked: list[str] = []
        self.tokens: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """A client that goes away is no error of this server's."""


@contextlib.contextmanager
def serving(server: Hub) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, place = self.server, self.path.removeprefix("/").replace("/resolve/main/", "/")
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").split("-")[0])
        hub.asked.append(f"{self.command} {place}" + (f" from {start}" if start else ""))
        hub.tokens.append(self.headers["Authorization"])
        if place in hub.refusals or place not in hub.files:
            missing = (404, {"X-Error-Code": "EntryNotFound"})
            return self.head(*hub.refusals.get(place, missing))
        content = hub.files[place]
        if self.command == "GET" and hub.cut.get(place) == -1:
            return self.head(500, {})
        part = content[start:]
        headers = {
            "X-Repo-Commit": "1" * 40,
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
            "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}",
        }
        self.head(206 if start else 200, headers, len(part))
        if self.command == "HEAD":
            return None
        if place in hub.cut:
            part, hub.cut[place], self.close_connection = part[: hub.cut[place]], -1, True
        for i in range(0, len(part), 2**16):
            self.wfile.write(part[i : i + 2**16])
            time.sleep(hub.pace)

    def head(self, status: int, headers: dict[str, str], length: int = 0) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Be quiet."""


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`vocab.json` and `merges.txt` of CLIP's size, with merges that anyone may have."""
    folder = tmp_path_factory.mktemp("vocabulary")
    letters = base_tokens()[:256]
    merges = list(itertools.islice(itertools.product(letters, letters), CLIP_MERGES))
    write_tokenizer(Tokenizer(vocab_of(merges), merges), folder)
    return folder


@pytest.fixture
def hub(vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The server, in the Hub's place, with the small file and CLIP's vocabulary; an empty cache."""
    from huggingface_hub import constants

    with Hub() as server:
        server.files["some/weights/small.ckpt"] = CONTENT
        for path in vocabulary.iterdir():
            server.files[f"{CLIP_REPO}/{path.name}"] = path.read_bytes()

        def known_as_served(file: KnownFile) -> KnownFile:
            content = server.files[f"{file.repo}/{file.file}"]
            sha256 = hashlib.sha256(content).hexdigest()
            return dataclasses.replace(file, bytes=len(content), sha256=sha256)

        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)  # how often it writes
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setattr(module, "known_files", lambda: (KNOWN,))
        monkeypatch.setattr(module, "VOCABULARY", tuple(map(known_as_served, VOCABULARY)))
        with serving(server):
            yield server


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


# --- The known files -------------------------------------------------------------------------


def test_every_known_file_is_whole_and_named_once() -> None:
    files = known_files()
    assert {"sd-v1-4", "sd-v1-5"} <= {file.model for file in files}
    for column in ("model", "sha256", "file"):
        assert len({getattr(file, column) for file in files}) == len(files)
    for file in files:
        assert re.fullmatch(r"[0-9a-f]{64}", file.sha256)
        assert re.fullmatch(r"[\w-]+/[\w.-]+", file.repo)
        assert file.file.endswith((".ckpt", ".safetensors"))
        assert file.bytes is None or 4e9 < file.bytes < 8e9
        assert file.licence in file.terms and file.repo in file.terms


def test_the_known_files_are_the_published_ones() -> None:
    source = ROOT.parent / "shared" / "sd_v1" / "known_files.json"
    if not source.is_file():
        pytest.skip("the list that the table was made from is not part of the repository")
    published = json.loads(source.read_text())["files"]
    ours = [dataclasses.asdict(file) for file in known_files()]
    assert [{k: v for k, v in file.items() if k != "licence"} for file in ours] == published


def test_clips_vocabulary_is_known_by_what_openais_own_file_makes(clip_folder: Path) -> None:
    """The same tokens and merges in transformers' form, byte for byte."""
    real = read_tokenizer(clip_folder)
    lines = ["#version: 0.2", *map(" ".join, real.merges), ""]
    made = {
        "vocab.json": json.dumps(real.vocab, ensure_ascii=False).encode(),
        "merges.txt": "\n".join(lines).encode(),
    }
    for known in VOCABULARY:
        content = made.pop(known.file)
        assert len(content) == known.bytes
        assert hashlib.sha256(content).hexdigest() == known.sha256
    assert not made and len(real) == CLIP_VOCAB_SIZE


def test_a_file_is_identified_by_its_hash_or_guessed_by_its_size() -> None:
    files = {file.model: file for file in known_files()}
    v14 = files["sd-v1-4"]
    assert identify(v14.bytes, v14.sha256) == (v14,)
    assert identify(v14.bytes) == (v14, files["sd-v1-5-ckpt"])  # of one size
    assert identify(files["sd-v1-5"].bytes) == (files["sd-v1-5"],)
    assert identify(v14.bytes, "0" * 64) == ()
    assert identify(12345) == ()
    unsized = files["sd-v1-5-full-ckpt"]
    assert identify(7_703_810_217, unsized.sha256) == (unsized,)


def test_an_unknown_model_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown model 'sd-v9': there are sd-v1-4, .*sd-v1-5"):
        download("sd-v9", tmp_path)
    assert not any(tmp_path.iterdir())


# --- A download ------------------------------------------------------------------------------


def test_weights_and_tokenizer_arrive_in_a_folder_of_their_own(hub: Hub, tmp_path: Path) -> None:
    path = download("small", tmp_path / "weights")
    assert path == tmp_path / "weights" / "small" / "small.ckpt"
    assert path.read_bytes() == CONTENT
    assert len(read_tokenizer(path.parent)) == 49408
    assert {p.name for p in path.parent.iterdir()} == {"small.ckpt", "vocab.json", "merges.txt"}


def test_what_is_there_and_right_is_not_asked_for_again(hub: Hub, tmp_path: Path) -> None:
    path = download("small", tmp_path)
    hub.asked.clear()
    before = path.stat().st_mtime_ns
    assert download("small", tmp_path) == path
    assert hub.asked == []
    assert path.stat().st_mtime_ns == before
    (path.parent / "merges.txt").unlink()
    download("small", tmp_path)
    assert hub.asked and not any("small.ckpt" in asked for asked in hub.asked)
    assert len(read_tokenizer(path.parent)) == 49408


def test_an_interrupted_download_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    hub.cut["some/weights/small.ckpt"] = 700_000
    with pytest.raises(DownloadError, match=r"the Hub refuses small.ckpt .* \(500\)") as error:
        download("small", tmp_path)
    one_line(error)
    assert not (tmp_path / "small" / "small.ckpt").exists()  # whole, or not at all
    hub.cut.clear()
    hub.asked.clear()
    assert download("small", tmp_path).read_bytes() == CONTENT
    assert "GET some/weights/small.ckpt from 700000" in hub.asked
    assert "GET some/weights/small.ckpt" not in hub.asked


def test_an_interrupted_tokenizer_is_no_tokenizer(hub: Hub, tmp_path: Path) -> None:
    """A `merges.txt` without its end would be read without an error, and give other ids."""
    hub.cut[f"{CLIP_REPO}/merges.txt"] = 200_000
    with pytest.raises(DownloadError, match=r"merges.txt .* \(500\)"):
        download("small", tmp_path)
    assert not (tmp_path / "small" / "merges.txt").exists()
    hub.cut.clear()
    assert len(read_tokenizer(download("small", tmp_path).parent)) == 49408


def test_a_part_that_is_longer_than_the_file_is_given_up(hub: Hub, tmp_path: Path) -> None:
    part = tmp_path / "small" / ".small.ckpt.part"
    part.parent.mkdir()
    part.write_bytes(bytes(len(CONTENT) + 1))
    assert download("small", tmp_path).read_bytes() == CONTENT


def test_ctrl_c_keeps_what_has_arrived_and_the_progress_is_shown(hub: Hub, tmp_path: Path) -> None:
    """A process of its own, as a user starts it: the Hub's address comes from the environment."""
    fields = dataclasses.asdict(KNOWN)
    program = (
        "import signal, sys, huggingface_hub.constants as c, ldm.checkpoints.download as d; "
        # A process that a background shell starts is born deaf to Ctrl-C.
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "c.DOWNLOAD_CHUNK_SIZE = 50_000; "
        f"d.known_files = lambda: (d.KnownFile(**{fields!r}),); d.download('small', sys.argv[1])"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.url}
    env |= {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "TQDM_POSITION": "-1"}
    hub.pace = 0.2
    command = [sys.executable, "-c", program, str(tmp_path)]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    part = tmp_path / "small" / ".small.ckpt.part"
    deadline = time.monotonic() + 120
    while not part.exists() or not part.stat().st_size:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert "small.ckpt" in errors and "%" in errors  # the bar
    assert not (tmp_path / "small" / "small.ckpt").exists()

    hub.pace = 0.0
    hub.asked.clear()
    assert download("small", tmp_path).read_bytes() == CONTENT
    assert any(re.fullmatch(r"GET some/weights/small.ckpt from \d+", one) for one in hub.asked)


def test_a_token_in_the_environment_is_sent(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_something")
    download("small", tmp_path)
    assert set(hub.tokens) == {"Bearer hf_something"}


def elsewhere(storage: Hub, content: bytes) -> tuple[int, dict[str, str]]:
    """What the Hub answers for a large file: what it is, and where it is: on another machine."""
    storage.files["bucket/0123"] = content
    headers = {"Location": f"{storage.url}/bucket/0123", "X-Repo-Commit": "1" * 40}
    headers |= {"X-Linked-Size": str(len(CONTENT)), "X-Linked-Etag": f'"{KNOWN.sha256}"'}
    return 302, headers


def test_another_machine_that_holds_the_bytes_never_sees_the_token(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_something")
    with Hub() as storage, serving(storage):
        hub.refusals["some/weights/small.ckpt"] = elsewhere(storage, CONTENT)
        part = tmp_path / "small" / ".small.ckpt.part"
        part.parent.mkdir()
        part.write_bytes(CONTENT[:1000])
        assert download("small", tmp_path).read_bytes() == CONTENT
        assert storage.asked == ["GET bucket/0123 from 1000"]
        assert storage.tokens == [None] and hub.tokens[0] == "Bearer hf_something"


# --- What goes wrong -------------------------------------------------------------------------

GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}


@pytest.mark.parametrize(
    "status, headers, words",
    [
        (401, GATED, ["licence to accept", "HF_TOKEN"]),
        (403, GATED, ["licence to accept", "HF_TOKEN"]),
        (401, {"X-Error-Code": "RepoNotFound"}, ["not there, or not for everyone", "HF_TOKEN"]),
        (404, {"X-Error-Code": "RepoNotFound"}, ["not there, or not for everyone", "HF_TOKEN"]),
        (403, {"X-Error-Message": "bad token"}, ["(403)", "HF_TOKEN"]),
        (404, {"X-Error-Code": "EntryNotFound"}, ["has no file small.ckpt"]),
        (500, {}, ["(500)"]),
        (503, {}, ["(503)"]),
        (429, {}, ["(429)"]),
    ],
)
def test_a_refusal_is_one_line_with_the_page_and_what_to_do(
    hub: Hub, tmp_path: Path, status: int, headers: dict[str, str], words: list[str]
) -> None:
    hub.refusals["some/weights/small.ckpt"] = (status, headers)
    with pytest.raises(DownloadError) as error:
        download("small", tmp_path)
    message = one_line(error)
    assert all(word in message for word in [*words, f"{hub.url}/some/weights", "small.ckpt"][:-1])
    assert not any(tmp_path.iterdir())  # nothing begun
    assert hub.asked == ["HEAD some/weights/small.ckpt"]  # and nothing tried again


def test_offline_mode_is_said_at_once(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match=r"offline, by HF_HUB_OFFLINE: small.ckpt") as error:
        download("small", tmp_path)
    one_line(error)
    assert hub.asked == [] and not any(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_no_network_is_said_at_once(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    start = time.monotonic()
    with pytest.raises(DownloadError, match=r"the Hub cannot be reached: small.ckpt of") as error:
        download("small", tmp_path)
    one_line(error)
    assert time.monotonic() - start < 10  # the library itself would try for 24 seconds
    assert not any(tmp_path.iterdir())


def test_offline_everything_that_is_there_is_enough(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = download("small", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert download("small", tmp_path) == path


@pytest.mark.parametrize("size", [len(CONTENT), None], ids=["size known", "size unknown"])
@pytest.mark.parametrize("content", [CONTENT[:-1] + b"?", CONTENT[:-1]], ids=["bytes", "size"])
def test_another_file_on_the_hub_is_not_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, size: int | None
) -> None:
    known = dataclasses.replace(KNOWN, bytes=size)
    monkeypatch.setattr(module, "known_files", lambda: (known,))
    hub.files["some/weights/small.ckpt"] = content
    with pytest.raises(DownloadError, match="is another file now: it has") as error:
        download("small", tmp_path)
    assert hashlib.sha256(content).hexdigest() in one_line(error)
    assert hub.asked == ["HEAD some/weights/small.ckpt"]


def test_a_storage_that_sends_too_little_is_said_in_one_line(hub: Hub, tmp_path: Path) -> None:
    with Hub() as storage, serving(storage):
        hub.refusals["some/weights/small.ckpt"] = elsewhere(storage, CONTENT[:-1000])
        with pytest.raises(DownloadError, match="the download stopped") as error:
            download("small", tmp_path)
        assert str(len(CONTENT) - 1000) in one_line(error)
        hub.refusals["some/weights/small.ckpt"] = elsewhere(storage, CONTENT)
        assert download("small", tmp_path).read_bytes() == CONTENT
        assert storage.asked[-1] == f"GET bucket/0123 from {len(CONTENT) - 1000}"


def test_a_hub_that_names_files_otherwise_is_judged_by_the_size(hub: Hub, tmp_path: Path) -> None:
    with Hub() as storage, serving(storage):
        status, headers = elsewhere(storage, CONTENT)
        headers["X-Linked-Etag"] = '"v1"'
        hub.refusals["some/weights/small.ckpt"] = status, headers | {"X-Linked-Size": "12"}
        with pytest.raises(DownloadError, match="is another file now: it has 12 bytes"):
            download("small", tmp_path)
        assert storage.asked == []
        hub.refusals["some/weights/small.ckpt"] = status, headers
        assert download("small", tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("size", [len(CONTENT), None], ids=["size known", "size unknown"])
def test_a_damaged_download_is_removed(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int | None
) -> None:
    """The Hub says the right hash and size, and other bytes arrive."""
    known = dataclasses.replace(KNOWN, bytes=size)
    monkeypatch.setattr(module, "known_files", lambda: (known,))
    with Hub() as storage, serving(storage):
        hub.refusals["some/weights/small.ckpt"] = elsewhere(storage, b"?" + CONTENT[1:])
        with pytest.raises(DownloadError, match="is not small: it has the SHA-256") as error:
            download("small", tmp_path)
        assert KNOWN.sha256 in one_line(error) and "removed" in str(error.value)
        assert [path.name for path in (tmp_path / "small").iterdir()] == [".small.ckpt.lock"]
    hub.refusals.clear()
    path = download("small", tmp_path)
    assert path.read_bytes() == CONTENT
    assert {p.name for p in path.parent.iterdir()} == {"small.ckpt", "vocab.json", "merges.txt"}


def test_a_link_that_waits_under_the_parts_name_is_not_followed(hub: Hub, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / ".small.ckpt.part").symlink_to(victim)
    with pytest.raises(OSError, match=r"\.small\.ckpt\.part cannot be written: ") as error:
        download("small", tmp_path)
    assert victim.read_text() == "precious" and one_line(error)


# --- Two at once -----------------------------------------------------------------------------


def download_in_a_thread(folder: Path, results: list[object]) -> threading.Thread:
    def run() -> None:
        try:
            results.append(download("small", folder))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.filterwarnings("ignore:.* is being fetched already")  # asked for below
def test_two_downloads_of_one_model_at_once_fetch_it_once(hub: Hub, tmp_path: Path) -> None:
    hub.pace = 0.03
    results: list[object] = []
    first = download_in_a_thread(tmp_path, results)
    part = tmp_path / "small" / ".small.ckpt.part"
    wait_until(lambda: part.exists() and part.stat().st_size > 0)
    with pytest.warns(UserWarning, match=r"small\.ckpt is being fetched already: waiting") as said:
        path = download("small", tmp_path)
    first.join()
    assert results == [path] and len(said) == 1
    assert path.read_bytes() == CONTENT
    assert hub.asked.count("GET some/weights/small.ckpt") == 1
    assert {p.name for p in path.parent.iterdir()} == {"small.ckpt", "vocab.json", "merges.txt"}
    assert len(read_tokenizer(path.parent)) == CLIP_VOCAB_SIZE


@pytest.mark.filterwarnings("ignore:.* is being fetched already")
def test_whoever_waited_goes_on_where_the_other_stopped(hub: Hub, tmp_path: Path) -> None:
    hub.pace = 0.03
    hub.cut["some/weights/small.ckpt"] = 700_000
    results: list[object] = []
    threads = [download_in_a_thread(tmp_path, results)]
    part = tmp_path / "small" / ".small.ckpt.part"
    wait_until(lambda: part.exists() and part.stat().st_size > 0)
    threads += [download_in_a_thread(tmp_path, results) for _ in range(2)]
    wait_until(lambda: bool(results))  # the first has failed; the Hub is well again
    hub.cut.clear()
    for thread in threads:
        thread.join()
    path = tmp_path / "small" / "small.ckpt"
    assert any(isinstance(result, DownloadError) for result in results) and len(results) == 3
    assert download("small", tmp_path) == path and path.read_bytes() == CONTENT
    assert hub.asked.count("GET some/weights/small.ckpt") == 1
    assert "GET some/weights/small.ckpt from 700000" in hub.asked


# --- A page in the vocabulary's place --------------------------------------------------------

PAGE = b"<!DOCTYPE html><html><body>Log in to use this network</body></html>"


def vocabulary_elsewhere(hub: Hub, storage: Hub, file: str, content: bytes) -> None:
    """The Hub says the right size of a vocabulary's file, and `content` arrives."""
    right = hub.files[f"{CLIP_REPO}/{file}"]
    storage.files["bucket/page"] = content
    headers = {"Location": f"{storage.url}/bucket/page", "X-Repo-Commit": "1" * 40}
    headers |= {"X-Linked-Size": str(len(right)), "X-Linked-Etag": f'"{"1" * 40}"'}
    hub.refusals[f"{CLIP_REPO}/{file}"] = 302, headers


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
def test_a_page_in_place_of_the_vocabulary_never_gets_its_name(
    hub: Hub, tmp_path: Path, file: str
) -> None:
    """As a captive portal answers everything: whatever it says, the folder is not spoilt."""
    place = f"{CLIP_REPO}/{file}"
    right, folder = hub.files[place], tmp_path / "small"
    hub.files[place] = PAGE
    with pytest.raises(DownloadError, match=f"{file} of .* is another file now") as error:
        download("small", tmp_path)
    one_line(error)
    assert not (folder / file).exists()
    hub.files[place] = right
    with Hub() as storage, serving(storage):
        for page in (PAGE, PAGE + bytes(len(right) - len(PAGE)), right[:-1] + b"?"):
            vocabulary_elsewhere(hub, storage, file, page)
            with pytest.raises(DownloadError, match=file) as error:
                download("small", tmp_path)
            one_line(error)
            assert {p.name for p in folder.iterdir()} <= {"small.ckpt", "vocab.json"} - {file}
    hub.refusals.clear()
    assert len(read_tokenizer(download("small", tmp_path).parent)) == CLIP_VOCAB_SIZE


def test_a_page_in_place_of_the_vocabulary_does_not_stay_in_the_hubs_cache(
    hub: Hub, tmp_path: Path
) -> None:
    right = hub.files[f"{CLIP_REPO}/merges.txt"]
    with Hub() as storage, serving(storage):
        vocabulary_elsewhere(hub, storage, "merges.txt", PAGE + bytes(len(right) - len(PAGE)))
        with pytest.raises(FileNotFoundError, match="it was removed: fetch it again") as error:
            module.require_tokenizer(tmp_path / "model.ckpt", CLIP_VOCAB_SIZE)
        one_line(error)
    hub.refusals.clear()
    tokenizer = module.require_tokenizer(tmp_path / "model.ckpt", CLIP_VOCAB_SIZE)
    assert len(tokenizer) == CLIP_VOCAB_SIZE


def test_half_a_vocabulary_of_the_users_is_left_alone(hub: Hub, tmp_path: Path) -> None:
    mine = tmp_path / "small" / "vocab.json"
    mine.parent.mkdir()
    mine.write_text("{}")
    with pytest.raises(DownloadError, match="move it away to fetch the official one") as error:
        download("small", tmp_path)
    assert str(mine) in one_line(error) and mine.read_text() == "{}"


# --- What is there already -------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, words",
    [(b"mine", "it has 4 bytes, not 1,048,576;"), (b"?" + CONTENT[1:], KNOWN.sha256)],
    ids=["size", "bytes"],
)
def test_a_file_of_the_users_under_that_name_is_left_alone(
    hub: Hub, tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "small" / "small.ckpt"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(DownloadError, match="move it away to fetch the official one") as error:
        download("small", tmp_path)
    assert str(path) in one_line(error) and words in str(error.value)
    assert path.read_bytes() == content and hub.asked == []


def test_a_right_file_that_was_put_there_by_hand_counts(hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / "small" / "small.ckpt"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    assert download("small", tmp_path) == path
    assert not any("small.ckpt" in asked for asked in hub.asked)


@pytest.mark.parametrize("size", [len(CONTENT), None], ids=["size known", "size unknown"])
def test_too_little_space_is_said_before_a_byte_moves(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int | None
) -> None:
    known = dataclasses.replace(KNOWN, bytes=size)
    monkeypatch.setattr(module, "known_files", lambda: (known,))
    usage = shutil.disk_usage(tmp_path)._replace(free=len(CONTENT) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    message = "has room for 1,048,575 bytes, 1,048,576 are to be fetched"
    with pytest.raises(DownloadError, match=message) as error:
        download("small", tmp_path)
    one_line(error)
    assert hub.asked == ["HEAD some/weights/small.ckpt"] and not any(tmp_path.iterdir())


def test_what_has_arrived_needs_no_space_again(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.cut["some/weights/small.ckpt"] = 700_000
    with pytest.raises(DownloadError):
        download("small", tmp_path)
    hub.cut.clear()
    usage = shutil.disk_usage(tmp_path)._replace(free=len(CONTENT) - 700_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert download("small", tmp_path).read_bytes() == CONTENT


def test_a_file_in_the_folders_place_is_said(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("not a folder")
    with pytest.raises(DownloadError, match="no file can be written to") as error:
        download("small", tmp_path / "weights")
    assert str(tmp_path / "weights") in one_line(error)
    assert (tmp_path / "weights").read_text() == "not a folder"


def test_another_models_tokenizer_in_the_folder_is_named(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    write_tokenizer(Tokenizer.train(["a red house"] * 5, vocab_size=520), tmp_path / "small")
    with pytest.raises(ValueError, match=r"it has \d+ tokens, the text encoder 49408"):
        download("small", tmp_path)


# --- The tokenizer of weights that were not downloaded here ----------------------------------


def test_a_missing_tokenizer_is_fetched_into_the_hubs_cache_once(hub: Hub, tmp_path: Path) -> None:
    weights = tmp_path / "mine" / "model.ckpt"
    assert len(module.require_tokenizer(weights, 49408)) == 49408
    assert not weights.parent.exists()
    assert any((tmp_path / "cache").iterdir())
    hub.asked.clear()
    assert len(module.require_tokenizer(weights, 49408)) == 49408
    assert hub.asked == []


def test_a_tokenizer_beside_the_weights_is_enough(hub: Hub, tmp_path: Path) -> None:
    own = Tokenizer.train(["a red house"] * 5, vocab_size=520)
    write_tokenizer(own, tmp_path)
    assert module.require_tokenizer(tmp_path / "model.ckpt", len(own)) == own
    assert hub.asked == []


def test_without_a_network_one_line_says_how_to_get_a_tokenizer(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        FileNotFoundError, match=r"no tokenizer for .*model.ckpt: put vocab"
    ) as error:
        module.require_tokenizer(tmp_path / "model.ckpt", 49408)
    message = one_line(error)
    assert "https://huggingface.co/openai/clip-vit-large-patch14" in message
    assert "HF_HUB_OFFLINE" in message


def test_another_models_tokenizer_is_never_fetched(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="695 tokens are not CLIP's vocabulary"):
        module.require_tokenizer(tmp_path / "model.ckpt", 695)
    assert hub.asked == []
