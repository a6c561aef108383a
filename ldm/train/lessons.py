"""Pictures with captions, as people have them: a folder of files, encoded once to learn from.

The caption of `mill.png` stands in `mill.txt` beside it; or one caption does for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ldm.pictures import Picture, cropped, to_rgb

if TYPE_CHECKING:
    from ldm.pipeline import TextToImage

LONGEST = 10_000  # bytes of a caption's file


@dataclass(frozen=True)
class Lessons:
    """Pictures and what is said of each, ready to be noised.

    Attributes:
        latents: (N, C, h, w), scaled.
        captions: N of them.
    """

    latents: Tensor
    captions: Sequence[str]


def read_folder(folder: Path, caption: str | None = None) -> list[tuple[Path, str]]:
    """The pictures in a folder, by name, and the caption of each.

    Args:
        folder: of pictures, and files of text of the same names. What begins with a dot is left
            out.
        caption: what is said of a picture that has no text beside it.

    Raises:
        ValueError: in one line: there is no such folder, or no picture in it, a file is no picture,
            or there is no caption for one.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder of pictures at {str(folder)!r}")
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() == ".txt" or path.is_dir():
            continue
        to_rgb(path)  # or a line that says what it is
        found.append((path, caption_of(path, caption)))
    if not found:
        raise ValueError(f"there is no picture in {str(folder)!r}")
    return found


def caption_of(path: Path, otherwise: str | None) -> str:
    """What the text beside a picture says, or where there is none `otherwise`."""
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        if otherwise is None:
            raise ValueError(f"{path} has no caption: write {beside.name} beside it, or pass one")
        return otherwise
    data = beside.read_bytes()
    try:
        text = " ".join(data.decode("utf-8-sig").split())
    except ValueError as error:
        raise ValueError(f"{beside} is not a text in UTF-8") from error
    if not text or len(data) > LONGEST:
        raise ValueError(f"{beside} is no caption: it has {len(data):,} bytes")
    return text


def encode_lessons(
    pipe: TextToImage, pictures: Sequence[Picture], captions: Sequence[str]
) -> Lessons:
    """Encode pictures once: the autoencoder stays as it is. Of a picture of another shape than the
    model's it is the middle.

    Raises:
        FileNotFoundError, ValueError: as `ldm.pictures.to_rgb`; or there is no picture, or not as
            many captions.
    """
    if not pictures or len(pictures) != len(captions):
        raise ValueError(f"{len(pictures)} pictures need as many captions, not {len(captions)}")
    size = pipe.config.image_size
    images = [cropped(to_rgb(picture), size, size) for picture in pictures]
    return Lessons(pipe.encode(images).float(), tuple(captions))
