"""Samplers: from noise to a picture, one step at a time.

    for step in ddim(eps_fn, x, schedule.ddim_timesteps(50), schedule):
        show(step.x0)

    loop.py       the one loop: asks for the noise, applies a rule, yields everything it knows
    rules.py      ddim and ddpm: a rule is the equation of its paper
    solvers.py    rules that look at one step: euler, euler_ancestral, heun, lcm
    multistep.py  rules that look back: plms, dpmpp_2m, dpmpp_2m_sde, unipc
    grids.py      which noise levels a run visits
    by_name.py    what `pipe(sampler=...)` finds. A new sampler is a rule in one of the three files,
                  a line there, and its name in the options of the command (`ldm.cli.options`)
    guidance.py   classifier-free guidance: two predictions made into one
    inpainting.py a rule around a rule: a part of the picture is kept
    inversion.py  from a picture back to noise
    noise.py      where random numbers come from
    soundness.py  whether latents are still numbers of a sane size

Samplers know no model, so they run as well on a closed form as on a UNet. `ddim`, `ddpm`, and
`sample` with any rule, return a generator: `generator.send(new_x)` goes on from `new_x` instead of
`step.x_prev`, and returns the next Step.
"""

from ldm.samplers.by_name import SAMPLERS, Sampler
from ldm.samplers.grids import SPACINGS
from ldm.samplers.guidance import guide, on_interval
from ldm.samplers.inpainting import inpaint_rule
from ldm.samplers.inversion import invert, rising
from ldm.samplers.loop import EpsFn, Grid, Known, Moment, Prediction, Rule, Step, Steps, sample
from ldm.samplers.multistep import dpmpp_2m_rule, dpmpp_2m_sde_rule, plms_rule, unipc_rule
from ldm.samplers.noise import Generators, Noise, draw_noise, handed_in, slerp
from ldm.samplers.rules import ddim, ddpm
from ldm.samplers.solvers import euler_ancestral_rule, euler_rule, heun_rule, lcm_rule

__all__ = [
    "SAMPLERS",
    "SPACINGS",
    "EpsFn",
    "Generators",
    "Grid",
    "Known",
    "Moment",
    "Noise",
    "Prediction",
    "Rule",
    "Sampler",
    "Step",
    "Steps",
    "ddim",
    "ddpm",
    "dpmpp_2m_rule",
    "dpmpp_2m_sde_rule",
    "draw_noise",
    "euler_ancestral_rule",
    "euler_rule",
    "guide",
    "handed_in",
    "heun_rule",
    "inpaint_rule",
    "invert",
    "lcm_rule",
    "on_interval",
    "plms_rule",
    "rising",
    "sample",
    "slerp",
    "unipc_rule",
]
