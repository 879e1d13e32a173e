"""One transition of the reverse process, for the ODE and for the three SDEs that RL on flow models uses.

With the predicted clean latent x0 = x - sigma v and the predicted noise eps = x + (1 - sigma) v, every kind is a
Gaussian whose mean is linear in x and v, mean = a x + b v, with one standard deviation:

    ode        mean = x + v dt                                   std = 0
    flow_sde   mean = x + (v + g^2 eps / (2 sigma)) dt           std = g sqrt(-dt), g = eta sqrt(sigma / (1 - sigma))
    dance_sde  the same with g = eta
    cps        mean = (1 - sigma') x0 + sqrt(sigma'^2 - std^2) eps,   std = sigma' sin(eta pi / 2)

Sources: Flow-GRPO (arXiv 2505.05470, equation 9; yifan123/flow_grpo, sd3_sde_with_logprob.py), DanceGRPO (arXiv
2505.07818), Coefficients-Preserving Sampling (arXiv 2509.05952). dt = sigma' - sigma < 0.

Coefficients are fp64 and the arithmetic on latents is fp32 (fp64 if x is), because half precision overflows here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.errors import WeftError

KINDS = ("ode", "flow_sde", "dance_sde", "cps")

Sigma = float | Tensor  # one for the batch, or [B]


@dataclass(slots=True)
class StepResult:
    """A transition x -> x_next.

    `mean` [B, ...]; `std`: standard deviation of the noise that is added, x_next = mean + std z; `diffusion`: the
    coefficient g of dW (what Flow-GRPO calls std_dev_t; for CPS the same as std). Both are fp64 on the CPU, one number
    or [B]. `log_prob` [B] in fp32 (fp64 if x is), None for the ODE, which has no density.
    """

    x_next: Tensor
    mean: Tensor
    std: Tensor
    diffusion: Tensor
    log_prob: Tensor | None


def step(
    x: Tensor,
    v: Tensor,
    sigma: Sigma,
    sigma_next: Sigma,
    noise: Tensor | None = None,
    *,
    kind: str = "ode",
    eta: float = 0.0,
    sigma_max: float | None = None,
    valid: Tensor | None = None,
    x_next: Tensor | None = None,
) -> StepResult:
    """One step from sigma to sigma_next (each a number or [B]) of x and velocity v, both [B, C, ...].

    `noise` is the standard normal z of an SDE kind; `x_next` in its place replays a stored transition, so that its
    log-prob is a differentiable function of v. `eta` is the noise level: > 0 for the SDE kinds (at most 1 for cps),
    0 for the ODE. At sigma = 1, where flow_sde's g is infinite, g is taken with `sigma_max` in the denominator: the
    second value of the grid, which is `sigma_next` unless told otherwise. `valid` [B, 1, H, W] marks the real
    cells of padded latents: only they count in the log-prob. Raises WeftError for an impossible combination.
    """
    _check_kind(kind, eta)
    if kind == "ode" and (noise is not None or x_next is not None):
        raise WeftError("the ode kind is deterministic: it takes no noise, and a stored x_next has no log-prob")
    if kind != "ode" and (noise is None) == (x_next is None):
        raise WeftError(f"kind {kind} needs either noise or a stored x_next")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, v = x.to(dtype), v.to(dtype)
    a, b, std, diffusion = coefficients(sigma, sigma_next, kind=kind, eta=eta, sigma_max=sigma_max)
    mean = _like(a, x) * x + _like(b, x) * v
    if kind == "ode":
        return StepResult(mean, mean, std, diffusion, None)
    if noise is not None:
        x_next = mean + _like(std, x) * noise.to(dtype)
    assert x_next is not None
    x_next = x_next.to(dtype)
    return StepResult(x_next, mean, std, diffusion, log_prob_of(x_next, mean, std, kind=kind, valid=valid))


def coefficients(
    sigma: Sigma, sigma_next: Sigma, *, kind: str, eta: float = 0.0, sigma_max: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(a, b, std, g) of the transition in fp64, each a number or [B]: mean = a x + b v, see the module's head."""
    s = torch.as_tensor(sigma, dtype=torch.float64, device="cpu").detach()
    t = torch.as_tensor(sigma_next, dtype=torch.float64, device="cpu").detach()
    _check_kind(kind, eta)
    if not bool(((s > t) & (t >= 0) & (s <= 1)).all()):
        raise WeftError(f"a step must go down within [0, 1]; got sigma {s.tolist()} to {t.tolist()}")
    dt = t - s
    if kind == "ode":
        return torch.ones_like(dt), dt, torch.zeros_like(dt), torch.zeros_like(dt)
    if kind == "cps":
        std = t * math.sin(eta * math.pi / 2)
        rest = torch.sqrt(t**2 - std**2)
        return (1 - t) + rest, rest * (1 - s) - (1 - t) * s, std, std
    if kind == "flow_sde":
        limit = t if sigma_max is None else torch.as_tensor(sigma_max, dtype=torch.float64)
        g = eta * torch.sqrt(s / (1 - torch.where(s == 1, limit, s)))
    else:
        g = torch.full_like(dt, eta)
    k = g**2 / (2 * s) * dt
    return 1 + k, dt + k * (1 - s), g * torch.sqrt(-dt), g


def log_prob_of(x_next: Tensor, mean: Tensor, std: Tensor, *, kind: str, valid: Tensor | None = None) -> Tensor:
    """Log-density [B] of x_next under N(mean, std^2), averaged (not summed) over all real cells and channels.

    The constants are kept (DanceGRPO's public code and its copies lose those of dance_sde to a line break; ratios do
    not change). For cps it is -(x_next - mean)^2, as that method defines it: no variance, no constants (at its last
    step, sigma' = 0, the transition is deterministic and this says nothing; leave that step out). No gradient flows
    into x_next.
    """
    error = (x_next.detach() - mean) ** 2
    if kind == "cps":
        return -_mean(error, valid)
    # The variance is a constant of each sample, so the mean of the density is the density of the mean error.
    if not bool((std > 0).all()):
        raise WeftError("a transition without noise has no log-prob; use an SDE kind with eta > 0")
    error = _mean(error, valid)
    scale = (2 * std**2).to(error)
    return -error / scale - (std.log() + 0.5 * math.log(2 * math.pi)).to(error)


def _mean(error: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return error.flatten(1).mean(1)
    mask = valid.to(error).expand_as(error).flatten(1)
    return (error.flatten(1) * mask).sum(1) / mask.sum(1)


def _like(value: Tensor, x: Tensor) -> Tensor:
    """A number or [B] in x's dtype, on its device, broadcastable against [B, ...]."""
    value = value.to(x)
    return value if value.ndim == 0 else value.reshape(-1, *[1] * (x.ndim - 1))


def _check_kind(kind: str, eta: float) -> None:
    if kind not in KINDS:
        raise WeftError(f"step kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if kind == "ode" and eta != 0:
        raise WeftError(f"eta is {eta}, but the ode kind adds no noise; set eta to 0 or choose an SDE kind")
    if kind != "ode" and not eta > 0:
        raise WeftError(f"kind {kind} needs a noise level eta > 0, got {eta} (usual: 0.7; dance_sde 0.3)")
    if kind == "cps" and eta > 1:
        raise WeftError(f"eta is {eta}, but cps takes at most 1 (at 1 all noise is fresh)")
