"""Where the stages of a pipeline compute, and how: what `pipe.optimize` has arranged.

Without it all stages stay where they are, and compute as their files say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from ldm.text import CLIPTextEncoder
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

if TYPE_CHECKING:
    from ldm.speed.gpu import FastUNet

LARGE = 30_000_000
"""From how many parameters on a stage gains; smaller ones spend time on calls."""


@dataclass(frozen=True)
class Workplace:
    """Where and how the stages of a pipeline compute.

    Attributes:
        optimized: whether they may compute otherwise than plainly.
        low_memory: whether a stage gives back what it takes when its work is done.
        visited: the GPU that stages come to when they work, where with `low_memory` they do not
            stay; None where they stay.
        fast_unet: a faster way to ask the UNet.
    """

    optimized: bool = False
    low_memory: bool = False
    visited: torch.device | None = None
    fast_unet: FastUNet | None = None

    @classmethod
    def arranged(
        cls,
        unet: UNet,
        vae: AutoencoderKL,
        text: CLIPTextEncoder,
        device: torch.device,
        *,
        low_memory: bool,
    ) -> Self:
        """The fastest that there is for stages that compute on this device, or the one in least
        memory: see `TextToImage.optimize`."""
        large = [
            stage
            for stage in (unet, vae, text)
            if sum(weight.numel() for weight in stage.parameters()) >= LARGE
        ]
        if device.type != "cuda":
            from ldm.speed.cpu import optimize

            for stage in large:
                optimize(stage)
            return cls(optimized=True, low_memory=low_memory)
        from ldm.speed.gpu import FastUNet, can_compile, optimize_decoder

        for stage in (unet, vae, text):
            stage.to("cpu" if low_memory else device)
        if low_memory:
            return cls(optimized=True, low_memory=True, visited=device)
        if vae in large:
            optimize_decoder(vae)
        return cls(
            optimized=True, fast_unet=FastUNet(unet, compiled=unet in large and can_compile())
        )

    @contextlib.contextmanager
    def at_work(self, stage: nn.Module) -> Iterator[None]:
        """A stage while it computes: where it is to, and in the precision that it is to."""
        device = next((weight.device for weight in stage.parameters()), torch.device("cpu"))
        if self.visited is not None and device.type != self.visited.type:
            stage.to(self.visited)
        if (self.visited or device).type != "cuda":
            yield
            return
        from ldm.speed.gpu import in_float32

        with in_float32(self.visited or device, tf32=self.optimized):
            yield

    def rest(self, stage: nn.Module) -> None:
        """With `low_memory`, give back what a stage takes until it works again."""
        if self.visited is not None:
            stage.to("cpu")
        elif self.low_memory:
            from ldm.speed.cpu import rest

            rest(stage)

    def ask(self, unet: UNet, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """What the UNet says, in the fastest way that there is: see `UNet.forward`."""
        with self.at_work(unet):
            fast = self.fast_unet
            if fast is not None and fast.unet is unet:
                return fast(x, t, context)
            return unet(x, t, context)
