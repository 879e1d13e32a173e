"""How the world benchmark is shown: the table and the HTML report."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from weft.evals import benchmark
from weft.evals.benchmark import group_of, points
from weft.evals.world import BASELINES, EDIT_MEAN, GroupScore, WorldReport
from weft.report.page import Comparison, Number, Page, environment_facts
from weft.report.table import Table, decibel, percent, percent_interval
from weft.world.references import CONCEPTS

if TYPE_CHECKING:
    from PIL import Image

    from weft.evals.runner import Row
    from weft.record import Record

TITLES = {
    "generate": "generation",
    "multi_edit": "editing from references",
    "multi_generate": "generation from references",
}
MARKS = {
    "copy": "copy the source",
    "reference": "copy the first reference",
    "chance": "chance",
    "vae": "exact target after the VAE",
}


def title(name: str) -> str:
    """A group's name for people: 'edit/recolour' -> 'edit: recolour'."""
    return benchmark.title(name, TITLES)


def table(report: WorldReport, brief: bool = False) -> Table:
    """All groups with success (bootstrap 95 % interval), its parts, and the baselines on the same records.

    `brief` leaves out the columns that a terminal has no room for.
    """
    columns: dict[str, Callable[[GroupScore], Any]] = {
        "group": lambda group: title(group.name),
        "n": lambda group: group.count,
        "success %": lambda group: percent_interval(group.success.value, group.success.low, group.success.high),
        "requests %": lambda group: _percent(group.requests.value if group.requests else None),
        "rest kept %": lambda group: _percent(group.kept),
        "collateral": lambda group: group.collateral,
        "PSNR outside": lambda group: decibel(group.psnr.value if group.psnr else None),
        "VAE PSNR": lambda group: decibel(group.vae_psnr),
        "VAE %": lambda group: _percent(group.vae_success),
        **{f"{kind} %": partial(_baseline_cell, kind) for kind in BASELINES},
    }
    if any(group.concepts for group in report.groups.values()):
        columns |= {f"{concept} %": partial(_concept_cell, concept) for concept in CONCEPTS}
    else:
        del columns["reference %"]
    if brief:
        columns = {name: columns[name] for name in columns if name not in ("collateral", "VAE %", "blank %")}
    rows = [[cell(group) for cell in columns.values()] for group in report.groups.values()]
    strong = {index for index, name in enumerate(report.groups) if name in ("generate", EDIT_MEAN)}
    return Table(list(columns), rows, note=_note(report), strong=strong)


def _concept_cell(concept: str, group: GroupScore) -> str:
    return _percent(group.concepts[concept].value if concept in group.concepts else None)


def _baseline_cell(kind: str, group: GroupScore) -> str:
    return _percent(group.baselines.get(kind))


def _percent(value: float | None) -> str:
    return percent(value).removesuffix(" %")


def page(report: WorldReport, shown: int) -> Page:
    """The report; pictures of the first `shown` records of each group come from the results folder."""
    settings = report.settings
    facts = {
        "model": settings["model"],
        "weights": settings["weights"],
        "data": f"{settings['split']} split of the embedded world, seed {settings['data_seed']}",
        "records": f"{len(report.rows):,} of {len(report.items):,}, {settings['count']:,} per group",
        "sampling": f"{settings['steps']} steps, guidance {settings['guidance']:g}, seed {settings['seed']}",
        **environment_facts(),
    }
    labels = [
        "The world is procedural: small synthetic scenes with exact targets. These numbers say how well the model does "
        "in this world, and nothing about photographs.",
        "Every picture is judged by a program that knows the scene, not by a model.",
        *report.unfinished,
    ]
    summary = "How often the model does exactly what it was asked, and leaves the rest alone."
    result = Page(f"{settings['model']} on the embedded world", summary, facts, labels)
    section = result.section("Results").numbers(_numbers(report))
    section.figure(_figure(report), "Bars: full success. Whiskers: 95 % bootstrap intervals. Marks: the same records.")
    section.table(table(report))
    if report.results and shown > 0:
        _pictures(result, report, shown)
    result.section("How it was measured").text(_method(report))
    return result


