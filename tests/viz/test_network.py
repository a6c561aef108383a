"""A UNet's shape, and the maps that pass through a network, are those of the network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import viz
from ldm.viz.colours import heat

MAPS = [
    viz.UNetMap("conv_in", 8, 16),
    viz.UNetMap("down.0.blocks.0", 12, 8, attends=True),
    viz.UNetMap("up.0.blocks.0", 20, 16, skip="conv_in"),
]


def test_a_square_for_each_map_and_an_arrow_for_each_skip() -> None:
    pytest.importorskip("matplotlib")
    ax = viz.unet_shape(MAPS)
    widths = [square.get_width() for square in ax.patches]
    assert widths[0] == widths[2] > widths[1]  # the larger map is the larger square
    assert len({square.get_facecolor() for square in ax.patches}) == 3
    arrows = [text for text in ax.texts if not text.get_text()]
    (arrow,) = arrows  # from the top of the first to the top of the last
    assert arrow.xyann == (0, widths[0] / 2) and arrow.xy == (2, widths[2] / 2)
    assert {"8", "12", "20", "16 x 16", "8 x 8"} <= {text.get_text() for text in ax.texts}


def test_a_shape_without_maps_or_with_a_skip_from_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match="there are no maps to show"):
        viz.unet_shape([])
    with pytest.raises(ValueError, match=r"up\.0\.blocks\.0 has a skip from 'conv_in'"):
        viz.unet_shape(MAPS[1:])


def holds(sheet: np.ndarray, part: np.ndarray) -> bool:
    """Whether these pixels are somewhere on the sheet."""
    windows = np.lib.stride_tricks.sliding_window_view(sheet, part.shape)
    return bool((windows == part).all(axis=(-3, -2, -1)).any())


def test_feature_maps_are_the_channels_that_differ_most_each_on_its_own_scale() -> None:
    values = torch.zeros(2, 3, 2, 2)
    values[0, 0] = 5.0  # the same everywhere: it shows nothing
    values[0, 1] = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    values[0, 2] = torch.tensor([[0.0, 0.1], [0.0, 0.1]])
    values[1] = 100.0  # of another picture
    kept = values.clone()
    one, two = (
        np.asarray(viz.feature_maps({"mid": values}, count=count, size=2)) for count in (1, 2)
    )
    assert torch.equal(values, kept)
    first, second = heat(np.array([[0, 1], [2, 3]]) / 3), heat([[0, 1], [0, 1]])
    assert holds(one, first) and not holds(one, second)
    assert holds(two, first) and holds(two, second)
    assert isinstance(viz.feature_maps({"a": values, "b": values[:, :2]}), Image.Image)


@pytest.mark.parametrize(
    ("layers", "count", "message"),
    [
        ({}, 6, "there are no feature maps to show"),
        ({"mid": torch.zeros(1, 2, 3, 3)}, 0, "there are no feature maps to show"),
        ({"time": torch.zeros(1, 8)}, 6, r"time must be \(B, C, h, w\), not \(1, 8\)"),
    ],
)
def test_what_is_no_map_is_refused(layers, count, message) -> None:
    with pytest.raises(ValueError, match=message):
        viz.feature_maps(layers, count=count)
