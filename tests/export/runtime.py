"""Exported graphs, run by ONNX Runtime: a model for our samplers, made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Graphs:
    """The stages of an exported folder."""

    def __init__(self, folder: Path) -> None:
        self.text, self.decoder, self.unet, self.insides = (
            session(folder / f"{name}.onnx") for name in ("text", "decoder", "unet", "unet_insides")
        )

    def context(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(self.text.run(None, {"ids": ids.numpy()})[0])

    def image(self, latents: Tensor) -> Tensor:
        return torch.from_numpy(self.decoder.run(None, {"latents": latents.numpy()})[0])

    def model(self, **steering: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """model(x, t, context), as `guide` wants it."""

        def ask(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            return self.ask(self.unet, x, t, context, **steering)["prediction"]

        return ask

    def ask(self, unet: Any, x: Tensor, t: Tensor, context: Tensor, **steering: Tensor) -> Any:
        """All outputs of one of the two UNets, by their names."""
        gates = next(one.shape[0] for one in unet.get_inputs() if one.name == "gates")
        neutral = {
            "bias": torch.zeros(context.shape[:2]),
            "weight": torch.ones(context.shape[:2]),
            "gates": torch.ones(gates),
        }
        inputs = {"x": x, "t": t.long(), "context": context} | neutral | steering
        names = [one.name for one in unet.get_outputs()]
        arrays = unet.run(None, {name: one.numpy() for name, one in inputs.items()})
        return {n: torch.from_numpy(np.asarray(a)) for n, a in zip(names, arrays, strict=True)}
