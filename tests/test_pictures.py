"""Pictures and tensors: the numbers of each, and that what goes in is what a person sees."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.pictures import GROUND, stack, to_images, to_levels, to_rgb, to_tensor
from tests.helpers import randn

# Four colours a person can name, in quarters: no half of it looks like another.
RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)
QUARTERS = np.zeros((16, 24, 3), dtype=np.uint8)
QUARTERS[:8, :12], QUARTERS[:8, 12:], QUARTERS[8:, :12], QUARTERS[8:, 12:] = RED, GREEN, BLUE, GREY
RGB = Image.fromarray(QUARTERS)
# Greys from black to white, in columns.
RAMP = np.tile(np.linspace(0, 255, 24).round().astype(np.uint8), (16, 1))
RAMP_RGB = np.repeat(RAMP[..., None], 3, axis=2)


def seen(picture: Any) -> np.ndarray[Any, Any]:
    """What `to_rgb` makes of it, (H, W, 3)."""
    image = to_rgb(picture)
    assert image.mode == "RGB"
    return np.asarray(image)


def reopened(image: Image.Image, form: str, **options: Any) -> Image.Image:
    """The same image, written to a file and read again."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return Image.open(io.BytesIO(file.getvalue()))


# --- Numbers -------------------------------------------------------------------------------------


def test_levels_become_pixels_and_come_back_the_same() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(2, 1, 128, 1).expand(2, 1, 128, 3)
    pixels = to_tensor(levels)
    assert pixels.shape == (2, 3, 1, 128) and pixels.dtype == torch.float32
    assert torch.equal(pixels[:, 0].flatten(), torch.arange(256) / 127.5 - 1)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert torch.equal(to_levels(pixels), levels)


def test_levels_in_half_precision_become_pixels_in_half_precision() -> None:
    levels = torch.arange(256.0, dtype=torch.float16).view(1, 256, 1)
    assert to_tensor(levels).dtype == torch.float16
    assert torch.equal(to_tensor(levels).flatten(), levels.flatten() / 127.5 - 1)


def test_pixels_become_the_nearest_levels_and_what_lies_outside_black_or_white() -> None:
    pixels = torch.tensor([-7.0, -1.001, -1.0, -0.999, 0.0, 0.5, 0.99, 1.0, 1.01, 40.0])
    levels = to_levels(pixels.view(1, 1, -1))
    assert levels.dtype == torch.uint8 and levels.shape == (1, 10, 1)
    assert levels.flatten().tolist() == [0, 0, 0, 0, 128, 191, 254, 255, 255, 255]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_become_images(dtype: torch.dtype) -> None:
    pixels = randn(2, 3, 5, 7).to(dtype)
    images = to_images(pixels)
    assert [(image.mode, image.size) for image in images] == [("RGB", (7, 5))] * 2
    expected = to_levels(pixels.float())
    assert torch.equal(stack(images), expected)


# --- What a person sees --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBX", "CMYK", "HSV", "YCbCr", "LAB", "P"])
def test_colours_of_every_mode_are_seen(mode: str) -> None:
    image = RGB.quantize(4) if mode == "P" else RGB.convert(mode)
    assert image.mode == mode
    difference = seen(image).astype(int) - QUARTERS
    # The corners of the colour cube hardly fit into LAB's 8 bits; YCbCr rounds twice.
    assert np.abs(difference).max() <= {"LAB": 22, "YCbCr": 2}.get(mode, 0)


@pytest.mark.parametrize("mode", ["L", "LA", "La", "P", "PA", "RGBA", "RGBa"])
def test_greys_of_every_mode_are_seen(mode: str) -> None:
    image = Image.fromarray(RAMP)
    for step in {"La": ("LA", "La"), "RGBa": ("RGBA", "RGBa")}.get(mode, (mode,)):
        image = image.convert(step)
    assert image.mode == mode
    assert np.array_equal(seen(image), RAMP_RGB)


def test_black_and_white_is_seen() -> None:
    image = Image.fromarray(RAMP > 100)
    assert image.mode == "1"
    assert np.array_equal(seen(image), np.where(RAMP_RGB > 100, 255, 0))


DEEP = RAMP.astype(np.uint16) * 257 + np.uint16(100)  # nearer to each level than to the next
DEEP[:, -1] = 65535


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_greys_of_16_bits_are_rounded_to_8(mode: str) -> None:
    """Pillow's own conversion cuts all that is above 255 to white."""
    order = ">u2" if mode == "I;16B" else "<u2"
    image = Image.frombytes(mode, (24, 16), DEEP.astype(order).tobytes())
    assert np.array_equal(seen(image), RAMP_RGB)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PGM"])
