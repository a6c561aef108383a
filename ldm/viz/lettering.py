"""Text on pictures: broken to a width, in a font that knows its letters."""

from __future__ import annotations

import functools
import importlib.util
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from PIL import ImageDraw, ImageFont

INK, QUIET, PAPER = "#1a1a1a", "#555555", "#ffffff"
TITLE, TEXT = 16, 13


@functools.cache
def font(size: int, plain: bool = True) -> ImageFont.FreeTypeFont:
    """The font that Pillow carries; it knows little more than ASCII, so for other letters
    matplotlib's, where that is installed."""
    if not plain:
        spec = importlib.util.find_spec("matplotlib")
        folder = Path(str(spec.origin)).parent / "mpl-data" / "fonts" / "ttf" if spec else Path()
        if (path := folder / "DejaVuSans.ttf").is_file():
            return ImageFont.truetype(str(path), size - 1)
        return font(size)
    built_in = ImageFont.load_default(size=size)
    if not isinstance(built_in, ImageFont.FreeTypeFont):
        raise ValueError("captions need a Pillow with FreeType, as its wheels have")
    return built_in


@dataclass(frozen=True)
class Text:
    """Lines of text that fit a width."""

    lines: tuple[str, ...]
    font: ImageFont.FreeTypeFont
    colour: str

    @classmethod
    def wrapped(cls, text: str, width: int, size: int = TEXT, colour: str = INK) -> Text:
        """Break at spaces, and within a word only where it alone is too wide."""
        face = font(size, text.isascii())
        if not text.isascii() and face is font(size):
            letters = unicodedata.normalize("NFKD", text)
            text = "".join(letter for letter in letters if not unicodedata.combining(letter))
            text = text.encode("ascii", "replace").decode()
        lines = []
        for paragraph in text.split("\n"):
            line = ""
            for word in paragraph.split(" "):
                longer = f"{line} {word}" if line else word
                if face.getlength(longer) <= width:
                    line = longer
                    continue
                lines += [line] if line else []
                while face.getlength(word) > width and len(word) > 1:
                    fits = max(
                        (n for n in range(1, len(word)) if face.getlength(word[:n]) <= width),
                        default=1,
                    )
                    lines.append(word[:fits])
                    word = word[fits:]
                line = word
            lines.append(line)
        return cls(tuple(lines) if text else (), face, colour)

    @property
    def width(self) -> int:
        return max((int(self.font.getlength(line)) + 1 for line in self.lines), default=0)

    @property
    def height(self) -> int:
        return len(self.lines) * sum(self.font.getmetrics())

    def draw(self, on: ImageDraw.ImageDraw, x: float, y: float, anchor: str = "m") -> None:
        """Each line starts at ("l"), ends at ("r") or has its middle at ("m") x; y is the top."""
        for line in self.lines:
            on.text((x, y), line, font=self.font, fill=self.colour, anchor=f"{anchor}a")
            y += sum(self.font.getmetrics())
