"""What all online methods share: an epoch is rollouts, scores, advantages, and then one or more optimiser steps.

The counter is the loop's `step`; epoch = step // (updates x inner_epochs). An objective (`Nft`, `Grpo`) declares what
it needs of the rollouts and computes the loss of (sample, noise level) items; it knows no data and no rewards.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from weft.errors import WeftError, nearest
from weft.reward.advantage import AdvantageConfig, group_stats
from weft.reward.filter import FilterConfig, banned, keep_groups
from weft.reward.make import make_scorer
from weft.reward.mix import Mixed, Mixture, ScorerConfig, averages, spearman
from weft.rng import numpy_rng
from weft.sample import kernels
from weft.sample.solvers import SOLVERS
from weft.train.fed import Fed
from weft.train.geometry import RewardRecipe, RolloutRecipe, check_geometry
from weft.train.method import Setting
from weft.train.policy import Policies
from weft.train.rollouts import (
    Epoch,
    Sample,
    add_samples,
    buffer_tensors,
    encode_batches,
    fill_buffer,
    others,
    plan_epoch,
    roll,
)
from weft.train.sft import held_out, loss_options
from weft.types import Draw, Example, FlowModel, Loss, Score


@dataclass(slots=True)
class Item:
    """One thing to learn from: a sample at step k of its rollout's grid."""

    sample: Sample
    k: int


class Objective(Protocol):
    """A method's own part. `keep` names what rollouts store, `rollout_policy` whose weights make them."""

    keep: tuple[str, ...]
    rollout_policy: str
    advantage: AdvantageConfig
    filter: FilterConfig
    drop_zero: bool
    policies: Policies

    def check(self, rollout: RolloutRecipe) -> None: ...

    def count(self, rollout: RolloutRecipe) -> int: ...

    def steps_of(self, seed: int, sample_seed: int, window: tuple[int, int], step: int, total: int) -> list[int]: ...

    def loss(self, items: Sequence[Item], draw: Draw) -> Loss: ...

    def updated(self, first: bool) -> dict[str, float]: ...

    def epoch_done(self, step: int) -> dict[str, float]: ...


def chosen_steps(candidates: Iterable[int], count: int, how: str, seed: int, sample_seed: int, step: int) -> list[int]:
    """`count` of the candidates: the first ones, or a random choice in random order, new at every optimiser step."""
    all_of_them = list(candidates)
    if how == "first":
        return all_of_them[:count]
    order = numpy_rng(seed, "levels", step, str(sample_seed)).permutation(len(all_of_them))
    return [all_of_them[i] for i in order[:count]]


