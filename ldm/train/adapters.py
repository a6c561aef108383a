"""Teaching a finished model one thing more, from a handful of pictures: by LoRA, or by a word.

Both loops minimise what the UNet was trained with (LDM, eq. 3). What they may change is little:

- `LowRank`, two thin matrices beside each of the UNet's attention projections (Hu et al. 2021,
  arXiv:2106.09685): the model learns to *draw* something new;
- `NewWord`, the vectors that one more word is embedded as (Gal et al. 2022, arXiv:2208.01618): the
  model learns to be *asked* for something that it can draw already.

The model itself is only read: its weights stay as they are, bit for bit, and between two steps it
draws as ever. What was learnt is a small file, which `pipe.load_lora` and `pipe.load_embedding`
read: a LoRA under kohya's names, a word as diffusers writes it, since both are read everywhere.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ldm.adapters import corrected
from ldm.checkpoints.diffusers.names import diffusers_unet_names
from ldm.checkpoints.embedding import MOST_VECTORS
from ldm.config import TextConfig
from ldm.device import sent
from ldm.files import written_whole
from ldm.schedule import NoiseSchedule
from ldm.text import CLIPTextEncoder
from ldm.tokenizer import Tokenizer
from ldm.train.data import rng_at
from ldm.train.diffusion import Batch, DiffusionSettings, min_snr_weight
from ldm.train.lessons import Lessons
from ldm.train.state import Optimisation, Record, TrainState, fast_step
from ldm.unet import UNet

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")
CONVOLUTIONS = ("conv1", "conv2")
HIGHEST_RANK = 1024


@dataclass(frozen=True)
class LoraSettings:
    """How a LoRA is trained. The numbers are Horizon's; for Stable Diffusion people take a tenth of
    the learning rate and several times the steps."""

    optimisation: Optimisation = field(
        default_factory=lambda: Optimisation(
            steps=200, batch_size=8, learning_rate=2e-3, warmup=20, ema_decay=0.98
        )
    )
    rank: int = 4
    """Columns of the thin matrices, 1 to 1,024."""
    alpha: float | None = None
    """What is added counts alpha / rank; None is the rank."""
    convolutions: bool = False
    """Whether the ResBlocks' convolutions are corrected as well as attention."""

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or not 1 <= self.rank <= HIGHEST_RANK:
            raise ValueError(f"rank must be 1 to {HIGHEST_RANK}, not {self.rank!r:.40}")
        if self.alpha is not None and not 0 < self.alpha <= HIGHEST_RANK:
            raise ValueError(f"alpha must be above 0, to {HIGHEST_RANK}, not {self.alpha!r:.40}")


@dataclass(frozen=True)
class EmbeddingSettings:
    """How a word is trained."""

    optimisation: Optimisation = field(
        default_factory=lambda: Optimisation(
            steps=200,
            batch_size=8,
            learning_rate=2e-2,
            warmup=20,
            weight_decay=0.0,
            ema_decay=0.98,
        )
    )
    vectors: int = 1
    """How many tokens the word becomes, 1 to 75."""

    def __post_init__(self) -> None:
        if not isinstance(self.vectors, int) or not 1 <= self.vectors <= MOST_VECTORS:
            raise ValueError(f"vectors must be 1 to {MOST_VECTORS}, not {self.vectors!r:.40}")


