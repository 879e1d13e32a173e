"""Which groups teach something: the low-variance filters of Edit-R1 (arXiv 2510.16888, section 2.3), by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from weft.errors import WeftError
from weft.reward.advantage import GroupStats

RULES = ("none", "paper", "release_mask", "ban")


@dataclass(frozen=True)
class FilterConfig:
    """Drop groups by the mean and the population deviation of their rewards (which must lie in [0, 1] for these
    thresholds).

    `rule`: "none"; "paper" drops a group that is good and even, mean > `mean` and deviation < `std`; "release_mask"
    keeps only deviation > `std` and mean < `mean` (the loss mask of the released code: it also drops every even
    group and every good one); "ban" trains on all groups but never samples again what "paper" would drop.
    """

    rule: Literal["none", "paper", "release_mask", "ban"] = "none"
    mean: float = 0.9
    std: float = 0.05

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise WeftError(f"filter.rule {self.rule!r} is unknown; choose one of {', '.join(RULES)}")
        if self.std < 0:
            raise WeftError(f"filter.std is {self.std}; a deviation is not negative")


def keep_groups(stats: Mapping[str, GroupStats], config: FilterConfig) -> dict[str, bool]:
    """Whether each group is trained on."""
    if config.rule == "paper":
        return {key: not settled(s, config) for key, s in stats.items()}
    if config.rule == "release_mask":
        return {key: s.std > config.std and s.mean < config.mean for key, s in stats.items()}
    return dict.fromkeys(stats, True)


def banned(stats: Mapping[str, GroupStats], config: FilterConfig, before: Collection[str] = ()) -> list[str]:
    """All group keys that must not be sampled again, in a stable order; only the rule "ban" adds any."""
    new = [key for key, s in stats.items() if config.rule == "ban" and settled(s, config)]
    return list(dict.fromkeys([*before, *new]))


def settled(stats: GroupStats, config: FilterConfig) -> bool:
    """High mean and low deviation: nothing left to learn (False for a group without rewards)."""
    return stats.std < config.std and stats.mean > config.mean
