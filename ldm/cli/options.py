"""What several commands ask for, and how it is read from their arguments.

The names that help texts need are spelled out here, since their homes import torch; a test holds
them against those. The functions below the options import what they need when they are called.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ldm.errors import printable
from ldm.files import check_writable

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from ldm.checkpoints.planning import Ema, Plan
    from ldm.checkpoints.recognise import Weights
    from ldm.config import ModelConfig
    from ldm.tokenizer import Tokenizer

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

# ldm.samplers.SAMPLERS and SPACINGS
SAMPLERS = (
    *("ddim", "ddpm", "plms", "euler", "euler_ancestral", "heun"),
    *("dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm"),
)
SPACINGS = ("leading", "linspace", "trailing", "karras")
PREDICTIONS = ("eps", "v", "x0", "flow")  # of ldm.config
LIKE = ("compvis", "diffusers")  # ldm.presets.PRESETS, but for our own
DTYPES = ("float32", "float16", "bfloat16")  # of torch
EMA: dict[str, Ema] = {"auto": "auto", "yes": True, "no": False}
MODELS_OWN = "default: the model's own"
RUN = (
    *("steps", "sampler", "spacing", "guidance_scale", "negative_prompt"),
    *("eta", "height", "width", "strength", "fit", "paste_back"),
    *("variation_seed", "variation_strength", "guidance_rescale", "guidance_interval"),
    *("weighting", "clip_skip", "long_prompts"),
)
"""The settings of a run that options ask for by their own names, but for the seed."""
PICTURES = ("image", "mask")
"""What a run is given, by the names of the options."""
FITS = ("crop",)  # of ldm.settings
MAX_SCALE = 64  # of ldm.recipe
LONGEST_PATH = 4096  # characters, on Linux


# --- What is said ----------------------------------------------------------------------------


def say(text: object) -> None:
    """A line to people, beside the results: on stderr, where somebody still reads that."""
    with contextlib.suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)


def tell(path: Path) -> None:
    """A line of results: what was written, as soon as it is there."""
    print(printable(path, LONGEST_PATH), flush=True)


# --- Options ---------------------------------------------------------------------------------


def add_lora_option(p: argparse._ActionsContainer, what: str) -> None:
    """LoRAs, any number of them, each with its scale."""
    p.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help=f"{what}, by this scale (1); may be given several times",
    )


def asked_loras(args: argparse.Namespace) -> list[tuple[Path, float]]:
    """The files and the scales that `--lora` names. What follows the last colon is a scale where it
    is a number."""
    asked = []
    for given in args.lora:
        name, colon, last = given.rpartition(":")
        try:
            scale = float(last) if colon else None
        except ValueError:
            scale = None
        asked.append((Path(given), 1.0) if scale is None else (Path(name), scale))
    return asked


def add_run_options(parser: argparse.ArgumentParser, *, seed_help: str) -> None:
    """The settings of a run but for its prompt, in groups; what is not given is None where the
    model has a default of its own."""
    p = parser.add_argument_group("the run")
    add_sampler_options(p)
    p.add_argument(
        "--spacing",
        metavar="NAME",
        help=f"which noise levels to visit: {', '.join(SPACINGS)} (default: the sampler's own)",
    )
    p.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="the timesteps from and to which there is guidance (default: all)",
    )
    p.add_argument(
        "--guidance-rescale",
        type=float,
        default=0.0,
        metavar="R",
        help="how far to undo guidance's contrast, 0 to 1 (%(default)s)",
    )
    p.add_argument("--negative-prompt", default="", metavar="TEXT", help="what to move away from")
    add_reading_options(p)
    p.add_argument(
        "--eta", type=float, default=0.0, metavar="E", help="ddim's noise, 0 to 1 (%(default)s)"
    )
    p.add_argument("-s", "--seed", type=int, metavar="N", help=seed_help)
    for side in ("--height", "--width"):
        p.add_argument(side, type=int, metavar="PIXELS", help="(default: as the model was trained)")
    p.add_argument(
        "--variation-seed", type=int, metavar="N", help="a second seed, to go some of the way to"
    )
    p.add_argument(
        "--variation-strength",
        type=float,
        default=0.0,
        metavar="S",
        help="how far, 0 to 1 (%(default)s)",
    )
    add_picture_options(parser)


def add_reading_options(p: argparse._ActionsContainer) -> None:
    """How the prompts are read."""
    p.add_argument(
        "--weighting",
        action="store_true",
        help="let brackets weigh words: (red:1.3), (red), [red]",
    )
    p.add_argument(
        "--clip-skip",
        type=int,
        default=0,
        metavar="N",
        help="leave out the text encoder's last N layers (%(default)s)",
    )
    p.add_argument(
        "--long-prompts",
        action="store_true",
        help="read on, in chunks, where a prompt is too long",
    )


def add_picture_options(parser: argparse.ArgumentParser) -> None:
    """A picture that a run starts from, and what becomes of it."""
    p = parser.add_argument_group("a picture to start from")
    p.add_argument("--image", type=Path, metavar="FILE", help="the picture, of the run's size")
    p.add_argument(
        "--strength",
        type=float,
        metavar="S",
        help="how much of it to redraw, above 0 to 1 (default: 0.75, with a --mask 1)",
    )
    p.add_argument(
        "--mask", type=Path, metavar="FILE", help="what of it to redraw, white; black is kept"
    )
    p.add_argument(
        "--fit", metavar="HOW", help=f"{FITS[0]}: take the middle of another size, and resize it"
    )
    p.add_argument(
        "--paste-back", action="store_true", help="keep the very pixels that the --mask keeps"
    )


def add_sampler_options(p: argparse._ActionsContainer) -> None:
    """Those settings of a run that a model has its own defaults for."""
    p.add_argument(
        *("-k", "--steps"), type=int, metavar="N", help=f"sampler steps, 1 to 1000 ({MODELS_OWN})"
    )
    named = p.add_argument(
        "--sampler", metavar="NAME", help=f"{', '.join(SAMPLERS)} ({MODELS_OWN})"
    )
    named.completer = lambda **_: SAMPLERS  # type: ignore[attr-defined]  # what argcomplete asks
    p.add_argument(
        "--guidance-scale",
        type=float,
        metavar="SCALE",
        help=f"how hard to follow the prompt; 1 is without guidance ({MODELS_OWN})",
    )


def add_weights_option(p: argparse._ActionsContainer) -> None:
    """The main file or folder of weights, which need not be named."""
    p.add_argument(
        "--weights", type=Path, metavar="PATH", help="a file or folder (default: Horizon, shipped)"
    )


def add_model_options(p: argparse._ActionsContainer) -> None:
    """What a model is made of, but for the main file or folder of its weights."""
    p.add_argument("--vae", type=Path, metavar="PATH", help="another file with the autoencoder")
    p.add_argument("--text", type=Path, metavar="PATH", help="another file with the text encoder")
    p.add_argument(
        "--config",
        type=Path,
        metavar="JSON",
        help="a config.json like Horizon's, for weights of another size that bring none",
    )
    p.add_argument(
        "--ema",
        choices=EMA,
        default="auto",
        help="take the running mean of the UNet's weights; auto: if it is there (%(default)s)",
    )
    p.add_argument(
        "--prediction",
        choices=PREDICTIONS,
        help="what the UNet predicts (default: what the file says, else eps, the noise)",
    )


def add_drawing_options(parser: argparse.ArgumentParser) -> None:
    """The model that draws, where, and in what precision."""
    p = parser.add_argument_group("the model")
    add_weights_option(p)
    add_model_options(p)
    add_device_option(p)
    p.add_argument("--dtype", choices=DTYPES, help="(default: float16 on a GPU, else float32)")


def add_device_option(p: argparse._ActionsContainer) -> None:
    """Where to compute."""
    p.add_argument(
        "--device", metavar="NAME", help="cuda, mps or cpu (default: the fastest there is)"
    )


# --- What was asked for ----------------------------------------------------------------------


def asked_device(args: argparse.Namespace) -> torch.device:
    """The device of `--device`, or the fastest there is; a ValueError if it is not there."""
    from ldm.device import check_device, default_device

    return default_device() if args.device is None else check_device(args.device)


def asked_dtype(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    """The precision of `--dtype`, or the device's usual one."""
    from ldm.device import default_dtype

    return named_dtype(args.dtype) if args.dtype else default_dtype(device)


