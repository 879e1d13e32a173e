"""How the motion benchmark is shown: tables, the HTML report with strips of frames, and the page that plays them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.evals import benchmark
from weft.evals.benchmark import EDIT_MEAN, group_of, points
from weft.evals.motion_answers import requests
from weft.evals.motion_verdicts import shown_by, truth
from weft.evals.motion_world import ATTRIBUTES, MotionReport, MotionScore, Rates
from weft.motion.files import load_part
from weft.motion.render import contact_strip
from weft.motion.viewer import MOST, Scene, write_viewer
from weft.record import instruction_text
from weft.report.page import Comparison, Number, Page, environment_facts
from weft.report.table import Table, percent, percent_interval

if TYPE_CHECKING:
    from weft.evals.runner import Row
    from weft.evals.stats import Interval
    from weft.motion.clip import Motion
    from weft.record import Record

TITLES = {
    "generate": "text to motion",
    "in_context": "in context: two clips",
    "chain": "several turns",
    "between": "in-betweening",
    "knowledge": "implied movements",
    "reflect": "reflection",
    "describe": "motion to text",
}
MARKS = {"copy": "copy the source", "chance": "chance", "codec": "exact target after the quantiser"}
PHYSICS = {
    "skate_ratio": "skate ratio",
    "skate_speed": "skate m/s",
    "jitter": "jitter m/s³",
    "floating": "floating m",
    "bone_drift": "bone drift m",
}
GIVEN = {"source": "source", "start": "given: start", "end": "given: end"}


def title(name: str) -> str:
    """A group's name for people: 'edit/body_part' -> 'edit: body part'."""
    return benchmark.title(name, TITLES)


# --- tables -------------------------------------------------------------------------------------------------------


def table(report: MotionReport, brief: bool = False) -> Table:
    """All groups: success and attribute accuracy (95 % intervals), their parts, and the baselines on the same records.

    `brief` leaves out the columns that a terminal has no room for.
    """
    columns: dict[str, Callable[[MotionScore], Any]] = {
        "group": lambda group: title(group.name),
        "n": lambda group: group.count,
        "attributes %": lambda group: _interval(group.accuracy),
        "success %": lambda group: _interval(group.success),
        "changed %": lambda group: _percent(group.changed),
        "kept %": lambda group: _percent(group.kept),
        "words %": lambda group: _percent(group.words),
        "away cm": lambda group: None if group.collateral is None else f"{100 * group.collateral:.1f}",
        **{f"{kind} %": partial(_baseline, kind) for kind in ("codec", "copy", "chance")},
    }
    if brief:
        del columns["away cm"]
    rows = [[cell(group) for cell in columns.values()] for group in report.groups.values()]
    strong = {index for index, name in enumerate(report.groups) if name in ("generate", EDIT_MEAN)}
    return Table(list(columns), rows, note=_note(report), strong=strong)


def _interval(value: Interval) -> str:
    return percent_interval(value.value, value.low, value.high)


def _percent(value: float | None) -> str:
    return percent(value).removesuffix(" %")


def _rates(group: MotionScore, kind: str) -> Rates | None:
    return group.codec if kind == "codec" else group.baselines.get(kind)


def _baseline(kind: str, group: MotionScore) -> str:
    rates = _rates(group, kind)
    return _percent(rates.accuracy if rates else None)


def _attributes(report: MotionReport) -> Table:
    names = [name for name in ATTRIBUTES if any(name in group.attributes for group in report.groups.values())]
    rows = [
        [title(group.name), *(_interval(group.attributes[n]) if n in group.attributes else None for n in names)]
        for group in report.groups.values()
    ]
    return Table(["group", *(f"{name} %" for name in names)], rows, title="By attribute, where it is asked for")


def _baselines(report: MotionReport) -> Table:
    kinds = {"target": "target", "codec": "codec", "copy": "copy", "chance": "chance"}
    rows = []
    for group in report.groups.values():
        found = [_rates(group, kind) for kind in kinds]
        cells = [f"{_percent(r.accuracy)} / {_percent(r.success)}" if r else None for r in found]
        error = [None if v is None else f"{1000 * v:.0f}" for v in (group.codec_error, group.codec_drift)]
        rows.append([title(group.name), group.baseline_count, *cells, *error])
    head = ["group", "n", *(f"{kind} %" for kind in kinds.values()), "codec mm", "with path mm"]
    return Table(head, rows, title="What needs no model: attributes / success", note=(
        "target: the exact answer itself, as the oracle sees it. codec: the exact answer after the model's own "
        "quantiser, with its mean joint distance in millimetres (roots aligned; with the path). copy: what was given. "
        "chance: another record's exact answer."
    ))  # fmt: skip


def _parts(report: MotionReport) -> Table | None:
    rows: list[list[Any]] = []
    for group in report.groups.values():
        named = [(f"turn {k}", rates) for k, rates in enumerate(group.turns, 1)]
        named += [(kind.replace("_", " "), rates) for kind, rates in group.kinds.items()]
        for name, rates in named:
            rows.append([title(group.name), name, rates.count, _percent(rates.accuracy), _percent(rates.success)])
    return Table(["group", "part", "n", "attributes %", "success %"], rows, title="By turn and kind") if rows else None


def _physics(report: MotionReport) -> Table | None:
    rows = []
    for group in report.groups.values():
        if not {"result", "truth"} <= set(group.physics):
            continue
        pairs = [(group.physics["result"][name], group.physics["truth"][name]) for name in PHYSICS]
        rows.append([title(group.name), *(f"{made:.3g} ({true:.3g})" for made, true in pairs)])
    note = (
        "Made by the model, in brackets the exact clips of the same records. skate: toes near the floor that move "
        "faster than 0.2 m/s (share), and their mean speed; jitter: mean third difference of joint positions; "
        "floating: height of the lowest joint; bone drift: the largest deviation of a bone's length over a clip."
    )
    return Table(["group", *PHYSICS.values()], rows, title="Physical plausibility", note=note) if rows else None


# --- page ---------------------------------------------------------------------------------------------------------


def page(report: MotionReport, shown: int) -> Page:
    """The report; strips of the first `shown` records of each group come from the results folder."""
    settings = report.settings
    asked = ["temperature", "top_k", "top_p", "guidance", "rounds", "seed"]
    facts = {
        "model": settings["model"],
        "weights": settings["weights"],
        "data": f"{settings['split']} split of the embedded motion world, seed {settings['data_seed']}",
        "records": f"{len(report.rows):,} of {len(report.items):,}, {settings['count']:,} per group",
        "sampling": ", ".join(f"{n.replace('_', '-')} {settings[n]:g}" for n in asked if settings[n] is not None),
        **environment_facts(("weft", "torch", "transformers")),
    }
    labels = [
        "The world is procedural: clips of one body that a program makes, with exact targets. These numbers say how "
        "well the model does in this world, and nothing about recorded movement.",
        "Every movement is measured by a program from its joints, every text is read by a program; no model judges.",
        *report.unfinished,
    ]
    summary = "How often the model moves exactly as it was asked to, and how much of what was asked is there."
    result = Page(f"{settings['model']} on the embedded motion world", summary, facts, labels)
    section = result.section("Results").numbers(_numbers(report))
    groups = {title(name): group for name, group in report.groups.items()}
    marks = {
        label: {name: rates.accuracy if (rates := _rates(group, kind)) else None for name, group in groups.items()}
        for kind, label in MARKS.items()
    }
    figure = benchmark.bars({name: group.accuracy for name, group in groups.items()}, marks, "attribute accuracy")
    section.figure(figure, "Bars: attribute accuracy. Whiskers: 95 % bootstrap intervals. Marks: the same records.")
    section.table(table(report))
    section = result.section("Parts").table(_attributes(report))
    for part in (_parts(report), _baselines(report), _physics(report)):
        if part is not None:
            section.table(part)
    if report.results and shown > 0:
        _strips(result, report, shown)
    result.section("How it was measured").text(_method(report))
    return result


def _numbers(report: MotionReport) -> list[Number]:
    found = []
    for name, label in (
        ("generate", "text to motion"),
        (EDIT_MEAN, "edits, mean over kinds"),
        ("describe", "captions"),
    ):
        if group := report.groups.get(name):
            chance = _baseline("chance", group)
            low, high = (_percent(v) for v in (group.accuracy.low, group.accuracy.high))
            note = f"of the attributes right; 95 %: {low} to {high}; chance {chance}. All of them: "
            found.append(Number(percent(group.accuracy.value), label, note + percent(group.success.value)))
    if not found:
        found = [Number(percent(g.accuracy.value), title(g.name)) for g in list(report.groups.values())[:4]]
    return found


def _note(report: MotionReport) -> str:
    count = min(report.settings["baseline_count"], report.settings["count"])
    judged = (
        f"codec, copy, chance %: attributes of the exact target after the quantiser, of the source as it was and of "
        f"another record's target, on the first {count} records of each group. "
        if count
        else ""
    )
    return (
        "attributes: the share of action, side, direction, path, style and speed that is right. success: all of them. "
        "changed, kept: edits in which all that was named came, all the rest stayed. words: right plans, judgements. "
        f"away: mean distance of the joints from the exact target. {judged}A dash: not defined or not measured."
    )


def _method(report: MotionReport) -> str:
    differences = "".join(
        f" {title(name)}: {points(value.value)} points of attribute accuracy [{points(value.low)}, "
        f"{points(value.high)}] against the same task with seen phrasings and pairs."
        for name, value in report.differences.items()
    )
    return (
        "The oracle measures a clip's joints and compares the numbers with those of clips that a program makes for "
        "what was asked, and for everything that differs from it in one attribute: the clip must be nearest to what "
        "was asked, and near. Timing, stride, place and number of repeats are free. Captions and plans are read for "
        "the acts, style and speed that they name.\n\n"
        "Attribute accuracy is the mean over records of the share of attributes that are right; records are resampled "
        "for its 95 % percentile bootstrap interval. Where all or none succeed the interval of success has no width, "
        f"and results.json has the Wilson interval beside it. The mean over kinds of edits weighs each kind "
        f"equally.{differences}\n\n"
        "Several turns are played: the model's own movement of turn 1 is what turn 2 edits. Each turn is judged by "
        "what all turns so far ask of the given source, so an attribute that was missed stays missed until it is "
        "mended; a success is right at every turn. In a reflection the model is shown an attempt, which is wrong two "
        "times of three: it must say so and make a right one, or leave a right one alone.\n\n"
        f"Each answer has its own seed, derived from {report.settings['seed']} and the record's id. results.jsonl "
        "holds one line per record and motions/ its movements; both can be judged again without the model (--rescore)."
    )


@dataclass(slots=True)
class _Shown:
    """One record as it is shown: named clips that were given, made and right, and what was said."""

    record: Record
    row: Row
    given: list[tuple[str, Motion]]
    made: list[tuple[str, Motion]]
    right: list[tuple[str, Motion]]
    said: str

    @property
    def asked(self) -> str:
        texts = [instruction_text(turn) for turn in requests(self.record)]
        return texts[0] if len(texts) == 1 else " ".join(f"{k}. {text}" for k, text in enumerate(texts, 1))


def _first(report: MotionReport, shown: int) -> Iterator[tuple[str, list[_Shown]]]:
    """The first finished records of each group in the order of the benchmark."""
    for name in report.groups:
        keys = [key for key in report.items if key in report.rows and group_of(key) == name][:shown]
        if keys:
            yield name, [_load(report, key) for key in keys]


def _load(report: MotionReport, key: str) -> _Shown:
    assert report.results is not None
    record, row = report.items[key], report.rows[key]
    answer = report.results.made(row)
    given: list[tuple[str, Motion]] = []
    for turn in record.turns[: 2 if record.task == "reflect" else 1]:
        for part in turn.parts:
            if part.type == "motion":
                name = "attempt" if turn.role == "assistant" else GIVEN.get(part.role or "", "")
                given.append((name or f"motion {len(given) + 1}", load_part(part, record.root)))
    made, right = ([], []) if record.task == "describe" else (shown_by(record, answer), shown_by(record, truth(record)))
    several = len(right) > 1

    def named(what: str, clips: list[Motion | None]) -> list[tuple[str, Motion]]:
        return [(f"{what}, turn {k}" if several else what, c) for k, c in enumerate(clips, 1) if c is not None]

    target = "exact target" if given and record.task != "reflect" else "a right movement"
    said = " ".join(part.text or "" for turn in answer for part in turn if part.type == "text").strip()
    return _Shown(record, row, given, named("result", made), named(target, right), said)


def _strips(result: Page, report: MotionReport, shown: int) -> None:
    section = result.section("Movements")
    section.text(
        f"The first {shown} records of each group in the order of the benchmark, not selected; five moments of each "
        "clip from left to right. viewer.html beside this page plays them: orbit, scrub, side by side."
    )
    for index, (name, found) in enumerate(_first(report, shown)):
        group = report.groups[name]
        note = f"{percent(group.accuracy.value)} of the attributes, {percent(group.success.value)} of {group.count:,}"
        section.comparisons([_card(one) for one in found], title=title(name), note=note, folded=index > 0)


def _card(one: _Shown) -> Comparison:
    turns = one.row["score"]["turns"]
    several = len(turns) > 1
    checks = {
        (f"turn {k}: {name}" if several else name): right
        for k, turn in enumerate(turns, 1)
        for name, right in turn["requests"].items()
    }
    if one.row["score"]["words"] is not None:
        checks["plan" if one.record.task == "knowledge" else "judgement"] = one.row["score"]["words"]
    detail = [f"wrote: “{one.said}”"] if one.said else []
    if one.record.task == "describe":
        right = " ".join(part.text or "" for turn in truth(one.record) for part in turn)
        detail.append(f"a right caption: “{right}”")
    detail.append("seen: " + ", ".join(f"{name} {value}" for name, value in turns[-1]["seen"].items()))
    clips = [*one.given, *(clip for pair in zip(one.made, one.right, strict=False) for clip in pair)]
    pictures = [(name, contact_strip(clip, count=5, size=96).quantize(64)) for name, clip in clips]
    return Comparison(one.asked, pictures, one.row["score"]["success"], checks, "; ".join(detail), strips=True)


def write_scenes(report: MotionReport, path: Path, shown: int) -> None:
    """A page that plays the movements of the report; none where there is nothing to show."""
    if report.results is None or shown < 1:
        return
    scenes = []
    for name, found in _first(report, shown):
        for k, one in enumerate(found, 1):
            ends = one.made if len(one.made) > 1 else [*one.made, *one.right]
            clips = [*one.given[: MOST - len(ends)], *ends]
            verdict = "right" if one.row["score"]["success"] else "wrong"
            names = [name for name, _ in clips]
            scenes.append(Scene([c for _, c in clips], names, f"{title(name)} {k} ({verdict})", one.asked))
    if scenes:
        write_viewer(scenes, path, title=f"{report.settings['model']} on the embedded motion world")
