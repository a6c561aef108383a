"""The posterior of a world of a few Gaussian numbers (`Sea`, `House`), by numerical integration.

Pictures are rendered from numbers, so the atoms of `ldm.worlds.atoms` become nodes of an integral
over numbers; each stands for the density of its numbers times the volume around it:

    p(x_t) = integral of p(numbers) N(x_t; sqrt(a) render(numbers), 1 - a)

With little noise x_t tells the numbers to a thousandth, which no nodes over the whole world can
see. So there are others around the peak, for each x_t of its own:

    1. nodes over the whole world: do they, if enough of them are near x_t;
    2. else, if almost none is, climb from the best one to the peak; its curvature says how wide
       the nodes around it have to lie;
    3. or else, as a rendering has kinks, and a peak need not have the shape of its curvature, the
       nodes so far say where, and how wide.

Numbers are here counted in standard deviations from their means, and called u: (..., P).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.worlds.atoms import Posterior, joined, log_likelihoods, of_atoms
from ldm.worlds.distribution import TRUNCATION
from ldm.worlds.ladder import House, Sea

ENOUGH = 1 / 4  # of the nodes, if they are effective: then they do
LOST = 20  # effective nodes, that say nothing of the shape of a peak
ROUNDS = 6
CLIMBS = 20
WIDER = 1.3  # than the peak: what it has in its tails must not be missed


@dataclass(frozen=True)
class Nodes:
    """Of an integral over a world: its numbers u, (N, P), the pictures, (N, 3, S, S), and the
    logarithms of density times volume, (N,), all in float64 but the pictures."""

    u: Tensor
    pictures: Tensor
    log_weights: Tensor


def by_quadrature(world: Sea | House, x_t: Tensor, alpha_bar: Tensor) -> Posterior:
    """The posterior for each x_t, (B, 3, S, S), and its alpha_bar, (B,) float64.

    Differentiable in x_t, for which the nodes stay where they are.
    """
    p = len(world.names)
    whole = nodes(world, torch.zeros(p).double(), torch.eye(p).double(), x_t)
    parts = []
    for x, a in zip(x_t.split(1), alpha_bar.split(1), strict=True):
        near = nodes_near(world, whole, x, a)
        part = of_atoms(near.pictures, near.log_weights, x, a)
        parts.append(dataclasses.replace(part, effective_atoms=torch.full_like(a, math.inf)))
    return joined(parts)


@torch.no_grad()
def nodes_near(world: Sea | House, whole: Nodes, x: Tensor, alpha_bar: Tensor) -> Nodes:
    """Nodes that see the peak of one x, (1, 3, S, S): see above."""
    found = whole
    for _ in range(ROUNDS):
        logits = log_likelihoods(found.pictures, x, alpha_bar)[0] + found.log_weights
        w = torch.softmax(logits, dim=0).cpu()  # (N,)
        effective = 1 / w.square().sum()
        if effective >= ENOUGH * len(w):
            break
        if effective < LOST:
            centre, covariance = climb(world, found.u[w.argmax()], x, alpha_bar)
        else:
            centre = w @ found.u
            covariance = (found.u - centre).T @ (w[:, None] * (found.u - centre))
        found = nodes(world, centre, WIDER * torch.linalg.cholesky(covariance), x)
    return found


def nodes(world: Sea | House, centre: Tensor, spread: Tensor, x: Tensor) -> Nodes:
    """Nodes that lie as a Gaussian of this mean, (P,), and square root of a covariance, (P, P);
    their pictures are of x's size.

    They are a lattice in the unit cube (Niederreiter 1992, section 5.1), bent: along any number
    alone they lie as evenly as along all, as the edge of a thing within its pixel asks for.
    """
    p = len(centre)
    n = 1024 * p
    # Multiples of the powers of 1 / g, where g^(p + 1) = g + 1: for p = 1 the golden ratio.
    g = 1.5
    for _ in range(50):
        g = (1 + g) ** (1 / (p + 1))
    steps = g ** -torch.arange(1.0, p + 1, dtype=torch.float64)
    cube = (0.5 + torch.arange(n, dtype=torch.float64)[:, None] * steps) % 1
    z = torch.special.ndtri(cube.clamp(1e-9, 1 - 1e-9))  # (N, P), standard Gaussian

    u = centre + z @ spread.T
    mean, sd = moments(world)
    numbers = mean + sd * u
    # Where they lie n q(numbers) to a volume, each stands for 1 / (n q) of it.
    log_q = -z.square().sum(dim=1) / 2 - p / 2 * math.log(2 * math.pi)
    log_q = log_q - torch.linalg.slogdet(spread).logabsdet - sd.log().sum()
    log_weights = world.log_prob(numbers) - log_q - math.log(n)
    pictures = world.render(numbers, x.shape[-1])
    return Nodes(u, pictures.to(x.device), log_weights.to(x.device))


def climb(world: Sea | House, start: Tensor, x: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """From u, (P,), up to a peak of p(u | x), and the covariance, (P, P), of the Gaussian that has
    its curvature (Laplace's approximation).

    Levenberg and Marquardt's method: least squares, with as much caution as the last steps taught.
    """
    mean, sd = moments(world)
    a, p = alpha_bar.item(), len(start)
    apart = torch.cat([torch.zeros(1, p), torch.eye(p), -torch.eye(p)]).double() * 0.02

    def at(u: Tensor) -> tuple[float, Tensor, Tensor]:
        """-log p(u | x) up to a constant, its gradient, (P,), and curvature, (P, P)."""
        rendered = world.render(mean + sd * (u + apart), x.shape[-1]).double().flatten(1)
        picture, ahead, behind = rendered.split([1, p, p])
        slope = a**0.5 * (ahead - behind) / 0.04  # (P, D)
        rest = x.double().flatten(1).cpu() - a**0.5 * picture  # (1, D)
        cost = (rest.square().sum() / (1 - a) + u.square().sum()).item() / 2
        return cost, u - slope @ rest[0] / (1 - a), slope @ slope.T / (1 - a) + torch.eye(p)

    u, caution = start.cpu(), 1e-2
    cost, gradient, curvature = at(u)
    for _ in range(CLIMBS):
        damped = curvature + caution * curvature.diagonal().diag()
        step = torch.linalg.solve(damped, gradient)
        tried = (u - step).clamp(-TRUNCATION, TRUNCATION)
        new = at(tried)
        gain = cost - new[0]
        if gain > 0:
            u, (cost, gradient, curvature), caution = tried, new, caution / 5
        else:
            caution *= 5
        if abs(gain) < 1e-3:  # nats: this is the peak
            break
    return u, torch.linalg.inv(curvature)


def moments(world: Sea | House) -> tuple[Tensor, Tensor]:
    """The means and standard deviations of a world's numbers, (P,) float64 each."""
    mean, sd = torch.tensor(list(world.numbers.values()), dtype=torch.float64).unbind(dim=1)
    return mean, sd
