"""What a network looks like inside: its shape, and the maps that pass through it.

    with ldm.record(pipe.unet, "mid", "up.0.blocks.1") as seen:
        pipe.unet(x, t, context)
    viz.feature_maps({name: calls[0] for name, calls in seen.items()})

Both are given names and numbers, and know no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image
from torch import Tensor

from ldm.viz.colours import LINES, heat
from ldm.viz.grids import grid
from ldm.viz.plots import new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW = 1.8  # between two sizes of maps in `unet_shape`, where the largest map is 0.9 wide


class UNetMap(NamedTuple):
    """One map of a UNet's forward pass.

    Attributes:
        name: the part that makes it, such as "down.0.blocks.0".
        channels, side: it is (channels, side, side).
        skip: the name of the earlier map that is put beside what the part is given, or "".
        attends: whether the part reads the prompt.
    """

    name: str
    channels: int
    side: int
    skip: str = ""
    attends: bool = False


def unet_shape(maps: Sequence[UNetMap], ax: Axes | None = None) -> Axes:
    """The maps of a UNet from left to right, small ones lower, with the skips as arrows.

    Raises:
        ValueError: there are none, or one has a skip from a map that is not before it.
    """
    if not maps:
        raise ValueError("there are no maps to show")
    for i, one in enumerate(maps):
        if one.skip and one.skip not in {earlier.name for earlier in maps[:i]}:
            raise ValueError(f"{one.name} has a skip from {one.skip!r}, which is not before it")
    ax = new_axes(9.0, 4.4) if ax is None else ax
    from matplotlib.patches import Rectangle

    kinds = {
        "in, out, halve, double": "#BBBBBB",
        "ResBlock": LINES[5],
        "ResBlock, and reads the prompt": LINES[4],
    }
    plain, block, reads = kinds.values()
    sides = sorted({one.side for one in maps}, reverse=True)
    at: dict[str, tuple[int, float, float]] = {}  # column, height, width
    for i, one in enumerate(maps):
        y, edge = -ROW * sides.index(one.side), 0.7 * one.side / sides[0] + 0.2
        at[one.name] = (i, y, edge)
        colour = reads if one.attends else block if "blocks" in one.name else plain
        corner = (i - edge / 2, y - edge / 2)
        ax.add_patch(Rectangle(corner, edge, edge, facecolor=colour, edgecolor="#333333"))
        ax.text(i, y - edge / 2 - 0.08, str(one.channels), ha="center", va="top", fontsize=8)
        if one.skip:
            x0, y0, e0 = at[one.skip]
            arrow = {"arrowstyle": "->", "color": "#888888", "connectionstyle": "arc3,rad=-0.12"}
            tip, tail = (i, y + edge / 2), (x0, y0 + e0 / 2)
            ax.annotate("", tip, tail, zorder=0, arrowprops=arrow)
    for row, side in enumerate(sides):
        ax.text(-1.0, -ROW * row, f"{side} x {side}", ha="right", va="center")
    for label, colour in kinds.items():
        ax.scatter([], [], marker="s", s=80, color=colour, edgecolor="#333333", label=label)
    ax.legend(
        loc="upper center", bbox_to_anchor=(0.5, 0.02), ncol=3, fontsize="small", frameon=False
    )
    ax.set(xlim=(-2.8, len(maps)), ylim=(0.8 - ROW * len(sides), 1.9))
    ax.set_title("Squares are maps, the number is their channels, arrows are skips", fontsize=10)
    ax.set_aspect("equal")
    ax.axis("off")
    return ax


def feature_maps(
    layers: Mapping[str, Tensor], *, count: int = 6, title: str = "", size: int | None = 80
) -> Image.Image:
    """The channels of some layers as pictures: a row each, the channels that differ most from
    place to place first, each from its own smallest value (black) to its largest (yellow).

    Args:
        layers: {name: (B, C, h, w)}; the first of the batch is shown.
        count: how many channels of each, at most.

    Raises:
        ValueError: there are no layers, no channels to show, or one is not (B, C, h, w).
    """
    if not layers or count < 1:
        raise ValueError("there are no feature maps to show: name a layer, and count 1 or more")
    rows, captions, names = [], [], []
    for name, values in layers.items():
        if values.ndim != 4:
            raise ValueError(f"{name} must be (B, C, h, w), not {tuple(values.shape)}")
        maps = values[0].detach().float().cpu()  # (C, h, w)
        spread = maps.flatten(1).std(dim=1)
        chosen = spread.argsort(descending=True, stable=True)[:count].tolist()
        low, high = maps.amin(dim=(1, 2)), maps.amax(dim=(1, 2))
        scaled = (maps - low[:, None, None]) / (high - low).clamp(min=1e-12)[:, None, None]
        rows.append([Image.fromarray(heat(scaled[channel].numpy())) for channel in chosen])
        captions.append([f"channel {channel}" for channel in chosen])
        names.append(f"{name}\n{maps.shape[1]} x {maps.shape[2]}")
    note = "Each map from its smallest value (black) to its largest (yellow)."
    return grid(rows, captions=captions, row_captions=names, title=title, note=note, size=size)