def test_files_of_16_bits_are_rounded_to_8(form: str) -> None:
    if form == "PGM":
        file = Image.open(io.BytesIO(b"P5 24 16 65535\n" + DEEP.astype(">u2").tobytes()))
    else:
        file = reopened(Image.frombytes("I;16", (24, 16), DEEP.astype("<u2").tobytes()), form)
    assert np.array_equal(seen(file), RAMP_RGB)


def test_greys_of_16_bits_that_pillow_calls_32_are_known_by_their_file() -> None:
    """As Pillow before 11 opened a PNG of 16 bits."""
    image = Image.fromarray(RAMP.astype(np.int32) * 257)
    assert image.mode == "I"
    image.format = "PNG"
    assert np.array_equal(seen(image), RAMP_RGB)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_that_do_not_say_what_is_white_are_refused(mode: str, tmp_path: Path) -> None:
    kind = np.int32 if mode == "I" else np.float32
    for scale in (1 / 255, 1, 257):
        image = Image.fromarray((RAMP.astype(float) * scale).astype(kind))
        assert image.mode == mode
        with pytest.raises(
            ValueError, match=rf"^the picture is of mode '{mode}', which does not say"
        ):
            to_rgb(image)
    Image.fromarray((RAMP / 255).astype(kind)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=rf"^'.*a\.tiff' is of mode '{mode}', which does not say"):
        to_rgb(tmp_path / "a.tiff")


# --- What is transparent -------------------------------------------------------------------------

ALPHA = np.zeros((16, 24), dtype=np.uint8)
ALPHA[:, :8], ALPHA[:, 8:16] = 255, 128  # a third opaque, one half so, one not at all


def over_the_ground(levels: np.ndarray[Any, Any], alpha: np.ndarray[Any, Any]) -> Any:
    """The mean of a picture and the ground, weighted by alpha."""
    share = alpha[..., None] / 255
    return levels * share + np.array(GROUND) * (1 - share)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_what_is_transparent_lies_over_the_ground(mode: str) -> None:
    grey = mode in ("LA", "La", "PA")
    levels = RAMP_RGB if grey else QUARTERS
    if mode == "PA":
        image = Image.fromarray(RAMP).convert("PA")
        image.putalpha(Image.fromarray(ALPHA))
    else:
        image = Image.fromarray(RAMP if grey else QUARTERS).convert("LA" if grey else "RGBA")
        image.putalpha(Image.fromarray(ALPHA))
        image = image.convert(mode)
    assert image.mode == mode
    difference = seen(image) - over_the_ground(levels, ALPHA)
    assert np.abs(difference).max() <= (2 if mode.endswith("a") else 1)  # rounded once more
    assert (seen(image)[:, 16:] == GROUND).all()
    assert np.array_equal(seen(image)[:, :8], levels[:, :8])


@pytest.mark.parametrize("kind", ["a byte for each colour", "one colour", "colours with alpha"])
def test_a_palette_may_be_transparent(kind: str) -> None:
    if kind == "colours with alpha":
        image = Image.new("P", (2, 1))
        image.putpalette([*RED, 255, *GREEN, 0], "RGBA")
    else:
        image = Image.new("P", (2, 1))
        image.putpalette([*RED, *GREEN])
        image.info["transparency"] = 1 if kind == "one colour" else bytes([255, 0])
    image.putpixel((1, 0), 1)
    assert seen(image).tolist() == [[list(RED), list(GROUND)]]


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_a_palettes_transparency_is_read_from_a_file(form: str) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    file = reopened(image, form, transparency=1)
    assert seen(file).tolist() == [[list(RED), list(GROUND)]]


@pytest.mark.parametrize(
    ("mode", "key", "other"),
    [("1", 0, 1), ("L", 7, 0), ("RGB", GREEN, RED), ("I;16", 515, 514)],
)
def test_a_colour_may_stand_for_nothing(mode: str, key: Any, other: Any) -> None:
    image = Image.new(mode, (2, 1), other)
    image.putpixel((1, 0), key)
    if mode == "I;16":
        image.info["transparency"] = key
    else:
        image = reopened(image, "PNG", transparency=key)
    kept = {"1": (255,) * 3, "L": (0,) * 3, "RGB": RED, "I;16": (2,) * 3}[mode]
    assert seen(image).tolist() == [[list(kept), list(GROUND)]]


# --- Which side is up ----------------------------------------------------------------------------

