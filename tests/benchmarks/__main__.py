"""python -m tests.benchmarks load [--pairs 5] [--weights FILE] [--small] [--json]"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from ldm.config import SD_V1
from tests.benchmarks import load
from tests.benchmarks.harness import Setting, measure, table

SUITES = {"load": load.BENCHMARKS}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("suite", choices=SUITES, help="what to time")
    parser.add_argument("--pairs", type=int, default=5, help="how often (default: 5)")
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
    if args.pairs < 1:
        parser.error("--pairs must be 1 or more")
    if args.weights is not None and not args.weights.is_file():
        parser.error(f"there is no file {args.weights}")

    with tempfile.TemporaryDirectory(prefix="ldm-benchmarks-") as folder:
        setting = prepare(Path(folder), args.weights, args.small)
        results = [
            measure(benchmark, setting, args.pairs)
            for benchmark in tqdm(SUITES[args.suite], unit="row", file=sys.stderr)
        ]
    if args.json:
        runs = [result.summary() | {"pairs": result.pairs} for result in results]
        told = {"machine": machine(), "results": runs}
        print(json.dumps(told, default=vars, indent=2))
    else:
        print(*(f"{name}: {value}" for name, value in machine().items()), sep="\n", end="\n\n")
        print(*table(results), sep="\n")


def prepare(folder: Path, weights: Path | None, small: bool) -> Setting:
    """The weights that both sides read, a random model's where there are none."""
    from tests.benchmarks.diffusers_side import write_configs
    from tests.helpers import random_checkpoint, small_config

    config = small_config() if small else SD_V1
    if weights is None:
        weights = folder / "random.safetensors"
        print("writing random weights", file=sys.stderr)
        random_checkpoint(weights, config)
    return Setting(weights, config, write_configs(folder / "configs", config))


def machine() -> dict[str, str | int]:
    """What the numbers depend on."""
    names = ("torch", "diffusers", "transformers", "safetensors")
    return {
        "system": platform.platform(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
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
