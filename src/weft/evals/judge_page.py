"""How the judge's benchmark is shown: tables and the HTML report."""

from __future__ import annotations

from weft.evals.judge import GOOD, JudgeReport
from weft.evals.stats import Interval
from weft.report import plots
from weft.report.page import Comparison, Number, Page, environment_facts
from weft.report.table import Table
from weft.reward.graded import picture_of


def _mean(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _number(value: Interval | None) -> str:
    return "–" if value is None else f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"


def _share(value: Interval | None) -> str:
    return "–" if value is None else f"{100 * value.value:.0f} [{100 * value.low:.0f}, {100 * value.high:.0f}]"


def agreement_table(report: JudgeReport) -> Table:
    """Agreement by group."""
    rows = [
        [name, g.count, g.missing, f"{g.truth:.2f}", f"{g.judge:.2f}", _number(g.gap), _number(g.rank), _share(g.pairs),
         _share(g.success)]
        for name, g in report.groups.items()
    ]  # fmt: skip
    note = (
        "truth, judge: mean scores from 0 to 1; gap: judge minus truth; rank: Spearman over all records; pairs: "
        "attempts at one request put in the right order; success pairs: a full success above a failure. 95 % "
        "intervals over requests. A dash: does not exist."
    )
    columns = ["samples", "n", "missing", "truth", "judge", "gap", "rank", "pairs %", "success pairs %"]
    return Table(columns, rows, note=note)


def attack_table(report: JudgeReport) -> Table:
    """What attacks reach."""
    rows = [
        [name, a.count, a.missing, _mean(a.score), _number(a.gain), _share(a.fooled), _share(a.below_target)]
        for name, a in report.attacks.items()
    ]
    note = (
        f"Exact targets get {_mean(report.target)} on average. gain: over the same picture without the attack; "
        f"taken for good: {GOOD:g} or more; below target: under the exact target of the same request."
    )
    columns = ["attack", "n", "missing", "score", "gain", "taken for good %", "below target %"]
    return Table(columns, rows, note=note)


def page(report: JudgeReport) -> Page:
    """The report."""
    facts = {**{k: v for k, v in report.settings.items() if k != "benchmark"}, **environment_facts()}
    labels = [
        "Truth is the oracle of the embedded world, a program that knows the scene. These numbers say how well the "
        "judge sees small synthetic scenes, and nothing about photographs."
    ]
    result = Page(
        f"{report.settings['judge']} as a judge of edits", "Does the judge see what the oracle sees?", facts, labels
    )
    section = result.section("Agreement with the oracle")
    numbers = [
        Number(
            f"{group.rank.value:.2f}",
            f"rank correlation, {name}",
            f"95 %: {group.rank.low:.2f} to {group.rank.high:.2f}",
        )
        for name, group in report.groups.items()
        if group.rank is not None
    ]
    section.numbers(numbers[:4]).table(agreement_table(report))
    known = {name: group.pairs for name, group in report.groups.items() if group.pairs is not None}
    if known:
        figure = plots.bars(
            {name: pair.value for name, pair in known.items()},
            intervals={name: (pair.low, pair.high) for name, pair in known.items()},
            label="pairs of one request in the right order (chance: 50)",
            percent=True,
        )
        section.figure(figure, "Bars: pairwise accuracy. Whiskers: 95 % intervals over requests.")
    if report.attacks:
        result.section("Attacks").table(attack_table(report))
    shown = result.section("Farthest from the truth")
    shown.text("The records of each group on which the judge is most too strict, then most too generous.")
    for index, (name, examples) in enumerate(report.examples.items()):
        cards = []
        for example in examples:
            record = example["record"]
            pictures = [("source", record.load(record.source))] if record.source else []
            pictures.append(("judged", record.load(picture_of(record))))
            detail = (
                f"judge {example['judge']:.2f}, truth {record.meta['grade'] / 5:.2f} ({record.meta.get('made', '')})"
            )
            cards.append(Comparison(record.instruction, pictures, None, {}, detail))
        if cards:
            shown.comparisons(cards, title=name, folded=index > 0)
    return result
