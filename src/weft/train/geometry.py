"""The recipe of rollouts: how many samples of how many requests, which of them carry noise, in which batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from weft.errors import WeftError
from weft.rng import numpy_rng


@dataclass(slots=True)
class WindowRecipe:
    """Noise only in `size` consecutive steps of a rollout; the other steps take the ODE `solver`.

    The window lies within steps [range[0], range[1]) (default: all but the last). `move`: "fixed" at the first step;
    "random", uniform for each rollout batch (Flow-GRPO-Fast); "progressive", `shift` steps on after `every` epochs
    (MixGRPO, arXiv 2507.21802); "decay", the same with fewer epochs at later places, falling linearly from `every` to a
    quarter of it; "exp_decay", the same with ceil(every exp(-k max(0, position - after))) epochs at a place. At the
    end it stays, or with `roll_back` returns to the start (in the public code it shrinks to nothing there before).
    """

    size: int = 3
    range: list[int] | None = None
    move: Literal["fixed", "random", "progressive", "decay", "exp_decay"] = "random"
    every: int = 25
    shift: int = 1
    k: float = 0.1
    after: int = 13
    roll_back: bool = False


@dataclass(slots=True)
class RolloutRecipe:
    """One epoch: `groups` requests with `group_size` samples each, made `batch` at a time, then `updates` optimiser
    steps (times `inner_epochs`) on parts of equal size; `run.batch_size` samples pass the network at once in them.

    `steps`, `solver`, `kind`, `eta`, `guidance` and `negative` are those of `weft.sample.rollout.sample_flow`.
    `same_latent`: one initial noise per group (DanceGRPO). `workers`: threads that ask for rewards while the next
    batch is made. `patience`: epochs in a row without anything to learn from before the run stops. `refill`: how often
    an epoch makes groups of other requests in the place of those from which nothing is learned (filtered, without
    rewards, or even where the method drops zero advantages), as DAPO does (arXiv 2503.14476, section 3.2).
    """

    groups: int = 48
    group_size: int = 24
    batch: int = 12
    updates: int = 1
    inner_epochs: int = 1
    steps: int = 10
    solver: str = "euler"
    kind: Literal["ode", "flow_sde", "dance_sde", "cps"] = "ode"
    eta: float = 0.0
    window: WindowRecipe | None = None
    guidance: float = 1.0
    negative: str = ""
    same_latent: bool = False
    workers: int = 1
    patience: int = 3
    refill: int = 0

    @property
    def samples(self) -> int:
        return self.groups * self.group_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps from one set of rollouts."""
        return self.updates * self.inner_epochs


@dataclass(slots=True)
class ScorerRecipe:
    """A scorer by its dotted path (`package.module:name` or `file.py:name`). A class is built with `args`, a function
    is called with the batch and `args`. An object with a method `ready` is asked before the first rollouts: it may wait
    for what it needs, or raise. `name` (default: that of the object) stands in logs. The other fields are
    those of `weft.reward.ScorerConfig`."""

    call: str
    args: dict[str, Any] = field(default_factory=dict)
    name: str | None = None
    weight: float | list[list[float]] = 1.0
    scale: float = 1.0
    offset: float = 0.0
    watch: bool = False
    share: float = 1.0


@dataclass(slots=True)
class RewardRecipe:
    """Scorers and how they combine (see `weft.reward.Mixture`). `alarm`: how far the distance between the reward and
    a watched scorer may grow beyond that of the first epoch before the run says so."""

    scorers: list[ScorerRecipe] = field(default_factory=list)
    combine: Literal["sum", "product", "normalised"] = "sum"
    alarm: float = 0.1


