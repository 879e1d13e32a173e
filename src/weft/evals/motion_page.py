"""How the motion benchmark is shown: tables, the HTML report with strips of frames, and the page that plays them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from weft.evals import benchmark
from weft.evals.benchmark import EDIT_MEAN, group_of, points
from weft.evals.motion_answers import requests
from weft.evals.motion_verdicts import shown_by, truth
from weft.evals.motion_world import ATTRIBUTES, MotionReport, MotionScore, Rates, physical
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
    from weft.record import Part, Record

TITLES = {
    "generate": "text to motion",
    "in_context": "in context: two clips",
    "chain/two_turn": "two turns, played",
    "chain/three_turn": "three turns, played",
    "between": "in-betweening",
    "knowledge": "implied movements",
    "reflect": "reflection",
    "describe": "motion to text",
}
MARKS = {"copy": "copy the source", "chance": "chance", "codec": "exact target after the quantiser"}
PHYSICS: dict[str, tuple[str, float]] = {
    "skate_ratio": ("skate %", 100.0),
    "skate_speed": ("skate cm/s", 100.0),
    "jitter": ("jitter m/s³", 1.0),
    "floating": ("floating cm", 100.0),
    "bone_drift": ("bone drift mm", 1000.0),
}
GIVEN = {"source": "source", "start": "start", "end": "end"}


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
        "unclear %": lambda group: _percent(group.unclear),
        "away cm": lambda group: None if group.collateral is None else f"{100 * group.collateral:.1f}",
        **{f"{kind} %": partial(_baseline, kind) for kind in ("codec", "copy", "chance")},
    }
    if brief:
        del columns["away cm"]
    rows = [[cell(group) for cell in columns.values()] for group in report.groups.values()]
    strong = {index for index, name in enumerate(report.groups) if name in ("generate", EDIT_MEAN)}
    return Table(list(columns), rows, note=_note(report), strong=strong)


def _interval(value: Interval, digits: int = 1) -> str:
    return percent_interval(value.value, value.low, value.high, digits)


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
        [title(group.name), *(_interval(group.attributes[n], 0) if n in group.attributes else None for n in names)]
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
    groups = {title(name): group.physics for name, group in report.groups.items()}
    rows = []
    for name, found in {**groups, "all": physical(report.rows.values())}.items():
        if "result" in found:
            shown = [found[kind] for kind in ("result", "truth", "codec") if kind in found]
            rows.append([name, *(" / ".join(f"{f * v[key]:.1f}" for v in shown) for key, (_, f) in PHYSICS.items())])
    note = (
        "skate: how often a toe near the floor moves faster than 0.2 m/s, and the mean speed of such toes; jitter: "
        "mean third difference of joint positions; floating: height of the lowest joint (jumps count); bone drift: the "
        "largest deviation of a bone's length over a clip. The quantiser on the records of the baselines."
    )
    names = [name for name, _ in PHYSICS.values()]
    heading = "Physical plausibility: the model's clips / the exact ones / these after the quantiser"
    return Table(["group", *names], rows, heading, note, {len(rows) - 1}) if rows else None


def _examples(report: MotionReport) -> Table:
    rows = []
    for name in report.groups:
        if record := next((item for key, item in report.items.items() if group_of(key) == name), None):
            given = ", ".join(label for label, _ in given_clips(record)) or "text alone"
            rows.append([title(name), given, asked(record)])
    return Table(["group", "given", "the first instruction"], rows, title="What is asked")


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
    section.table(table(report)).table(_examples(report))
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
    for group in list(report.groups.values())[:1]:
        if group.codec_error is not None and group.codec_drift is not None:
            note = f"{title(group.name)}; with the path {1000 * group.codec_drift:.0f} mm"
            found.append(Number(f"{1000 * group.codec_error:.0f} mm", "joint error of the quantiser", note))
    measured = physical(report.rows.values())
    if "result" in measured:
        made, true = (measured[kind]["skate_ratio"] for kind in ("result", "truth"))
        found.append(Number(percent(made), "foot skate", f"in the exact clips {percent(true)}"))
    if not {"generate", EDIT_MEAN, "describe"} & set(report.groups):
        found += [Number(percent(g.accuracy.value), title(g.name)) for g in list(report.groups.values())[:3]]
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
        "unclear: movements near to nothing that the oracle knows, so that no attribute counts as right. "
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


def asked(record: Record) -> str:
    """All that the user says, numbered where there are several turns."""
    texts = [instruction_text(turn) for turn in requests(record)]
    return texts[0] if len(texts) == 1 else " ".join(f"{k}. {text}" for k, text in enumerate(texts, 1))


def given_clips(record: Record) -> list[tuple[str, Part]]:
    """The movements that the model is given, by what they are: those of a chain's first turn, a reflection's attempt,
    references as instructions name them."""
    found: list[tuple[str, Part]] = []
    count = 0
    for turn in record.turns[: 2 if record.task == "reflect" else 1]:
        for part in turn.parts:
            if part.type == "motion":
                count += part.role not in ("start", "end")
                name = "attempt" if turn.role == "assistant" else GIVEN.get(part.role or "", f"motion {count}")
                found.append((name, part))
    return found


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
    given = [(name, load_part(part, record.root)) for name, part in given_clips(record)]
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
    few = Image.Quantize.FASTOCTREE  # a quarter of the bytes; median cut would lose the figure's colours to the floor's
    pictures = [(name, contact_strip(clip, count=5, size=96).quantize(128, few)) for name, clip in clips]
    return Comparison(asked(one.record), pictures, one.row["score"]["success"], checks, "; ".join(detail), strips=True)


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
            scenes.append(Scene([c for _, c in clips], names, f"{title(name)} {k} ({verdict})", asked(one.record)))
    if scenes:
        write_viewer(scenes, path, title=f"{report.settings['model']} on the embedded motion world")
