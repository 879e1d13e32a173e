"""ODE solvers as functions of the current velocity and one remembered evaluation.

In a rectified flow the first-order exponential (DDIM) step is Euler's step, so every solver here is Euler plus a
correction along the change since the previous evaluation: of the velocity, or of the clean latent x0 = x - sigma v.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class Past:
    """The previous evaluation of an ODE trajectory: its sigma, its velocity and its predicted clean latent."""

    sigma: float
    v: Tensor
    x0: Tensor


Solver = Callable[[Tensor, Tensor, float, float, "Past | None"], Tensor]


def euler(x: Tensor, v: Tensor, sigma: float, sigma_next: float, past: Past | None = None) -> Tensor:
    """x + v dt: first order."""
    return x + (sigma_next - sigma) * v


def ab2(x: Tensor, v: Tensor, sigma: float, sigma_next: float, past: Past | None = None) -> Tensor:
    """Adams-Bashforth with two velocities and variable steps: second order, regular at sigma = 1 and at 0."""
    if past is None:
        return euler(x, v, sigma, sigma_next)
    dt = sigma_next - sigma
    return x + dt * (v + 0.5 * dt / (sigma - past.sigma) * (v - past.v))


def dpmpp_2m(x: Tensor, v: Tensor, sigma: float, sigma_next: float, past: Past | None = None) -> Tensor:
    """DPM-Solver++(2M), midpoint form (arXiv 2211.01095, algorithm 2), with alpha = 1 - sigma: second order.

    It extrapolates x0 linearly in lambda = log(alpha / sigma), which is minus infinity at sigma = 1; after a step
    from there the extrapolation is linear in alpha / sigma itself, so that the second step keeps its order. First
    order are: the first step, the one to sigma = 0, and a step more than twice as long in lambda as the one before.
    Stable Diffusion 3's grid has such a step before its last (0.278 to 0.009 with 10 steps), and to extrapolate
    across it costs more accuracy than all the other corrections gain.
    """
    if past is None or sigma_next == 0:
        return euler(x, v, sigma, sigma_next)
    measure = ratio if past.sigma == 1 else log_ratio
    advance = (measure(sigma_next) - measure(sigma)) / (measure(sigma) - measure(past.sigma))
    return _corrected(x, v, sigma, sigma_next, past, advance if advance <= 2 else 0.0)


def dpmpp_2m_heun(x: Tensor, v: Tensor, sigma: float, sigma_next: float, past: Past | None = None) -> Tensor:
    """`dpmpp_2m` with the linear extrapolation integrated exactly (the "heun" type of diffusers)."""
    if past is None or sigma_next == 0 or past.sigma == 1:
        return dpmpp_2m(x, v, sigma, sigma_next, past)
    h, h_past = log_ratio(sigma_next) - log_ratio(sigma), log_ratio(sigma) - log_ratio(past.sigma)
    if h > 2 * h_past:
        return euler(x, v, sigma, sigma_next)
    gain = (sigma - sigma_next) / sigma
    return euler(x, v, sigma, sigma_next) + ((1 - sigma_next) * h - gain) / h_past * (x - sigma * v - past.x0)


def dpmpp_2m_release(x: Tensor, v: Tensor, sigma: float, sigma_next: float, past: Past | None = None) -> Tensor:
    """The variant of Flow-GRPO, DiffusionNFT and MixGRPO (solver.py `dpm2`; sampling_utils.py `dpmsolver++`, midpoint).

    The infinite lambda at sigma = 1 stays in the formula, so the second step's correction vanishes; long steps are
    extrapolated like any other. Only for parity with what was trained on it.
    """
    if past is None or past.sigma == 1 or sigma_next == 0:
        return euler(x, v, sigma, sigma_next)
    h, h_past = log_ratio(sigma_next) - log_ratio(sigma), log_ratio(sigma) - log_ratio(past.sigma)
    return _corrected(x, v, sigma, sigma_next, past, h / h_past)


def _corrected(x: Tensor, v: Tensor, sigma: float, sigma_next: float, past: Past, advance: float) -> Tensor:
    """Euler plus half of the change of x0, `advance` steps ahead, times alpha' (1 - exp(-h)) of the paper."""
    gain = (sigma - sigma_next) / sigma
    return euler(x, v, sigma, sigma_next) + 0.5 * gain * advance * (x - sigma * v - past.x0)


def ratio(sigma: float) -> float:
    """alpha / sigma, the square root of the signal-to-noise ratio."""
    return (1 - sigma) / sigma


def log_ratio(sigma: float) -> float:
    """lambda = log(alpha / sigma) of arXiv 2211.01095, for 0 < sigma < 1."""
    return math.log1p(-sigma) - math.log(sigma)


SOLVERS: dict[str, Solver] = {
    "euler": euler,
    "ab2": ab2,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_heun": dpmpp_2m_heun,
    "dpmpp_2m_release": dpmpp_2m_release,
}

KEEPS_PAST = frozenset({"dpmpp_2m_release"})
"""Solvers that extrapolate across a step with noise, as MixGRPO does. The others start anew after it, because the
change of x0 then holds the noise's jump, which does not continue."""
