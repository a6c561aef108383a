"""How far a UNet in training is above what can be reached, told while there is time to act on it.

A loss that no longer falls may be at its floor, or stuck far above it: the number alone does not
say. Here the floor is known (`ldm.worlds.floor`), and where most of the excess is says what is
undertrained: layout, where nearly all is noise, objects, or detail.

It is the plain error in the noise, of the running mean of the weights, with the empty caption, on
scenes that are not trained on: not the loss, which is weighted, and knows captions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.schedule import NoiseSchedule, as_eps_fn
from ldm.text import CLIPTextEncoder
from ldm.train.autoencoder import encode_scenes
from ldm.train.data import draw_scenes, rng_at
from ldm.train.diffusion import DiffusionSettings, LatentSet
from ldm.train.state import Record, TrainState
from ldm.unet import UNet
from ldm.vae import AutoencoderKL
from ldm.worlds.floor import Excess, Floor, compare, floor, in_words

MEASURED_AT = (0.3, 0.5, 0.7, 0.8, 0.9, 0.99)
"""Where in the table it is measured. Below the first no picture is like another, and the floor is
not known."""
STREAM = 2**20  # of the validation scenes: no training step has this number


@dataclass(frozen=True)
class Ruler:
    """The floor under the error of a UNet, and what it takes to measure one against it.

    Attributes:
        validation: latents of scenes that are not trained on, (M, C, h, w).
        floors: the bracket at each timestep.
        context: the empty caption's, (1, L, D).
        schedule, prediction: by which the UNet is trained.
    """

    validation: Tensor = field(repr=False)
    floors: Sequence[Floor]
    context: Tensor = field(repr=False)
    schedule: NoiseSchedule
    prediction: str

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        vae: AutoencoderKL,
        data: LatentSet,
        text: CLIPTextEncoder,
        schedule: NoiseSchedule,
        prediction: str,
        settings: DiffusionSettings,
    ) -> Ruler:
        """The floor by the latents that are trained on, and fresh ones beside them."""
        rng = rng_at(settings.optimisation.seed, STREAM)
        scenes = draw_scenes(rng, settings.validation)
        validation = encode_scenes(vae, scenes, settings.image_size) * vae.config.scaling_factor
        last = len(schedule.alpha_bar) - 1
        floors = floor(validation, data.latents, schedule, [round(f * last) for f in MEASURED_AT])
        return cls(validation, floors, text([""]), schedule, prediction)

    @torch.no_grad()
    def measure(self, unet: UNet) -> list[Excess]:
        """The error of a UNet beside each floor."""

        def model(x: Tensor, t: Tensor) -> Tensor:
            return unet(x, t, self.context.expand(len(x), -1, -1))

        eps_fn = as_eps_fn(model, self.prediction, self.schedule)
        return compare(eps_fn, self.floors, self.validation, self.schedule)


def measured(
    records: Iterator[Record], state: TrainState, ruler: Ruler, settings: DiffusionSettings
) -> Iterator[Record]:
    """The same records; every `measure_every` steps, and at the last, one has the excess at each
    timestep among its figures ("excess at 899": 0.19 is 19% above) and says where it is large."""
    for record in records:
        if record.step % settings.measure_every and record.step != settings.optimisation.steps:
            yield record
            continue
        found = ruler.measure(state.ema)  # type: ignore[arg-type]
        excess = {f"excess at {one.floor.t}": round(one.excess, 4) for one in found}
        yield dataclasses.replace(record, values={**record.values, **excess}, told=in_words(found))
