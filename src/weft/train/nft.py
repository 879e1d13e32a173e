"""DiffusionNFT (arXiv 2509.16117) as Edit-R1 uses it (arXiv 2510.16888): learn on the forward process from good and bad
samples of an old policy. No likelihood, any sampler, no guidance.

With v the velocity of the trained policy and v_old that of the old one at the same noisy latent, the implicit
policies are v+ = (1 - beta) v_old + beta v and v- = (1 + beta) v_old - beta v (theorem 3.2). Each predicts a clean
latent x0 = x_t - t v; its squared error, divided by its own mean absolute error (the adaptive weight), counts with the
optimality probability r and 1 - r. At v = v_old the gradient with respect to v is 2 t^2 A (v - target) / (D w), D
values per sample: linear in the clipped advantage A, independent of beta and of the clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from weft import rng
from weft.errors import WeftError
from weft.reward.advantage import AdvantageConfig, optimality
from weft.reward.filter import FilterConfig
from weft.sample.rollout import pad_latents
from weft.train.geometry import RolloutRecipe, check_fraction
from weft.train.method import Cost, Setting
from weft.train.online import Item, Online, chosen_steps
from weft.train.policy import (
    Glance,
    OldSchedule,
    Policies,
    anchor_of,
    by_level,
    masked_mean,
    norm_excess,
    norm_ratio,
    old_schedule,
)
from weft.train.reading import build
from weft.types import Draw, Loss

FLOOR = 1e-5  # of the adaptive weight


@dataclass(frozen=True)
class NftOptions:
    """`beta`: how far the implicit policies reach (1: v+ is the trained policy; smaller is faster and less stable).
    `kl`: weight of the mean of (v - v_ref)^2. `reference`: "off" (a LoRA's bare network) or "start" (the weights at
    step 0); None takes the first for a LoRA and the second for full weights. `old`: how the old policy follows, by
    name or as {flat, rate, hold}. `norm_guard`: weight of the squared excess of |v| over |v_ref| (NormGuard, arXiv
    2606.27771). Of a rollout's T noise levels int(T x `timestep_fraction`) are trained, drawn anew for each sample
    and update (`timesteps` "random") or the first ones.
    """

    beta: float = 1.0
    kl: float = 1e-4
    reference: Literal["off", "start"] | None = None
    old: OldSchedule | str = "linear_to_0_5"
    norm_guard: float = 0.0
    timestep_fraction: float = 0.99
    timesteps: Literal["random", "first"] = "random"
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    drop_zero: bool = False

    def __post_init__(self) -> None:
        check_fraction(self.timestep_fraction)


def policy_loss(
    v: Tensor, v_old: Tensor, x_t: Tensor, x0: Tensor, sigma: Tensor, r: Tensor, *, beta: float, clip: float,
    valid: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Per-sample loss [B] of velocities [B, C, ...] at noisy latents x_t of clean x0; sigma, r [B] in [0, 1].

    clip (r l+ + (1 - r) l-) / beta with l = mean (x0' - x0)^2 / w, w = stopgrad max(mean |x0' - x0|, 1e-5)
    (NVlabs/DiffusionNFT, scripts/train_nft_sd3.py; the weights in fp64). `valid` masks padded cells.
    """
    t = sigma.to(x_t).reshape(-1, *[1] * (x_t.ndim - 1))
    old = v_old.detach()
    positive = _weighted_error(x_t - t * (beta * v + (1 - beta) * old), x0, valid)
    negative = _weighted_error(x_t - t * ((1 + beta) * old - beta * v), x0, valid)
    return clip * (r * positive + (1 - r) * negative) / beta


def _weighted_error(predicted: Tensor, x0: Tensor, valid: Tensor | None) -> Tensor:
    error = predicted - x0
    weight = masked_mean(error.detach().double().abs(), valid).clamp(min=FLOOR)
    return masked_mean(error.square(), valid) / weight


def levels(o: NftOptions, rollout: RolloutRecipe) -> int:
    """Noise levels trained per sample."""
    return int(rollout.steps * o.timestep_fraction)


def cost(options: dict[str, Any], rollout: RolloutRecipe, lora: bool) -> Cost:
    """For `plan`."""
    o: NftOptions = build(NftOptions, options, "method.options")
    anchored = o.kl > 0 or o.norm_guard > 0
    return Cost(levels(o, rollout), 1 + anchored, 1 + (anchored and anchor_of(o.reference, lora) == "start"))


