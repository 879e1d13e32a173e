"""Several scorers, one reward: weighted sum, product, or per-reward normalised advantages; weights may move with the
step (PDTR of UniPic 2.0, arXiv 2509.04548, raises them gradually)."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from weft.errors import WeftError
from weft.record import Record
from weft.reward.advantage import AdvantageConfig, advantages, clipped, normalised, reshape
from weft.types import Score

if TYPE_CHECKING:
    from PIL import Image

Pair = tuple[Record, "Image.Image"]
Scorer = Callable[[Sequence[Pair]], Sequence[Score]]
"""A batch of (record, output) pairs to one Score each, in order. Called from threads, `rollout.workers` at once."""

COMBINE = ("sum", "product", "normalised")
Weight = float | list[list[float]]


@dataclass(slots=True)
class ScorerConfig:
    """One scorer and its part in the mixture.

    `weight`: a number, or a schedule [[step, weight], ...]: linear between the points, constant beyond them.
    The value used is `offset` + `scale` x score (a judge of 0..10 in 0..1: scale 0.1). With `watch` the scorer is only
    measured, never trained on: a second judge, or an oracle, whose distance to the reward is logged; an expensive one
    may look at a `share` of each batch only (at least one output, evenly spread).
    """

    name: str
    scorer: Scorer
    weight: Weight = 1.0
    scale: float = 1.0
    offset: float = 0.0
    watch: bool = False
    share: float = 1.0


@dataclass(slots=True)
class Mixed:
    """Rewards of N samples: the total [N] (NaN: missing), each scorer's values and the scores' own parts by name
    (each [N], NaN where absent), and the reasons of missing totals."""

    total: np.ndarray
    parts: dict[str, np.ndarray]
    reasons: dict[int, str] = field(default_factory=dict)


class Mixture:
    """Scorers and how their values become one reward.

    `combine`: "sum" of weight x value; "product" of value^weight (execution x consistency; values must not be
    negative); "normalised" (MixGRPO's `advantage_aggr`): the total is the weighted sum for logs and filters, but
    advantages are made per scorer and then summed with the weights.
    A sample without a value from any scorer of weight above 0 has no reward.
    """

    def __init__(
        self, scorers: Sequence[ScorerConfig], combine: Literal["sum", "product", "normalised"] = "sum"
    ) -> None:
        if combine not in COMBINE:
            raise WeftError(f"reward.combine {combine!r} is unknown; choose one of {', '.join(COMBINE)}")
        names = [s.name for s in scorers]
        if len(set(names)) < len(names):
            raise WeftError(f"reward: two scorers have one name ({', '.join(names)}); give each its own")
        if not any(not s.watch for s in scorers):
            raise WeftError("reward: there is no scorer to train on (all are only watched)")
        for scorer in scorers:
            weight_at(scorer.weight, 0)  # refuses a malformed schedule
            if not 0 < scorer.share <= 1:
                raise WeftError(f"reward {scorer.name}: share {scorer.share} must lie above 0 and not above 1")
            if scorer.share < 1 and not scorer.watch:
                raise WeftError(f"reward {scorer.name}: only a watched scorer may look at a share of the outputs")
        self.scorers, self.combine = list(scorers), combine

    def score(self, batch: Sequence[Pair]) -> list[Score]:
        """One Score per pair: `parts` holds each scorer's value, `<scorer>/<part>` its parts, `reason` what is missing.

        The value is left out (it depends on the step and, if normalised, on the other samples): see `mixed`. A scorer
        that raises, returns a wrong count or a value that is not finite leaves those samples without its part.
        """
        parts: list[dict[str, float]] = [{} for _ in batch]
        reasons: list[list[str]] = [[] for _ in batch]
        for config in self.scorers:
            seen = some(len(batch), config.share)
            for i, score in zip(seen, ask_scorer(config, [batch[i] for i in seen]), strict=True):
                if score.value is None:
                    reasons[i].append(f"{config.name}: {score.reason}")
                    continue
                parts[i][config.name] = config.offset + config.scale * score.value
                parts[i] |= {f"{config.name}/{k}": v for k, v in score.parts.items()}
        return [Score(None, p, "; ".join(r) or "mixed later") for p, r in zip(parts, reasons, strict=True)]

    def weights(self, step: int) -> dict[str, float]:
        """Each trained scorer's weight at an optimiser step."""
        return {s.name: weight_at(s.weight, step) for s in self.scorers if not s.watch}

    def mixed(self, scores: Sequence[Score], step: int) -> Mixed:
        """Totals of what `score` returned, with the weights of this step."""
        names = dict.fromkeys([s.name for s in self.scorers] + [k for score in scores for k in score.parts])
        parts = {k: np.array([score.parts.get(k, math.nan) for score in scores], dtype=np.float64) for k in names}
        active = {name: w for name, w in self.weights(step).items() if w != 0}
        if not active:
            raise WeftError(f"reward: every weight is 0 at step {step}; nothing can be learned from that")
        if self.combine == "product":
            total = np.ones(len(scores))
            for name, weight in active.items():
                if (parts[name] < 0).any():
                    raise WeftError(f"reward.combine product: {name} has the negative value {np.nanmin(parts[name])}")
                total = total * parts[name] ** weight
        else:
            total = np.zeros(len(scores))
            for name, weight in active.items():
                total = total + weight * parts[name]
        missing = {i: scores[i].reason or "" for i in np.flatnonzero(np.isnan(total)).tolist()}
        return Mixed(total, parts, missing)

    def advantages(self, mixed: Mixed, keys: Sequence[str], step: int, config: AdvantageConfig) -> np.ndarray:
        """Clipped advantages [N] of the mixture (NaN: not trained on)."""
        if self.combine != "normalised":
            return advantages(mixed.total, keys, config)
        out = np.zeros(len(keys))
        for name, weight in self.weights(step).items():
            if weight:
                values = np.where(np.isnan(mixed.total), np.nan, mixed.parts[name])
                out = out + weight * normalised(values, keys, config)
        return reshape(clipped(out, config.clip), config)


def some(count: int, share: float) -> list[int]:
    """Which of `count` outputs a share is: about share x count of them, evenly spread, at least one of any."""
    wanted = max(1, round(share * count))
    return [k * count // wanted for k in range(min(wanted, count))]


def weight_at(weight: Weight, step: int) -> float:
    """A weight or the value of its schedule at a step."""
    if isinstance(weight, (int, float)):
        return float(weight)
    points = [[float(v) for v in point] if isinstance(point, Sequence) else [] for point in weight]
    pairs = bool(points) and all(len(p) == 2 for p in points)
    if not pairs or any(a[0] >= b[0] for a, b in zip(points, points[1:], strict=False)):
        raise WeftError(f"reward weight {weight}: a schedule is [[step, weight], ...] with rising steps")
    return float(np.interp(step, [p[0] for p in points], [p[1] for p in points]))


def ask_scorer(config: ScorerConfig, batch: Sequence[Pair]) -> list[Score]:
    """The scorer's answer, or why there is none: every value finite, one Score per pair."""
    try:
        scores: list[Any] = list(config.scorer(batch))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
        return [Score(None, reason=f"{type(error).__name__} in {place}: {error}")] * len(batch)
    if len(scores) != len(batch):
        return [Score(None, reason=f"{len(scores)} scores for {len(batch)} outputs")] * len(batch)
    return [_sound(score) for score in scores]


def _sound(score: Any) -> Score:
    """The score with plain floats (scorers return numpy's and torch's, too), or a missing one."""
    if not isinstance(score, Score):
        return Score(None, reason=f"a {type(score).__name__} instead of a weft.types.Score")
    parts = {str(k): number for k, v in score.parts.items() if (number := _float(v)) is not None}
    if score.value is None:
        return Score(None, parts, score.reason or "the scorer gives no reason")
    value = _float(score.value)
    if value is None or not math.isfinite(value):
        return Score(None, parts, f"the value is {score.value}")
    return Score(value, parts)


def _float(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two series over the places where both have a value; NaN if one of them is constant."""
    both = ~(np.isnan(a) | np.isnan(b))
    if both.sum() < 3:
        return math.nan
    from scipy.stats import rankdata

    x, y = rankdata(a[both]), rankdata(b[both])
    if x.std() == 0 or y.std() == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def averages(parts: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The mean of each part over the samples that have it; parts that nobody has are left out."""
    return {k: float(np.nanmean(v)) for k, v in parts.items() if not np.isnan(v).all()}
