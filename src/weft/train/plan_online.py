"""What an epoch of rollouts costs, for `weft.train.plan`: forwards of sampling and updates, requests for rewards."""

from __future__ import annotations

import math
from dataclasses import dataclass

from weft.errors import WeftError
from weft.train.config import Recipe
from weft.train.geometry import RolloutRecipe, check_geometry
from weft.train.method import Cost


@dataclass(slots=True)
class EpochPlan:
    """Counts of one epoch. `sampled`, `graded` and `plain` are forwards of single samples: in rollouts, in updates with
    a backward pass, and in updates without one (old policy, reference, and the negative half under guidance)."""

    epochs: int
    samples: int
    sampled: int
    graded: int
    plain: int
    calls: int  # of networks: batches of such forwards
    scorers: int
    batches: int  # of outputs to score
    copies: int  # of the trained weights

    def passes(self, backward: int) -> int:
        """Forwards of single samples that an epoch is worth, with a backward pass worth `backward` of them."""
        return self.sampled + self.plain + self.graded * (1 + backward)

    def lines(self) -> list[str]:
        """For the report."""
        scored = self.samples * self.scorers
        return [
            f"epochs      {self.epochs:,} of {self.samples:,} samples; in each {self.sampled:,} sample forwards in "
            f"rollouts, {self.graded:,} with and {self.plain:,} without a gradient in updates",
            f"rewards     {scored:,} scores an epoch from {self.scorers} scorer{'s' if self.scorers > 1 else ''} in "
            f"{self.batches * self.scorers:,} requests; {scored * self.epochs:,} in all",
        ]


def epoch_plan(config: Recipe, records: int | None, lora: bool) -> EpochPlan:
    """The counts of a recipe with rollouts. `records`: how many requests the data hold, None if they are not here.
    `lora`: whether nothing else trains.
    Raises WeftError for a geometry that cannot be, and for a method whose cost is not known."""
    rollout = config.rollout
    assert rollout is not None
    micro = config.run.batch_size
    check_geometry(rollout, micro, 1, rollout.groups if records is None else records)
    cost = _cost(config, rollout, lora)
    guided = rollout.guidance > 1
    uses = rollout.samples * rollout.inner_epochs  # every sample once in every inner epoch
    graded = uses * cost.levels
    twice = guided and config.method.name == "grpo"  # its replay repeats the guided step; nft learns the plain velocity
    plain = graded * (cost.extra * (2 if twice else 1) + (1 if twice else 0))
    sampled = rollout.samples * rollout.steps * (2 if guided else 1)
    batches = rollout.samples // rollout.batch
    share = rollout.samples // rollout.updates
    pieces = rollout.steps_per_epoch * math.ceil(share / micro)
    calls = batches * rollout.steps + pieces * cost.levels * (1 + cost.extra)
    scorers = len(config.reward.scorers) if config.reward is not None else 1
    epochs = math.ceil(config.run.steps / rollout.steps_per_epoch)
    return EpochPlan(epochs, rollout.samples, sampled, graded, plain, calls, scorers, batches, cost.copies)


def _cost(config: Recipe, rollout: RolloutRecipe, lora: bool) -> Cost:
    from weft.train import grpo, nft

    known = {"nft": nft.cost, "grpo": grpo.cost}
    name, options = config.method.name, config.method.options
    if name not in known:
        raise WeftError(f"plan knows what a rollout costs with {' and '.join(known)}, not with method {name}")
    cost = known[name](options, rollout, lora)
    if cost.levels < 1:
        fraction = options.get("timestep_fraction")
        raise WeftError(f"method.options.timestep_fraction {fraction} of {rollout.steps} steps is none")
    return cost
