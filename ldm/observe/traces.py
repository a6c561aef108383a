"""One run, kept whole: what every step knew, and where every word looked.

    run = ldm.trace(pipe, "a red house on green grass", steps=20, seed=0)
    run.x0                                  # (20, 4, h, w): the clean estimate of every step
    run.attention("house")                  # (h, w): where "house" looked, over the whole run
    run.save("run.safetensors")

The loop is `pipe.run`, watched by `record`. Cross-attention has a map for every token, layer and
step; `ldm.observe.maps` sums them up. What Jupyter shows of a trace is up to who draws: see
`show_as`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.config import MOST_TIMESTEPS, WIDEST
from ldm.errors import printable
from ldm.files import check_writable, written_whole
from ldm.inputs import Held, Inputs, asked, held_as_dict, held_from_dict
from ldm.observe.hooks import record
from ldm.observe.maps import (
    Word,
    conditional_mean,
    daam,
    find_word,
    group_words,
    map_size,
    prompt_to_prompt,
)
from ldm.settings import Settings

if TYPE_CHECKING:
    from ldm.pipeline import TextToImage

METHODS = ("daam", "prompt-to-prompt")
METADATA = "ldm.trace"
MAP_PREFIX = "maps."
FACTS = ("model", "settings", "tokens", "words", "heads", "t", "t_prev", "alpha_bar")
STEPWISE = ("x", "eps", "x0", "eps_cond", "eps_uncond")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_HEADER = 2**21  # bytes of a file that say what is in it; a long prompt's trace has 20,000


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """Everything that one run of one picture knew, on the CPU; S steps, noisiest first.

    `pipe.decode(trace.x0)` draws the clean estimate of every step, `pipe.decode(trace.latents)`
    the final picture.

    Attributes:
        model: the name of the model's config.
        settings: of the run, which is of one picture.
        tokens: the strings of all L tokens, start, end and filling included.
        words: which tokens make which word. The first is the start token; the last is the end,
            with all the end tokens that fill the rest of the L places.
        heads: of each cross-attention layer; 1 where levels differ in it (Stable Diffusion 2), so
            that what is summed over heads is their mean.
        t, t_prev: the timestep before and after each step, S numbers each: integers, but for
            samplers that visit points between two timesteps.
        alpha_bar: at each t, S numbers.
        x: the noisy latents before each step, (S, C, h, w), as are the next four.
        eps: the noise predicted in x; x0: the clean estimate that it implies.
        eps_cond, eps_uncond: with and without the prompt; None at a guidance scale of 1, and where
            some steps were without guidance.
        latents: after the last step, (1, C, h, w); of a run that was stopped, its clean estimate.
        maps: cross-attention weights with the prompt, {layer: (S, rows, columns, L)} float16, the
            mean over heads: at each place they sum to 1 over the L tokens.
        picture: the final latents decoded, (height, width, 3) uint8; None where nobody decoded
            them.
        inputs: what the run was given besides its settings, by name (`ldm.inputs.Inputs.held`): a
            picture to start from, say, of which, noised, the first x was made.
    """

    model: str
    settings: Settings
    tokens: tuple[str, ...]
    words: tuple[Word, ...]
    heads: int
    t: tuple[float, ...]
    t_prev: tuple[float, ...]
    alpha_bar: tuple[float, ...]
    x: Tensor
    eps: Tensor
    x0: Tensor
    latents: Tensor
    maps: Mapping[str, Tensor]
    eps_cond: Tensor | None = None
    eps_uncond: Tensor | None = None
    picture: Tensor | None = None
    inputs: Mapping[str, Held | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """A ValueError in one line where the parts do not fit together."""
        if self.settings.num_images != 1:
            raise ValueError("a trace is of one picture: for several, trace each on its own")
        steps, tokens = len(self.t), len(self.tokens)
        if not steps or (len(self.t_prev), len(self.alpha_bar)) != (steps, steps):
            raise ValueError(f"a trace of {steps} steps needs as many t_prev and alpha_bar")
        if not all(-1 <= t <= MOST_TIMESTEPS for t in (*self.t, *self.t_prev)):
            raise ValueError(f"a timestep must be between -1 and {MOST_TIMESTEPS}")
        if not all(0 <= left <= 1 for left in self.alpha_bar):
            raise ValueError("alpha_bar must be between 0 and 1")
        if not 1 <= self.heads <= WIDEST:
            raise ValueError(f"heads must be between 1 and {WIDEST}, not {self.heads!r:.80}")
        for name, tensor in self._tensors().items():
            if not tensor.numel() or not (tensor.dtype in FLOATS or name == "picture"):
                raise ValueError(f"{name} is {list(tensor.shape)} of {tensor.dtype}")
        if self.x.ndim != 4 or len(self.x) != steps or self.latents.shape != self.x[:1].shape:
            raise ValueError(f"the latents of {steps} steps do not fit their number")
        for name, tensor in self._stepwise().items():
            if tensor.shape != self.x.shape:
                raise ValueError(f"{name} is {list(tensor.shape)}, x is {list(self.x.shape)}")
        if not self.maps:
            raise ValueError("a trace needs maps")
        for layer, maps in self.maps.items():
            if maps.ndim != 4 or (len(maps), maps.shape[3]) != (steps, tokens):
                raise ValueError(f"{layer} is {list(maps.shape)}, not ({steps}, _, _, {tokens})")
        if (picture := self.picture) is not None and (
            picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != torch.uint8
        ):
            raise ValueError(f"the picture is {list(picture.shape)} of {picture.dtype}")
        for word in self.words:
            if not word.tokens or not all(place in range(tokens) for place in word.tokens):
                raise ValueError(f"the tokens of {word.text!r:.80} are not there")

    def __len__(self) -> int:
        """The number of steps."""
        return len(self.t)

    def __repr__(self) -> str:
        s = self.settings
        run = f"{len(self)} steps of {s.sampler}, guidance {s.guidance_scale}"
        start = "" if s.strength is None else f"from a picture at strength {s.strength:g}, "
        words = " ".join(word.text for word in self.words[1:-1])
        maps = ", ".join(
            f"{len(self.layers(rows))} at {rows}x{columns}" for rows, columns in self.resolutions
        )
        return printable(
            f"<Trace of {self.prompt!r} by {self.model}: {s.width}x{s.height}, {start}{run}, "
            f"seed {s.seed}; "
            f"words: {words}; attention layers: {maps}; {self.nbytes / 1e6:.3g} MB>"
        )

    def _repr_html_(self) -> str | None:
        """What Jupyter shows: the registered card (`show_as`); None is the plain text above."""
        return None if _card is None else _card(self)

    @property
    def prompt(self) -> str:
        """What was to be drawn."""
        return self.settings.prompt

    @property
    def nbytes(self) -> int:
        """The memory of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    @property
    def resolutions(self) -> tuple[tuple[int, int], ...]:
        """The sizes (rows, columns) that there are maps of, the finest first."""
        return tuple(sorted({(m.shape[1], m.shape[2]) for m in self.maps.values()}, reverse=True))

    @property
    def guidance_norms(self) -> Tensor:
        """||eps_cond - eps_uncond|| of each step, (S,): how much the prompt matters to it.

        Raises:
            ValueError: there was no guidance, so the model was not asked without the prompt.
        """
        if self.eps_cond is None or self.eps_uncond is None:
            raise ValueError("without guidance the model was not asked without the prompt")
        return (self.eps_cond - self.eps_uncond).flatten(1).norm(dim=1)

    def word(self, text: str) -> Word:
        """The word that is spelled so, in upper or lower case.

        Raises:
            ValueError: the prompt has no such word, or has it more than once, or it was cut off.
        """
        return find_word(self.words, text, self.prompt)

    def layers(self, resolution: int | None = None) -> dict[str, Tensor]:
        """The maps with so many rows, {layer: (S, rows, columns, L)}; None is all of them.

        Raises:
            ValueError: no layer has so many.
        """
        layers = {
            layer: maps
            for layer, maps in self.maps.items()
            if resolution is None or maps.shape[1] == resolution
        }
        if not layers:
            there = ", ".join(str(rows) for rows, _ in self.resolutions)
            raise ValueError(f"no layer has maps of {resolution} rows; there are {there}")
        return layers

    def attention(
        self,
        word: str | Word,
        step: int | None = None,
        resolution: int | None = None,
        method: str = "daam",
    ) -> Tensor:
        """Where a word looked, one map (rows, columns), float32, of the weights as they are: a
        picture of it has to choose its own scale.

        A word of several tokens has the mean of their maps.

        Args:
            word: its text, or one of `words` (where the prompt says it twice, or for the start
                and end tokens).
            step: of one step alone, 0 to S - 1; None is over all steps.
            resolution: of the layers with so many rows alone. None is all layers for "daam"; for
                "prompt-to-prompt" the second coarsest size, as its authors chose 16 x 16 of Stable
                Diffusion's 64, 32, 16 and 8.
            method: "daam" gives a map of the latents' size, see `daam`; "prompt-to-prompt" one of
                the layers' own, see `prompt_to_prompt`.

        Raises:
            ValueError: there is no such word, step, resolution or method.
        """
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}: there are {', '.join(METHODS)}")
        if step is not None and not 0 <= step < len(self):
            raise ValueError(f"step must be between 0 and {len(self) - 1}, not {step}")
        if method == "prompt-to-prompt" and resolution is None:
            resolution = self.resolutions[-2:][0][0]
        places = list((self.word(word) if isinstance(word, str) else word).tokens)
        steps = slice(None) if step is None else slice(step, step + 1)
        maps = [
            layer[steps][..., places].float().mean(dim=-1)  # (S or 1, rows, columns)
            for layer in self.layers(resolution).values()
        ]
        if method == "prompt-to-prompt":
            return prompt_to_prompt(maps)
        return daam(maps, heads=self.heads, size=(self.x.shape[2], self.x.shape[3]))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all: the tensors, and all else as one entry
        of sorted JSON in its metadata, so that the same trace always gives the same bytes.

        Raises:
            ValueError: it cannot be written there.
        """
        path = Path(path)
        check_writable(path)
        tensors = self._tensors()
        facts = {name: getattr(self, name) for name in FACTS}
        facts["settings"] = self.settings.as_dict()
        facts["words"] = [vars(word) for word in self.words]
        if self.inputs:
            facts["inputs"] = held_as_dict(self.inputs)
        text = json.dumps(facts, sort_keys=True)
        with written_whole(path) as temporary:
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, temporary, metadata={METADATA: text})

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: it is broken, or not a trace; one line says what is wrong.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no trace at {path}")
        try:
            with path.open("rb") as start:
                size = int.from_bytes(start.read(8), "little")
            if size > MAX_HEADER:
                raise ValueError(f"its header has {size:,} bytes, more than {MAX_HEADER:,}")
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(METADATA)
                if text is None:
                    raise ValueError("its metadata has no trace")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = read_facts(text)
            maps = {
                name.removeprefix(MAP_PREFIX): tensors.pop(name)
                for name in sorted(tensors)
                if name.startswith(MAP_PREFIX)
            }
            return cls(**(facts | tensors), maps=maps)
        # Whatever safetensors and json say of a broken file, and a trace of parts that do not fit.
        except (
            SafetensorError,
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            raise ValueError(printable(f"{path} is not a readable trace: {error}")) from error

    def _stepwise(self) -> dict[str, Tensor]:
        """The tensors that have one value per step and the shape of x."""
        named = {name: getattr(self, name) for name in STEPWISE}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor, by the name that it has in a file."""
        maps = {MAP_PREFIX + layer: tensor for layer, tensor in self.maps.items()}
        picture = {} if self.picture is None else {"picture": self.picture}
        return {**self._stepwise(), "latents": self.latents, **picture, **maps}