class Online:
    """A training method over an objective: see the module's head."""

    def __init__(self, setting: Setting, objective: Objective) -> None:
        recipe, name = setting.recipe, setting.recipe.method.name
        self.setting, self.objective = setting, objective
        if not isinstance(setting.model, FlowModel):
            kind = type(setting.model).__name__
            raise WeftError(f"method {name} samples pictures: it trains flow models, not {kind}")
        if setting.rollout is None:
            raise WeftError(f"method {name} needs a rollout section: groups, group_size, batch, steps ...")
        if recipe.run.prefetch:
            raise WeftError(f"method {name}: run.prefetch is of no use, rollouts depend on the weights; remove it")
        if recipe.run.accumulate != 1 or any(s.accumulate or s.batch_size for s in recipe.stages):
            raise WeftError(
                f"method {name}: run.accumulate and the stages' batches are not used; an update takes rollout.groups x "
                f"group_size / updates samples, run.batch_size of them at once"
            )
        if recipe.cache is not None or len(recipe.stages) > 1:
            raise WeftError(f"method {name} takes one stage and no cache: requests are encoded once per epoch")
        self.rollout: RolloutRecipe = setting.rollout
        records = sum(len(source) for source in setting.feed.sources)
        check_geometry(self.rollout, recipe.run.batch_size, setting.processes.size, records)
        check_rollout(self.rollout, objective.advantage)
        objective.check(self.rollout)
        self.mixture = make_mixture(recipe.reward, setting.reward, name)
        self.alarm = (recipe.reward or RewardRecipe()).alarm
        self.seed = recipe.run.seed
        self.epoch: Epoch | None = None
        self.mixed: Mixed | None = None
        self.order: list[list[int]] = []  # sample indices of every update of the epoch
        self.banned: list[str] = []
        self.new_bans: list[str] = []
        self.gaps: dict[str, float] = {}  # reward - watched scorer, at the first epoch
        self.empty = 0
        self.news: dict[str, float] = {}
        self.begun, self.updating = 0.0, 0.0  # when the last update began, and the seconds of the epoch's updates

    # -- one optimiser step

    def batch(self, step: int) -> Fed | None:
        """The items of an optimiser step; the first one of an epoch makes the rollouts. None if asked to stop."""
        number, part = divmod(step, self.rollout.steps_per_epoch)
        if self.epoch is None or self.epoch.number != number:
            assert part == 0, "an epoch under way is restored by load"
            try:
                epoch = self._planned(number)
            except WeftError as error:  # the same in all processes, which save and end
                return Fed("", [], [], 0, 1, error=error)
            if not self._begin(epoch):
                return None
        assert self.epoch is not None
        chosen = self.order[part]
        table = {s.index: s for batch in self.epoch.batches for s in batch}
        own = [table[i] for i in chosen if i in table]
        micro, total = self.setting.recipe.run.batch_size, self.rollout.steps
        items: list[Item] = []
        pieces: list[int] = []
        for start in range(0, len(own), micro):
            some = own[start : start + micro]
            levels = [self.objective.steps_of(self.seed, s.seed, s.window, step, total) for s in some]
            for column in zip(*levels, strict=True):
                items += [Item(s, k) for s, k in zip(some, column, strict=True)]
                pieces.append(len(some))
        count = len(chosen) * self.objective.count(self.rollout)
        news, self.news = self.news, {}
        ids = [f"{item.sample.id}@{item.k}" for item in items]
        self.begun = time.perf_counter()
        return Fed(self.epoch.name, items, ids, count, micro, pieces=pieces, metrics=news)

    def loss(self, items: Sequence[Item], draw: Draw) -> Loss:
        return self.objective.loss(items, draw)

    def stepped(self, step: int) -> dict[str, float]:
        """After an optimiser step; after an epoch's last one the old policy follows and bans take effect."""
        values = self.objective.updated((step - 1) % self.rollout.steps_per_epoch == 0)
        self.updating += time.perf_counter() - self.begun
        if step % self.rollout.steps_per_epoch == 0:
            values |= self.objective.epoch_done(step) | {"seconds/update": self.updating}
            self.updating = 0.0
            self.banned = list(dict.fromkeys([*self.banned, *self.new_bans]))
            self.epoch = self.mixed = None
        return values

    # -- an epoch

    def _begin(self, epoch: Epoch) -> bool:
        """Roll out an epoch, and then more groups in the place of idle ones, as often as `rollout.refill` says."""
        batches: list[list[Sample]] = list(epoch.batches)
        for again in range(self.rollout.refill + 1):
            if not self._rolled(epoch, batches):
                self.epoch = self.mixed = None
                return False
            self._judge(epoch)
            if again == self.rollout.refill or not (batches := self._refilled(epoch)):
                break
        self._report(epoch)
        return True

    def _rolled(self, epoch: Epoch, batches: Sequence[list[Sample]]) -> bool:
        setting = self.setting
        modules = setting.trained.values()
        started = time.perf_counter()
        encode_batches(setting.feed, self.rollout, batches)
        epoch.seconds["encode"] = epoch.seconds.get("encode", 0.0) + time.perf_counter() - started
        for module in modules:
            module.eval()
        try:
            with self.objective.policies.using(self.objective.rollout_policy):
                return roll(
                    setting.model, self.rollout, epoch, batches, self.mixture, setting.processes, seed=self.seed,
                    keep=self.objective.keep, autocast=setting.autocast, stopped=setting.stopped,
                )  # fmt: skip
        finally:
            for module in modules:
                module.train()

    def _planned(self, number: int) -> Epoch:
        """Raises WeftError in all processes if one cannot plan, or if they plan different requests."""
        feed, processes = self.setting.feed, self.setting.processes
        try:
            epoch = plan_epoch(feed, self.rollout, processes, self.seed, number, self.banned)
            plans = processes.gather([json.dumps([s.group for s in epoch.samples])])
        except WeftError as error:
            processes.gather([str(error)])
            raise
        if len(set(plans)) > 1:
            raise WeftError(f"epoch {number}: the processes do not read the same requests: check that all see one disk")
        return epoch

    def _refilled(self, epoch: Epoch) -> list[list[Sample]]:
        """Add groups of other requests for those of the judged epoch from which nothing is learned; none if there are
        no such groups or no other requests. A function of the scores so far, so that a resumed run adds the same."""
        learned = {epoch.samples[i].group for part in self.order for i in part}
        keys = [s.group for s in epoch.samples]
        wanted = self.rollout.groups - len(learned)
        feed, processes = self.setting.feed, self.setting.processes
        found = list(others(feed, self.seed, epoch.number, {*keys, *self.banned}, wanted))
        return add_samples(epoch, self.rollout, processes, self.seed, found) if found else []

    def _judge(self, epoch: Epoch) -> None:
        """Advantages, filters, and which samples each update takes; the same in all processes."""
        step = epoch.number * self.rollout.steps_per_epoch
        keys = [s.group for s in epoch.samples]
        mixed = self.mixture.mixed(epoch.scores, step)
        advantages = self.mixture.advantages(mixed, keys, step, self.objective.advantage)
        stats = group_stats(mixed.total, keys)
        kept = keep_groups(stats, self.objective.filter)
        learn = ~np.isnan(advantages) & np.array([kept[key] for key in keys])
        dropped = sum(s.valid < self.objective.advantage.min_valid for s in stats.values())
        filtered = sum(not kept[key] for key in stats)
        spreads = np.array([s.std for s in stats.values() if s.valid] or [math.nan])
        if self.objective.drop_zero:
            learn &= advantages != 0
        for sample, value in zip(epoch.samples, advantages, strict=True):
            sample.advantage = float(value)
        self.order = []
        for inner in range(self.rollout.inner_epochs):
            order = numpy_rng(self.seed, "updates", epoch.number, sample=inner).permutation(np.flatnonzero(learn))
            self.order += [part.tolist() for part in np.array_split(order, self.rollout.updates)]
        self.epoch, self.mixed = epoch, mixed
        self.new_bans = banned(stats, self.objective.filter, self.banned)
        missing = float(np.isnan(mixed.total).mean())
        self.news = {f"reward/{k}": v for k, v in averages(mixed.parts).items()} | {
            "reward": float(np.nanmean(mixed.total)) if missing < 1 else math.nan,
            "reward_group_std": float(spreads.mean()),
            "reward_zero_std": float((spreads == 0).mean()),
            "reward_missing": missing,
            "groups": float(len(stats)),
            "groups_dropped": float(dropped),
            "groups_filtered": float(filtered),
            "groups_banned": float(len(self.new_bans)),
            "groups_refilled": float(max(0, len(stats) - self.rollout.groups)),
            "samples_trained": float(learn.sum()),
            "epoch": float(epoch.number),
        }

    def _report(self, epoch: Epoch) -> None:
        """Numbers of an epoch for the log, alarms, and the end of a run that has nothing to learn from."""
        assert self.mixed is not None
        say, mixed = self.setting.say, self.mixed
        self.news |= {f"seconds/{k}": v for k, v in epoch.seconds.items()}
        if mixed.reasons:
            reason = next(iter(mixed.reasons.values()))
            say(
                f"epoch {epoch.number}: {len(mixed.reasons)} of {len(epoch.samples)} samples without a reward: {reason}"
            )
        for scorer in self.mixture.scorers:
            if not scorer.watch or np.isnan(mixed.parts[scorer.name] + mixed.total).all():
                continue
            truth = mixed.parts[scorer.name]
            gap = float(np.nanmean(mixed.total - truth))  # over the samples that both have seen
            self.news |= {f"gap/{scorer.name}": gap, f"rank/{scorer.name}": spearman(mixed.total, truth)}
            first = self.gaps.setdefault(scorer.name, gap)
            if gap > first + self.alarm:
                say(
                    f"ALARM epoch {epoch.number}: the reward is {gap:.3f} above {scorer.name}, {gap - first:.3f} more "
                    f"than at the start: the policy may be exploiting the reward"
                )
        self.empty = 0 if any(self.order) else self.empty + 1
        if np.isnan(mixed.total).all() and (epoch.number == 0 or self.empty >= self.rollout.patience):
            raise WeftError(
                f"epoch {epoch.number}: not one of {len(epoch.samples)} samples has a reward: "
                f"{next(iter(mixed.reasons.values()))}"
            )
        if self.empty >= self.rollout.patience:
            raise WeftError(
                f"{self.empty} epochs in a row had nothing to learn from (all groups even, filtered or without "
                f"rewards): use harder requests, another filter, or raise rollout.patience"
            )

    # -- checkpoints

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The policies, and within an epoch the rollouts that later updates need."""
        found = self.objective.policies.tensors()
        if self.epoch is not None:
            own = [s for batch in self.epoch.batches for s in batch]
            found["rollouts"] = self.setting.processes.gather_tensors(buffer_tensors(own))
        return found

    def state(self) -> dict[str, Any]:
        scores = None
        if self.epoch is not None:
            scores = [[s.value, s.parts, s.reason] for s in self.epoch.scores]
        return {"banned": self.banned, "gaps": self.gaps, "empty": self.empty, "scores": scores}

    def load(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Continue; an epoch under way is planned again, its rollouts and scores come from the checkpoint."""
        self.objective.policies.load(tensors)
        self.banned, self.gaps, self.empty = state["banned"], state["gaps"], state["empty"]
        number, part = divmod(step, self.rollout.steps_per_epoch)
        if part == 0:
            return
        if state["scores"] is None or "rollouts" not in tensors:
            raise WeftError("the checkpoint lies within an epoch but holds no rollouts")
        scores = [Score(value, parts, reason) for value, parts, reason in state["scores"]]
        epoch = self._planned(number)
        batches: list[list[Sample]] = list(epoch.batches)
        while True:
            # round by round, as they were made: an encoder's last bits depend on its batch
            encode_batches(self.setting.feed, self.rollout, batches)
            epoch.scores = scores[: len(epoch.samples)]
            self._judge(epoch)
            if len(epoch.samples) == len(scores):
                break
            batches = self._refilled(epoch)
            if not batches or len(epoch.samples) > len(scores):
                raise WeftError(
                    f"epoch {number}: the checkpoint has {len(scores)} samples, now {len(epoch.samples)} are planned: "
                    f"the data have changed; use an earlier checkpoint or the data of that run"
                )
        fill_buffer(epoch, tensors["rollouts"])
        self.news = {}

    def held_out(
        self, examples: Sequence[Example], ids: Sequence[str], sigmas: Sequence[float], seed: int, batch: int
    ) -> dict[str, float]:
        """The flow-matching loss of held-out examples, as for `sft`."""
        model = self.setting.model
        return held_out(model, loss_options(model, {}), examples, ids, sigmas, seed, batch)


