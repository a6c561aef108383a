"""Loading: from a file in the system's cache to models that can run.

diffusers maps the file into memory and reads none of it until a model runs. So do we with
`check=False`: these rows compare the same work. By default ours looks at every number, since a NaN
is to be found here and not in a black picture: these rows are called `checked`. `load and read`
ends when, after loading, every weight has been read once, which the first step of a model does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn

from tests.benchmarks.harness import Benchmark, Setting

STAGES = ("unet", "vae", "text")


def ours(
    setting: Setting, *, stages: tuple[str, ...], dtype: torch.dtype | None, read: bool, check: bool
) -> Callable[[], object]:
    import transformers.models.clip.modeling_clip  # noqa: F401 (a stage would import it)

    from ldm.checkpoints.loading import load_stages

    def load() -> object:
        models = load_stages(
            setting.weights,
            stages,
            dtype=dtype or torch.float32,
            config=setting.config,
            check=check,
        )
        return models, read and read_once(models)

    return load


def theirs(
    setting: Setting, *, stages: tuple[str, ...], dtype: torch.dtype | None, read: bool
) -> Callable[[], object]:
    from tests.benchmarks import diffusers_side

    def load() -> object:
        # A stage alone opens the file itself; for several, as in a pipeline, it is opened once.
        alone = len(stages) == 1
        source = setting.weights if alone else diffusers_side.open_file(setting.weights)
        models = [diffusers_side.load(stage, source, setting.configs, dtype) for stage in stages]
        return models, read and read_once(models)

    return load


@torch.no_grad()
def read_once(models: Iterable[nn.Module]) -> float:
    """The sum of all weights: something that needs each of them."""
    return sum(float(weight.sum()) for model in models for weight in model.parameters())


def benchmark(
    name: str,
    stages: tuple[str, ...],
    dtype: torch.dtype | None = None,
    *,
    check: bool = False,
    read: bool = False,
) -> Benchmark:
    asked = dict(stages=stages, dtype=dtype, read=read)
    return Benchmark(
        name, partial(ours, **asked, check=check), partial(theirs, **asked), fresh=True
    )


BENCHMARKS = (
    *(benchmark(f"load {stage}", (stage,)) for stage in STAGES),
    benchmark("load all", STAGES),
    benchmark("load all, checked", STAGES, check=True),
    benchmark("load and read all", STAGES, read=True),
    benchmark("load and read all, checked", STAGES, check=True, read=True),
    benchmark("load all as float16, checked", STAGES, torch.float16, check=True),
)