_card: Callable[[Trace], str] | None = None


def show_as(card: Callable[[Trace], str]) -> None:
    """Let Jupyter show every trace by the HTML that `card` makes of it. The last one that is
    registered counts; `ldm.trace` and `ldm.viz` register `ldm.viz.card.trace_html`."""
    global _card
    _card = card


def trace(pipe: TextToImage, prompt: str, **settings: Any) -> Trace:
    """Draw one picture, and keep everything that each step knew.

    The attention maps take most of the memory, S x places x L x 2 bytes a layer: 4 MB a step for
    Stable Diffusion v1 at 512x512, 0.02 MB for Horizon. They are kept as float16, without the
    half of the guidance batch that has no prompt, and as the mean over heads; what is lost with
    the single heads, `record` can show. All stays on the device to the end, so that no step waits
    for it. The final latents are decoded once, for `picture`.

    Args:
        pipe: the model.
        prompt: of one picture. For several, trace each on its own: image i of a batch is the image
            of seed + i made alone.
        settings: the keywords of `pipe(...)`.

    Raises:
        ValueError: at the call, before any work, as `pipe(...)` does, or for several pictures.
    """
    return trace_run(pipe, *asked(pipe.config, prompt, settings))


def trace_run(pipe: TextToImage, settings: Settings, inputs: Inputs = Inputs()) -> Trace:
    """The same, of settings and inputs that are there already. It must be one picture.

    Raises:
        ValueError: at the call, before any work, for settings that the model cannot follow, or of
            several pictures; or for a context, of which nobody knows the words, or a prompt of more
            than one chunk (`long_prompts`).
    """
    if settings.num_images != 1:
        raise ValueError("a trace is of one picture: for several, trace each on its own")
    if inputs.context is not None:
        raise ValueError("a trace tells where words look: pass the prompt, and no context")
    if (chunks := pipe.chunks(settings, inputs)) > 1:
        raise ValueError(f"a trace is of prompts of one chunk of tokens, and these need {chunks}")
    run = pipe.run(settings, inputs)
    times: list[tuple[float, float, float]] = []
    tensors: dict[str, list[Tensor]] = {name: [] for name in STEPWISE}
    with record(
        pipe.unet, "*.cross_attention.weights", reduce=conditional_mean, max_bytes=None
    ) as recorded:
        for step in run:
            # A rule that asks the model once more, within its step, has more maps: those are left.
            for calls in recorded.values():
                del calls[len(times) + 1 :]
            times.append((step.t, step.t_prev, step.alpha_bar))
            for name, values in tensors.items():
                if (value := getattr(step, name)) is not None:  # None: there was no guidance
                    values.append(value)
            last = step

    latents = pipe.ended(last, settings, inputs)
    (picture,) = pipe.pictures(latents, settings, inputs)
    t, t_prev, alpha_bar = zip(*times, strict=True)
    latent_size = (latents.shape[2], latents.shape[3])
    tokenizer = pipe.text.require_tokenizer()
    text = pipe.config.text
    tokens = [i for i, _ in pipe.text.tokens(settings.prompt, settings.reading)]
    ids = tokenizer.pad(tokens, text.max_length, text.pad_token_id)
    return Trace(
        model=pipe.config.name,
        settings=settings,
        tokens=tuple(tokenizer.strings(ids)),
        words=group_words(tokenizer, ids),
        heads=1 if pipe.config.unet.head_width else pipe.config.unet.num_heads,
        t=t,
        t_prev=t_prev,
        alpha_bar=alpha_bar,
        # Copied from the device here, all steps at once: within the run nothing waits for it.
        **{n: torch.cat(values).cpu() for n, values in tensors.items() if len(values) == len(t)},
        latents=latents.cpu(),
        maps={
            name: torch.stack(calls).cpu().unflatten(1, map_size(len(calls[0]), latent_size))
            for name, calls in recorded.items()
        },
        picture=torch.from_numpy(np.array(picture)),  # (height, width, 3)
        inputs=inputs.held(),
    )