def _numbers(report: WorldReport) -> list[Number]:
    found = []
    for name, label in (("generate", "generation"), (EDIT_MEAN, "single-image edits, mean over kinds")):
        if group := report.groups.get(name):
            chance = group.baselines.get("chance")
            note = f"95 %: {100 * group.success.low:.1f} to {100 * group.success.high:.1f}"
            found.append(Number(percent(group.success.value), label, note + f"; chance {percent(chance)}"))
    edits = report.groups.get(EDIT_MEAN)
    if edits and edits.psnr:
        note = f"VAE alone: {decibel(edits.vae_psnr)}" if edits.vae_psnr is not None else ""
        found.append(Number(decibel(edits.psnr.value), "PSNR outside the edit mask", note))
    for name, value in report.differences.items():
        if name.endswith("unseen phrasing"):
            note = f"points; 95 %: {points(value.low)} to {points(value.high)}"
            found.append(Number(points(value.value), f"unseen phrasings, {title(name.split('/')[0])}", note))
    if not found:
        for group in list(report.groups.values())[:4]:
            found.append(Number(percent(group.success.value), title(group.name)))
    return found


def _figure(report: WorldReport) -> Any:
    groups = {title(name): group for name, group in report.groups.items()}
    marks = {label: {name: _baseline(group, kind) for name, group in groups.items()} for kind, label in MARKS.items()}
    return benchmark.bars({name: group.success for name, group in groups.items()}, marks, "full success")


def _baseline(group: GroupScore, kind: str) -> float | None:
    return group.vae_success if kind == "vae" else group.baselines.get(kind)


def _pictures(result: Page, report: WorldReport, shown: int) -> None:
    section = result.section("Pictures")
    section.text(f"The first {shown} records of each group in the order of the benchmark, not selected.")
    for index, (name, group) in enumerate(report.groups.items()):
        rows = [row for key, row in report.rows.items() if group_of(key) == name][:shown]
        if rows:
            cards = [_card(report, report.items[row["key"]], row) for row in rows]
            note = f"{percent(group.success.value)} of {group.count:,}"
            section.comparisons(cards, title=title(name), note=note, folded=index > 0)


def _card(report: WorldReport, record: Record, row: Row) -> Comparison:
    assert report.results is not None
    pictures: list[tuple[str, Image.Image | None]] = []
    if record.source:
        pictures.append(("source", record.load(record.source)))
    first = len(pictures) + 1
    pictures += [(f"picture {first + k}", record.load(part)) for k, part in enumerate(record.references)]
    pictures.append(("output", report.results.made(row)))
    assert record.target is not None
    pictures.append(("target" if record.source else "a right picture", record.load(record.target)))
    score = row["score"]
    checks = {("rest kept" if name == "keep" else name): passed for name, passed in score["requests"].items()}
    detail = []
    if score["psnr_outside"] is not None:
        detail.append(f"outside the mask {decibel(score['psnr_outside'])}")
    if score["seen"]:
        seen = [f"{what} ({where})" for where, what in score["seen"].items()]
        more = f" and {len(seen) - 3} more" if len(seen) > 3 else ""
        detail.append("seen instead: " + ", ".join(seen[:3]) + more)
    return Comparison(record.instruction, pictures, score["success"], checks, "; ".join(detail) or None)


def _note(report: WorldReport) -> str:
    count = min(report.settings["baseline_count"], report.settings["count"])
    given = any(group.concepts for group in report.groups.values())
    concepts = f"{', '.join(CONCEPTS)} %: of these, the ones that a reference gives the value of. " if given else ""
    kinds = "copy, reference, blank" if given else "copy, blank"
    judged = f"VAE %, {kinds} and chance: the first {count} records of each group. " if count else ""
    return (
        "success: every request done and the rest kept, with its 95 % interval. requests: single changes done. "
        f"{concepts}collateral: mean absolute change (0 to 1) outside the edit mask. {judged}"
        "A dash: not defined or not measured."
    )


def _method(report: WorldReport) -> str:
    settings = report.settings
    differences = "".join(
        f" {title(name)}: {points(value.value)} points [{points(value.low)}, {points(value.high)}]"
        f" against the same task with seen phrasings and attribute pairs."
        for name, value in report.differences.items()
    )
    return (
        "The oracle draws the exact target scene, and the same scene with each attribute changed, and asks which of "
        "them the picture is nearest to: every requested change must be there (requests), everything else must stay as "
        "it was (rest kept). A picture that fails one of them is not a success.\n\n"
        "Baselines on the same records: copy returns the source, reference the first reference, blank a grey picture, "
        "chance the exact target of another record of the group. VAE is the exact target after the "
        "model's own autoencoder: what the oracle takes from its reconstructions, and how exact a copy outside the "
        "mask can be.\n\n"
        "Intervals are percentile bootstrap intervals at 95 %; where all or none succeed they have no width, and "
        "results.json has the Wilson interval beside them. The mean over kinds weighs each kind equally."
        f"{differences}\n\n"
        f"Each output has its own seed, derived from {settings['seed']} and the record's id. results.jsonl holds one "
        "line per picture; the pictures can be judged again from it without the model."
    )
