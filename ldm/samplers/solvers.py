"""Rules that look at one step alone: Euler's and Heun's methods, the same with noise, and LCM's.

Karras et al. (2022, arXiv:2206.00364) write the probability flow for y = x / sqrt(alpha_bar), whose
noise has the standard deviation sigma = sqrt((1 - alpha_bar) / alpha_bar). There it is but

    dy / dsigma = eps(x)

so a solver is how to step along eps in sigma. In x, Euler's step is DDIM's at eta 0, and Euler's
with noise is DDIM's at eta 1: they differ in the grid that they walk, and in where it ends.
"""

from __future__ import annotations

from torch import Tensor

from ldm.samplers.loop import Known
from ldm.schedule import noised, x0_from_eps


def along(known: Known, eps: Tensor) -> Tensor:
    """From x to the step's end along an eps: y' = y + (sigma' - sigma) eps, written in x."""
    if known.alpha_bar == 0.0:  # pure noise hides its picture: only the model's own pair has it
        return noised(known.x0, known.eps, known.alpha_bar_prev)
    return noised(x0_from_eps(known.x, eps, known.alpha_bar), eps, known.alpha_bar_prev)


def euler_rule(known: Known) -> Tensor:
    """Euler's method (Karras et al. 2022, algorithm 1 without its correction)."""
    return noised(known.x0, known.eps, known.alpha_bar_prev)


def heun_rule(known: Known) -> Tensor:
    """Heun's method (Karras et al. 2022, algorithm 1): with the mean of the slopes at either end.
    Two calls of the model a step, but one where it ends in the clean picture."""
    guess = euler_rule(known)
    if known.alpha_bar_prev == 1.0:
        return guess
    return along(known, (known.eps + known.ask(guess, known.there)) / 2)


def euler_ancestral_rule(known: Known) -> Tensor:
    """Euler's method to below the end's noise level, and fresh noise up to it (k-diffusion's
    `sample_euler_ancestral`; the shares are those of DDPM eq. 7, in sigma):

    sigma_up^2 = sigma'^2 (sigma^2 - sigma'^2) / sigma^2,  sigma_down^2 = sigma'^2 - sigma_up^2
    """
    alpha_bar, alpha_bar_prev = known.alpha_bar, known.alpha_bar_prev
    # (sigma' / sigma)^2: the part of the noise's variance that stays.
    kept = alpha_bar * (1 - alpha_bar_prev) / (alpha_bar_prev * (1 - alpha_bar))
    mean = alpha_bar_prev**0.5 * known.x0 + (kept * (1 - alpha_bar_prev)) ** 0.5 * known.eps
    if alpha_bar_prev == 1.0:
        return mean
    return mean + ((1 - kept) * (1 - alpha_bar_prev)) ** 0.5 * known.draw()


SIGMA_DATA = 0.5  # of the latents, as the consistency model takes them to be
TIME_SCALE = 10.0  # of t, so that c_skip is nearly 0 but for the first few timesteps


def lcm_rule(known: Known) -> Tensor:
    """LCM (Luo et al. 2023, arXiv:2310.04378, algorithm 3): the model was distilled to know the end
    of the flow at once; noise it again, and ask from there. Their f(x, t) = c_skip x + c_out x0 is
    x itself at t = 0 (eq. 9; Song et al. 2023, arXiv:2303.01469, appendix C)."""
    t = TIME_SCALE * known.t
    c_skip = SIGMA_DATA**2 / (t**2 + SIGMA_DATA**2)
    c_out = t / (t**2 + SIGMA_DATA**2) ** 0.5
    clean = c_skip * known.x + c_out * known.x0
    if known.alpha_bar_prev == 1.0:
        return clean
    return noised(clean, known.draw(), known.alpha_bar_prev)
