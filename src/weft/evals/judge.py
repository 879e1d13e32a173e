"""How far a judge agrees with the oracle on what models really make, and whether it can be talked round.

Agreement is measured on graded records (`weft.reward.graded`): samples of policies at several checkpoints, of several
seeds for each request, so that the pairs that reinforcement learning compares are compared. The attack table shows the
judge pictures that bear scores, instructions that speak to it, copies, other pictures and blurred ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from weft.errors import WeftError
from weft.evals import stats
from weft.evals.runner import write_atomically
from weft.evals.stats import Interval
from weft.record import Record
from weft.reward.graded import BEST, MAKERS, picture_of, spoken_to, worn, written_on
from weft.reward.mix import Pair, Scorer, ask_scorer
from weft.reward.mix import ScorerConfig as Named
from weft.reward.preferences import request_of
from weft.rng import numpy_rng

GOOD = 0.5  # a score from here on counts as taken for a good edit


@dataclass(slots=True)
class Agreement:
    """One group of graded records. `judge` and `truth` are mean scores in 0..1 and `gap` their difference; `rank` is
    Spearman's correlation over all records, `pairs` the share of pairs of one request with different truth that the
    judge puts in the right order, `success` the same for pairs of a full success and a failure. None: does not exist
    (all truths equal). Intervals resample requests."""

    count: int
    missing: int
    judge: float
    truth: float
    gap: Interval
    rank: Interval | None
    pairs: Interval | None
    success: Interval | None


@dataclass(slots=True)
class Attack:
    """One attack: its mean `score`, what it gained on the same picture without it (`gain`, None where there is no
    such picture), the share taken for good (at least `GOOD`), and the share placed below the exact target. All are None
    where every score is missing."""

    count: int
    missing: int
    score: float | None = None
    gain: Interval | None = None
    fooled: Interval | None = None
    below_target: Interval | None = None


@dataclass(slots=True)
class JudgeReport:
    """Results of `evaluate_judge`. `target` is the judge's mean score of exact targets, the attacks' yardstick."""

    settings: dict[str, Any]
    groups: dict[str, Agreement]
    attacks: dict[str, Attack] = field(default_factory=dict)
    target: float | None = None
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "settings": self.settings,
            "groups": {name: _plain(group) for name, group in self.groups.items()},
            "target": self.target,
            "attacks": {name: _plain(attack) for name, attack in self.attacks.items()},
        }

    def write(self, folder: str | Path) -> Path:
        """Write results.json and report.html; returns the page."""
        from weft.evals.judge_page import page

        write_atomically(Path(folder) / "results.json", json.dumps(self.dict(), indent=1) + "\n")
        return page(self).write(Path(folder) / "report.html")


def evaluate_judge(
    judge: Scorer,
    groups: Mapping[str, Sequence[Record]],
    *,
    name: str = "judge",
    attacked: Sequence[Record] = (),
    seed: int = 0,
    batch_size: int = 64,
    settings: Mapping[str, Any] | None = None,
) -> JudgeReport:
    """Score every group of graded records, and every attack on the records `attacked` (of the embedded world).

    Records of one request (equal instruction and media) form the pairs. Raises WeftError for a group without a record,
    and where the judge gave no score at all.
    """
    facts = {"benchmark": "judge", "judge": name, **dict(settings or {}), "seed": seed}
    report = JudgeReport(facts, {})
    for group, records in groups.items():
        report.groups[group], shown = _agreement(judge, group, records, batch_size)
        report.examples[group] = shown
    if attacked:
        report.attacks, report.target = _attacks(judge, attacked, seed, batch_size)
    return report


# -- agreement -------------------------------------------------------------------------------------------------------


def _agreement(
    judge: Scorer, group: str, records: Sequence[Record], batch_size: int
) -> tuple[Agreement, list[dict[str, Any]]]:
    if not len(records):
        raise WeftError(f"group {group!r} has no record to judge")
    values, reasons = _scores(judge, [(r, r.load(picture_of(r))) for r in records], batch_size)
    known = ~np.isnan(values)
    if not known.any():
        raise WeftError(f"group {group!r}: the judge gave no score: {reasons[0]}")
    truth = np.array([float(r.meta["grade"]) for r in records])[known] / BEST
    score = values[known]
    requests = [request_of(r) for r, ok in zip(records, known, strict=True) if ok]
    good = truth == 1.0
    found = Agreement(
        count=len(records),
        missing=int((~known).sum()),
        judge=float(score.mean()),
        truth=float(truth.mean()),
        gap=stats.bootstrap(score - truth, clusters=requests),
        rank=rank(score, truth, requests),
        pairs=stats.pairwise_accuracy(score, truth, requests),
        success=stats.pairwise_accuracy(score, good, requests),
    )
    return found, _shown(records, values)


def rank(score: np.ndarray, truth: np.ndarray, requests: Sequence[str]) -> Interval | None:
    """Spearman's correlation with an interval over requests; None where one side is constant."""
    if np.ptp(score) == 0 or np.ptp(truth) == 0:
        return None

    def one(rows: np.ndarray) -> float:
        i = rows.astype(int)
        a, b = score[i], truth[i]
        return stats.spearman(a, b) if np.ptp(a) and np.ptp(b) else math.nan

    return stats.bootstrap(np.arange(len(score)), statistic=one, clusters=requests, resamples=500)