def check_geometry(r: RolloutRecipe, micro: int, processes: int, records: int) -> None:
    """Refuse what cannot be divided, with the numbers. Raises WeftError."""
    for name in ("groups", "batch", "updates", "inner_epochs", "steps", "workers", "patience"):
        if getattr(r, name) < 1:
            raise WeftError(f"rollout.{name} is {getattr(r, name)}; it must be at least 1")
    if r.refill < 0:
        raise WeftError(f"rollout.refill is {r.refill}; it is a number of rounds, 0 for none")
    if r.group_size < 2:
        raise WeftError(f"rollout.group_size is {r.group_size}; a group of fewer than 2 has nothing to compare")
    total = f"{r.groups} groups x {r.group_size} = {r.samples} samples"
    at_once = r.batch * processes
    if r.samples % at_once:
        fitting = [b for b in range(1, r.samples + 1) if r.samples % (b * processes) == 0]
        fix = (
            f"set rollout.batch to {min(fitting, key=lambda b: abs(b - r.batch))}"
            if fitting
            else f"make groups x group_size a multiple of {processes}"
        )
        raise WeftError(
            f"rollout: {total} an epoch do not divide into batches of {r.batch} on {processes} process"
            f"{'es' if processes > 1 else ''} ({at_once} at once): {fix}"
        )
    if r.samples % r.updates:
        fitting = [u for u in range(1, r.samples + 1) if r.samples % u == 0]
        raise WeftError(
            f"rollout: {total} an epoch do not divide into {r.updates} updates; "
            f"set rollout.updates to {min(fitting, key=lambda u: abs(u - r.updates))}"
        )
    if r.groups > records:
        raise WeftError(
            f"rollout.groups is {r.groups}, but the data hold only {records} records: an epoch needs distinct requests"
        )
    share = r.samples // r.updates
    if micro > share:
        raise WeftError(f"run.batch_size is {micro}, but an update has {share} samples ({total} / {r.updates} updates)")
    window_at(r, 0, 0, 0)  # refuses a window that does not fit


def check_fraction(fraction: float) -> None:
    """Raises WeftError for a share of the noise levels that cannot be."""
    if not 0 < fraction <= 1:
        raise WeftError(f"method.options.timestep_fraction is {fraction}; it must be above 0 and at most 1")


def window_at(r: RolloutRecipe, seed: int, epoch: int, batch: int) -> tuple[int, int]:
    """The steps [start, stop) with noise of a rollout batch; (0, 0) for the ODE, all steps without a window."""
    if r.kind == "ode":
        if r.window is not None:
            raise WeftError("rollout.window needs noise: choose rollout.kind flow_sde, dance_sde or cps")
        return 0, 0
    if r.window is None:
        return 0, r.steps
    w = r.window
    low, high = (0, r.steps - 1) if w.range is None else w.range
    last = high - w.size  # the last place to start
    if w.size < 1 or low < 0 or high > r.steps or last < low:
        raise WeftError(
            f"rollout.window: {w.size} steps within [{low}, {high}) of {r.steps} steps do not fit; "
            f"make size at most {max(0, min(high, r.steps) - max(low, 0))} or widen range"
        )
    if w.move == "fixed":
        return low, low + w.size
    if w.move == "random":
        start = int(numpy_rng(seed, "window", epoch, sample=batch).integers(low, last + 1))
        return start, start + w.size
    if w.every < 1 or w.shift < 1:
        raise WeftError(f"rollout.window: every {w.every} and shift {w.shift} must be at least 1")
    start, left = low, epoch
    while (stay := _stay(w, start, high)) <= left:
        left -= stay
        start += w.shift
        if start > last:
            if not w.roll_back:
                start = last
                break
            start = low
    return start, start + w.size


def _stay(w: WindowRecipe, position: int, high: int) -> int:
    """Epochs at a place (MixGRPO's `get_dynamic_iters_per_group` and `get_exp_decay_iters_per_group`)."""
    if w.move == "decay":
        least, progress = max(1, w.every // 4), position / high
        return max(least, int(w.every * (1 - progress) + least * progress))
    if w.move != "exp_decay":
        return w.every
    return math.ceil(w.every * math.exp(-w.k * max(0, position - w.after)))