# --- LoRA -------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """The corrections of a UNet's layers, each B A (Hu et al. 2021, section 4.1): A is Gaussian and
    B zero, so that nothing is changed at first. Its state is kohya's file."""

    def __init__(
        self,
        unet: UNet,
        rank: int,
        alpha: float | None,
        generator: torch.Generator,
        convolutions: bool = False,
    ) -> None:
        """Of the projections of attention, as the paper has it, or of the ResBlocks' convolutions
        as well: where a UNet has no attention, only these can draw what is new."""
        super().__init__()
        self.keys: dict[str, str] = {}  # our name of a layer -> its key
        for ours, theirs in diffusers_unet_names(unet.config).items():
            kind = ours.rpartition(".")[2]
            if kind in PROJECTIONS or (convolutions and kind in CONVOLUTIONS):
                try:
                    layer = unet.get_submodule(ours)
                except AttributeError:  # not at this level
                    continue
                key = f"lora_unet_{theirs.replace('.', '_')}"
                self.keys[ours] = key
                self.add_module(key, Correction(layer, rank, alpha or rank, generator))

    @contextlib.contextmanager
    def beside(self, unet: UNet) -> Iterator[None]:
        """Within it, the UNet computes with the corrections: W x + alpha / rank B A x (eq. 3)."""
        hooks = [
            unet.get_submodule(ours).register_forward_hook(getattr(self, key))
            for ours, key in self.keys.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class Correction(nn.Module):
    """What is added to one layer, as a forward hook of it."""

    def __init__(
        self, layer: nn.Module, rank: int, alpha: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        if isinstance(layer, nn.Conv2d):  # A looks through its window, B at each place
            window = (layer.kernel_size, layer.stride, layer.padding)
            self.lora_down = skip_init(nn.Conv2d, layer.in_channels, rank, *window, bias=False)
            self.lora_up = skip_init(nn.Conv2d, rank, layer.out_channels, 1, bias=False)
        else:
            assert isinstance(layer, nn.Linear)
            self.lora_down = skip_init(nn.Linear, layer.in_features, rank, bias=False)  # A
            self.lora_up = skip_init(nn.Linear, rank, layer.out_features, bias=False)  # B
        down, up = self.lora_down.weight, self.lora_up.weight
        nn.init.zeros_(up)
        # So that A x is about as large as x.
        nn.init.normal_(down, std=down[0].numel() ** -0.5, generator=generator)
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.factor = alpha / rank

    def forward(self, layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """y + alpha / rank B A x, computed as `ldm.adapters.Lora` does it."""
        down, up = self.lora_down.weight, self.lora_up.weight.flatten(1)
        return y + self.factor * corrected(layer, args[0], down, up)


def train_lora(
    state: TrainState,
    settings: LoraSettings,
    lessons: Lessons,
    unet: UNet,
    text: CLIPTextEncoder,
    schedule: NoiseSchedule,
    prediction: str = "eps",
) -> Iterator[Record]:
    """Minimise the UNet's error on a few pictures over `state.model`, a `LowRank` of it.

    Yields one record per step, with the weighted `loss` and the plain `mse`.
    """
    lora, context = cast(LowRank, state.model), contexts(text, lessons.captions)
    while state.step < settings.optimisation.steps:
        chosen, batch = lesson(state, lessons, schedule)
        with lora.beside(unet):
            loss, mse = losses(batch, unet, context[chosen], prediction)
        state.update(loss)
        yield Record(state.step, {"loss": loss.detach(), "mse": mse.detach()})


@torch.no_grad()
def contexts(text: CLIPTextEncoder, captions: Sequence[str]) -> Tensor:
    """The text states of captions, (N, L, D); equal ones are encoded once."""
    with warnings.catch_warnings():  # that a word was never seen is what is about to be changed
        warnings.filterwarnings("ignore", message="this model has never seen")
        known = {caption: text([caption]) for caption in dict.fromkeys(captions)}
    return torch.cat([known[caption] for caption in captions])


# --- A word -----------------------------------------------------------------------------------


class NewWord(nn.Module):
    """What a new word is embedded as: `vectors` (n, D), each begun as that of the word `start`."""

    def __init__(self, text: CLIPTextEncoder, start: str, count: int) -> None:
        """Raises ValueError as `start_id`."""
        super().__init__()
        known = text.transformer.embeddings.token_embedding.weight
        first = known[start_id(text.require_tokenizer(), start)]  # (D,)
        self.vectors = nn.Parameter(first.detach().float().repeat(count, 1))


def start_id(tokenizer: Tokenizer, start: str) -> int:
    """The token of a word to begin from, or a ValueError: it is unknown, or several tokens."""
    ids = tokenizer.encode(start)
    if len(ids) != 1 or ids[0] >= len(tokenizer) or tokenizer.unseen(start):
        raise ValueError(f"a word begins from a known word of one token, not from {start!r:.80}")
    return ids[0]


def train_embedding(
    state: TrainState,
    settings: EmbeddingSettings,
    lessons: Lessons,
    word: str,
    unet: UNet,
    text: CLIPTextEncoder,
    schedule: NoiseSchedule,
    prediction: str = "eps",
) -> Iterator[Record]:
    """Minimise the UNet's error on a few pictures over `state.model`, a `NewWord` that stands in
    their captions as `word`: v* = argmin E ||eps - eps_theta(z_t, t, tau(y))||^2 (Gal et al. 2022,
    eq. 2).

    Yields one record per step, with the weighted `loss` and the plain `mse`.

    Raises:
        ValueError: at the first step: the vocabulary has the word, or a caption lacks it.
    """
    known, config = text.require_tokenizer(), text.config
    ids, index = (
        sent(one, state.device)
        for one in spelt(known, config, word, settings.vectors, lessons.captions)
    )
    new = cast(NewWord, state.model)
    while state.step < settings.optimisation.steps:
        chosen, batch = lesson(state, lessons, schedule)
        with embedded(text, new.vectors, index[chosen]), fast_step(state.device):
            context = text.encode(ids[chosen])
        loss, mse = losses(batch, unet, context, prediction)
        state.update(loss)
        yield Record(state.step, {"loss": loss.detach(), "mse": mse.detach()})


def spelt(
    tokenizer: Tokenizer, config: TextConfig, word: str, count: int, captions: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Captions with a word of `count` vectors that the tokenizer does not have.

    Returns:
        The ids that it has, (N, L), 0 where the word stands; and which of the word's vectors stands
        where, (N, L), elsewhere -1.

    Raises:
        ValueError: it has the word already, no file can have it, or a caption lacks it.
    """
    if "." in word:  # which parts the names in a file
        raise ValueError(f"the word must be without a dot, not {word!r:.80}")
    tokenizer = tokenizer.with_word(word, count)
    own = tokenizer.added[word.lower()]
    length, fill = config.max_length, config.pad_token_id
    rows = [tokenizer.pad(tokenizer.encode(caption), length, fill) for caption in captions]
    for row, caption in zip(rows, captions, strict=True):
        if not set(own) <= set(row):
            raise ValueError(f"the word {word!r:.80} is not in the caption {caption!r:.80}")
    ids = torch.tensor(rows)
    index = torch.where(ids >= own[0], ids - own[0], -1)
    return ids.where(index < 0, 0), index


@contextlib.contextmanager
def embedded(text: CLIPTextEncoder, vectors: Tensor, index: Tensor) -> Iterator[None]:
    """Within it, the encoder embeds places of the ids (B, L) as vectors (n, D) by their index."""

    def put(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return torch.where((index >= 0)[..., None], vectors[index].to(y.dtype), y)  # (B, L, D)

    hook = text.transformer.embeddings.token_embedding.register_forward_hook(put)
    try:
        yield
    finally:
        hook.remove()


# --- The error that both minimise -------------------------------------------------------------


RECIPE = DiffusionSettings()
"""How the UNet itself was trained: its timesteps and its weights of them are taken here too."""


def lesson(state: TrainState, lessons: Lessons, schedule: NoiseSchedule) -> tuple[Tensor, Batch]:
    """Which lessons a step learns from, (B,), and these with noise on them; both depend on the seed
    and the step alone."""
    size, count = state.settings.batch_size, len(lessons.latents)
    rng = rng_at(state.settings.seed + 1, state.step)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    chosen = sent(torch.from_numpy(rng.choice(count, size, size > count)), state.device)
    return chosen, Batch.drawn(lessons.latents[chosen], rng, generator, schedule, RECIPE)


def losses(batch: Batch, unet: UNet, context: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """The mean squared error of what the UNet says, weighted by its noise as in training
    (`min_snr_weight`), and plain."""
    with fast_step(batch.x0.device):
        output = unet(batch.x, batch.t, context)
    error = batch.error(output, prediction)  # (B, C, h, w)
    balance = min_snr_weight(prediction, batch.alpha_bar, RECIPE.snr_gamma)  # (B, 1, 1, 1)
    return (balance * error).mean(), error.mean()


# --- Files ------------------------------------------------------------------------------------


def save_lora(path: Path, lora: LowRank) -> None:
    """Write it by kohya's names, whole or not at all: `down`, `up` and alpha of each layer.

    Raises:
        WriteError: it cannot be written there.
    """
    write(path, lora.state_dict())


def save_embedding(path: Path, word: str, vectors: Tensor) -> None:
    """Write a word as diffusers does, whole or not at all: its vectors (n, D), under its name.

    Raises:
        WriteError: it cannot be written there.
    """
    write(path, {word: vectors})


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Tensors as a safetensors file."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with written_whole(path) as temporary:
        save_file(plain, temporary, metadata={"format": "pt"})
