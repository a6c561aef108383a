"""Pictures that move: GIF and WebP files, and what Jupyter shows.

viz.animation(viz.frames(run, pipe.decode)).save("run.webp")
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.files import check_writable, written_whole


@dataclass(frozen=True)
class Animation:
    """Pictures that play one after the other, again and again; Jupyter shows them moving.

    Attributes:
        frames: of one size.
        durations: of each, in milliseconds.
    """

    frames: tuple[Image.Image, ...]
    durations: tuple[int, ...]

    def save(self, path: str | Path) -> None:
        """Write a .gif or a .webp file, whole or not at all. GIF has 256 colours a frame, and joins
        frames that are equal.

        Raises:
            ValueError: another suffix, or it cannot be written there.
        """
        path = Path(path)
        if path.suffix.lower() not in (".gif", ".webp"):
            raise ValueError(f"an animation is a .gif or a .webp file, not {path.name!r}")
        check_writable(path)
        data = self.encoded(path.suffix.lower().removeprefix("."))
        with written_whole(path) as temporary:
            temporary.write_bytes(data)

    def encoded(self, kind: str) -> bytes:
        """The bytes of a "gif" or "webp" file."""
        file = io.BytesIO()
        first, *rest = self.frames
        options: dict[str, Any] = {"quality": 90, "method": 4} if kind == "webp" else {}
        first.save(
            file,
            format=kind,
            save_all=True,
            append_images=rest,
            duration=list(self.durations),
            loop=0,
            **options,
        )
        return file.getvalue()

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.encoded("webp")).decode()
        alt = f"animation of {len(self.frames)} pictures"
        return f'<img alt="{alt}" src="data:image/webp;base64,{data}">'


def animation(images: Sequence[Image.Image], ms: int = 80, *, hold_ms: int = 1000) -> Animation:
    """Pictures of one size, `ms` milliseconds each, the last for `hold_ms`.

    Raises:
        ValueError: no pictures, of several sizes, or a time below 20 ms, which players slow down.
    """
    if not images:
        raise ValueError("an animation needs pictures")
    if len({image.size for image in images}) != 1:
        raise ValueError("the pictures of an animation must be of one size")
    if min(ms, hold_ms) < 20:
        raise ValueError(f"a picture must stay for 20 ms or more, not {min(ms, hold_ms)}")
    durations = [ms] * (len(images) - 1) + [hold_ms]
    return Animation(tuple(image.convert("RGB") for image in images), tuple(durations))
