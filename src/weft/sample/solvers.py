"""ODE solvers as functions of the current velocity and one remembered prediction.

In a rectified flow the first-order exponential (DDIM) step is Euler's step, so every solver here is Euler plus a
correction along the change of the predicted clean latent x0 = x - sigma v since the previous evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class Past:
    """The previous evaluation of an ODE trajectory: its sigma and its predicted clean latent."""

    sigma: float
    x0: Tensor


Solver = Callable[[Tensor, Tensor, float, float, "Past | None"], Tensor]


def euler(x: Tensor, v: Tensor, sigma: float, sigma_next: float, past: Past | None = None) -> Tensor:
    """x + v dt: first order."""
    return x + (sigma_next - sigma) * v


def dpmpp_2m(x: Tensor, v: Tensor, sigma: float, sigma_next: float, past: Past | None = None) -> Tensor:
    """DPM-Solver++(2M), midpoint form (arXiv 2211.01095, algorithm 2), with alpha = 1 - sigma: second order.

    It extrapolates x0 linearly in log(alpha / sigma), which is minus infinity at sigma = 1. After a step from there
    the same extrapolation is linear in alpha / sigma itself, so that the second step keeps its order. The first step
    and the one to sigma = 0 are Euler's.
    """
    if past is None or sigma_next == 0:
        return euler(x, v, sigma, sigma_next)
    measure = ratio if past.sigma == 1 else log_ratio
    advance = (measure(sigma_next) - measure(sigma)) / (measure(sigma) - measure(past.sigma))
    gain = (sigma - sigma_next) / sigma  # alpha' (1 - exp(-h)) in the paper's terms
    return euler(x, v, sigma, sigma_next) + 0.5 * gain * advance * (x - sigma * v - past.x0)


def dpmpp_2m_heun(x: Tensor, v: Tensor, sigma: float, sigma_next: float, past: Past | None = None) -> Tensor:
    """DPM-Solver++(2M) with the linear extrapolation integrated exactly (the "heun" type of diffusers)."""
    if past is None or sigma_next == 0 or past.sigma == 1:
        return dpmpp_2m(x, v, sigma, sigma_next, past)
    h, h_past = log_ratio(sigma_next) - log_ratio(sigma), log_ratio(sigma) - log_ratio(past.sigma)
    gain = (sigma - sigma_next) / sigma
    return euler(x, v, sigma, sigma_next) + ((1 - sigma_next) * h - gain) / h_past * (x - sigma * v - past.x0)


def dpmpp_2m_release(x: Tensor, v: Tensor, sigma: float, sigma_next: float, past: Past | None = None) -> Tensor:
    """The variant of Flow-GRPO and MixGRPO (solver.py `dpm2`; sampling_utils.py `dpmsolver++`, midpoint).

    Like `dpmpp_2m`, but the infinite log-ratio at sigma = 1 stays in the formula: its correction vanishes, and the
    second step is Euler's, too. Only for parity with checkpoints and baselines trained on it.
    """
    if past is not None and past.sigma == 1:
        past = None
    return dpmpp_2m(x, v, sigma, sigma_next, past)


def ratio(sigma: float) -> float:
    """alpha / sigma, the square root of the signal-to-noise ratio."""
    return (1 - sigma) / sigma


def log_ratio(sigma: float) -> float:
    """lambda = log(alpha / sigma) of arXiv 2211.01095, for 0 < sigma < 1."""
    return math.log1p(-sigma) - math.log(sigma)


SOLVERS: dict[str, Solver] = {
    "euler": euler,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_heun": dpmpp_2m_heun,
    "dpmpp_2m_release": dpmpp_2m_release,
}

KEEPS_PAST = frozenset({"dpmpp_2m_release"})
"""Solvers that extrapolate across a step with noise, as MixGRPO does. The others start anew after it, because the
change of x0 then holds the noise's jump, which does not continue."""
