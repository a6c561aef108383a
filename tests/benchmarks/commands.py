"""What a user waits for before anything is drawn: imports, and the way to the first step.

Each is a program of its own, started anew; so the start of Python counts on both sides.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial

from tests.benchmarks.harness import Benchmark, Setting

# The package's names come, with torch, when they are asked for: so they are asked for.
OUR_IMPORTS = "import ldm; ldm.load, ldm.load_unet, ldm.record, ldm.trace, ldm.inspect"
OUR_FIRST_STEP = "import ldm; next(ldm.load().denoise('a red house', steps=20))"
# What cannot be spared: our text encoder is transformers' own.
ITS_IMPORTS = "import torch; from transformers import CLIPTextConfig, CLIPTextModel"


def program(setting: Setting, text: str) -> Callable[[], object]:
    """A program of Python, from its start to its end."""

    def run() -> None:
        subprocess.run([sys.executable, "-c", text], check=True)

    return run


def benchmark(name: str, ours: str, theirs: str) -> Benchmark:
    return Benchmark(name, partial(program, text=ours), partial(program, text=theirs))


IMPORT = (
    benchmark("import ldm, over import torch", OUR_IMPORTS, "import torch"),
    benchmark(
        "import ldm, over diffusers' pipeline",
        OUR_IMPORTS,
        "from diffusers import StableDiffusionPipeline",
    ),
)
FIRST_STEP = (
    benchmark("to Horizon's first step, over its imports alone", OUR_FIRST_STEP, ITS_IMPORTS),
)
