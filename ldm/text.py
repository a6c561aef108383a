"""The text encoder: from a prompt to the context that the UNet reads.

The transformer is `transformers`' own CLIP text model (Radford et al. 2021, arXiv:2103.00020,
section 2.4): Stable Diffusion v1 takes its states after the final layer norm, one per token, and so
does Stable Diffusion 2 with OpenCLIP's, of whose blocks it leaves out the last.
Prompts are cut and filled to a fixed number of tokens; the mask is causal, and padding is not
masked, since these models were trained to see it. `ldm.prompts.Reading` says what else may be done
with a prompt: weights in brackets, chunks of one that is too long, last layers left out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import TextConfig
from ldm.device import sent
from ldm.errors import did_you_mean
from ldm.prompts import Part, Reading, parts_of, weighed
from ldm.tokenizer import Tokenizer


class CLIPTextEncoder(nn.Module):
    """Prompts -> context. `SD_V1.text` makes CLIP ViT-L/14's 123,060,480 parameters."""

    def __init__(self, config: TextConfig, tokenizer: Tokenizer | None = None) -> None:
        """Without a tokenizer the encoder still encodes ids.

        Raises:
            ValueError: the tokenizer's special tokens are not where the config says.
        """
        from transformers import CLIPTextConfig, CLIPTextModel  # seconds to import: only here

        super().__init__()
        if tokenizer is not None:
            check_tokenizer(tokenizer, config)
        self.config = config
        self.tokenizer = tokenizer
        model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.mlp_size,
                projection_dim=config.hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                max_position_embeddings=config.max_length,
                hidden_act="gelu" if config.open_clip else "quick_gelu",
                bos_token_id=config.bos_token_id,
                eos_token_id=config.eos_token_id,
                pad_token_id=config.pad_token_id,
            )
        )
        # transformers 4 wraps the transformer once more, transformers 5 does not.
        self.transformer = getattr(model, "text_model", model)
        self.rebuild_buffers()

    def forward(
        self, prompts: Sequence[str], reading: Reading = Reading(), *, chunks: int = 1
    ) -> Tensor:
        """Prompts -> context (B, max_length, hidden_size).

        Args:
            reading: how they are read. With `long_prompts` a prompt is as many rows of tokens as it
                needs (`read`), each is encoded by itself, and their contexts are joined: (B, n *
                max_length, hidden_size), n that of the longest prompt.
            chunks: n at least, with `long_prompts`.

        Raises:
            ValueError: as `tokenize`, `encode` and `ldm.prompts.parts_of`.
        """
        check_prompts(prompts)
        reading.check(self.config)
        chunks = max(chunks, *(self.chunks(prompt, reading) for prompt in prompts))
        read = [self.read(prompt, reading, chunks) for prompt in prompts]
        ids, weights = (sent(torch.cat(rows), self.device) for rows in zip(*read, strict=True))
        context = self.encode(ids, reading.clip_skip)  # (B n, L, D)
        if reading.weighting:
            context = weighed(context, weights)
        return context.reshape(len(prompts), -1, context.shape[-1])  # (B, n L, D)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> token ids, int64 (B, max_length), on the encoder's device.

        Warns with the words that did not fit when a prompt is too long, and with those that the
        model has never seen, where its tokenizer knows (Horizon's does).

        Raises:
            ValueError: the encoder has no tokenizer, or was given something else than a list of
                strings: one string, say, or the token ids that `encode` takes.
        """
        check_prompts(prompts)
        return sent(torch.cat([self.read(prompt)[0] for prompt in prompts]), self.device)

    def tokens(self, prompt: str, reading: Reading = Reading()) -> list[tuple[int, float]]:
        """The ids of a prompt's tokens, without start and end, and each one's weight: 1 but for
        `weighting`."""
        tokenizer = self.require_tokenizer()
        parts = parts_of(prompt) if reading.weighting else (Part(prompt),)
        return [(i, part.weight) for part in parts for i in tokenizer.encode(part.text)]

    def chunks(self, prompt: str, reading: Reading) -> int:
        """How many rows of tokens `read` makes of a prompt: 1 but for `long_prompts`."""
        if not reading.long_prompts:
            return 1
        return max(1, math.ceil(len(self.tokens(prompt, reading)) / (self.config.max_length - 2)))

    def read(
        self, prompt: str, reading: Reading = Reading(), chunks: int = 1
    ) -> tuple[Tensor, Tensor]:
        """A prompt as rows of tokens, each with its start and its end token: one row, into which
        `max_length - 2` tokens fit; with `long_prompts` as many rows as are needed, cut after every
        so many tokens, wherever that is, and at least `chunks`, the last of them as of an empty
        prompt. Warns as `tokenize` does.

        Returns:
            The ids, int64 (n, max_length), and their weights, float32 alike; start, end and what
            fills a row have 1.
        """
        tokenizer, length = self.require_tokenizer(), self.config.max_length
        tokens, room = self.tokens(prompt, reading), length - 2
        if not reading.long_prompts and (lost := tokens[room:]):
            warnings.warn(
                f"the prompt is {len(lost)} tokens too long, this was left out: "
                f"{tokenizer.decode(i for i, _ in lost)!r}",
                stacklevel=3,
            )
        if unseen := tokenizer.unseen(prompt):
            known = sorted(tokenizer.words or ())
            near = did_you_mean(unseen[0], known)
            warnings.warn(
                f"this model has never seen {', '.join(map(repr, unseen[:5]))}{near}; "
                f"the {len(known)} words that it knows are listed by `ldm words`",
                stacklevel=3,
            )
        count = max(chunks, self.chunks(prompt, reading)) if reading.long_prompts else 1
        rows = [tokens[n * room : (n + 1) * room] for n in range(count)]
        fill = self.config.pad_token_id
        ids = [tokenizer.pad([i for i, _ in row], length, fill) for row in rows]
        weights = [[1.0, *(w for _, w in row), *[1.0] * (length - 1 - len(row))] for row in rows]
        return torch.tensor(ids, dtype=torch.int64), torch.tensor(weights)  # (n, max_length)

    def encode(self, ids: Tensor, clip_skip: int = 0) -> Tensor:
        """Token ids, integers (B, max_length) or fewer places -> context (B, max_length,
        hidden_size).

        Args:
            clip_skip: how many of the last layers are left out: the final norm then takes the
                states before them.

        Raises:
            ValueError: these are no token ids, or so many layers cannot be left out. On a GPU, and
                in compiled code, only the shape and the type of ids are looked at.
        """
        check_ids(ids, self.config.vocab_size + self.added_tokens, self.config.max_length)
        if clip_skip == 0:
            context: Tensor = self.transformer(input_ids=ids).last_hidden_state
            return context
        Reading(clip_skip=clip_skip).check(self.config)
        # The embeddings, and then what each layer made of them.
        states = self.transformer(input_ids=ids, output_hidden_states=True).hidden_states
        skipped: Tensor = self.transformer.final_layer_norm(states[-1 - clip_skip])
        return skipped

    @torch.no_grad()
    def add_word(self, word: str, vectors: Tensor) -> None:
        """Teach the encoder a word: what its tokens are embedded as (textual inversion, Gal et al.
        2022, arXiv:2208.01618). The weights stay what they are, and files of weights lack it.

        Args:
            word: as it will stand in prompts, in upper or lower case.
            vectors: (n, hidden_size), one for each of the n tokens that the word becomes.

        Raises:
            ValueError: there is no tokenizer, it has the word already or cannot have it, or the
                vectors are of another width.
        """
        width = self.config.hidden_size
        if vectors.ndim != 2 or not len(vectors) or vectors.shape[1] != width:
            raise ValueError(f"vectors must be (n, {width}), not {tuple(vectors.shape)}")
        tokenizer = self.require_tokenizer().with_word(word, len(vectors))
        embedding = self.transformer.embeddings.token_embedding
        new = vectors.to(embedding.weight.device, embedding.weight.dtype)
        if isinstance(embedding, EmbeddingWithWords):
            new = torch.cat([embedding.added, new])
        embedding.__class__ = EmbeddingWithWords  # the same object, as `ldm.speed.cpu` does it
        embedding.register_buffer("added", new, persistent=False)
        self.tokenizer = tokenizer

    @property
    def added_tokens(self) -> int:
        """How many tokens `add_word` has added behind those of the vocabulary."""
        embedding = self.transformer.embeddings.token_embedding
        return len(embedding.added) if isinstance(embedding, EmbeddingWithWords) else 0

    def token_strings(self, ids: Tensor) -> list[list[str]]:
        """Token ids (B, L) -> the tokens as text, for people: `"house</w>"` ends a word."""
        return [self.require_tokenizer().strings(row) for row in ids.tolist()]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.transformer.final_layer_norm.weight.device
        return device

    def rebuild_buffers(self) -> None:
        """Make the position ids anew, outside the state: old versions of transformers save them,
        and a model that was built on the meta device and filled from a file still lacks them."""
        positions = torch.arange(self.config.max_length, device=self.device)[None]  # (1, L)
        self.transformer.embeddings.register_buffer("position_ids", positions, persistent=False)

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer, or a ValueError that says that there is none."""
        if self.tokenizer is None:
            raise ValueError("this text encoder has no tokenizer: it encodes token ids only")
        return self.tokenizer


class EmbeddingWithWords(nn.Embedding):
    """Embeddings of the vocabulary's tokens, and of those that come after them."""

    added: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> (B, L, D)."""
        known = super().forward(ids.clamp(max=self.num_embeddings - 1))
        new = F.embedding((ids - self.num_embeddings).clamp(min=0), self.added)
        return torch.where(ids[..., None] < self.num_embeddings, known, new)


def check_prompts(prompts: object) -> None:
    """A ValueError unless it is a list of strings, of one at least."""
    if isinstance(prompts, str):
        raise ValueError("pass a list of prompts, not one string")
    if isinstance(prompts, Tensor):
        raise ValueError("prompts must be a list of strings: token ids are for encode(ids)")
    is_list = isinstance(prompts, Sequence) and all(isinstance(one, str) for one in prompts)
    if not is_list or not prompts:
        raise ValueError(f"prompts must be a list of strings, not {prompts!r:.80}")


def check_ids(ids: Tensor, vocab_size: int, length: int) -> None:
    """A ValueError unless these are token ids that the embedding has."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"ids must be a tensor of int64, as tokenize(prompts) gives, not {kind}")
    if ids.ndim != 2 or 0 in ids.shape or ids.shape[1] > length:
        raise ValueError(f"ids must be (B, {length}) or fewer places, not {tuple(ids.shape)}")
    # Values only where they are at hand: to look at a tensor on a GPU is to wait for the GPU.
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = ids.min().item(), ids.max().item()
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"ids must be between 0 and {vocab_size - 1}, not {wrong}")


def check_tokenizer(tokenizer: Tokenizer, config: TextConfig) -> None:
    """A ValueError unless the ids of a tokenizer are those that the weights were trained with."""
    ours = (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    theirs = (config.vocab_size, config.bos_token_id, config.eos_token_id)
    if ours != theirs:
        raise ValueError(
            f"the tokenizer's size, start and end ids are {ours}, the text encoder's are {theirs}"
        )