def named_dtype(name: str) -> torch.dtype:
    """One of `DTYPES`, as torch has it."""
    import torch

    return {dtype: getattr(torch, dtype) for dtype in DTYPES}[name]


def asked_run(args: argparse.Namespace) -> dict[str, Any]:
    """What a run is asked for, as keywords of `pipe(...)`: the settings in `RUN`, the seed of
    `--seed`, or a fresh one, and the pictures."""
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    pictures = asked_pictures(args)
    return {name: getattr(args, name) for name in RUN} | {"seed": seed} | pictures


def asked_pictures(args: argparse.Namespace) -> dict[str, Image]:
    """The pictures that options name, read."""
    from ldm.pictures import to_rgb

    given = {name: getattr(args, name) for name in PICTURES}
    return {name: to_rgb(path) for name, path in given.items() if path is not None}


def asked_config(args: argparse.Namespace) -> ModelConfig | None:
    """The config in the file that `--config` names, or None."""
    from ldm.checkpoints.config_json import read_config

    if args.config is None:
        return None
    return read_config(args.config)


# --- The model that was asked for: opened first, so that every other argument can be checked with
# --- its config; then planned; the caller reads the weights last (`TextToImage.from_plans`).


def open_asked(args: argparse.Namespace) -> tuple[Mapping[str, Weights], ModelConfig]:
    """The files of weights of each stage, opened, and the config of the whole model."""
    from ldm.checkpoints.loading import joint_config, open_model
    from ldm.checkpoints.shipped import shipped_weights

    sources = open_model(
        args.weights or shipped_weights(),
        asked_config(args),
        vae=args.vae,
        text=args.text,
        prediction=args.prediction,
    )
    return sources, joint_config(sources)


