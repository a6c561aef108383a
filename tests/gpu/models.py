"""Random models on the device, of Stable Diffusion v1's size (or Horizon's), and their inputs."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.checkpoints.stages import STAGES, empty_stage
from ldm.config import HORIZON, SD_V1, ModelConfig
from ldm.pipeline import TextToImage
from ldm.schedule import NoiseSchedule
from tests.gpu.report import Report


def config_of(report: Report) -> ModelConfig:
    return HORIZON if report.small else SD_V1


def half_of(report: Report) -> torch.dtype:
    """What a device draws in where it is to be fast."""
    return torch.float16 if report.on_gpu else torch.float32


def random_pipe(report: Report, dtype: torch.dtype) -> TextToImage:
    """Every weight drawn on the device; its prompts are token ids, any text standing for one."""
    config = config_of(report)
    stages = {}
    for seed, name in enumerate(STAGES):
        stage = empty_stage(name, config).to(dtype).to_empty(device=report.device)
        fill(stage, seed)
        stages[name] = stage.eval().requires_grad_(False)
    stages["text"].rebuild_buffers()
    pipe = TextToImage(**stages, schedule=NoiseSchedule(config.schedule), config=config)
    text = config.text
    ids = torch.full((2, text.max_length), text.eos_token_id)
    ids[:, 0] = text.bos_token_id
    ids[1, 1:-1] = torch.arange(text.max_length - 2)
    even = torch.ones(1, text.max_length)  # no word weighs more than another
    pipe.text.read = lambda prompt, *_: (ids[[int(bool(prompt))]], even)
    return pipe


def fill(model: nn.Module, seed: int) -> None:
    """Weights that keep what they are given about as large as it is."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for name, weight in model.named_parameters():
        weight.data.normal_(generator=generator)
        if weight.ndim > 1:
            weight.data.mul_(0.5 if "embedding" in name else weight[0].numel() ** -0.5)
        else:
            weight.data.mul_(0.1).add_(1.0 if name.endswith("weight") else 0.0)


def moved(stage: nn.Module, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """A copy of a stage elsewhere, or in another type."""
    return copy.deepcopy(stage).to(device, dtype)


def inputs(
    report: Report, dtype: torch.dtype, batch: int = 2, t: int = 501, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and context of a call of the UNet."""
    config, generator = config_of(report), torch.Generator().manual_seed(seed)
    side = config.image_size // config.vae.factor
    x = torch.randn(batch, config.unet.in_channels, side, side, generator=generator)
    shape = (batch, config.text.max_length, config.unet.context_dim)
    context = torch.randn(shape, generator=generator)
    times = torch.full((batch,), t, device=report.device)
    return x.to(report.device, dtype), times, context.to(report.device, dtype)


def gflop(report: Report, batch: int) -> float:
    """How many operations a call of the UNet is, in 1e9, counted on one without numbers."""
    x, t, context = (a.to("meta") for a in inputs(report, torch.float32, batch))
    with FlopCounterMode(display=False) as counter:
        empty_stage("unet", config_of(report))(x, t, context)
    return counter.get_total_flops() / 1e9


def error(ours: Tensor, exact: Tensor) -> float:
    """The largest error, in standard deviations of the exact values."""
    ours, exact = ours.detach().double().cpu(), exact.detach().double().cpu()
    return float((ours - exact).abs().max() / exact.std())
