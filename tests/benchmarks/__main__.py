"""python -m tests.benchmarks SUITE [--pairs 5] [--weights FILE] [--small] [--json]: see --help"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from ldm import shipped_weights
from ldm.checkpoints.opening import open_archive
from ldm.checkpoints.recognise import recognise
from ldm.config import SD_V1, ModelConfig
from tests.benchmarks import commands, images, load, models
from tests.benchmarks.harness import Benchmark, Setting, measure, peak_gflops, table

OF_HORIZON = ("horizon", "train-step")
OF_PROGRAMS = ("import", "first-step")
COUNTED = ("unet", "decode")
SUITES = ("load", *OF_PROGRAMS, "text", "unet", "decode", "image", *OF_HORIZON)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("suite", choices=SUITES, help="what to time")
    parser.add_argument("--pairs", type=int, default=5, help="how often (default: 5)")
    parser.add_argument("--batch", type=int, help="unet: default 2; train-step: default 64")
    parser.add_argument("--size", type=int, help="pixels a side (default: as trained)")
    parser.add_argument("--steps", type=int, default=20, help="of a picture (default: 20)")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="of weights"
    )
    parser.add_argument(
        "--compile", action="store_true", help="unet: with torch.compile, on either side"
    )
    parser.add_argument("--low-memory", action="store_true", help="image: with low_memory on ours")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--weights",
        type=Path,
        help="a safetensors file of Stable Diffusion v1 (default: a random one is made)",
    )
    weights.add_argument(
        "--small", action="store_true", help="a small random model: shows that it works, no more"
    )
    parser.add_argument("--json", action="store_true", help="for programs: every run, in JSON")
    args = parser.parse_args()
    for name in ("pairs", "batch", "steps", "size"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} must be 1 or more")
    if args.weights is not None and not args.weights.is_file():
        parser.error(f"there is no file {args.weights}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no GPU here")

    with tempfile.TemporaryDirectory(prefix="ldm-benchmarks-") as folder:
        setting = prepare(Path(folder), args)
        side = 256 if args.small else product_side(args.device)
        peak = peak_gflops(setting, side) if args.suite in COUNTED else None
        results = [
            measure(benchmark, setting, args.pairs, peak)
            for benchmark in tqdm(benchmarks(args, setting.config), unit="row", file=sys.stderr)
        ]
    told = machine() | {"device": args.device, "type": args.dtype}
    if peak is not None:
        told["a matrix product, GFLOP/s"] = round(peak)
    if args.json:
        runs = [result.summary() | {"pairs": result.pairs} for result in results]
        print(json.dumps({"machine": told, "results": runs}, default=vars, indent=2))
    else:
        print(*(f"{name}: {value}" for name, value in told.items()), sep="\n", end="\n\n")
        print(*table(results), sep="\n")


def product_side(device: str) -> int:
    """Of the square matrices whose product stands for the machine's peak: large enough for it."""
    return 8192 if device.startswith("cuda") else 2048


def benchmarks(args: argparse.Namespace, config: ModelConfig) -> tuple[Benchmark, ...]:
    """The rows of a suite."""
    size = args.size or config.image_size
    match args.suite:
        case "load":
            return load.BENCHMARKS
        case "import":
            return commands.IMPORT
        case "first-step":
            return commands.FIRST_STEP
        case "text":
            return models.TEXT
        case "unet":
            return models.unet(config, batch=args.batch or 2, size=size, compile=args.compile)
        case "decode":
            return models.decode(config, size=size)
        case "image":
            return images.image(steps=args.steps, size=size, low_memory=args.low_memory)
        case "horizon":
            return images.horizon(steps=args.steps, size=size)
        case _:
            return models.train_step(batch=args.batch or 64)


def prepare(folder: Path, args: argparse.Namespace) -> Setting:
    """The weights that both sides read, a random model's where there are none."""
    from tests.benchmarks.diffusers_side import write_configs
    from tests.helpers import random_checkpoint, small_config

    config, weights = small_config() if args.small else SD_V1, args.weights
    if args.suite in OF_HORIZON:
        weights = shipped_weights()
        config = recognise(open_archive(weights)).config
    elif weights is None and args.suite not in OF_PROGRAMS:
        weights = folder / "random.safetensors"
        print("writing random weights", file=sys.stderr)
        random_checkpoint(weights, config)
    return Setting(
        weights or folder,
        config,
        write_configs(folder / "configs", config),
        args.device,
        getattr(torch, args.dtype),
    )


def machine() -> dict[str, str | int]:
    """What the numbers depend on."""
    names = ("torch", "diffusers", "transformers", "safetensors")
    return {
        "system": platform.platform(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


def processor() -> str:
    """The processor's name; the standard library knows only its family."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()


if __name__ == "__main__":
    main()
