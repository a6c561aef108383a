"""From a folder of pictures to a file: a LoRA or a word, with progress bar, log and checkpoints.

As the stages of `ldm.train.run`, a run keeps its state in `lora.pt` or `embedding.pt` of its folder
and its log beside it; what it ends with is `lora.safetensors` or `embedding.safetensors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from ldm.config import ModelConfig
from ldm.pipeline import TextToImage
from ldm.tokenizer import Tokenizer
from ldm.train.adapters import (
    EmbeddingSettings,
    LoraSettings,
    LowRank,
    NewWord,
    save_embedding,
    save_lora,
    spelt,
    start_id,
    train_embedding,
    train_lora,
)
from ldm.train.lessons import encode_lessons
from ldm.train.run import check_start, follow, prepare
from ldm.train.state import Optimisation, read_state

Told = Sequence[tuple[Path, str]]
"""Pictures and their captions, as `ldm.train.lessons.read_folder` gives them."""


def teach_lora(
    pipe: TextToImage, told: Told, out: Path, settings: LoraSettings, *, resume: bool = False
) -> Path:
    """Train a LoRA in a folder, and return its file; the model stays as it is.

    Raises:
        StageError: the folder does not fit `resume`.
        FileNotFoundError, ValueError: as `encode_lessons`.
        WriteError: something cannot be written there.
    """

    def fresh() -> LowRank:
        generator = torch.Generator().manual_seed(settings.optimisation.seed)
        s = settings
        return LowRank(pipe.unet, s.rank, s.alpha, generator, s.convolutions)

    pictures, captions = zip(*told, strict=True)
    state = prepare(fresh, settings.optimisation, out, "lora", resume, str(pipe.device))
    lessons = encode_lessons(pipe, pictures, captions)
    model = (pipe.unet, pipe.text, pipe.schedule, pipe.config.prediction)
    follow(train_lora(state, settings, lessons, *model), state, out, "lora")
    path = out / "lora.safetensors"
    save_lora(path, cast(LowRank, state.ema))
    return path


@dataclass(frozen=True)
class WordAsked:
    """A word that is to be learnt.

    Attributes:
        told: pictures, and captions in which it stands.
        word: none that the vocabulary has.
        start: a known word of one token, from whose vector the new ones begin.
    """

    told: Told
    word: str
    start: str

    def check(self, tokenizer: Tokenizer, config: ModelConfig) -> None:
        """A ValueError unless a model can learn it."""
        start_id(tokenizer, self.start)
        spelt(tokenizer, config.text, self.word, 1, [caption for _, caption in self.told])


def teach_embedding(
    pipe: TextToImage,
    asked: WordAsked,
    out: Path,
    settings: EmbeddingSettings,
    *,
    resume: bool = False,
) -> Path:
    """Train the vectors of a word in a folder, and return its file; the model stays as it is.

    Raises:
        StageError: the folder does not fit `resume`.
        FileNotFoundError, ValueError: as `encode_lessons`, or for a word that cannot be learnt.
        WriteError: something cannot be written there.
    """

    def fresh() -> NewWord:
        return NewWord(pipe.text, asked.start, settings.vectors)

    asked.check(pipe.text.require_tokenizer(), pipe.config)
    pictures, captions = zip(*asked.told, strict=True)
    state = prepare(fresh, settings.optimisation, out, "embedding", resume, str(pipe.device))
    lessons = encode_lessons(pipe, pictures, captions)
    model = (pipe.unet, pipe.text, pipe.schedule, pipe.config.prediction)
    loop = train_embedding(state, settings, lessons, asked.word, *model)
    follow(loop, state, out, "embedding")
    path = out / "embedding.safetensors"
    save_embedding(path, asked.word, cast(NewWord, state.ema).vectors)
    return path


# --- What can be said before the model is read -----------------------------------------------


def check_model(config: ModelConfig) -> None:
    """A ValueError unless the UNet reads latents alone."""
    if config.unet.in_channels != config.vae.latent_channels:
        told = f"{config.name} reads {config.unet.in_channels} channels, a picture beside the"
        raise ValueError(f"{told} latents: it cannot be taught")


def started(
    path: Path, recipe: Optimisation, changes: dict[str, Any], resume: bool
) -> Optimisation:
    """How a run is to be optimised: by the recipe but for the changes, or as its checkpoint began.

    Raises:
        StageError: as `prepare`.
        ValueError: a setting is out of its range.
    """
    check_start(path, resume)
    return replace(read_state(path).settings if resume else recipe, **changes)


def lora_settings(
    out: Path,
    rank: int | None,
    alpha: float | None,
    convolutions: bool,
    changes: dict[str, Any],
    resume: bool,
) -> LoraSettings:
    """The settings of a run; one that is resumed keeps its rank, its alpha and its layers.

    Raises:
        StageError, ValueError: as `started`; or the rank or alpha is out of its range.
    """
    path = out / "lora.pt"
    recipe = LoraSettings()
    optimisation = started(path, recipe.optimisation, changes, resume)
    if resume:
        for name, value in read_state(path).model.items():
            convolutions |= ".lora_" in name and value.ndim == 4
            if name.endswith("lora_down.weight") and value.ndim >= 2:
                rank = len(value)
            if name.endswith("alpha") and value.ndim == 0:
                alpha = float(value)
    return LoraSettings(optimisation, recipe.rank if rank is None else rank, alpha, convolutions)


def embedding_settings(
    out: Path, vectors: int | None, changes: dict[str, Any], resume: bool
) -> EmbeddingSettings:
    """The settings of a run; one that is resumed keeps its number of vectors.

    Raises:
        StageError, ValueError: as `started`; or the number is out of its range.
    """
    path = out / "embedding.pt"
    recipe = EmbeddingSettings()
    optimisation = started(path, recipe.optimisation, changes, resume)
    if resume:
        known = read_state(path).model.get("vectors")
        vectors = len(known) if known is not None and known.ndim == 2 else vectors
    return EmbeddingSettings(optimisation, recipe.vectors if vectors is None else vectors)
