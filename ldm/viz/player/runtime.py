"""ONNX Runtime Web, which runs a model in a page: two files of the package that npm publishes,
known by their hashes, fetched once into a cache. Nothing of it stands in this repository.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

from ldm.files import written_whole

VERSION = "1.30.0"
URL = f"https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"
SCRIPT, WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
SHA256 = {
    SCRIPT: "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    WASM: "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
MAX_BYTES = 200_000_000  # of the package, which has 30 MB: what is more is not it
TIMEOUT = 30  # seconds without a byte


def runtime_files(folder: Path | None = None) -> dict[str, bytes]:
    """The runtime's two files by their names, each the one that is known.

    Args:
        folder: where they are, in it or in its `dist` or `package/dist`; None is the cache, to
            which they are fetched if they are not there.

    Raises:
        FileNotFoundError: `folder` does not have them.
        ValueError: one is another file than the one that is known.
        OSError: they cannot be fetched; one line says what to do.
    """
    if folder is None:
        folder = cache_folder()
        if not all((folder / name).is_file() for name in SHA256):
            fetch(folder)
    for place in (folder, folder / "dist", folder / "package" / "dist"):
        if all((place / name).is_file() for name in SHA256):
            return {name: checked(name, (place / name).read_bytes()) for name in SHA256}
    raise FileNotFoundError(f"{folder} has no {SCRIPT} and {WASM} of onnxruntime-web {VERSION}")


def cache_folder() -> Path:
    """Where the runtime is kept, by the rules of the XDG base directories."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ldm" / f"onnxruntime-web-{VERSION}"


def fetch(folder: Path) -> None:
    """Fetch the package from npm, and keep its two files."""
    try:
        with urllib.request.urlopen(URL, timeout=TIMEOUT) as answer:
            package = answer.read(MAX_BYTES)
        with tarfile.open(fileobj=io.BytesIO(package)) as archive:
            for name in SHA256:
                member = archive.extractfile(f"package/dist/{name}")
                content = b"" if member is None else member.read()
                folder.mkdir(parents=True, exist_ok=True)
                with written_whole(folder / name) as temporary:
                    temporary.write_bytes(checked(name, content))
    except (urllib.error.URLError, TimeoutError, tarfile.TarError, KeyError) as error:
        why = getattr(error, "reason", error)
        raise OSError(
            f"onnxruntime-web {VERSION} cannot be fetched ({why}): fetch {URL} elsewhere, unpack "
            "it and pass --runtime FOLDER"
        ) from error


def checked(name: str, content: bytes) -> bytes:
    """The content, or a ValueError: it is not that of onnxruntime-web's file."""
    if hashlib.sha256(content).hexdigest() != SHA256[name]:
        raise ValueError(f"{name} is not that of onnxruntime-web {VERSION}: its hash is another")
    return content
