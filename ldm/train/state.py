"""What every training loop shares: its state, its records, and how a step is made fast."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.files import written_whole


@dataclass(frozen=True)
class Record:
    """What one training step reports: the step's number (from 1), and named figures."""

    step: int
    figures: dict[str, float]


@dataclass(frozen=True)
class Optimisation:
    """How long and how fast to learn: the settings that all three stages share."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 200
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    grad_clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(
                f"steps and batch_size must be 1 or more, not {self.steps} and {self.batch_size}"
            )
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, not {self.learning_rate}")
        if self.seed < 0:
            raise ValueError(f"the seed must be 0 or more, not {self.seed}")


class StageError(ValueError):
    """A stage that cannot start: what is missing, or what would be overwritten."""


class TrainState:
    """A model in training, the running mean of its weights, and its optimizer.

    `ema` is what ships: it follows the weights with `ema_decay`, sooner at the start (Polyak &
    Juditsky 1992; LDM's code has the same warm-up).
    """

    def __init__(self, model: nn.Module, settings: Optimisation) -> None:
        self.model = model
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        self.settings = settings
        self.step = 0
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=settings.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=settings.weight_decay,
            fused=True,
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def learning_rate(self) -> float:
        """Linear warm-up, then a half cosine down to a twentieth."""
        s = self.settings
        if self.step < s.warmup:
            return s.learning_rate * (self.step + 1) / s.warmup
        done = (self.step - s.warmup) / max(1, s.steps - s.warmup)
        return s.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))

    def update(self, loss: Tensor) -> None:
        """One optimizer step down the gradient of `loss`; the running mean follows."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
        self.optimizer.step()
        self.step += 1
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, value in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)

    def save(self, path: Path) -> None:
        """Write everything that `load` needs; a stop in the middle leaves the checkpoint before."""
        state = {
            "settings": asdict(self.settings),
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with written_whole(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            StageError: it cannot be read, or was made with other settings, or for another model.
        """
        state = read_state(path, self.device)
        if state["settings"] != asdict(self.settings):
            raise StageError(f"{path} was made with {state['settings']}: go on with the same")
        if state["model"].keys() != self.model.state_dict().keys():
            raise StageError(f"{path} is not a checkpoint of this stage")
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def read_state(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `TrainState.save` wrote.

    Raises:
        StageError: it is not there, or not such a file.
    """
    if not path.is_file():
        raise StageError(f"{path} is not there")
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        if missing := {"settings", "step", "model", "ema", "optimizer"} - state.keys():
            raise KeyError(*missing)
    except Exception as error:  # torch says a broken file in many ways and many lines
        raise StageError(f"{path} is not a checkpoint of a training stage") from error
    return state


@contextlib.contextmanager
def fast_step(device: torch.device) -> Iterator[None]:
    """Run forward passes in bfloat16 where the weights stay float32.

    On a CPU attention is computed by plain matrix products: for sequences as short as Horizon's
    they are several times faster backward than the fused kernel.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, dtype=torch.bfloat16))
        if device.type == "cpu":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield
