"""The benchmark of the embedded motion world: what the oracle says of a model's movements and captions, by group.

A group has two figures: full success (all that was asked for is there) and attribute accuracy (the mean over records of
the share of attributes that are right: `Verdict.share`). Beside them stand, on the same records, those of the exact
target, of the target after the model's own quantiser (which no model with it can beat by much), of copying the source
and of chance (another record's target).

Multi-turn editing is played: the model's own movement of turn 1 goes into turn 2. Each turn is judged by what all turns
so far ask of the given source, never by what the model made before: an attribute that was missed stays missed until it
is mended, for a user wants the result. `changed` is milder: whether what the turn itself names came.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import WeftError
from weft.evals import stats
from weft.evals.benchmark import EDIT_MEAN, BaselineScorer, Benchmark, Report, by_group, inserted, mean
from weft.evals.motion_answers import MOVEMENTS, Answer, Asking
from weft.evals.motion_groups import DEFAULT, MOTIONS, SHORT
from weft.evals.motion_verdicts import copy, rated, shown_by, truth, verdicts, words
from weft.evals.runner import Results, Row
from weft.evals.stats import Interval
from weft.motion import physics
from weft.motion.clip import Motion
from weft.motion.files import load_part
from weft.record import Record, motion_part
from weft.world.motion_tasks import RENDERER

if TYPE_CHECKING:
    from weft.report.page import Page
    from weft.report.table import Table
    from weft.types import TokenModel

BASELINES = ("target", "copy", "chance")
ATTRIBUTES = ("action", "side", "direction", "path", "style", "speed", "start", "end")


@dataclass(slots=True, frozen=True)
class Rates:
    """Full success and attribute accuracy over `count` records, fractions."""

    success: float
    accuracy: float
    count: int


@dataclass(slots=True)
class MotionScore:
    """One group's results; rates are fractions.

    `attributes`: how often each kind of attribute is right, where it is asked for. `unclear`: how often a movement is
    near to nothing that the oracle knows, which leaves none right. `changed` and `kept`, of edits: all that the edit
    names came, all the rest stayed. `words`: the plan in words says what is implied (knowledge), or the judgement is
    right (reflect). `collateral`: metres from the exact target (how else it is done). `kinds` and `turns` split the
    group. `baselines` and `codec` (the target after the model's quantiser) are of its first `baseline_count` records,
    `codec_error` the mean joint distance there, roots aligned, `codec_drift` with the paths, metres.
    `physics`: `weft.motion.physics.measure` of the answers (`result`), of the targets (`truth`) and of the codec's.
    """

    name: str
    count: int
    success: Interval
    accuracy: Interval
    wilson: Interval | None = None
    attributes: dict[str, Interval] = field(default_factory=dict)
    unclear: float | None = None
    changed: float | None = None
    kept: float | None = None
    words: float | None = None
    collateral: float | None = None
    kinds: dict[str, Rates] = field(default_factory=dict)
    turns: list[Rates] = field(default_factory=list)
    baselines: dict[str, Rates | None] = field(default_factory=dict)
    codec: Rates | None = None
    codec_error: float | None = None
    codec_drift: float | None = None
    physics: dict[str, dict[str, float]] = field(default_factory=dict)
    baseline_count: int = 0


@dataclass(slots=True)
class MotionReport(Report[MotionScore]):
    """The benchmark's results. `differences` are of attribute accuracy."""

    def metrics(self) -> dict[str, float]:
        """Flat numbers for a training log: by group (`edit`: mean over kinds) success and `.../attributes`."""
        found: dict[str, float] = {}
        for name, group in self.groups.items():
            name = "edit" if name == EDIT_MEAN else name
            found |= {name: group.success.value, f"{name}/attributes": group.accuracy.value}
        return found

    def page(self, shown: int) -> Page:
        from weft.evals.motion_page import page

        return page(self, shown)

    def table(self, brief: bool = False) -> Table:
        from weft.evals.motion_page import table

        return table(self, brief)

    def write(self, folder: str | Path, *, shown: int = 4) -> Path:
        """Write results.json, report.html and viewer.html, which plays the movements of the report; returns the
        report."""
        from weft.evals.motion_page import write_scenes

        write_scenes(self, Path(folder) / "viewer.html", shown)
        return Report.write(self, folder, shown=shown)


def evaluate_motion_world(
    model: TokenModel,
    *,
    name: str | None = None,
    split: str = "test",
    groups: Sequence[str] = DEFAULT,
    count: int = 512,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float = 1.0,
    captions: float = 0.0,
    rounds: int = 0,
    seed: int = 0,
    data_seed: int = 0,
    batch_size: int = 8,
    baseline_count: int = 64,
    codec: bool = True,
    out: str | Path | None = None,
    shown: int = 4,
    progress: bool = False,
    show: bool = False,
) -> MotionReport:
    """Evaluate a model on `count` records of each group; with `out`, into a folder that an interrupted run resumes.

    `groups` are names of `weft.evals.motion_groups.GROUPS` or short names: edit, chain, unseen, held-out pair, held-out
    kind. `captions` is the temperature of texts about a movement; the other options of sampling are those of
    `weft generate`. `seed` draws the answers, `data_seed` the records. The first `baseline_count` records of each group
    are also judged for the baselines; `codec` judges their targets after the quantiser (`model.codec`). Writes
    results.jsonl (as it goes), results.json, report.html and viewer.html to `out`.

    Raises:
        WeftError: unknown group or split, no records; `out` holds the results of another run.
    """
    return BENCHMARK.run(
        model,
        Asking(temperature, top_k, top_p, guidance, captions, rounds, seed, batch_size),
        name=name or model.name,
        split=split,
        groups=groups,
        count=count,
        data_seed=data_seed,
        baseline_count=baseline_count,
        facts={"codec": codec},
        extra=codec,
        out=out,
        shown=shown,
        progress=progress,
        show=show,
    )


def rescore_motion_world(folder: str | Path, *, shown: int = 4, show: bool = False) -> MotionReport:
    """Judge the recorded answers of a results folder again, without a model, finished or not; rewrites its report.

    The quantiser's numbers need the model and stay as recorded.
    """
    return BENCHMARK.rescore(folder, shown=shown, show=show)


def motion_world_evaluator(
    groups: Sequence[str] = ("generate", "edit"), count: int = 16, split: str = "val", **options: Any
) -> Callable[..., dict[str, float]]:
    """The benchmark as a plain function f(model, step) -> flat metrics, small and quick, for a training run to call.

    `model` is a motion model, or what trains one and has it as its `model`. Uses the validation split; `options` go to
    `evaluate_motion_world`. Raises `WeftError` for a model that makes no movements.
    """

    def measure(model: Any, step: int = 0) -> dict[str, float]:
        model = getattr(model, "model", model)
        if not hasattr(model, "respond"):
            raise WeftError(f"{type(model).__name__} makes no movements: motion-world measures motion language models")
        fixed = {"baseline_count": 0, "codec": False, **options}
        return evaluate_motion_world(model, split=split, groups=groups, count=count, **fixed).metrics()

    return measure


class _Scorer(BaselineScorer):
    """Judges an answer; for the first records of each group, the baselines as well."""

    def __call__(self, key: str, record: Record, made: Answer) -> dict[str, Any]:
        found = verdicts(record, made)
        score: dict[str, Any] = {
            **rated(record, made, found),
            "words": words(record, made),
            "turns": [
                {"success": v.success, "requests": v.requests, "changed": v.changed, "kept": v.kept,
                 "collateral": v.collateral, "seen": v.seen}
                for v in found
            ],
        }  # fmt: skip
        if record.task != "describe":
            clips = {"result": shown_by(record, made), "truth": shown_by(record, truth(record))}
            score["physics"] = {name: _physics(shown) for name, shown in clips.items()}
        if key in self.chance:
            answers = {"target": truth(record), "copy": copy(record), "chance": None}
            if other := self.chance[key]:
                answers["chance"] = truth(other)
            score["baselines"] = {name: answer and rated(record, answer) for name, answer in answers.items()}
        return score

    def extra(self, model: Any, keys: Sequence[str], records: Sequence[Record]) -> list[dict[str, Any]]:
        """What is left of the exact target after the model's own quantiser."""
        chosen = {key: truth(record) for key, record in zip(keys, records, strict=True) if key in self.chance}
        parts = [part for answer in chosen.values() for turn in answer for part in turn if part.type == "motion"]
        exact = [load_part(part) for part in parts]
        again = iter(zip(exact, model.codec.decode(model.codec.encode(exact)), strict=True)) if exact else iter(())
        facts: list[dict[str, Any]] = []
        for key, record in zip(keys, records, strict=True):
            pairs: list[tuple[Motion, Motion]] = []
            answer: Answer = []
            for turn in chosen.get(key, []):
                answer.append([])
                for part in turn:
                    if part.type == "motion":
                        pairs.append(next(again))
                        part = motion_part(pairs[-1][1])
                    answer[-1].append(part)
            facts.append({"codec": _worn(record, answer, pairs)} if pairs else {})
        return facts


def _worn(record: Record, answer: Answer, pairs: Sequence[tuple[Motion, Motion]]) -> dict[str, Any]:
    """The exact answer after the quantiser: as good as which, and how far from it in metres."""
    cut = [(a.joints[: len(b)], b.joints[: len(a)]) for a, b in pairs]  # the quantiser drops what fills no step
    return {
        **rated(record, answer),
        "error": mean([physics.mpjpe(a, b) for a, b in cut]),
        "drift": mean([physics.mpjpe(a, b, aligned=False) for a, b in cut]),
        "physics": _physics([b for _, b in pairs]),
    }


def _physics(clips: Sequence[Motion | None]) -> dict[str, float] | None:
    known = [physics.measure(clip) for clip in clips if clip is not None]
    return physics.average(known) if known else None


# --- summary ------------------------------------------------------------------------------------------------------


def summarise(
    rows: Mapping[str, Row], items: Mapping[str, Record], settings: Mapping[str, Any], results: Results | None = None
) -> MotionReport:
    """Aggregate rows of `evaluate`; needs no model and no movement."""
    parts = by_group(rows)
    groups = {name: _group(name, part, items) for name, part in parts.items()}
    edits = [name for name in SHORT["edit"] if name in groups]
    if len(edits) > 1:
        pooled = _group(EDIT_MEAN, [row for name in edits for row in parts[name]], items)
        pooled.success = stats.macro_mean({name: _values(parts[name], "success") for name in edits})
        pooled.accuracy = stats.macro_mean({name: _values(parts[name], "share") for name in edits})
        pooled.wilson, pooled.kinds = None, {}  # a mean of group means is not one proportion
        groups = inserted(groups, edits[-1], EDIT_MEAN, pooled)
    base = {"generate": parts.get("generate", []), "edit": [row for name in edits for row in parts[name]]}
    differences = {
        name: stats.difference(_values(part, "share"), _values(base[task], "share"))
        for name, part in parts.items()
        for task, _, what in [name.partition("/")]
        if what in ("unseen phrasing", "held-out pair") and base.get(task)
    }
    return MotionReport(groups, differences, dict(settings), dict(rows), dict(items), results)


def _values(rows: Sequence[Row], what: str) -> list[float]:
    return [float(row["score"][what]) for row in rows]


def _group(name: str, rows: Sequence[Row], items: Mapping[str, Record]) -> MotionScore:
    scores = [row["score"] for row in rows]
    turns = [turn for score in scores for turn in score["turns"]]
    success = _values(rows, "success")
    judged = [score["baselines"] for score in scores if "baselines" in score]
    worn = [row["codec"] for row in rows if "codec" in row]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row, score in zip(rows, scores, strict=True):
        kinds.setdefault(items[row["key"]].meta["kind"], []).append(score)
    numbered = [[score["turns"][k] for score in scores] for k in range(len(scores[0]["turns"]))]
    return MotionScore(
        name=name,
        count=len(rows),
        success=stats.bootstrap(success),
        accuracy=stats.bootstrap(_values(rows, "share")),
        wilson=stats.wilson(round(sum(success)), len(success)),
        attributes=_attributes(scores),
        unclear=mean([turn["seen"]["clear"] == "no" for turn in turns if "clear" in turn["seen"]]),
        changed=mean([turn["changed"] for turn in turns]),
        kept=mean([turn["kept"] for turn in turns]),
        words=mean([score["words"] for score in scores]),
        collateral=mean([turn["collateral"] for turn in turns]),
        kinds={kind: _rates(part) for kind, part in sorted(kinds.items())} if len(kinds) > 1 else {},
        turns=[_rates([_of_turn(turn) for turn in part]) for part in numbered] if len(numbered) > 1 else [],
        baselines={kind: _known_rates([found[kind] for found in judged]) for kind in BASELINES},
        codec=_known_rates(worn),
        codec_error=mean([found["error"] for found in worn]),
        codec_drift=mean([found["drift"] for found in worn]),
        physics=physical(rows),
        baseline_count=len(judged),
    )


def physical(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """The mean of `weft.motion.physics.measure` over the answers, their targets, and targets after the quantiser."""
    measured: dict[str, list[dict[str, float]]] = {"result": [], "truth": [], "codec": []}
    for row in rows:
        found = {**row["score"].get("physics", {}), "codec": row.get("codec", {}).get("physics")}
        for kind, numbers in found.items():
            measured[kind] += [numbers] if numbers else []
    return {kind: physics.average(found) for kind, found in measured.items() if found}


def _attributes(scores: Sequence[dict[str, Any]]) -> dict[str, Interval]:
    """By kind of attribute; those of one record stand or fall together, so records are resampled."""
    found: dict[str, list[tuple[float, int]]] = {}
    for index, score in enumerate(scores):
        for turn in score["turns"]:
            for request, right in turn["requests"].items():
                found.setdefault(re.sub(r" \d$", "", request), []).append((float(right), index))
    return {
        name: stats.bootstrap([v for v, _ in found[name]], clusters=[k for _, k in found[name]])
        for name in ATTRIBUTES
        if name in found
    }


def _of_turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    return {"success": turn["success"], "share": sum(turn["requests"].values()) / len(turn["requests"])}


def _rates(found: Sequence[Mapping[str, Any]]) -> Rates:
    success, share = mean([row["success"] for row in found]), mean([row["share"] for row in found])
    return Rates(success or 0.0, share or 0.0, len(found))


def _known_rates(found: Sequence[Mapping[str, Any] | None]) -> Rates | None:
    known = [row for row in found if row is not None]
    return _rates(known) if known else None


BENCHMARK = Benchmark("motion-world", RENDERER, MOTIONS, MOVEMENTS, _Scorer, summarise)
