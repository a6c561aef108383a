"""Pictures of one colour."""

from __future__ import annotations

from PIL import Image

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def solid(colour: tuple[int, int, int], width: int = 64, height: int = 64) -> Image.Image:
    return Image.new("RGB", (width, height), colour)