def read_facts(text: str) -> dict[str, Any]:
    """What a trace's metadata says, as the trace has it: all that it says, and nothing else.

    Raises:
        ValueError: it is not the metadata of a trace.
    """
    facts = json.loads(text)
    if not isinstance(facts, dict) or facts.keys() - {"inputs"} != set(FACTS):
        raise ValueError(f"its metadata does not have just the fields {', '.join(FACTS)}")
    if type(facts["model"]) is not str or type(facts["heads"]) is not int:
        raise ValueError(f"model is {facts['model']!r:.80}, heads {facts['heads']!r:.80}")
    facts["tokens"] = listed("tokens", facts["tokens"], str)
    facts["alpha_bar"] = listed("alpha_bar", facts["alpha_bar"], float)
    for name in ("t", "t_prev"):
        facts[name] = listed(name, facts[name], int, float)
    facts["settings"] = Settings.from_dict(facts["settings"])
    facts["inputs"] = held_from_dict(facts.get("inputs", {}))
    facts["words"] = tuple(map(read_word, listed("words", facts["words"], dict)))
    return facts


def read_word(fields: Mapping[str, Any]) -> Word:
    """A word as `vars` gave it, or a ValueError."""
    if fields.keys() != {"text", "tokens"} or type(fields["text"]) is not str:
        raise ValueError("a word has a text, and tokens")
    return Word(fields["text"], listed("tokens", fields["tokens"], int))


def listed(name: str, values: object, *kinds: type) -> tuple[Any, ...]:
    """A list of JSON, of these types alone: True is no number. A ValueError if it is not."""
    if not isinstance(values, list) or not all(type(value) in kinds for value in values):
        raise ValueError(f"{name} must be a list of {kinds[0].__name__}, not {values!r:.80}")
    return tuple(values)