def plan_asked(sources: Mapping[str, Weights], ema: str) -> tuple[Mapping[str, Plan], Tokenizer]:
    """Which entry fills which weight, and the tokenizer, which may have to be fetched; `ema` is a
    name in `EMA`."""
    from ldm.checkpoints.download import require_tokenizer
    from ldm.checkpoints.loading import plan_stages

    plans = plan_stages(sources, EMA[ema])
    text = plans["text"]
    return plans, require_tokenizer(text.path, text.config.text.vocab_size)


def files_of(sources: Mapping[str, Weights]) -> list[Path]:
    """Every file that weights lie in, each once."""
    return sorted({e.file.path for one in sources.values() for e in one.entries.values()})


# --- Where pictures and pages go -------------------------------------------------------------


@dataclass(frozen=True)
class Outputs:
    """Where pictures go: one file, or `name-0.png`, `name-1.png`, ..., however many."""

    path: Path
    count: int

    def __iter__(self) -> Iterator[Path]:
        """A path for each of several pictures; one picture needs no number."""
        if self.count == 1:
            return iter([self.path])
        return (self.path.with_stem(f"{self.path.stem}-{i}") for i in range(self.count))

    def taken(self) -> list[Path]:
        """Those where there is something already. The folder is read once: of a million paths few
        are there. (Where a file system knows no small letters, neither does this.)"""
        if self.count == 1:
            return [self.path] if self.path.exists() else []
        stem, suffix = re.escape(self.path.stem), re.escape(self.path.suffix)
        ours = re.compile(rf"{stem}-(0|[1-9]\d*){suffix}", re.ASCII | re.IGNORECASE)
        found = ((path, ours.fullmatch(path.name)) for path in self.path.parent.iterdir())
        return sorted(path for path, match in found if match and int(match[1]) < self.count)


def outputs(output: Path | None, prompt: str, suffix: str, count: int = 1) -> Outputs:
    """Where to write; without a name, one made of the prompt that is not taken yet.

    Raises:
        ValueError: a file could not be written there, or its name ends in another suffix.
    """
    if output is None:
        stems = (slug(prompt) + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
        candidates = (Outputs(Path(stem + suffix), count) for stem in stems)
        chosen = next(one for one in candidates if not one.taken())
    elif output.suffix.lower() != suffix:
        raise ValueError(f"the output must end in {suffix}, not {output}")
    else:
        chosen = Outputs(output, count)
    first = next(iter(chosen))
    check_writable(first)
    for path in chosen.taken():
        check_writable(path)
    return chosen


def slug(prompt: str) -> str:
    """A prompt as the name of a file: "green grass at night" -> "green-grass-at-night"."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "picture"
