"""Stage 2: a CLIP pair learns which caption goes with which picture (Radford et al. 2021,
arXiv:2103.00020). Its text tower is then frozen and becomes the model's text encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.device import sent
from ldm.errors import UnreadableError
from ldm.files import written_whole
from ldm.layers import Downsample, ResBlock
from ldm.text import CLIPTextEncoder
from ldm.train.data import draw_scenes, rng_at
from ldm.train.state import Optimisation, Record, TrainState, fast_step
from ldm.worlds.batches import pictures

NORM_EPS = 1e-5
PAIR_FILE = "clip.safetensors"  # beside the model: all of the pair but the text encoder


@dataclass(frozen=True)
class CLIPSettings:
    """How the CLIP pair is trained."""

    optimisation: Optimisation = field(
        default_factory=lambda: Optimisation(steps=1200, batch_size=128, learning_rate=1e-3)
    )
    image_size: int = 64
    """The image tower looks at half the size that the model draws at: it sees all it needs."""


class ImageTower(nn.Module):
    """Picture -> one vector: a small convolutional network down to a 4x4 map, laid out flat, so
    that left and right stay apart."""

    def __init__(self, dim: int, image_size: int, width: int = 48) -> None:
        """`image_size` must be 16 times a power of two or more: each level halves it."""
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        levels: list[nn.Module] = []
        channels, size = width, image_size // 4
        while size > 4:
            levels.append(ResBlock(channels, channels, norm_groups=8, eps=NORM_EPS))
            levels.append(Downsample(channels, pad=(1, 1, 1, 1)))
            levels.append(ResBlock(channels, 2 * channels, norm_groups=8, eps=NORM_EPS))
            channels, size = 2 * channels, size // 2
        self.levels = nn.Sequential(*levels)
        self.norm = nn.GroupNorm(8, channels)
        self.project = nn.Linear(channels * size * size, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, image_size, image_size) in [-1, 1] -> (B, dim)."""
        h = self.levels(self.patches(x))  # (B, C, 4, 4)
        return self.project(F.silu(self.norm(h)).flatten(1))


class CLIPPair(nn.Module):
    """Two towers that put a picture and its caption in the same place on the unit sphere."""

    def __init__(self, text: CLIPTextEncoder, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.text = text
        dim = text.config.hidden_size
        self.text_project = nn.Linear(dim, dim, bias=False)
        self.image = ImageTower(dim, image_size)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def embed_text(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> unit vectors (B, D), from the state of the first end token."""
        states = self.text.encode(ids)  # (B, L, D)
        end = (ids == self.text.config.eos_token_id).int().argmax(dim=1)
        pooled = states[torch.arange(len(ids), device=ids.device), end]  # (B, D)
        return F.normalize(self.text_project(pooled), dim=-1)

    def embed_images(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> unit vectors (B, D)."""
        return F.normalize(self.image(x), dim=-1)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """Similarities of every picture with every caption, times the learnt scale: (B, B)."""
        # CLIP clamps the scale at 100, for stability (section 2.5).
        scale = self.log_scale.exp().clamp(max=100.0)
        return scale * self.embed_images(x) @ self.embed_text(ids).T


def save_pair(path: Path, pair: CLIPPair) -> None:
    """Write what the pair adds to the text encoder (image tower, projection and scale) as one
    safetensors file in half precision."""
    tensors = {
        name: value.detach().to("cpu", torch.float16).contiguous()
        for name, value in sorted(pair.state_dict().items())
        if not name.startswith("text.")
    }
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata={"image_size": str(pair.image_size)})


def load_pair(path: str | Path, text: CLIPTextEncoder) -> CLIPPair:
    """The CLIP pair that `save_pair` wrote, around the text encoder that it was trained with.

    Raises:
        CheckpointError: it is no such file, or of another text encoder's width.
    """
    try:
        with safe_open(path, framework="pt") as file:
            image_size = int(file.metadata()["image_size"])
        pair = CLIPPair(text, image_size).to(text.device)
        of_text = {f"text.{name}": value for name, value in text.state_dict().items()}
        pair.load_state_dict(load_file(path) | of_text)
    except (SafetensorError, OSError, TypeError, KeyError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UnreadableError(f"{path} is not a CLIP pair for this model: {reason}") from error
    return pair.eval().requires_grad_(False)


def captions_to_learn_from(seed: int, count: int = 20_000) -> list[str]:
    """Captions for the tokenizer."""
    rng = rng_at(seed, 0)
    return [scene.caption(rng) for scene in draw_scenes(rng, count)]


def train_clip(state: TrainState, settings: CLIPSettings) -> Iterator[Record]:
    """Minimise the symmetric cross-entropy of picture -> caption and caption -> picture (CLIP,
    figure 3). Equal captions in a batch share the target: each is right for the other's picture.

    Yields one record per step, with `loss` and `accuracy` (of picture -> caption).
    """
    s = settings.optimisation
    pair = state.model
    assert isinstance(pair, CLIPPair)
    while state.step < s.steps:
        rng = rng_at(s.seed, state.step)
        scenes = draw_scenes(rng, s.batch_size)
        captions = [scene.caption(rng) for scene in scenes]
        x = sent(pictures(scenes, pair.image_size), state.device)
        ids = pair.text.tokenize(captions)
        same = sent(equal_captions(captions), state.device)  # (B, B)

        with fast_step(state.device):
            logits = pair(x, ids)
        logits = logits.float()
        target = same / same.sum(dim=1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        state.update(loss)
        right = same.gather(1, logits.argmax(dim=1, keepdim=True)).mean()
        yield Record(state.step, {"loss": loss.detach(), "accuracy": right})


def equal_captions(captions: Sequence[str]) -> Tensor:
    """(B, B) float: 1 where two captions are the same text."""
    _, groups = np.unique(np.array(captions), return_inverse=True)
    index = torch.from_numpy(groups)
    return (index[:, None] == index[None, :]).float()
