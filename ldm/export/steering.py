"""The UNet with its insides on the outside, for graphs that cannot be hooked: inputs that change it
while it runs, and outputs that show it.

`SteeredUNet` is a second UNet over the same weights. Where its inputs are neutral (no bias, all
weights and gates 1) it says what the plain one says, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ldm.attention import AttentionWeights, SpatialTransformer
from ldm.layers import ResBlock
from ldm.unet import UNet


@dataclass(eq=False)
class Steering:
    """What one call of a steered UNet is told, and what it shows; set at the call's beginning.

    Attributes:
        bias: added to each token's score before the softmax, (B, L); minus a large number strikes
            the token (`ldm.observe.edits.strike`).
        weight: multiplies each token's share after the softmax, (B, L)
            (`ldm.observe.edits.weigh`).
        gates: how much of what each block adds is added, (K,); 0 switches it off.
        maps: of each cross-attention layer, (B, N, L): the mean over heads, after the softmax.
        blocks: what comes out of each block, (B, C, h, w).
    """

    bias: Tensor = field(default_factory=lambda: torch.zeros(1, 1))
    weight: Tensor = field(default_factory=lambda: torch.ones(1, 1))
    gates: Tensor = field(default_factory=lambda: torch.ones(1))
    maps: dict[str, Tensor] = field(default_factory=dict)
    blocks: dict[str, Tensor] = field(default_factory=dict)


class SteeredWeights(AttentionWeights):
    """The weights of one cross-attention layer, with a bias and a weight for every token."""

    def __init__(self, steering: Steering, name: str) -> None:
        super().__init__()
        self.steering, self.name = steering, name

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As in `AttentionWeights`."""
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, N, L)
        shares = torch.softmax(scores + self.steering.bias[:, None, None], dim=-1)
        self.steering.maps[self.name] = shares.mean(dim=1)  # (B, N, L)
        return (shares * self.steering.weight[:, None, None]) @ v


class GatedRes(nn.Module):
    """A ResBlock of which a gate lets through what it adds: skip(x) + gate * h(x)."""

    def __init__(self, block: ResBlock, steering: Steering, gate: int) -> None:
        super().__init__()
        self.block, self.steering, self.gate = block, steering, gate

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """As in `ResBlock`."""
        skip = self.block.skip(x)
        return skip + self.steering.gates[self.gate] * (self.block(x, time) - skip)


class GatedTransformer(nn.Module):
    """A spatial transformer of which a gate lets through what it adds."""

    def __init__(self, block: SpatialTransformer, steering: Steering, gate: int) -> None:
        super().__init__()
        self.block, self.steering, self.gate = block, steering, gate

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """As in `SpatialTransformer`."""
        return x + self.steering.gates[self.gate] * (self.block(x, context) - x)


class SteeredUNet(nn.Module):
    """A UNet whose words are weighed and whose blocks are gated by inputs.

    Attributes:
        layers: the names of its cross-attention layers, in the order of their maps.
        blocks: the names of its blocks, in the order of their gates and outputs.
    """

    def __init__(self, unet: UNet, *, insides: bool = True) -> None:
        """`insides`: return maps and blocks too. `unet` stays as it is, and shares its weights."""
        super().__init__()
        with torch.device("meta"):
            copy = UNet(unet.config, unet.num_timesteps)
        copy.load_state_dict(unet.state_dict(), assign=True)
        self.unet = copy.eval().requires_grad_(False)
        self.insides = insides
        self._steering = steering = Steering()
        self.layers = tuple(name for name, one in copy.named_modules() if is_cross(name, one))
        for name in self.layers:
            copy.get_submodule(name).weights = SteeredWeights(steering, name)
        # Blocks by the names of the UNet: down.0.blocks.0, ..., mid, ..., up.0.blocks.1.
        owners = {
            name: one
            for name, one in copy.named_modules()
            if name == "mid" or name.rpartition(".")[0].endswith(".blocks")
        }
        self.blocks = tuple(sorted(owners, key=as_passed))
        for gate, name in enumerate(self.blocks):
            for part, module in list(owners[name].named_children()):
                if isinstance(module, ResBlock):
                    setattr(owners[name], part, GatedRes(module, steering, gate))
                elif isinstance(module, SpatialTransformer):
                    setattr(owners[name], part, GatedTransformer(module, steering, gate))
            owners[name].register_forward_hook(keeper(steering, name))

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, bias: Tensor, weight: Tensor, gates: Tensor
    ) -> tuple[Tensor, ...]:
        """x, t, context as in `UNet.forward`; bias and weight (B, L), gates (K,) as in `Steering`.

        Returns:
            what the UNet predicts, (B, C, h, w); with insides, the maps of `layers` and the outputs
            of `blocks` follow, as in `Steering`.
        """
        steering = self._steering
        steering.bias, steering.weight, steering.gates = bias, weight, gates
        steering.maps, steering.blocks = {}, {}
        output = self.unet(x, t, context)
        if not self.insides:
            return (output,)
        maps = [steering.maps[name] for name in self.layers]
        return (output, *maps, *(steering.blocks[name] for name in self.blocks))


def is_cross(name: str, module: nn.Module) -> bool:
    """Whether this is a cross-attention layer of a UNet."""
    return name.endswith(".cross_attention") and hasattr(module, "weights")


def as_passed(name: str) -> tuple[int, int, int]:
    """Sorts blocks as a latent passes them: down.0 to the last level, mid, and back up to up.0."""
    if name == "mid":
        return 1, 0, 0
    way, level, _, block = name.split(".")
    return (0, int(level), int(block)) if way == "down" else (2, -int(level), int(block))


def keeper(steering: Steering, name: str) -> Callable[[nn.Module, object, Tensor], None]:
    """A forward hook that keeps what comes out of a block."""

    def keep(module: nn.Module, args: object, output: Tensor) -> None:
        steering.blocks[name] = output

    return keep