class Nft:
    """The objective of DiffusionNFT: what it needs of rollouts, and the loss of (sample, noise level) items."""

    keep: tuple[str, ...] = ()
    rollout_policy = "old"

    def __init__(self, setting: Setting, options: dict[str, Any]) -> None:
        self.setting, self.model = setting, setting.model
        self.options: NftOptions = build(NftOptions, options, "method.options", setting.file)
        o = self.options
        if not 0 < o.beta:
            raise WeftError(f"method.options.beta is {o.beta}; it must be positive (usual: 1, or 0.1)")
        self.advantage, self.filter, self.drop_zero = o.advantage, o.filter, o.drop_zero
        self.schedule = old_schedule(o.old)
        self.reference = anchor_of(o.reference, setting.lora)
        self.anchored = o.kl > 0 or o.norm_guard > 0
        start = self.anchored and self.reference == "start"
        self.policies = Policies(setting.trained, setting.parameters, old=True, start=start)
        self.glance = Glance(setting.rollout, possible=self.reference == "off")

    def check(self, rollout: RolloutRecipe) -> None:
        """Any sampler is allowed. Raises WeftError if no noise level is left to train."""
        if self.count(rollout) < 1:
            raise WeftError(
                f"method.options.timestep_fraction {self.options.timestep_fraction} of {rollout.steps} steps is none"
            )

    def count(self, rollout: RolloutRecipe) -> int:
        """Noise levels trained per sample."""
        return levels(self.options, rollout)

    def steps_of(self, seed: int, sample_seed: int, window: tuple[int, int], step: int, total: int) -> list[int]:
        """The sampler's steps whose noise levels this sample is trained at; all are candidates, also sigma = 1."""
        o = self.options
        return chosen_steps(range(total), int(total * o.timestep_fraction), o.timesteps, seed, sample_seed, step)

    def loss(self, items: Sequence[Item], draw: Draw) -> Loss:
        """Per-item losses [B]; see the module's head."""
        o, model = self.options, self.model
        samples = [item.sample for item in items]
        batch = model.prepare([s.condition for s in samples])
        device = self.setting.device
        x0, valid = pad_latents([s.x0 for s in samples])
        noise, _ = pad_latents(
            [rng.normal(tuple(i.sample.x0.shape), i.sample.seed, "nft", draw.step, sample=i.k) for i in items]
        )
        x0, noise = x0.to(device), noise.to(device)
        valid = valid if valid is None else valid.to(device)
        sigma = torch.stack([i.sample.sigmas[i.k] for i in items]).to(device)
        t = sigma.reshape(-1, 1, 1, 1)
        x_t = (1 - t) * x0 + t * noise
        v_old: Tensor | None = None
        v_ref: Tensor | None = None
        with torch.no_grad():
            if not self.policies.old_is_default:
                with self.policies.using("old"):
                    v_old = model.velocity(x_t, sigma, batch)
            if self.anchored or self.glance.due(draw.step):
                with self.policies.using(self.reference):
                    v_ref = model.velocity(x_t, sigma, batch)
        v = model.velocity(x_t, sigma, batch)
        v_old = v.detach() if v_old is None else v_old
        clip = o.advantage.clip
        advantage = torch.tensor([s.advantage for s in samples], dtype=torch.float64, device=device)
        r = optimality(advantage, clip)
        per_sample = policy_loss(v, v_old, x_t, x0, sigma, r, beta=o.beta, clip=clip, valid=valid)
        metrics = {
            "policy_loss": float(per_sample.detach().mean()),
            "old_distance": float(masked_mean((v.detach() - v_old).square(), valid).mean()),
            "optimality": float(r.mean()),
            "x0_norm": float(masked_mean(x0.square(), valid).mean()),
        }
        if v_ref is not None:
            kl = masked_mean((v - v_ref).square(), valid)
            if o.kl > 0:
                per_sample = per_sample + o.kl * kl
            metrics |= {"kl": float(kl.detach().mean()), "velocity_norm": norm_ratio(v, v_ref)}
            metrics |= by_level("kl", sigma, kl)
            if o.norm_guard > 0:
                per_sample = per_sample + o.norm_guard * norm_excess(v, v_ref)
        return Loss(per_sample.float(), metrics)

    def updated(self, first: bool) -> dict[str, float]:
        """After an optimiser step."""
        self.policies.old_is_default = False
        return {}

    def epoch_done(self, step: int) -> dict[str, float]:
        """The old policy follows, by the optimiser steps done so far."""
        keep = self.schedule.at(step)
        self.policies.update_old(keep)
        return {"old_kept": keep}


def method(setting: Setting, options: dict[str, Any]) -> Online:
    """The method `nft` of the training loop."""
    return Online(setting, Nft(setting, options))