# What a person sees of a file whose EXIF orientation is this (TIFF 6.0, "Orientation").
UPRIGHT: dict[int, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_picture_stands_upright(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = reopened(RGB, form, exif=exif)
    before = np.asarray(file).copy()
    assert np.array_equal(seen(file), UPRIGHT[orientation](QUARTERS))
    assert np.array_equal(np.asarray(file), before)  # the caller's is left as it was


def test_greys_of_16_bits_stand_upright_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = reopened(Image.fromarray(RAMP.astype(np.uint16) * 257), "PNG", exif=exif)
    assert np.array_equal(seen(file), np.rot90(RAMP_RGB, -1))


# --- Arrays, paths, and what is no picture -------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (QUARTERS, QUARTERS),
        (QUARTERS[::-1, ::2], QUARTERS[::-1, ::2]),
        (RAMP, RAMP_RGB),
        (np.dstack([QUARTERS, np.full_like(ALPHA, 255)]), QUARTERS),
        (np.dstack([QUARTERS, np.zeros_like(ALPHA)]), np.full_like(QUARTERS, 255)),
    ],
    ids=["colours", "strides", "greys", "opaque", "transparent"],
)
def test_arrays_of_levels_are_pictures(array: Any, expected: Any) -> None:
    assert np.array_equal(seen(array), expected)


@pytest.mark.parametrize(
    "array",
    [
        QUARTERS / 255,
        QUARTERS.astype(np.int64),
        RAMP.astype(np.uint16),
        RAMP > 100,
        QUARTERS[None],
        QUARTERS.transpose(2, 0, 1),
        QUARTERS[..., :2],
        QUARTERS[0, 0],
        QUARTERS[:0],
        np.array(["a"]),
    ],
    ids=lambda array: f"{array.dtype} {array.shape}",
)
def test_other_arrays_are_refused_by_their_type_and_shape(array: Any) -> None:
    with pytest.raises(ValueError) as error:
        to_rgb(array)
    assert str(error.value) == (
        "an array must be uint8, 0 to 255, of shape (height, width), (height, width, 3) or "
        f"(height, width, 4), not {array.dtype} {array.shape}; for several pictures pass a list"
    )


@pytest.mark.parametrize("kind", [str, Path])
def test_paths_are_opened(kind: type[str] | type[Path], tmp_path: Path) -> None:
    RGB.save(tmp_path / "a.png")
    assert np.array_equal(seen(kind(tmp_path / "a.png")), QUARTERS)
    with pytest.raises(FileNotFoundError, match=r"^no picture at '.*b\.png'$"):
        to_rgb(kind(tmp_path / "b.png"))
    with pytest.raises(FileNotFoundError):
        to_rgb(kind(tmp_path))


def png(data: Callable[[bytes], bytes]) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((40, 40), 90).save(file, "PNG")
    return data(file.getvalue())


BROKEN = {
    "empty": b"",
    "text": b"a picture of a house",
    "short": png(lambda data: data[:200]),
    "damaged": png(lambda data: data[:300] + b"\x00" * 99 + data[399:]),
    "huge": png(lambda data: data[:16] + b"\x00\x01\x00\x00" * 2 + data[24:]),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_is_no_picture_is_refused_in_a_line_that_names_it(
    kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "a\n\x1b]0;b.png"
    path.write_bytes(BROKEN[kind])
    with pytest.raises(ValueError) as error:
        to_rgb(path)
    message = str(error.value)
    assert message.isprintable() and len(message) < 600
    assert message.startswith(repr(str(path)) + " is not a picture that can be read: ")


@pytest.mark.parametrize("thing", [None, 7, b"png", iter([RGB]), RGB.tobytes, {}, [RGB]])
def test_what_is_no_picture_is_refused_by_its_type(thing: Any) -> None:
    with pytest.raises(ValueError) as error:
        to_rgb(thing)
    kind = type(thing).__name__
    assert str(error.value) == f"a picture is a PIL image, an array or a path, not a {kind}"


def test_a_tensor_is_sent_to_the_autoencoder() -> None:
    with pytest.raises(ValueError, match=r"pixels in \[-1, 1\] are for pipe\.vae\.encode$"):
        to_rgb(randn(1, 3, 8, 8))  # type: ignore[arg-type]


def test_a_picture_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^the picture has no pixels: it is 0x5$"):
        to_rgb(Image.new("RGB", (0, 5)))


def test_pictures_of_one_size_are_stacked_and_others_refused() -> None:
    levels = stack([RGB, QUARTERS, RGB.convert("RGBA")])
    assert levels.shape == (3, 16, 24, 3) and levels.dtype == torch.uint8
    assert all(np.array_equal(one, QUARTERS) for one in levels.numpy())
    with pytest.raises(ValueError, match=r"must be all of one size: these are 24x16, 16x24$"):
        stack([RGB, QUARTERS, RGB.rotate(90, expand=True)])
    with pytest.raises(ValueError, match=r"must be all of one size: there are none$"):
        stack([])
