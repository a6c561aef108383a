"""How fast a GPU draws, and in how much memory."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.pipeline import TextToImage
from ldm.speed.gpu import FastUNet, can_compile, optimize_decoder
from ldm.speed.workplace import Workplace
from tests import oracle_configs
from tests.gpu.models import config_of, error, gflop, half_of, inputs, moved, random_pipe
from tests.gpu.report import Report

GRAPH = 0.05  # the largest error of the fast call, in standard deviations of the plain one's


def environment(report: Report) -> None:
    """What the figures depend on."""
    report.machine |= {"Python": platform.python_version(), "cores": os.cpu_count() or 1}
    for name in ("torch", "transformers", "triton", "diffusers"):
        try:
            report.machine[name] = version(name)
        except PackageNotFoundError:
            continue
    if report.on_gpu:
        found = torch.cuda.get_device_properties(report.device)
        report.machine |= {"GPU": found.name, "GB": round(found.total_memory / 1e9, 1)}
        report.machine |= {
            "CUDA": str(torch.version.cuda),
            "capability": f"{found.major}.{found.minor}",
        }
    report.machine["size"] = config_of(report).name


def peak(report: Report) -> None:
    """What a large product and a copy reach: the two ceilings."""
    side = 512 if report.small else 8192
    halves = (torch.float16, torch.bfloat16) if report.on_gpu else ()
    for dtype in (*halves, torch.float32):
        a, b = (torch.randn(side, side, device=report.device).to(dtype) for _ in range(2))
        tflops = 2 * side**3 / report.milliseconds(lambda a=a, b=b: a @ b, 10) / 1e9
        name = str(dtype).removeprefix("torch.")
        report.peak[name] = tflops
        report.row(f"a product of {side} x {side}, {name}", **{"TFLOP/s": round(tflops, 3)})
    size = 2**20 if report.small else 2**30
    numbers = torch.zeros(size, dtype=torch.uint8, device=report.device)
    other = torch.empty_like(numbers)
    ms = report.milliseconds(lambda: other.copy_(numbers), 10)
    report.row("a copy, read and written", **{"GB/s": round(2 * numbers.nbytes / ms / 1e6, 1)})


def pictures_as_they_are(report: Report) -> None:
    """Whole pictures by the plain pipeline."""
    pictures(report, random_pipe(report, half_of(report)), "plain")


def pictures(report: Report, pipe: TextToImage, kind: str) -> None:
    """Whole pictures with guidance, one and four at once: the loop, the decoder, the memory."""
    steps = 20 if report.on_gpu else 2
    for count in (1, 4) if report.on_gpu else (1,):
        settings = dict(steps=steps, num_images=count)
        pipe("a", steps=2, num_images=count)  # compiles, captures, chooses kernels
        latents: list[Tensor] = []

        def loop(settings: dict[str, int] = settings, latents: list[Tensor] = latents) -> None:
            *_, step = pipe.denoise("a", **settings)
            latents[:] = [step.x_prev]

        with report.memory() as memory:
            looped = report.seconds_of(loop)
            decoded = report.seconds_of(lambda latents=latents: pipe.decode(latents[0]))
        figures = {
            "pictures a second": round(count / (looped + decoded), 3),
            "steps a second": round(steps / looped, 2),
            "decode, ms": round(1000 * decoded, 1),
        }
        report.row(f"pictures of {steps} steps, {kind}, batch {count}", **figures, **memory)


def steps_of_the_unet(report: Report) -> None:
    """A guided step: plain, with channels last, and as a graph."""
    dtype = half_of(report)
    unet = random_pipe(report, dtype).unet
    for batch in (2, 8) if report.on_gpu else (2,):
        call, cost = inputs(report, dtype, batch), gflop(report, batch)
        ms = report.milliseconds(lambda call=call: unet(*call))
        report.row(f"UNet, batch {batch}, plain", **report.share(ms, cost, dtype))
        lasting: Any = moved(unet, report.device, dtype).to(memory_format=torch.channels_last)
        ms = report.milliseconds(lambda call=call, lasting=lasting: lasting(*call))
        report.row(f"UNet, batch {batch}, channels last", **report.share(ms, cost, dtype))
        del lasting
        if report.on_gpu:
            fast_step(report, FastUNet(unet, compiled=False), f"graph, batch {batch}", batch)
        report.free()


def fast_step(report: Report, fast: FastUNet, name: str, batch: int = 2) -> None:
    """A step of the fast UNet: how exact, and how fast."""
    dtype = half_of(report)
    for t, seed in ((501, 1), (7, 2)):  # neither t nor the prompt may be baked into the graph
        call = inputs(report, dtype, batch, t, seed)
        report.check(f"UNet, {name}, at t = {t}", error(fast(*call), fast.unet(*call)), GRAPH)
    report.row(
        f"UNet, {name}",
        **report.share(report.milliseconds(lambda: fast(*call)), gflop(report, batch), dtype),
    )


def pictures_by_graph(report: Report) -> None:
    """Whole pictures with the UNet captured, and nothing compiled."""
    pipe = random_pipe(report, half_of(report))
    if report.on_gpu:
        pipe.workplace = Workplace(optimized=True, fast_unet=FastUNet(pipe.unet, compiled=False))
    pictures(report, pipe, "graph")


def kernels_of_attention(report: Report) -> None:
    """How long each of PyTorch's kernels takes for each shape of attention, and which it picks."""
    if not report.on_gpu:
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    for name, batch, heads, queries, keys, width in (
        ("self, 64 x 64", 2, 8, 4096, 4096, 40),
        ("cross, 64 x 64", 2, 8, 4096, 77, 40),
        ("self, 32 x 32", 2, 8, 1024, 1024, 80),
        ("self, 16 x 16", 2, 8, 256, 256, 160),
        ("decoder, 512 pixels", 1, 1, 4096, 4096, 512),
    ):
        q, k, v = (
            torch.randn(batch, n, heads, width, device=report.device).half().transpose(1, 2)
            for n in (queries, keys, keys)
        )

        def attend(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

        figures: dict[str, Any] = {"PyTorch's choice, ms": round(report.milliseconds(attend), 4)}
        for kernel, backend in kernels.items():
            with warnings.catch_warnings(), sdpa_kernel(backend):
                warnings.simplefilter("ignore")  # of the reasons why a kernel cannot
                try:
                    figures[f"{kernel}, ms"] = round(report.milliseconds(attend), 4)
                except RuntimeError:
                    figures[f"{kernel}, ms"] = "cannot"
        report.row(f"attention, {name}", **figures)


def compiled(report: Report) -> None:
    """What `optimize()` makes of a large model: the UNet compiled and captured, the decoder too."""
    if not report.on_gpu or not can_compile():
        return
    pipe = random_pipe(report, half_of(report))
    fast = FastUNet(pipe.unet, compiled=True)
    pipe.workplace = Workplace(optimized=True, fast_unet=fast)
    seconds = report.seconds_of(lambda: fast(*inputs(report, half_of(report))))
    report.row("the first step, compiled and captured", seconds=round(seconds, 1))
    fast_step(report, fast, "compiled, graph")
    optimize_decoder(pipe.vae)
    pictures(report, pipe, "optimized")


def compiled_and_tuned(report: Report) -> None:
    """The same, with PyTorch trying out kernels: what there may be left to win."""
    if not report.on_gpu or not can_compile():
        return
    import torch._inductor.config as inductor

    tuned = dict(conv_1x1_as_mm=True, coordinate_descent_tuning=True, max_autotune=True)
    with inductor.patch(**tuned):
        unet = random_pipe(report, half_of(report)).unet
        fast_step(report, FastUNet(unet, compiled=True), "compiled and tuned, graph")


def diffusers_unet(report: Report) -> None:
    """diffusers' UNet of the same shape, where it is installed: plain."""
    if find_spec("diffusers") is None:
        return
    from diffusers import UNet2DConditionModel

    dtype, config = half_of(report), config_of(report)
    with report.device:
        theirs = UNet2DConditionModel(
            sample_size=config.image_size // config.vae.factor, **oracle_configs.unet(config.unet)
        )
    theirs = theirs.to(dtype).eval()
    call = inputs(report, dtype)
    ms = report.milliseconds(lambda: theirs(*call, return_dict=False))
    report.row("diffusers' UNet, batch 2, plain", **report.share(ms, gflop(report, 2), dtype))


def sections() -> Iterator[tuple[Callable[[Report], None], float]]:
    """Every section with the seconds that it may take, in the order of their worth."""
    from tests.gpu import right

    yield environment, 20
    yield peak, 30
    yield right.stages_of_horizon, 60
    yield right.pictures_of_a_seed, 60
    yield right.no_step_waits, 90
    yield right.optimized_pictures, 60
    yield right.training, 40
    yield pictures_as_they_are, 60
    yield steps_of_the_unet, 60
    yield pictures_by_graph, 40
    yield right.full_size_stages, 100
    yield right.low_memory, 60
    yield compiled, 230
    yield kernels_of_attention, 40
    yield diffusers_unet, 60
    yield compiled_and_tuned, 230
