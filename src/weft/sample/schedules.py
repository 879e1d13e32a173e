"""Sigma grids for inference and sigma samplers for training.

Sigma is the flow time: 1 is pure noise, 0 is the clean latent, x_sigma = (1 - sigma) x0 + sigma noise. Inference
grids are those of diffusers' `FlowMatchEulerDiscreteScheduler`, computed with the same operations in the same
precision, so they agree to the last bit and a model sees exactly the timesteps that it would see there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weft.errors import WeftError

TRAIN_STEPS = 1000

CONFIG_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": TRAIN_STEPS,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "time_shift_type": "exponential",
    "stochastic_sampling": False,
}
"""Every key of diffusers' `FlowMatchEulerDiscreteScheduler` with its default there."""

_UNSUPPORTED = ("invert_sigmas", "use_beta_sigmas", "stochastic_sampling")


def shift_sigma(sigma: Any, shift: float) -> Any:
    """The shift map of Stable Diffusion 3 (arXiv 2403.03206, equation 23): s sigma / (1 + (s - 1) sigma)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def flow_match_sigmas(steps: int, shift: float = 3.0, num_train_timesteps: int = TRAIN_STEPS) -> Tensor:
    """The static grid [steps + 1] in fp32 from 1 down to 0, shifted twice as diffusers does it.

    The grid is linear between the ends of the 1000-step training table, which is shifted already (its last sigma is
    shift(0.001)), and is then shifted again: for 10 steps and shift 3 it ends in ... .278049, .008929, 0.
    """
    return grid_from_config({"shift": shift, "num_train_timesteps": num_train_timesteps}, steps)


def grid_from_config(
    config: Mapping[str, Any],
    steps: int | None = None,
    *,
    mu: float | None = None,
    sigmas: Sequence[float] | None = None,
) -> Tensor:
    """The grid [steps + 1] in fp32 that a diffusers scheduler of this configuration would set.

    `mu` is the dynamic shift (see `dynamic_mu`); it is needed exactly when the configuration uses dynamic shifting.
    `sigmas` replaces the linear grid before the shift (FLUX: `linear_sigmas(steps)`), as in `set_timesteps`.
    Raises WeftError for another scheduler class, an unknown key, or an option that is not supported.
    """
    name = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
    if name != "FlowMatchEulerDiscreteScheduler":
        raise WeftError(f"scheduler class {name} is not supported; use a folder with FlowMatchEulerDiscreteScheduler")
    unknown = [key for key in config if not key.startswith("_") and key not in CONFIG_DEFAULTS]
    if unknown:
        raise WeftError(f"scheduler config has the unknown key {unknown[0]!r}; known: {', '.join(CONFIG_DEFAULTS)}")
    c = {**CONFIG_DEFAULTS, **{key: value for key, value in config.items() if not key.startswith("_")}}
    for key in _UNSUPPORTED:
        if c[key]:
            raise WeftError(f"scheduler option {key}=true is not supported; set it to false")
    if c["use_dynamic_shifting"] != (mu is not None):
        need = "needs mu (see dynamic_mu)" if c["use_dynamic_shifting"] else f"takes no mu, but mu is {mu}"
        raise WeftError(f"a scheduler with use_dynamic_shifting={c['use_dynamic_shifting']} {need}")
    grid = _unshifted(c, steps, sigmas)
    grid = shift_sigma(grid, c["shift"]) if mu is None else _dynamic(grid, mu, c["time_shift_type"])
    if c["shift_terminal"]:  # stretched so that the last sigma before 0 is the terminal one (LTX-Video, rf.py)
        rest = 1 - grid
        grid = 1 - rest / (rest[-1] / (1 - c["shift_terminal"]))
    if c["use_karras_sigmas"]:  # arXiv 2206.00364, equation 5, rho = 7
        ramp, (top, end) = np.linspace(0, 1, len(grid)), (grid[0].item() ** (1 / 7), grid[-1].item() ** (1 / 7))
        grid = (top + ramp * (end - top)) ** 7.0
    elif c["use_exponential_sigmas"]:
        grid = np.exp(np.linspace(math.log(grid[0].item()), math.log(grid[-1].item()), len(grid)))
    return torch.cat([torch.from_numpy(grid).to(torch.float32), torch.zeros(1)])


def _unshifted(c: Mapping[str, Any], steps: int | None, sigmas: Sequence[float] | None) -> np.ndarray:
    """The grid before any shift: the caller's sigmas (fp32), or linear between the ends of the training table."""
    if sigmas is not None:
        if len(sigmas) == 0 or (steps is not None and len(sigmas) != steps):
            raise WeftError(f"{len(sigmas)} sigmas for {steps} steps; give one for each step, without the final 0")
        return np.array(sigmas).astype(np.float32)
    if steps is None or steps < 1:
        raise WeftError(f"steps is {steps}; it must be at least 1")
    count = c["num_train_timesteps"]
    table = training_sigmas(1.0 if c["use_dynamic_shifting"] else c["shift"], count)
    return np.linspace(table[0].item() * count, table[-1].item() * count, steps) / count


