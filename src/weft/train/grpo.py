"""Flow-GRPO (arXiv 2505.05470) and its family as options of one implementation: a clipped likelihood ratio over the
noisy steps of stored rollouts.

    full trajectory   rollout.kind flow_sde, no window (Flow-GRPO; its later code makes the last step without noise:
                      rollout.window {size: steps - 1, move: fixed})
    Fast              rollout.window {size, range, move: random}; kind cps for CPS (arXiv 2509.05952)
    Dance             rollout.kind dance_sde, rollout.same_latent, advantage {std: group, ddof: 1, eps: 1e-8},
                      timesteps random, timestep_fraction 0.6, rollout.window {size: steps - 1, move: fixed}: its
                      pictures are the last prediction of x0, without noise (DanceGRPO, arXiv 2505.07818)
    Mix               rollout.window {move: progressive, decay or exp_decay} (MixGRPO, arXiv 2507.21802)
    Guard             guard: true (GRPO-Guard, arXiv 2510.22319)

A replay computes the density of the stored next state with the current velocity; states are fp32 from the sampler to
here, so the ratio of the first update is 1 up to the rounding of a differently batched network. It is logged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weft import rng
from weft.errors import WeftError
from weft.reward.advantage import AdvantageConfig
from weft.reward.filter import FilterConfig
from weft.sample import kernels
from weft.sample.rollout import guided, pad_latents
from weft.train.geometry import RolloutRecipe, check_fraction
from weft.train.method import Cost, Setting
from weft.train.online import Item, Online, chosen_steps
from weft.train.policy import Glance, Policies, anchor_of, by_level, masked_mean, norm_excess, norm_ratio
from weft.train.reading import build
from weft.types import Draw, Loss


@dataclass(frozen=True)
class GrpoOptions:
    """`clip`: the ratio counts within [1 - clip, 1 + clip_high]; clip_high None is clip. `kl`: weight of the
    divergence from the `reference` ("off": a LoRA's bare network; "start": the weights at step 0) in `kl_form`:
    "no_dt", mean (m - m_ref)^2 / (2 g^2) as the public code has it; "exact", with the transition's variance
    g^2 |dt|; "velocity", mean (v - v_ref)^2. `guard`: GRPO-Guard's normalised ratio, and the loss divided by |dt|
    (`guard_dt`). `norm_guard`: weight of the squared excess of |v| over |v_ref|. Without a window the first
    int(T x `timestep_fraction`) of T steps are trained, with one all of its steps. `timesteps` "random": as large a
    part of the window, or of all steps but the last, new at every update (as DanceGRPO counts them).
    `drop_zero`: samples whose advantage is 0 take no part, also not in the KL, as in the public code.
    """

    clip: float = 1e-4
    clip_high: float | None = None
    kl: float = 0.04
    kl_form: Literal["no_dt", "exact", "velocity"] = "no_dt"
    reference: Literal["off", "start"] | None = None
    guard: bool = False
    guard_dt: bool = True
    norm_guard: float = 0.0
    timestep_fraction: float = 0.99
    timesteps: Literal["first", "random"] = "first"
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    drop_zero: bool = True

    def __post_init__(self) -> None:
        check_fraction(self.timestep_fraction)


def clipped_loss(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """max(-A ratio, -A clamp(ratio, 1 - low, 1 + high)) for each sample [B]."""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))


def kl_divergence(mean: Tensor, mean_ref: Tensor, scale: Tensor, valid: Tensor | None = None) -> Tensor:
    """mean (m - m_ref)^2 / (2 scale^2) per sample [B]; scale [B] or one number: g ("no_dt") or the std ("exact")."""
    return masked_mean((mean - mean_ref).square(), valid) / (2 * scale.to(mean) ** 2)


def guard_log_ratio(mean: Tensor, x_next: Tensor, std: Tensor, z: Tensor, valid: Tensor | None = None) -> Tensor:
    """GRPO-Guard's normalised log-ratio [B]: (log p - log p_old + mean (m - m_old)^2 / (2 std^2)) std.

    With x' = m_old + std z the quadratic terms cancel and mean z (m - m_old) is left, which has mean 0 and no
    dependence on the step's noise level. (The public code takes the batch's mean std; here each sample has its own.)
    """
    std = std.to(mean)
    shaped = std if std.ndim == 0 else std.reshape(-1, *[1] * (mean.ndim - 1))
    return masked_mean(z * (mean - (x_next - shaped * z)), valid)


def levels(o: GrpoOptions, rollout: RolloutRecipe) -> int:
    """Steps trained per sample; see `GrpoOptions`."""
    window = rollout.window
    if o.timesteps == "random":
        return int((rollout.steps - 1 if window is None else window.size) * o.timestep_fraction)
    return int(rollout.steps * o.timestep_fraction) if window is None else window.size


def cost(options: dict[str, Any], rollout: RolloutRecipe, lora: bool) -> Cost:
    """For `plan`."""
    o: GrpoOptions = build(GrpoOptions, options, "method.options")
    anchored = o.kl > 0 or o.norm_guard > 0
    return Cost(levels(o, rollout), int(anchored), int(anchored and anchor_of(o.reference, lora) == "start"))


class Grpo:
    """The objective of the Flow-GRPO family: what it needs of rollouts, and the loss of (sample, step) items."""

    keep: tuple[str, ...] = ("trajectory", "log_probs")
    rollout_policy = "default"

    def __init__(self, setting: Setting, options: dict[str, Any]) -> None:
        self.setting, self.model = setting, setting.model
        self.options: GrpoOptions = build(GrpoOptions, options, "method.options", setting.file)
        o = self.options
        if not (o.clip > 0 and (o.clip_high is None or o.clip_high > 0)):
            raise WeftError(f"method.options.clip is {o.clip}; it must be positive (usual: 1e-4)")
        self.advantage, self.filter, self.drop_zero = o.advantage, o.filter, o.drop_zero
        self.reference = anchor_of(o.reference, setting.lora)
        self.anchored = o.kl > 0 or o.norm_guard > 0
        start = self.anchored and self.reference == "start"
        self.policies = Policies(setting.trained, setting.parameters, old=False, start=start)
        self.rollout: RolloutRecipe = setting.rollout
        self.worst, self.worst_first = 0.0, 0.0
        self.glance = Glance(setting.rollout, possible=self.reference == "off")

    def check(self, rollout: RolloutRecipe) -> None:
        """Refuse rollouts whose steps have no density under the policy that is trained. Raises WeftError."""
        if rollout.kind == "ode":
            raise WeftError(
                "grpo compares likelihoods, and the steps of an ODE rollout have none: set rollout.kind to flow_sde, "
                "dance_sde or cps with rollout.eta > 0, or use method nft, which takes any sampler"
            )
        given = self.setting.recipe.method.options
        window = rollout.window
        ignored = [k for k in ("timesteps", "timestep_fraction") if k in given]
        if window is not None and self.options.timesteps == "first" and ignored:
            raise WeftError(
                f"method.options.{ignored[0]} chooses steps of a whole trajectory, but with rollout.window its "
                f"{window.size} steps are trained: remove one of the two, or set timesteps to random"
            )
        stop = rollout.steps if window is None else (rollout.steps - 1 if window.range is None else window.range[1])
        if window is None:
            stop = min(stop, self.count(rollout)) if self.options.timesteps == "first" else rollout.steps - 1
        if rollout.kind == "cps" and stop >= rollout.steps:
            raise WeftError(
                f"cps makes its last step (to sigma 0) without noise, so it has no likelihood: leave step "
                f"{rollout.steps - 1} out (rollout.window.range [.., {rollout.steps - 1}], or timestep_fraction)"
            )
        for name, module in self.setting.trained.items():
            for key, part in module.named_modules():
                if isinstance(part, nn.Dropout) and part.p > 0:
                    raise WeftError(
                        f"grpo: {name}.{key} drops out {part.p:g} of its inputs, so a replay is not the network that "
                        f"made the rollout; set dropout to 0 (model.lora.dropout)"
                    )
        if self.count(rollout) < 1:
            raise WeftError(
                f"method.options.timestep_fraction {self.options.timestep_fraction} of {rollout.steps} steps is none"
            )

    def count(self, rollout: RolloutRecipe) -> int:
        """Steps trained per sample."""
        return levels(self.options, rollout)

    def steps_of(self, seed: int, sample_seed: int, window: tuple[int, int], step: int, total: int) -> list[int]:
        """The steps of this sample that are trained: of its window, or of the whole trajectory."""
        how = self.options.timesteps
        candidates = range(*window)
        if how == "random" and self.rollout.window is None:
            candidates = candidates[:-1]
        return chosen_steps(candidates, self.count(self.rollout), how, seed, sample_seed, step)

    def velocity(self, x: Tensor, sigma: Tensor, batch: dict[str, Any]) -> Tensor:
        """As the rollout combined it. Under guidance the negative half has no gradient (train_sd3.py)."""
        guidance = self.rollout.guidance
        if guidance == 1:
            return self.model.velocity(x, sigma, batch).float()
        v_neg, v_pos = self.model.velocity(torch.cat([x, x]), torch.cat([sigma, sigma]), batch).float().chunk(2)
        return guided(self.model, v_neg.detach(), v_pos, guidance)

    def loss(self, items: Sequence[Item], draw: Draw) -> Loss:
        """Per-item losses [B]: the clipped ratio and the divergence from the reference."""
        o, r = self.options, self.rollout
        samples = [item.sample for item in items]
        negatives = [s.negative for s in samples] if r.guidance > 1 else []
        batch = self.model.prepare([*negatives, *(s.condition for s in samples)])
        device = self.setting.device
        x, valid = pad_latents([i.sample.states[i.k - i.sample.window[0]] for i in items])
        x_next, _ = pad_latents([i.sample.states[i.k - i.sample.window[0] + 1] for i in items])
        x, x_next = x.to(device), x_next.to(device)
        valid = valid if valid is None else valid.to(device)
        sigma = torch.stack([i.sample.sigmas[i.k] for i in items])
        sigma_next = torch.stack([i.sample.sigmas[i.k + 1] for i in items])
        now = sigma.to(device)
        old = torch.stack([i.sample.log_probs[i.k - i.sample.window[0]] for i in items]).to(device)
        v_ref: Tensor | None = None
        if self.anchored or self.glance.due(draw.step):
            with torch.no_grad(), self.policies.using(self.reference):
                v_ref = self.velocity(x, now, batch)
        v = self.velocity(x, now, batch)
        result = kernels.step(x, v, sigma, sigma_next, kind=r.kind, eta=r.eta, valid=valid, x_next=x_next)
        assert result.log_prob is not None
        change = result.log_prob - old
        advantage = torch.tensor([s.advantage for s in samples], dtype=torch.float32, device=device)
        high = o.clip if o.clip_high is None else o.clip_high
        if o.guard:
            z, _ = pad_latents([rng.normal(tuple(i.sample.x0.shape), i.sample.seed, "step", i.k) for i in items])
            ratio = guard_log_ratio(result.mean, x_next, result.std, z.to(device), valid).exp()
        else:
            ratio = change.exp()
        per_sample = clipped_loss(ratio, advantage, o.clip, high)
        if o.guard and o.guard_dt:
            per_sample = per_sample / (sigma - sigma_next).to(device)
        seen = ratio.detach() - 1
        self.worst = max(self.worst, float(seen.abs().max()))
        metrics = {
            "policy_loss": float(per_sample.detach().mean()),
            "ratio": float(ratio.detach().mean()),
            "clipped": float(((seen < -o.clip) | (seen > high)).float().mean()),
            "approx_kl": float(0.5 * change.detach().square().mean()),
        }
        metrics |= by_level("log_prob_gap", sigma, change)
        if v_ref is not None:
            if o.kl_form == "velocity":
                kl = masked_mean((v - v_ref).square(), valid)
            else:
                scale = result.diffusion if o.kl_form == "no_dt" else result.std
                with torch.no_grad():
                    given = kernels.step(
                        x, v_ref, sigma, sigma_next, kind=r.kind, eta=r.eta, valid=valid, x_next=x_next
                    )
                kl = kl_divergence(result.mean, given.mean, scale.to(device), valid)
            if o.kl > 0:
                per_sample = per_sample + o.kl * kl
            metrics |= {"kl": float(kl.detach().mean()), "velocity_norm": norm_ratio(v, v_ref)}
            if o.norm_guard > 0:
                per_sample = per_sample + o.norm_guard * norm_excess(v, v_ref)
        return Loss(per_sample.float(), metrics)

    def updated(self, first: bool) -> dict[str, float]:
        """After an optimiser step: the largest |ratio - 1| of the epoch's first update, which should be rounding."""
        if first:
            self.worst_first = self.worst
        worst, self.worst = self.worst, 0.0
        return {"ratio_error_first": self.worst_first, "ratio_error": worst}

    def epoch_done(self, step: int) -> dict[str, float]:
        return {}


def method(setting: Setting, options: dict[str, Any]) -> Online:
    """The method `grpo` of the training loop."""
    return Online(setting, Grpo(setting, options))
