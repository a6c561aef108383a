"""What is added to a model that is loaded: LoRAs, computed beside its weights.

A layer y = W x with a LoRA gives y + scale * alpha / rank * up (down x): the same as with the
weight W + scale * alpha / rank * up @ down, but W stays what it is. So a LoRA is taken off without
a trace, its scale is changed from one picture to the next, and several are added up. `fuse` gives
the layers those weights, and the LoRAs are gone.

A LoRA stands in its model as forward hooks, one for each layer that it corrects, and as buffers of
these layers that no file of weights has: they move with the model to any device and dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ldm.attention import Pointwise
from ldm.checkpoints.lora import Factors, check_scale, merged, read_lora
from ldm.files import file_sha256

NUMBERS = itertools.count()  # of LoRAs, for the names of their buffers


class Lora:
    """A LoRA on a model, as `pipe.load_lora` returns it.

    Attributes:
        path, sha256: its file, and that file's hash.
        scale: how strongly it counts, -1,000 to 1,000; 0 is not at all. It may be set at any time.
        layers: of how many layers it corrects the weights.
    """

    def __init__(self, path: str | Path, stages: Mapping[str, nn.Module], scale: float) -> None:
        """Read the file and add it to the stages "unet" and "text".

        Raises:
            ValueError: the scale is none.
            FileNotFoundError, CheckpointError: as `ldm.checkpoints.lora.read_lora`.
        """
        self.scale = scale
        self.path = Path(path)
        corrections = read_lora(path, stages)
        self.sha256 = file_sha256(self.path) if self.path.is_file() else ""
        self.layers = len(corrections)
        self.name = f"lora_{next(NUMBERS)}"
        self._on: list[tuple[nn.Module, float, RemovableHandle]] = []
        for (stage, name), factors in corrections.items():
            self._add(stages[stage].get_submodule(name), factors)

    @property
    def scale(self) -> float:
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        check_scale(scale)
        self._scale = float(scale)

    @property
    def is_on(self) -> bool:
        """Whether it is on the model still: `remove` and `fuse` take it off."""
        return bool(self._on)

    def __repr__(self) -> str:
        state = f"scale {self.scale:g}" if self.is_on else "removed"
        return f"Lora({self.path}: {self.layers} layers, {state})"

    def remove(self) -> None:
        """Take it off: the model computes what it did before, bit for bit. Again does nothing."""
        for layer, _, hook in self._on:
            hook.remove()
            for part in ("down", "up"):
                delattr(layer, f"{self.name}_{part}")
        self._on = []

    def fuse(self) -> None:
        """Give the layers the corrected weights, computed in float32, and take it off. It cannot be
        undone: what was rounded away is lost."""
        for layer, factor, _ in self._on:
            assert isinstance(layer.weight, nn.Parameter)
            down, up = self._factors(layer)
            layer.weight = merged(layer.weight, down, up, self.scale * factor)
        self.remove()

    def _add(self, layer: nn.Module, factors: Factors) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        for part, value in {"down": factors.down, "up": factors.up}.items():
            value = value.to(weight.device, weight.dtype)
            layer.register_buffer(f"{self.name}_{part}", value, persistent=False)
        factor = factors.factor

        def beside(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            if self.scale == 0:
                return y
            down, up = self._factors(layer)
            return y + self.scale * factor * corrected(layer, args[0], down, up)

        # Before any other hook, so that whoever looks at the layer sees what goes on from it.
        hook = layer.register_forward_hook(beside, prepend=True)
        self._on.append((layer, factor, hook))

    def _factors(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        down, up = (getattr(layer, f"{self.name}_{part}") for part in ("down", "up"))
        return down, up


def corrected(layer: nn.Module, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """up (down x), as the layer looks at x: at each row, at each place, or through its window."""
    if isinstance(layer, nn.Conv2d):
        h = F.conv2d(x, down, stride=layer.stride, padding=layer.padding)
        return F.conv2d(h, up[:, :, None, None])  # (B, out, H, W)
    if isinstance(layer, Pointwise):
        return F.conv2d(F.conv2d(x, down[:, :, None, None]), up[:, :, None, None])
    return F.linear(F.linear(x, down), up)  # (..., out)
