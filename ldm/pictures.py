"""Pictures as tensors, and tensors as pictures: one place says how, for all who draw and read.

A picture has grey levels, whole numbers from 0 (black) to 255 (white), (H, W, 3): red, green, blue.
The networks see pixels, numbers from -1 to 1, (3, H, W).

    pixels = level / 127.5 - 1        level = round(255 (pixels + 1) / 2), cut to 0 to 255
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image

Picture: TypeAlias = "Image | npt.NDArray[np.uint8] | str | Path"
"""What `to_rgb` reads: a PIL image of any mode, an array of grey levels, or a file."""

GROUND = (255, 255, 255)
"""What stands behind the transparent parts of a picture: white, as on a page."""

SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
"""Pillow's modes for greys from 0 to 65535. Files of these kinds it may also give as "I", numbers
of 32 bits, and means the same:"""
SIXTEEN_BIT_FILES = ("PNG", "PPM")


def to_tensor(levels: Tensor) -> Tensor:
    """Grey levels 0 to 255, (..., H, W, 3), to pixels in [-1, 1], (..., 3, H, W).

    They become float32; levels that are floating-point numbers already keep their type. The
    numbers are laid out in memory as they were, the colours of a place side by side.
    """
    pixels = levels.movedim(-1, -3)
    return (pixels if pixels.is_floating_point() else pixels.float()) / 127.5 - 1


def to_levels(pixels: Tensor) -> Tensor:
    """Pixels near [-1, 1], (..., 3, H, W), to the nearest grey levels, uint8 (..., H, W, 3); what
    lies outside becomes black or white."""
    return ((pixels + 1) / 2).clamp(0, 1).mul(255).round().byte().movedim(-3, -1)


def to_images(pixels: Tensor) -> list[Image]:
    """Pixels near [-1, 1], (B, 3, H, W) on any device, to B images."""
    from PIL import Image

    return [Image.fromarray(levels.numpy()) for levels in to_levels(pixels.float()).cpu()]


def stack(pictures: Sequence[Picture]) -> Tensor:
    """Pictures of one size, read by `to_rgb`, as grey levels, uint8 (B, H, W, 3).

    Raises:
        FileNotFoundError, ValueError: as `to_rgb` does; or there is no picture, or they are not
            all of one size.
    """
    import numpy as np

    images = [to_rgb(picture) for picture in pictures]
    sizes = dict.fromkeys(f"{image.width}x{image.height}" for image in images)
    if len(sizes) != 1:
        found = f"these are {', '.join(list(sizes)[:4])}" if sizes else "there are none"
        raise ValueError(f"pictures that are taken together must be all of one size: {found}")
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))


def cropped(image: Image, width: int, height: int) -> Image:
    """The middle of an image, as much of it as has this shape, resized to this size."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def to_rgb(picture: Picture) -> Image:
    """What a person sees of a picture, in red, green and blue.

    It stands upright, as its EXIF data says. What is transparent, by an alpha channel, a palette or
    a colour that stands for nothing, lies over `GROUND`. Greys of 16 bits are rounded to 8. Of a
    file with several frames it is the first; colour profiles are not applied.

    Args:
        picture: a PIL image; a path to a file that Pillow reads; or an array of grey levels,
            uint8, (H, W) for greys, (H, W, 3) for colours, (H, W, 4) for colours and alpha.

    Raises:
        FileNotFoundError: nothing is at the path.
        ValueError: in one line: it cannot be read, has no pixels, or its numbers do not say which
            of them is white (Pillow's modes "I" and "F").
    """
    import numpy as np
    from PIL import Image

    match picture:
        case Image.Image():
            return _seen(picture, getattr(picture, "filename", ""))
        case np.ndarray():
            return _seen(_of_array(picture), "")
        case str() | Path():
            if not Path(picture).is_file():
                raise FileNotFoundError(f"no picture at {str(picture)!r}")
            try:
                image = Image.open(picture)
            # A damaged file raises whatever its reader ran into, of any type; so below.
            except Exception as error:
                raise ValueError(_unreadable(picture, error)) from error
            with image:
                return _seen(image, picture)
        case Tensor():
            raise ValueError("a tensor is no picture: pixels in [-1, 1] are for pipe.vae.encode")
        case _:
            kind = type(picture).__name__
            raise ValueError(f"a picture is a PIL image, an array or a path, not a {kind}")


def _of_array(array: npt.NDArray[np.uint8]) -> Image:
    """An array of grey levels as an image."""
    from PIL import Image

    is_shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype.name != "uint8" or not is_shaped or not array.size:
        raise ValueError(
            "an array must be uint8, 0 to 255, of shape (height, width), (height, width, 3) or "
            f"(height, width, 4), not {array.dtype} {array.shape}; for several pictures pass a list"
        )
    return Image.fromarray(array)


def _seen(image: Image, path: str | Path) -> Image:
    """The same, of an image that came from `path`, or from none."""
    from PIL import Image, ImageOps

    if not image.width or not image.height:
        raise ValueError(f"{_named(path)} has no pixels: it is {image.width}x{image.height}")
    is_16_bit = image.mode in SIXTEEN_BITS or (
        image.mode == "I" and image.format in SIXTEEN_BIT_FILES
    )
    if image.mode in ("I", "F") and not is_16_bit:
        raise ValueError(
            f"{_named(path)} is of mode {image.mode!r}, which does not say what number is white: "
            "scale its numbers to 0 to 255, and pass them as an array of uint8"
        )
    try:
        image = ImageOps.exif_transpose(image)
        if is_16_bit:
            image = _of_16_bits(image)
        if not image.has_transparency_data:
            return image.convert("RGB")
        if image.mode == "La":  # greys that were multiplied by alpha: Pillow takes one step a time
            image = image.convert("LA")
        ground = Image.new("RGBA", image.size, GROUND)
        return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
    except Exception as error:
        raise ValueError(_unreadable(path, error)) from error


def _of_16_bits(image: Image) -> Image:
    """Greys 0 to 65535 as the nearest of 0 to 255, and what is transparent."""
    import numpy as np
    from PIL import Image

    greys = np.asarray(image).astype(np.int64)
    alpha = np.where(greys == image.info.get("transparency", -1), 0, 255)
    levels = (greys + 128) // 257  # 65535 = 257 * 255
    return Image.fromarray(np.stack([levels, alpha], axis=-1).astype(np.uint8))  # mode "LA"


def _named(path: str | Path) -> str:
    """A picture that came from `path`, or from none, for a line that can be printed."""
    return repr(str(path)) if path else "the picture"


def _unreadable(path: str | Path, error: Exception) -> str:
    """One printable line."""
    reason = repr(str(error).partition("\n")[0][:200] or type(error).__name__)[1:-1]
    return f"{_named(path)} is not a picture that can be read: {reason}"