def check_rollout(r: RolloutRecipe, advantage: AdvantageConfig) -> None:
    """Refuse what no rollout can be made with, before any is made. Raises WeftError."""
    if advantage.min_valid > r.group_size:
        raise WeftError(
            f"method.options.advantage.min_valid is {advantage.min_valid}, but a group has {r.group_size} samples: "
            f"every group would be dropped"
        )
    if r.solver not in SOLVERS:
        raise WeftError(f"rollout.solver: there is no '{r.solver}': {nearest(r.solver, SOLVERS)}")
    kernels.coefficients(1.0, 0.5, kind=r.kind, eta=r.eta)  # refuses a noise level that does not fit the kind


def make_mixture(recipe: RewardRecipe | None, given: Any, method: str) -> Mixture:
    """The reward of the recipe, or the one passed to `weft.train.run`: a scorer, or a `Mixture`. Raises WeftError."""
    if (recipe is None) == (given is None):
        have = "neither" if recipe is None else "both"
        raise WeftError(
            f"method {method} needs a reward, from the recipe's reward section or from run(..., reward=f); found {have}"
        )
    if isinstance(given, Mixture):
        return given
    if recipe is None:
        if not callable(given):
            raise WeftError(f"reward: a {type(given).__name__} is neither a scorer (callable) nor a Mixture")
        return Mixture([ScorerConfig(getattr(given, "__name__", type(given).__name__), given)])
    scorers = []
    for item in recipe.scorers:
        name = item.name or item.call.rpartition(":")[2]
        scorer = make_scorer(item.call, item.args, "reward.scorers")
        if callable(ready := getattr(scorer, "ready", None)):
            ready()
        scorers.append(ScorerConfig(name, scorer, item.weight, item.scale, item.offset, item.watch, item.share))
    return Mixture(scorers, recipe.combine)
