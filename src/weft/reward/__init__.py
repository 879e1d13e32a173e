"""Rewards: scorers and their mixture, group filters, advantages.

A scorer is a plain function or object: called with a batch of (record, output) pairs it returns one
`weft.types.Score` for each, in order; a failure is a Score without a value and with a reason. Nothing here knows how
the outputs were made or what is trained with the numbers.
"""

from __future__ import annotations

from weft.reward.advantage import AdvantageConfig, GroupStats, advantages, group_key, group_stats
from weft.reward.filter import FilterConfig, keep_groups
from weft.reward.mix import Mixture, Scorer, ScorerConfig

__all__ = [
    "AdvantageConfig", "FilterConfig", "GroupStats", "Mixture", "Scorer", "ScorerConfig", "advantages", "group_key",
    "group_stats", "keep_groups",
]  # fmt: skip
