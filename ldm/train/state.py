"""What every training loop shares: its state, its records, and how a step is made fast."""

from __future__ import annotations

import contextlib
import copy
import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.device import multiplies_bfloat16
from ldm.files import written_whole


@dataclass(frozen=True)
class Record:
    """What one training step reports: the step's number (from 1), named values, which stay on the
    device until someone looks, and now and then a line for people."""

    step: int
    values: Mapping[str, float | Tensor]
    told: str = ""

    @property
    def figures(self) -> dict[str, float]:
        """The values as numbers. To look at them is to wait for the step to be done."""
        return {name: float(value) for name, value in self.values.items()}


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
            # All in a few kernels where there are kernels for that; else one by one, as ever.
            means, values = tuple(self.ema.parameters()), tuple(self.model.parameters())
            torch._foreach_lerp_(means, values, 1 - decay)

    def save(self, path: Path) -> None:
        """Write everything that `load` needs; a stop in the middle leaves the checkpoint before.

        Raises:
            WriteError: it cannot be written there, or the disk is full.
        """
        state = {
            "settings": asdict(self.settings),
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with written_whole(path) as temporary, temporary.open("wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:
                # Of a full disk torch says how far its own writer came; the system said the rest.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    def load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            StageError: it cannot be read, or was made with other settings, or for another model.
        """
        saved = read_state(path, self.device)
        if saved.settings != self.settings:
            raise StageError(f"{path} was made with {asdict(saved.settings)}: go on with the same")
        check_weights(path, saved.model, self.model)
        check_weights(path, saved.ema, self.ema)
        check_moments(path, saved, self.model)
        self.model.load_state_dict(saved.model)
        self.ema.load_state_dict(saved.ema)
        # The groups' numbers follow from the settings, so those of this run are right.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": saved.moments, "param_groups": groups})
        self.step = saved.step


# --- A checkpoint ----------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedState:
    """What `TrainState.save` wrote.

    Attributes:
        settings, step: of the run, and how far it had come.
        model, ema: the weights, by their names.
        moments: what AdamW knows of each parameter, by its number: how often it was changed, and
            the running means of its gradient and of its square.
    """

    settings: Optimisation
    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    moments: dict[int, dict[str, Tensor]]

    def __post_init__(self) -> None:
        if type(self.step) is not int or not 0 <= self.step <= self.settings.steps:
            raise ValueError(f"step {self.step!r:.40} is not one of {self.settings.steps}")
        for name in ("model", "ema"):
            if not is_tensors(getattr(self, name), str):
                raise ValueError(f"its {name} is not a table of tensors")
        moments: object = self.moments
        if not isinstance(moments, dict) or not all(
            type(i) is int and is_tensors(one, str) for i, one in moments.items()
        ):
            raise ValueError("its optimizer's state is not a table of tensors")


def read_state(path: Path, device: torch.device | str = "cpu") -> SavedState:
    """What `TrainState.save` wrote.

    Raises:
        StageError: it is not there, not such a file, or damaged.
    """
    if not path.is_file():
        raise StageError(f"{path} is not there")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch itself compares no checksum
        state = torch.load(path, map_location=device, weights_only=True)
        named = {name: state[name] for name in ("settings", "step", "model", "ema")}
        moments = state["optimizer"]["state"]
    except Exception as error:  # torch says a broken file in many ways and many lines
        raise StageError(f"{path} is not a checkpoint of a training stage") from error
    if damaged is not None:
        raise StageError(f"{path} is damaged: the checksum of {damaged} does not match")
    try:
        return SavedState(**named | {"settings": read_settings(state["settings"])}, moments=moments)
    except ValueError as error:
        raise StageError(f"{path} is damaged: {error}") from error


def read_settings(table: object) -> Optimisation:
    """The settings that a checkpoint was made with, or a ValueError."""
    kinds = {field.name: str(field.type) for field in fields(Optimisation)}
    if not isinstance(table, dict) or table.keys() != kinds.keys():
        raise ValueError(f"its settings are not {', '.join(kinds)}")
    for name, value in table.items():
        if type(value) not in ((int,) if kinds[name] == "int" else (int, float)):
            raise ValueError(f"its setting {name} is {value!r:.40}, not a number")
    return Optimisation(**table)


def is_tensors(table: object, key: type) -> bool:
    """Whether something is a table of tensors by keys of one type."""
    return isinstance(table, dict) and all(
        isinstance(name, key) and isinstance(value, Tensor) for name, value in table.items()
    )


def check_weights(path: Path, weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """A StageError unless the weights that were read from `path` are those of such a model."""
    own = model.state_dict()
    if weights.keys() != own.keys():
        raise StageError(f"{path} is not a checkpoint of this stage")
    for name, value in weights.items():
        if (value.shape, value.dtype) != (own[name].shape, own[name].dtype):
            raise StageError(
                f"{path} is not a checkpoint of this stage: {name} is {described(value)}, "
                f"not {described(own[name])}"
            )


def check_moments(path: Path, saved: SavedState, model: nn.Module) -> None:
    """A StageError unless the optimizer's state in `path` is that of such a model."""
    parameters = dict(enumerate(model.parameters()))
    if not saved.moments.keys() <= parameters.keys() or bool(saved.moments) != (saved.step > 0):
        raise StageError(f"{path} is damaged: its optimizer's state is of other parameters")
    for i, moments in saved.moments.items():
        own = parameters[i]
        expected = {"step": (torch.Size([]), torch.float32)}
        expected |= dict.fromkeys(("exp_avg", "exp_avg_sq"), (own.shape, own.dtype))
        if {name: (value.shape, value.dtype) for name, value in moments.items()} != expected:
            raise StageError(
                f"{path} is damaged: its optimizer's state of parameter {i} is another"
            )


def described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"


@contextlib.contextmanager
def fast_step(device: torch.device) -> Iterator[None]:
    """Run forward passes in bfloat16 where the weights stay float32 and the device is fast at it;
    else as they are.

    On a CPU attention is then computed by plain matrix products: for sequences as short as
    Horizon's they are several times faster backward than the fused kernel.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with contextlib.ExitStack() as stack:
        if multiplies_bfloat16(device):
            stack.enter_context(torch.autocast(device.type, dtype=torch.bfloat16))
            if device.type == "cpu":
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield
