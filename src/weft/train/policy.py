"""The policies that post-training compares: `default` (trained), `old` (makes rollouts), `reference` (KL anchor).

All are the same network with other trained tensors: `old` is a copy of the trained parameters that stands in for
them inside `using("old")`, so LoRA and full weights are one case. The reference of a LoRA is the network with its
adapters off, exactly; of full weights, or with `reference="start"`, a copy of the parameters at the start.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.train.geometry import RolloutRecipe


@dataclass(frozen=True)
class OldSchedule:
    """How much of the old policy remains at its update after optimiser step i: 0 before `flat`, then
    min((i - flat) x `rate`, `hold`) (DiffusionNFT, arXiv 2509.16117, section 3.3; `return_decay`)."""

    flat: int = 0
    rate: float = 0.001
    hold: float = 0.5

    def at(self, step: int) -> float:
        return 0.0 if step < self.flat else min((step - self.flat) * self.rate, self.hold)


OLD_SCHEDULES = {
    "copy": OldSchedule(0, 0.0, 0.0),  # decay_type 0: on-policy
    "linear_to_0_5": OldSchedule(0, 0.001, 0.5),  # decay_type 1: the default
    "delayed_linear_to_0_999": OldSchedule(75, 0.0075, 0.999),  # decay_type 2: the OCR reward
}


def old_schedule(value: str | OldSchedule) -> OldSchedule:
    """A schedule by its name, or itself. Raises WeftError for an unknown name."""
    if isinstance(value, OldSchedule):
        return value
    if value not in OLD_SCHEDULES:
        raise WeftError(f'old: "{value}" is not one of {", ".join(OLD_SCHEDULES)}, nor {{flat, rate, hold}}')
    return OLD_SCHEDULES[value]


def anchor_of(reference: str | None, lora: bool) -> str:
    """Which weights the reference is: "off" or "start"; None takes "off" for a LoRA. Raises WeftError."""
    if reference == "off" and not lora:
        raise WeftError('reference "off" means the network without its LoRA, but full weights train; use "start"')
    return reference or ("off" if lora else "start")


class Policies:
    """`parameters` are the trained ones by name. `old` and `start` keep copies only if asked to (fp32, same device)."""

    def __init__(
        self, trained: dict[str, nn.Module], parameters: dict[str, nn.Parameter], *, old: bool, start: bool
    ) -> None:
        self.trained, self.parameters = trained, parameters
        self.old_is_default = old  # until the first optimiser step after a plain copy: one forward less
        self.copies: dict[str, dict[str, Tensor]] = {}
        for name, wanted in (("old", old), ("start", start)):
            if wanted:
                self.copies[name] = {k: p.detach().clone() for k, p in parameters.items()}

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """This policy's weights are in the network inside the block. "off" is a LoRA's bare network."""
        if name == "default":
            yield
        elif name == "off":
            with self._adapters_off():
                yield
        else:
            copy = self.copies[name]
            raw = {k: p.data for k, p in self.parameters.items()}
            # autocast keeps 16-bit copies by parameter, not by value: without this one policy would run on another's
            torch.clear_autocast_cache()
            try:
                for key, parameter in self.parameters.items():
                    parameter.data = copy[key]
                yield
            finally:
                for key, parameter in self.parameters.items():
                    parameter.data = raw[key]
                torch.clear_autocast_cache()

    @contextmanager
    def _adapters_off(self) -> Iterator[None]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [m for module in self.trained.values() for m in module.modules() if isinstance(m, BaseTunerLayer)]
        try:
            for layer in layers:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    @torch.no_grad()
    def update_old(self, keep: float) -> None:
        """old = keep x old + (1 - keep) x default."""
        for key, value in self.copies["old"].items():
            value.mul_(keep).add_(self.parameters[key].detach(), alpha=1.0 - keep)
        self.old_is_default = keep == 0

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The copies, for a checkpoint."""
        return {f"policy_{name}": copy for name, copy in self.copies.items()}

    def load(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Restore what `tensors` returned. Raises WeftError if it is not there."""
        for name, copy in self.copies.items():
            saved: Any = tensors.get(f"policy_{name}")
            if saved is None or set(saved) != set(copy):
                raise WeftError(f"the checkpoint has no {name} policy of these parameters")
            for key, value in copy.items():
                value.copy_(saved[key])
        if "old" in self.copies:
            self.old_is_default = all(torch.equal(v, self.parameters[k]) for k, v in self.copies["old"].items())


class Glance:
    """When a run without an anchor looks at its reference all the same, to log `kl` and `velocity_norm`: at the first
    micro-batch of an epoch, if the reference costs no memory (`possible`: a LoRA that is switched off)."""

    def __init__(self, rollout: RolloutRecipe | None, possible: bool) -> None:
        self.every = rollout.steps_per_epoch if rollout is not None else 1
        self.possible, self.last = possible, -1

    def due(self, step: int) -> bool:
        """Whether to look now; True once for every epoch."""
        due = self.possible and step % self.every == 0 and step != self.last
        self.last = step
        return due


def masked_mean(x: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of each sample [B] over channels and real cells; x [B, C, ...], valid [B, 1, H, W] or None (all)."""
    if valid is None:
        return x.flatten(1).mean(1)
    mask = valid.to(x).expand_as(x).flatten(1)
    return (x.flatten(1) * mask).sum(1) / mask.sum(1)


def norm_excess(v: Tensor, v_ref: Tensor) -> Tensor:
    """NormGuard's hinge (arXiv 2606.27771) per sample [B]: max(0, |v| - |v_ref|)^2 / |v_ref|^2.

    The paper's exponent and weight are not published: a relative excess, squared, is our choice.
    """
    size, limit = v.float().flatten(1).norm(dim=1), v_ref.float().flatten(1).norm(dim=1)
    return ((size - limit).clamp(min=0) / limit).square()


def norm_ratio(v: Tensor, v_ref: Tensor) -> float:
    """The batch's mean of |v| / |v_ref|: reinforcement learning tends to inflate velocities."""
    return float((v.detach().float().flatten(1).norm(dim=1) / v_ref.float().flatten(1).norm(dim=1)).mean())


def by_level(name: str, sigma: Tensor, values: Tensor) -> dict[str, float]:
    """Means of values [B] at each noise level, as `name@0.913`."""
    found: dict[str, list[float]] = {}
    for level, value in zip(sigma.tolist(), values.detach().tolist(), strict=True):
        found.setdefault(f"{name}@{level:.3f}", []).append(value)
    return {key: sum(v) / len(v) for key, v in found.items()}
