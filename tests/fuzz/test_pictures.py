"""PNGs that mean no good: what `ldm show` says of them, and the recipes that `--like` follows."""

from __future__ import annotations

import contextlib
import io
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ldm.cli.generate import check_sheet, order_like
from ldm.cli.main import main
from ldm.recipe import KEY, Recipe, read_recipes, save_png
from ldm.schedule import NoiseSchedule
from ldm.settings import Settings
from tests.fuzz.edits import (
    CHANGES,
    EDITS,
    PLACES,
    Changes,
    Edits,
    changed,
    edited,
    every_change,
    to_json,
)
from tests.fuzz.watching import Watch, assert_lines, fuzzed, outcome
from tests.helpers import tiny_config

CONFIG = tiny_config()
SCHEDULE = NoiseSchedule(CONFIG.schedule)
RECIPE = Recipe(
    settings=Settings.of(CONFIG, "a red house", seed=3, steps=7, height=16, width=24),
    model="tiny",
    model_sha256="0" * 64,
    ema="auto",
    device="cpu",
    dtype="float32",
    versions={"torch": "1"},
)
MOST_PIXELS = 2**28  # of what may be drawn: few memories hold what more would need

Chunk = tuple[bytes, bytes]  # its name, and what is in it
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def png(chunks: list[Chunk], crc: int = 0) -> bytes:
    """A file of these chunks; `crc` is what is wrong with each checksum."""
    parts = [SIGNATURE]
    for name, data in chunks:
        checksum = zlib.crc32(name + data) ^ crc
        parts += [len(data).to_bytes(4, "big"), name, data, checksum.to_bytes(4, "big")]
    return b"".join(parts)


def header(width: int, height: int, depth: int = 8, colour: int = 2) -> Chunk:
    sizes = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return b"IHDR", sizes + bytes([depth, colour, 0, 0, 0])


def text(content: bytes, key: bytes = KEY.encode(), packed: bool = False) -> Chunk:
    data = zlib.compress(content) if packed else content
    return b"iTXt", key + b"\0" + bytes([packed, 0]) + b"\0\0" + data


def old_text(content: bytes, packed: bool) -> Chunk:
    """As latin-1, in the chunks that came before iTXt."""
    key = KEY.encode() + b"\0"
    return (b"zTXt", key + b"\0" + zlib.compress(content)) if packed else (b"tEXt", key + content)


PIXELS = (b"IDAT", zlib.compress(bytes(1 + 3 * 24) * 16))
END = (b"IEND", b"")
RECIPES = json.dumps([RECIPE.as_dict()], sort_keys=True)


