"""Watching a reward while a policy is trained on it: the distance of reward and truth on fixed requests, as a curve.

A policy that learns to please its judge rather than to edit shows a reward that rises while the truth does not. The
online methods log `gap/<scorer>` over their own rollouts for every scorer with `watch: true`; this measures held-out
requests, with the averaged weights, always the same requests and noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weft.errors import WeftError
from weft.evals.runner import Sampling, outputs
from weft.record import Record
from weft.report import plots
from weft.reward.graded import truth as oracle
from weft.reward.mix import Mixture, Scorer, ScorerConfig, spearman

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from weft.types import FlowModel


def gap_evaluator(
    reward: Scorer | Mixture,
    records: Sequence[Record],
    *,
    truth: Scorer = oracle,
    steps: int = 12,
    seed: int = 0,
    alarm: float = 0.1,
    log: str | Path | None = None,
    name: str = "gap",
    say: Callable[[str], None] = print,
) -> Callable[[FlowModel, int], dict[str, float]]:
    """An evaluator f(model, step) -> numbers for `weft.train.run(..., evaluators={name: f})`.

    `reward` is what the run is trained on, `truth` a second judge or (default) the oracle; both on a scale of 0 to 1.
    The numbers: `reward` and `truth` (means), `gap` (their difference), `rank` (Spearman), `missing` (a share), `grown`
    (how much the gap has grown since the first measurement) and `alarm` (1 where that is more than `alarm`, which is
    said, too). After a resume the first measurement is read from `log`, the run's log.jsonl, under `name`.
    """
    if not len(records):
        raise WeftError("the gap evaluator has no records to sample")
    mixture = reward if isinstance(reward, Mixture) else Mixture([ScorerConfig("reward", reward)])
    second = Mixture([ScorerConfig("truth", truth)])
    first: list[float] = [] if log is None else first_gap(Path(log), name)

    def measure(model: FlowModel, step: int) -> dict[str, float]:
        made = list(outputs(model, records, Sampling(steps=steps, seed=seed)))
        batch = [(output.record, output.made) for output in made]
        paid = mixture.mixed(mixture.score(batch), step).total
        true = second.mixed(second.score(batch), 0).total
        both = ~(np.isnan(paid) | np.isnan(true))
        found = {"missing": float(1 - both.mean())}
        if not both.any():
            return found
        gap = float((paid - true)[both].mean())
        if not first:
            first.append(gap)
        grown = gap - first[0]
        rank = spearman(paid, true)
        found |= {"reward": float(paid[both].mean()), "truth": float(true[both].mean()), "gap": gap, "grown": grown}
        found |= {"alarm": float(grown > alarm), **({} if math.isnan(rank) else {"rank": rank})}
        if grown > alarm:
            say(
                f"ALARM step {step}: the reward of held-out requests is {gap:.3f} above the truth, {grown:.3f} more "
                f"than at the start: the policy may be exploiting the reward"
            )
        return found

    return measure


def first_gap(log: Path, name: str) -> list[float]:
    """The first `<name>/gap` of a run's log, as a list of one; empty where there is none."""
    return [row[f"{name}/gap"] for row in _rows(log) if f"{name}/gap" in row][:1]


def gap_curve(log: str | Path, name: str = "gap") -> Figure:
    """The measurements in a run's log.jsonl as a figure: reward and truth over steps. WeftError without any."""
    rows = [row for row in _rows(Path(log)) if f"{name}/gap" in row]
    if not rows:
        raise WeftError(f"{log}: holds no {name}/gap: train with this evaluator and run.evaluate_every")
    steps = [float(row["step"]) for row in rows]
    lines = {key: plots.Series(steps, [float(row[f"{name}/{key}"]) for row in rows]) for key in ("reward", "truth")}
    return plots.curve(lines, xlabel="step", ylabel="mean score", title="reward and truth on fixed requests")


def _rows(log: Path) -> list[dict[str, Any]]:
    if not log.is_file():
        return []
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
