"""Pictures, maps and numbers as text that can stand in a page, as fine as there is room for."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.viz.player.film import Film
from ldm.viz.runs import guidance

if TYPE_CHECKING:
    from PIL.Image import Image

SMALL_PICTURE = 256  # pixels along the longer side: up to here a picture is small


@dataclass(frozen=True)
class Fineness:
    """How finely a page keeps what it shows.

    Attributes:
        picture_side: pixels along the longer side of a picture, at most.
        quality: WebP's, 0 to 100; None is lossless.
        map_side: rows or columns of an attention map, at most.
    """

    picture_side: int
    quality: int | None
    map_side: int


# From the finest down; a page takes the first that fits into its bytes.
FINENESSES = (
    Fineness(picture_side=SMALL_PICTURE, quality=None, map_side=64),
    Fineness(picture_side=512, quality=90, map_side=64),
    Fineness(picture_side=512, quality=80, map_side=32),
    Fineness(picture_side=384, quality=75, map_side=32),
    Fineness(picture_side=256, quality=70, map_side=16),
    Fineness(picture_side=128, quality=60, map_side=8),
)


def guidance_maps(one: Film) -> dict[str, Any] | None:
    """At each place of the latents, the length of eps_cond - eps_uncond over the channels; None
    without guidance. Bytes, of which 255 stands for the largest of the step, its peak."""
    run = one.run
    if run.eps_cond is None or run.eps_uncond is None:
        return None
    lengths = guidance(run)[list(one.frames)].float()  # (F, h, w)
    peaks = lengths.amax(dim=(1, 2))
    levels = (lengths / peaks.clamp(min=1e-30)[:, None, None]).mul(255).round().byte()
    return {
        "rows": levels.shape[1],
        "columns": levels.shape[2],
        "peaks": peaks.tolist(),
        "levels": base64_of(levels),
    }


def attention_maps(one: Film, resolution: tuple[int, int], map_side: int) -> dict[str, Any]:
    """What share of each place's attention goes to each word: the mean over the layers of one size,
    the sum over the word's tokens, so that at each place the words sum to 1.

    Every map, (F + 1, W, rows, columns) of them with the mean over all steps as the last, has its
    own peak, (F + 1, W), which its byte 255 stands for.
    """
    run, (rows, columns) = one.run, resolution
    layers = [maps for maps in run.maps.values() if maps.shape[1:3] == resolution]
    mean = torch.stack([maps.float() for maps in layers]).mean(dim=0)  # (S, rows, columns, L)
    shares = torch.stack([mean[..., list(w.tokens)].sum(dim=-1) for w in run.words], dim=1)
    shown = torch.cat([shares[list(one.frames)], shares.mean(dim=0, keepdim=True)])
    kept = (min(rows, map_side), min(columns, map_side))
    shown = F.adaptive_avg_pool2d(shown, kept)  # (F + 1, W, rows, columns)
    peaks = shown.amax(dim=(2, 3))
    levels = (shown / peaks.clamp(min=1e-30)[..., None, None]).mul(255).round().byte()
    return {
        "label": f"{rows}x{columns}",
        "layers": len(layers),
        "rows": kept[0],
        "columns": kept[1],
        "peaks": base64_of(peaks),
        "levels": base64_of(levels),
    }


def picture_uri(image: Image, fineness: Fineness) -> str:
    """A picture as a data: URI, no larger than asked."""
    small = image.convert("RGB")
    small.thumbnail((fineness.picture_side, fineness.picture_side))
    file = io.BytesIO()
    if fineness.quality is None:
        small.save(file, "WEBP", lossless=True)
    else:
        small.save(file, "WEBP", quality=fineness.quality)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def base64_of(tensor: Tensor) -> str:
    """The bytes of a tensor, little-endian as every browser's typed arrays are."""
    array = tensor.contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


def script_safe(data: object) -> str:
    """JSON that can stand in a <script> element: nothing in it can close the element, or open a
    comment."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def sha256(source: str) -> str:
    """The name by which a Content-Security-Policy allows this text and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
