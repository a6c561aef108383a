"""Colours that keep their order in grey and for colour-blind eyes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

# Nine of the stops of matplotlib's "inferno" (van der Walt and Smith, public domain): every step
# is brighter than the one before.
STOPS = (
    (0x00, 0x00, 0x04),
    (0x21, 0x0C, 0x4A),
    (0x57, 0x10, 0x6E),
    (0x8A, 0x22, 0x6A),
    (0xBC, 0x37, 0x54),
    (0xE4, 0x5A, 0x31),
    (0xF9, 0x8E, 0x09),
    (0xF9, 0xCB, 0x35),
    (0xFC, 0xFF, 0xA4),
)

# Okabe and Ito's colours ("Color Universal Design", 2008), those that are readable on white:
# blue, vermilion, green, purple, orange, sky blue.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def heat(values: npt.ArrayLike) -> Bytes:
    """Numbers in [0, 1], any shape, to the colours (..., 3) from black over red to light yellow;
    what lies outside of [0, 1] is clamped to it."""
    at = np.clip(np.asarray(values, np.float64), 0.0, 1.0) * (len(STOPS) - 1)
    table = np.asarray(STOPS, np.float64)
    channels = [np.interp(at, np.arange(len(STOPS)), table[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)