class Picture:
    """A picture that is written again and again."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "picture.png"
        self.watch = Watch(folder)
        save_png(Image.new("RGB", (24, 16)), self.path, [RECIPE])
        self.saved = self.path.read_bytes()
        for data in (self.saved, b"no picture", self.of_text(RECIPES.encode())):
            for _ in range(2):  # Python imports what it needs when it is first needed
                with contextlib.suppress(AssertionError):
                    self.show(data)
        assert self.show(self.saved) == self.show(self.of_text(RECIPES.encode()))
        assert "a red house" in self.show(self.saved)
        assert self.follow(self.saved) is None

    def of_text(self, content: bytes) -> bytes:
        return png([header(24, 16), text(content), PIXELS, END])

    def show(self, data: bytes) -> str:
        """What `ldm show` prints, on either stream."""
        self.path.write_bytes(data)
        said = {0: io.StringIO(), 2: io.StringIO()}  # by the exit code that each belongs to
        codes: list[int] = []

        def look() -> None:
            with contextlib.redirect_stdout(said[0]), contextlib.redirect_stderr(said[2]):
                codes.append(main(["show", str(self.path)]))

        # The parser of all commands is most of the work: `follow` asks Python for every object.
        assert outcome(self.watch, look, (), len(data), traced=False) is None
        (code,) = codes
        told, error = said[0].getvalue(), said[2].getvalue()
        assert_lines(told)
        if code == 0:
            assert told and not error
            return told
        assert code == 2 and not told
        assert error.startswith("ldm: ") and error.count("\n") == 1
        assert_lines(error)
        return error

    def follow(self, data: bytes) -> str | None:
        """Read its recipes as `ldm generate --like` does, up to where the model is asked for."""
        self.path.write_bytes(data)
        found: list[Recipe] = []

        def look() -> None:
            order = order_like(self.path, CONFIG)
            check_sheet(order)
            found.extend(order)

        message = outcome(self.watch, look, (ValueError,), len(data))
        for recipe in found:
            settings = recipe.settings
            assert settings.height * settings.width <= MOST_PIXELS
            assert len(settings.grid(SCHEDULE)) <= CONFIG.schedule.num_train_timesteps
        return message


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Picture:
    return Picture(tmp_path_factory.mktemp("fuzz"))


@fuzzed(percent=4)
@given(CHANGES)
def test_a_changed_recipe_is_shown_or_refused(picture: Picture, changes: Changes) -> None:
    recipes = to_json(changed(json.loads(RECIPES), changes))
    picture.show(picture.of_text(recipes.encode("utf-8", "surrogatepass")))


@fuzzed(percent=4)
@given(CHANGES)
def test_a_changed_recipe_is_followed_or_refused(picture: Picture, changes: Changes) -> None:
    recipes = to_json(changed(json.loads(RECIPES), changes))
    picture.follow(picture.of_text(recipes.encode("utf-8", "surrogatepass")))


SIZES = st.sampled_from([0, 1, 16, 24, 65_535, 100_000, 2**31 - 1, 2**32 - 1])
TEXTS = st.sampled_from(
    [b"[]", b"", b"[" * 100_000, b"\xff\xfe", b"null", b"9" * 5000, RECIPES.encode(), b" " * 10**6]
)
CHUNKS = st.one_of(
    st.just(PIXELS),
    st.just(END),
    st.builds(header, SIZES, SIZES, st.integers(0, 255), st.integers(0, 255)),
    st.builds(text, TEXTS, packed=st.booleans()),
    st.builds(old_text, TEXTS, st.booleans()),
    st.builds(text, TEXTS, st.sampled_from([b"", b"x" * 80, b"Software", b"\xff"])),
    st.tuples(
        st.sampled_from([b"IHDR", b"iTXt", b"zTXt", b"tEXt", b"PLTE", b"iCCP", b"eXIf", b"acTL"])
        | st.binary(min_size=4, max_size=4),
        st.binary(max_size=40),
    ),
)


@fuzzed(percent=6)
@given(
    SIZES, SIZES, st.lists(CHUNKS, max_size=5), st.sampled_from([0, 0, 0, 1]), st.integers(1, 40)
)
def test_a_picture_of_any_chunks(
    picture: Picture, width: int, height: int, chunks: list[Chunk], crc: int, times: int
) -> None:
    picture.show(png([header(width, height), *(chunks * times)[: max(5, times)], PIXELS, END], crc))


@fuzzed(percent=4)
@given(PLACES, EDITS)
def test_a_damaged_picture(picture: Picture, which: int, edits: Edits) -> None:
    files = [picture.saved, picture.of_text(RECIPES.encode())]
    picture.show(edited(files[which % 2], files[0], edits))


def test_every_field_of_a_recipe_is_checked() -> None:
    """Each field with each hostile value: refused in one line, or followed as it stands."""
    kept = 0
    for what, text in every_change(RECIPE.as_dict()):
        try:
            recipe = Recipe.from_dict(json.loads(text))
            recipe.settings.check(CONFIG)
        except (ValueError, RecursionError) as error:
            fault = isinstance(error, (UnicodeError, json.JSONDecodeError, RecursionError))
            assert fault or (str(error).isprintable() and len(str(error)) < 1000), what
        else:
            assert recipe.settings.height * recipe.settings.width <= MOST_PIXELS, what
            kept += 1
    assert kept > 20  # every prompt that can be written, to begin with


PICTURES: dict[str, Any] = {
    "GIF": b"GIF89a\x01\0\x01\0\0\0\0;",
    "BMP": b"BM" + bytes(60),
    "TIFF": b"II*\0\x08\0\0\0",
    "JPEG": b"\xff\xd8\xff\xe0" + bytes(60),
    "nothing": b"",
    "a signature": SIGNATURE,
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}


@pytest.mark.parametrize("kind", PICTURES)
def test_what_is_no_png_is_refused(picture: Picture, kind: str) -> None:
    assert picture.show(PICTURES[kind]).startswith("ldm: ")


def test_what_is_fuzzed_is_what_is_written(picture: Picture) -> None:
    """So that an error above comes from a change."""
    picture.path.write_bytes(picture.of_text(RECIPES.encode()))
    assert read_recipes(picture.path) == [RECIPE]
    with Image.open(picture.path) as image:
        assert image.size == (24, 16) and image.getpixel((0, 0)) == (0, 0, 0)
