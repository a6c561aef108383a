"""What must be so on a GPU."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ldm
from ldm.config import HORIZON
from ldm.pipeline import TextToImage
from ldm.samplers import SAMPLERS, Steps
from ldm.speed.gpu import in_float32
from ldm.train.state import Optimisation, TrainState, fast_step
from ldm.unet import UNet
from tests.gpu.models import error, half_of, inputs, moved, random_pipe
from tests.gpu.report import Report

PROMPT, OTHER = "a red house on green grass at night", "calm sea"

# The largest errors that may be, in standard deviations of the exact values: rounding, added up by
# a deep network, and by the steps of a run.
STAGE = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.5}
RUN = {torch.float32: 2e-3, torch.float16: 1.0}


def last_of(run: Steps) -> Tensor:
    for step in run:
        latents = step.x_prev
    return latents


def dtypes(report: Report) -> tuple[torch.dtype, ...]:
    return tuple(STAGE) if report.on_gpu else (torch.float32, torch.bfloat16)


def stages_of_horizon(report: Report) -> None:
    """Each stage of the shipped model, in each type, against float32 on the CPU."""
    exact_pipe = ldm.load(device="cpu", dtype=torch.float32)
    exact = outputs(exact_pipe, exact_pipe.context([PROMPT, ""]))
    for dtype in dtypes(report):
        pipe = ldm.load(device=report.device, dtype=dtype)
        here = outputs(pipe, exact["text"])
        for name, value in here.items():
            told = f"Horizon's {name}, {dtype} against float32 on the CPU"
            report.check(told, error(value, exact[name]), STAGE[dtype])
            stayed = value.device.type == report.device.type and value.dtype == dtype
            report.check(f"{told}: it stays there", 0.0 if stayed else 1.0, 0)


def outputs(pipe: TextToImage, context: Tensor) -> dict[str, Tensor]:
    """What the stages of a pipeline make of the same inputs."""
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    x, t = x.to(pipe.device, pipe.dtype), torch.full((2,), 601, device=pipe.device)
    with in_float32(pipe.device, tf32=False):
        picture = pipe.vae.decode(x)
        return {
            "text": pipe.context([PROMPT, ""]),
            "unet": pipe.unet(x, t, context.to(pipe.device, pipe.dtype)),
            "decoder": picture,
            "encoder": pipe.vae.encode(x.repeat(1, 1, 4, 4)[:, :3].clamp(-1, 1)).mode(),
        }


def pictures_of_a_seed(report: Report) -> None:
    """One seed is one picture: on every device, alone or in a batch, and again."""
    settings = dict(steps=20 if report.on_gpu else 3, seed=3)
    exact_pipe = ldm.load(device="cpu", dtype=torch.float32)
    exact = last_of(exact_pipe.denoise(PROMPT, **settings))
    levels = np.asarray(exact_pipe.decode(exact)[0]).astype(int)
    for dtype in (torch.float32, half_of(report)):
        pipe = ldm.load(device=report.device, dtype=dtype)
        x = last_of(pipe.denoise(PROMPT, **settings))
        report.check(f"latents of a seed, {dtype}", error(x, exact), RUN[dtype])
        again = last_of(pipe.denoise(PROMPT, **settings))
        report.check(f"the same again, {dtype}", float((x - again).abs().max()), 0)
        batch = last_of(pipe.denoise(PROMPT, **settings | dict(seed=1, num_images=4)))
        report.check(f"third of a batch, {dtype}", error(batch[2:3], x), RUN[dtype])
        apart = np.abs(np.asarray(pipe.decode(x)[0]).astype(int) - levels)
        bound = 0.1 if dtype == torch.float32 else 3.0
        report.check(f"grey levels apart, mean, {dtype}", float(apart.mean()), bound)


def no_step_waits(report: Report) -> None:
    """No step of any sampler or preset waits for the GPU: `set_sync_debug_mode("error")`."""
    if not report.on_gpu:
        return
    runs: dict[str, dict[str, Any]] = {name: dict(sampler=name) for name in SAMPLERS}
    runs |= {
        "like compvis": dict(like="compvis", eta=0.5),
        "like diffusers": dict(like="diffusers", eta=0.5),
        "a batch": dict(num_images=3, eta=1.0),
        "a negative prompt": dict(negative_prompt=OTHER),
        "no guidance": dict(guidance_scale=1.0),
    }
    plain, fast = (ldm.load(device=report.device) for _ in range(2))
    fast.optimize()
    for kind, pipe in (("plain", plain), ("optimized", fast)):
        for name, settings in runs.items():
            run = pipe.denoise(PROMPT, steps=4, **settings)
            next(run)
            torch.cuda.synchronize()
            waited = 0.0
            try:
                torch.cuda.set_sync_debug_mode("error")
                for _ in range(3):
                    next(run)
            except RuntimeError:
                waited = 1.0
            finally:
                torch.cuda.set_sync_debug_mode("default")
            report.check(f"a step waits: {name}, {kind}", waited, 0)
    ldm.trace(plain, PROMPT, steps=2)
    counts = []
    for steps in (2, 6):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            ldm.trace(plain, PROMPT, steps=steps)
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(one.message) for one in seen))
    report.check("a trace waits more often for more steps", float(counts[1] - counts[0]), 0)


def optimized_pictures(report: Report) -> None:
    """`optimize()` draws what the plain pipeline draws, whatever changes between two runs."""
    for dtype in (torch.float32, half_of(report)):
        plain, fast = (ldm.load(device=report.device, dtype=dtype) for _ in range(2))
        fast.optimize()
        bound = 0.2 if report.on_gpu else RUN[dtype]  # float32 may be TensorFloat-32
        settings = dict(steps=4, seed=0)
        for name, prompt, more in (
            ("", PROMPT, {}),
            (", another prompt", OTHER, {}),
            (", a batch", PROMPT, dict(num_images=2)),
            (", the first again", PROMPT, {}),
        ):
            ours, theirs = (
                last_of(pipe.denoise(prompt, **settings, **more)) for pipe in (fast, plain)
            )
            report.check(f"optimized{name}, {dtype}", error(ours, theirs), bound)
        for pipe in (plain, fast):
            pipe.unet.mid.transformer.self_attention.to_q.weight.mul_(2.0)
            pipe.unet.mid.transformer.cross_attention.to_k.weight.mul_(2.0)
        ours, theirs = (last_of(pipe.denoise(PROMPT, **settings)) for pipe in (fast, plain))
        report.check(f"optimized, other weights, {dtype}", error(ours, theirs), bound)
        with ldm.record(fast.unet, "mid") as seen:
            last_of(fast.denoise(PROMPT, **settings))
        calls = sum(map(len, seen.values()))
        report.check(f"recorded while optimized, calls missing, {dtype}", float(calls < 4), 0)


def low_memory(report: Report) -> None:
    """One stage on the device at a time, and the same picture."""
    pipe = random_pipe(report, half_of(report))
    settings = dict(steps=2, seed=0)
    plain = last_of(pipe.denoise("a", **settings))
    pipe.optimize(low_memory=True)
    sizes = (1, 2) if report.on_gpu else (1,)
    for times in sizes:
        size = times * pipe.config.image_size
        with report.memory() as memory:
            seconds = report.seconds_of(
                lambda size=size: pipe("a", **settings, height=size, width=size)
            )
        report.row(f"low_memory, {size} pixels, 2 steps", seconds=round(seconds, 2), **memory)
        if memory:
            report.check(f"low_memory at {size}, GB", float(memory["memory, GB"]), 2.0 * times)
    x = last_of(pipe.denoise("a", **settings))
    report.check("low_memory's latents", error(x, plain), RUN[half_of(report)])


def full_size_stages(report: Report) -> None:
    """The stages at full size, random, in each type, against float32 on the CPU."""
    pipe = random_pipe(report, torch.float32)
    x, t, context = inputs(report, torch.float32)
    ids = pipe.text.tokenize(["", "a"])

    def run(name: str, stage: Any, device: Any, dtype: torch.dtype) -> Tensor:
        if name == "text":
            return stage.encode(ids.to(device))
        if name == "vae":
            return stage.decode(x[:1].to(device, dtype))
        return stage(x.to(device, dtype), t.to(device), context.to(device, dtype))

    for name in ("text", "vae", "unet"):
        stage = getattr(pipe, name)
        exact = run(name, moved(stage, "cpu", torch.float32), "cpu", torch.float32)
        for dtype in dtypes(report):
            with in_float32(report.device, tf32=False):
                here = run(name, moved(stage, report.device, dtype), report.device, dtype)
            told = f"{name} at full size, {dtype} against float32 on the CPU"
            report.check(told, error(here, exact), STAGE[dtype])
            del here
            report.free()


def training(report: Report) -> None:
    """A step of Horizon's training: the loss falls, and the step does not wait."""
    with torch.enable_grad():
        unet = UNet(HORIZON.unet).to(report.device)
        settings = Optimisation(steps=100, batch_size=64, learning_rate=1e-3, warmup=1)
        state = TrainState(unet, settings)
        n = settings.batch_size if report.on_gpu else 2
        shape = (n, HORIZON.unet.in_channels, 16, 16)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(report.device)
        context = torch.zeros(n, 1, HORIZON.unet.context_dim, device=report.device)
        t = torch.full((n,), 500, device=report.device)
        losses: list[Tensor] = []

        def step() -> None:
            with fast_step(report.device):
                eps = state.model(x, t, context)
            loss = (eps.float() - x).square().mean()
            state.update(loss)
            losses.append(loss.detach())

        step()
        with contextlib.ExitStack() as stack:
            if report.on_gpu:
                torch.cuda.synchronize()
                stack.callback(torch.cuda.set_sync_debug_mode, "default")
                torch.cuda.set_sync_debug_mode("error")
            step()
        took = report.milliseconds(step, 10 if report.on_gpu else 1, 3 if report.on_gpu else 1)
    report.check("training: the last loss over the first", float(losses[-1] / losses[0]), 0.99)
    report.row(f"training step of Horizon, batch {n}", ms=round(took, 2))