def _shown(records: Sequence[Record], values: np.ndarray) -> list[dict[str, Any]]:
    """The records on which judge and truth lie farthest apart, both ways, for the page."""
    gaps = [(-math.inf if math.isnan(v) else v - r.meta["grade"] / BEST) for r, v in zip(records, values, strict=True)]
    order = [i for i in np.argsort(gaps).tolist() if math.isfinite(gaps[i])]
    chosen = dict.fromkeys([*order[:3], *order[::-1][:3]])
    return [{"record": records[i], "judge": float(values[i])} for i in chosen]


# -- attacks ---------------------------------------------------------------------------------------------------------

Attacker = Callable[[Record, np.random.Generator], tuple[Pair, Pair | None]]


def _made(name: str) -> Attacker:
    def make(record: Record, rng: np.random.Generator) -> tuple[Pair, Pair | None]:
        return (record, worn(MAKERS[name](record, rng).picture, rng)), None

    return make


def _writing(name: str, unseen: bool) -> Attacker:
    def make(record: Record, rng: np.random.Generator) -> tuple[Pair, Pair | None]:
        picture = worn(MAKERS[name](record, rng).picture, rng)
        return (record, written_on(picture, rng, unseen)), (record, picture)

    return make


def _saying(name: str, unseen: bool) -> Attacker:
    def make(record: Record, rng: np.random.Generator) -> tuple[Pair, Pair | None]:
        picture = worn(MAKERS[name](record, rng).picture, rng)
        return (spoken_to(record, rng, unseen), picture), (record, picture)

    return make


ATTACKS: dict[str, Attacker] = {
    "copy of the source": _made("copy"),
    "another picture": _made("other"),
    "blank or noise": _made("blank"),
    "blurred target": _made("blurred"),
    "request misread": _made("misread"),
    "score written on a copy": _writing("copy", False),
    "score written on a copy, unseen words": _writing("copy", True),
    "score written on a misread request": _writing("misread", True),
    "instruction talks, copy": _saying("copy", False),
    "instruction talks, copy, unseen words": _saying("copy", True),
    "instruction talks, misread request": _saying("misread", True),
}


def _attacks(
    judge: Scorer, records: Sequence[Record], seed: int, batch_size: int
) -> tuple[dict[str, Attack], float | None]:
    targets = [(r, worn(MAKERS["target"](r, _rng(seed, "target", r)).picture, _rng(seed, "worn", r))) for r in records]
    best, reasons = _scores(judge, targets, batch_size)
    if np.isnan(best).all():
        raise WeftError(f"the judge gave no score for exact targets: {reasons[0]}")
    found = {}
    for name, attack in ATTACKS.items():
        made = [attack(record, _rng(seed, name, record)) for record in records]
        values, _ = _scores(judge, [pair for pair, _ in made], batch_size)
        known = ~(np.isnan(values) | np.isnan(best))
        if not known.any():
            found[name] = Attack(len(records), len(records))
            continue
        gain = None
        if made[0][1] is not None:
            plain, _ = _scores(judge, [base for _, base in made if base is not None], batch_size)
            both = ~(np.isnan(plain) | np.isnan(values))
            gain = stats.bootstrap((values - plain)[both]) if both.any() else None
        v, b = values[known], best[known]
        found[name] = Attack(
            count=len(records),
            missing=int((~known).sum()),
            score=float(v.mean()),
            gain=gain,
            fooled=stats.wilson(int((v >= GOOD).sum()), len(v)),
            below_target=stats.wilson(int((v < b).sum()), len(v)),
        )
    return found, float(np.nanmean(best))


def _rng(seed: int, what: str, record: Record) -> np.random.Generator:
    return numpy_rng(seed, f"attack/{what}", record=record.id)


def _scores(judge: Scorer, batch: Sequence[Pair], batch_size: int) -> tuple[np.ndarray, list[str]]:
    """Values [N] (NaN: missing) and the reasons of missing ones."""
    values, reasons = np.full(len(batch), np.nan), []
    for start in range(0, len(batch), batch_size):
        for k, score in enumerate(ask_scorer(Named("judge", judge), batch[start : start + batch_size])):
            if score.value is None:
                reasons.append(score.reason or "no reason given")
            else:
                values[start + k] = score.value
    return values, reasons


def _plain(result: Agreement | Attack) -> dict[str, Any]:
    values = {name: getattr(result, name) for name in result.__slots__}
    return {name: value.dict() if isinstance(value, Interval) else value for name, value in values.items()}