def _dynamic(grid: np.ndarray, mu: float, kind: str) -> np.ndarray:
    if kind not in ("exponential", "linear"):
        raise WeftError(f"time_shift_type {kind!r} is unknown; choose exponential or linear")
    scale = math.exp(mu) if kind == "exponential" else mu
    return scale / (scale + (1 / grid - 1) ** 1.0)


def dynamic_mu(tokens: int, config: Mapping[str, Any] | None = None) -> float:
    """The dynamic shift of an image of `tokens` tokens: linear between the configuration's base and max points.

    `calculate_shift` of the diffusers pipelines; FLUX: 256 tokens -> 0.5, 4096 tokens -> 1.15.
    """
    c = {**CONFIG_DEFAULTS, **(config or {})}
    slope = (c["max_shift"] - c["base_shift"]) / (c["max_image_seq_len"] - c["base_image_seq_len"])
    return tokens * slope + (c["base_shift"] - slope * c["base_image_seq_len"])


def dynamic_shift(tokens: int, config: Mapping[str, Any] | None = None) -> float:
    """The factor of the shift map (`shift_sigma`) that dynamic shifting amounts to for an image of `tokens` tokens."""
    mu = dynamic_mu(tokens, config)
    return math.exp(mu) if (config or {}).get("time_shift_type", "exponential") == "exponential" else mu


def linear_sigmas(steps: int) -> list[float]:
    """1, ..., 1/steps: the unshifted sigmas that the FLUX and Qwen-Image pipelines hand to their scheduler."""
    return np.linspace(1.0, 1 / steps, steps).tolist()


def training_sigmas(shift: float = 3.0, num_train_timesteps: int = TRAIN_STEPS) -> Tensor:
    """The shifted table [num_train_timesteps] in fp32 from 1 downwards that training indexes (no final 0)."""
    times = np.linspace(1, num_train_timesteps, num_train_timesteps, dtype=np.float32)[::-1].copy()
    return shift_sigma(torch.from_numpy(times) / num_train_timesteps, shift)


def uniform_shifted(
    count: int,
    *,
    shift: float = 3.0,
    generator: torch.Generator | None = None,
    u: Tensor | None = None,
    num_train_timesteps: int = TRAIN_STEPS,
) -> Tensor:
    """Training sigmas [count] in fp32, uniform over the shifted table: entry floor(1000 u) of `training_sigmas`.

    Draws u from `generator`, or takes u [count] in [0, 1) as given (for quantiles); u = 0 is pure noise.
    """
    index = (_uniform(count, generator, u) * num_train_timesteps).long().clamp_(max=num_train_timesteps - 1)
    return training_sigmas(shift, num_train_timesteps)[index]


def logit_normal(
    count: int,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    generator: torch.Generator | None = None,
    u: Tensor | None = None,
) -> Tensor:
    """Training sigmas [count] in fp32 with logit(sigma) ~ N(mean, std^2): arXiv 2403.03206, equation 19.

    Through the inverse normal distribution of u, so u [count] in (0, 1) gives quantiles, low u low sigma.
    """
    if std <= 0:
        raise WeftError(f"std of the logit-normal is {std}; it must be positive")
    normal = torch.special.ndtri(_uniform(count, generator, u))
    return torch.sigmoid(mean + std * normal).float()


def mode(
    count: int, *, scale: float = 1.29, generator: torch.Generator | None = None, u: Tensor | None = None
) -> Tensor:
    """Training sigmas [count] in fp32 with heavy tails: 1 - u - s (cos^2(pi u / 2) - 1 + u), arXiv 2403.03206, eq. 20.

    Positive `scale` favours the middle, negative the ends; 0 is uniform. u = 0 is pure noise.
    """
    top = 2 / (math.pi - 2)
    if not -1 <= scale <= top:
        raise WeftError(f"scale of the mode sampler is {scale}; it must lie in [-1, {top:.4f}] to be monotone")
    u = _uniform(count, generator, u)
    return (1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)).clamp_(0, 1).float()


def _uniform(count: int, generator: torch.Generator | None, u: Tensor | None) -> Tensor:
    """u [count] in fp64: fp32 would leave 2^-24 for exact zeros, which the logit-normal sends to infinity."""
    if (generator is None) == (u is None):
        raise WeftError("a sigma sampler takes either a generator or u; never the global generator")
    if u is None:
        return torch.rand(count, generator=generator, dtype=torch.float64)
    if u.shape != (count,) or not bool(((u >= 0) & (u <= 1)).all()):
        raise WeftError(f"u must have shape [{count}] and values in [0, 1]; it has shape {list(u.shape)}")
    return u.double()
