"""Samplers: from noise to a picture, one step at a time.

    for step in ddim(eps_fn, x, schedule.ddim_timesteps(50), schedule):
        show(step.x0)

    loop.py       the one loop: asks for the noise, applies a rule, yields everything it knows
    rules.py      the rules, one per sampler: the equation of its paper. A new sampler goes there,
                  its name here, and into the options of the command (`ldm.cli.options`)
    guidance.py   classifier-free guidance: two predictions made into one
    noise.py      where random numbers come from
    soundness.py  whether latents are still numbers of a sane size

Samplers know no model, so they run as well on a closed form as on a UNet. Each is a function that
returns a generator: `generator.send(new_x)` goes on from `new_x` instead of `step.x_prev`, and
returns the next Step.
"""

from ldm.samplers.guidance import guide
from ldm.samplers.loop import EpsFn, Known, Prediction, Rule, Step, Steps, sample
from ldm.samplers.noise import Generators, draw_noise
from ldm.samplers.rules import SAMPLERS, Sampler, ddim, ddpm

__all__ = [
    "SAMPLERS",
    "EpsFn",
    "Generators",
    "Known",
    "Prediction",
    "Rule",
    "Sampler",
    "Step",
    "Steps",
    "ddim",
    "ddpm",
    "draw_noise",
    "guide",
    "sample",
]
