"""The tour's report: what was done, what came out, what it means and what it does not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.report import plots
from weft.report.page import Comparison, Number, Page, environment_facts
from weft.report.table import Table, decibel, percent, seconds
from weft.tour_motion import moved_section
from weft.tour_omni import referred_section

if TYPE_CHECKING:
    from weft.api import Model, Output
    from weft.record import Record
    from weft.tour import Findings


def tour_page(model: Model, found: Findings, folder: Path, seed: int) -> Page:
    """The whole page from what the stages found."""
    parameters = sum(p.numel() for p in model.flow.modules()["transformer"].parameters())
    facts = {
        "model": f"{model.name}, a diffusion transformer of {parameters / 1e6:.1f} million parameters",
        "sampling": f"{found.pace.steps} steps, guidance {found.pace.guidance:g}, seed {seed}",
        "took": seconds(found.seconds["all"]),
        **environment_facts(),
    }
    labels = [
        "The model is tiny, and its world is synthetic: 64 x 64 pixels with up to four simple shapes. It shows that "
        "the system works, not what a large model can do.",
        "Success means: everything that was asked for happened and nothing else changed. A program that knows the "
        "exact scene decides (the oracle), not a model, and nothing was picked by hand.",
        "The samples are small, so that the tour is short: read the intervals. How many they are depends on the speed "
        "of this machine.",
    ]
    summary = (
        "A tiny model makes and edits pictures as sentences say, is measured, and learns a new kind of edit, all of it "
        "just now on this machine."
    )
    page = Page("A tour of weft", summary, facts, labels)
    _headline(page, found)
    _generated(page, found)
    _edited(page, found, folder)
    _measured(page, found)
    _taught(page, found)
    number = 5
    for part, show in ((found.referred, referred_section), (found.moved, moved_section)):
        if part:
            show(page, found, number)
            number += 1
    _afterwards(page, found, folder)
    return page


def _headline(page: Page, found: Findings) -> None:
    from weft.evals.world import EDIT_MEAN

    assert found.world and found.before and found.after
    numbers = []
    for name, label in (
        ("generate", "of generated pictures are exactly right"),
        (EDIT_MEAN, "of edits, mean of kinds"),
    ):
        group = found.world.groups[name]
        numbers.append(Number(percent(group.rate.value), label, _interval(group.rate) + _chance(group)))
    (before,), (after,) = found.before.groups.values(), found.after.groups.values()
    change = f"{percent(before.rate.value, 0)} → {percent(after.rate.value, 0)}"
    label = f"on an edit kind it had never seen, after {seconds(found.train['seconds'])} of training"
    numbers.append(Number(change, label, _interval(after.rate)))
    page.section("In short").numbers(numbers)


def _generated(page: Page, found: Findings) -> None:
    record, (first, *_), _ = found.generated[0]
    section = page.section("1. Generate").code(f'weft generate "{record.instruction}" --seed {first.seed} -o scene.png')
    section.text(
        "Sentences from the test split; no training picture shows these scenes. Two pictures for each sentence, and "
        "the scene that it describes. The verdict is on the first picture. The command makes the first of them again."
    )
    section.comparisons(
        [
            Comparison(
                record.instruction,
                _seeds(pair) + [("as described", _target(record))],
                verdict.success,
                verdict.requests,
            )
            for record, pair, verdict in found.generated
        ]
    )


def _seeds(pair: list[Output]) -> list[tuple[str, Any]]:
    return [(f"seed {output.seed}", output.image) for output in pair]


def _edited(page: Page, found: Findings, folder: Path) -> None:
    record, output, _ = found.edited[0]
    source = folder / "pictures" / "edit-1-source.png"
    section = page.section("2. Edit")
    section.code(f'weft edit {source} "{record.instruction}" --seed {output.seed} -o out.png')
    section.text("One instruction of each kind. The exact target is what a perfect edit would be.")
    section.comparisons([_edit_card(record, output, verdict) for record, output, verdict in found.edited])
    section.text(
        "Edits of edits: each step starts from the model's own last picture. The verdict is on everything so far, so a "
        "mistake stays a mistake."
    )
    cards = []
    for chain in found.chains:
        first = chain[0][0]
        pictures: list[tuple[str, Any]] = [("source", first.load(first.source) if first.source else None)]
        pictures += [(f"step {k}", output.image) for k, (_, output, _) in enumerate(chain, 1)]
        pictures += [("exact target", _target(chain[-1][0]))]
        steps = "; then: ".join(record.instruction for record, _, _ in chain)
        checks = {f"step {k}": verdict.success for k, (_, _, verdict) in enumerate(chain, 1)}
        cards.append(Comparison(steps, pictures, chain[-1][2].success, checks))
    section.comparisons(cards)


def _edit_card(record: Record, output: Output, verdict: Any) -> Comparison:
    source = record.load(record.source) if record.source else None
    pictures = [("source", source), ("output", output.image), ("exact target", _target(record))]
    detail = f"PSNR outside the edit: {decibel(verdict.psnr_outside)}" if verdict.psnr_outside is not None else None
    return Comparison(record.instruction, pictures, verdict.success, verdict.requests, detail)


def _measured(page: Page, found: Findings) -> None:
    from weft.evals.world_page import table, title

    assert found.world
    groups = {title(name): group for name, group in found.world.groups.items()}
    section = page.section("3. Measure").code("weft eval world")
    section.text(
        "Full success by kind of request, with 95 % intervals. Beside it, on the same requests: copying the "
        "source, and chance (another request's exact answer)."
    )
    baselines = {"copy the source": "copy", "chance": "chance"}
    marks = {
        label: {name: rate for name, group in groups.items() if (rate := group.baselines.get(kind)) is not None}
        for label, kind in baselines.items()
    }
    section.figure(
        plots.bars(
            {name: group.rate.value for name, group in groups.items()},
            intervals={name: (group.rate.low, group.rate.high) for name, group in groups.items()},
            marks={label: values for label, values in marks.items() if values},
            label="full success",
            percent=True,
        )
    )
    section.table(table(found.world, brief=True))


def _taught(page: Page, found: Findings) -> None:
    from weft.evals.stats import paired_difference

    assert found.before and found.after
    (before,), (after,) = found.before.groups.values(), found.after.groups.values()
    rates = [[float(row["score"]["success"]) for row in report.rows.values()] for report in (found.after, found.before)]
    gain = paired_difference(*rates)
    train = found.train
    section = page.section("4. Teach").code("weft train tiny/tour_tone")
    section.text(
        f"The model had never been asked to change the tone of a picture. It was now trained for {train['steps']} "
        f"steps of {train['batch']} samples, on {train['tone']} records of the new kind and {train['known']} of the "
        f"known ones, in {seconds(train['seconds'])}, and measured before and after on the same {after.count} test "
        "records."
    )
    known = (train["known_before"], train["known_after"])
    rows = [
        ["the new kind: tone", _rate(before.rate), _rate(after.rate), _points(gain)],
        ["a known kind: recolour", _rate(known[0]), _rate(known[1]), f"{100 * (known[1].value - known[0].value):+.1f}"],
    ]
    note = "Success with Wilson's 95 % interval; the gain's is a bootstrap, paired, over the same records."
    section.table(Table(["edits", "before %", "after %", "points"], rows, note=note))
    cards = []
    for key, row in list(found.after.rows.items())[:6]:
        record, first = found.after.items[key], found.before.rows[key]
        assert found.before.results and found.after.results and record.source
        pictures = [
            ("source", record.load(record.source)),
            ("before", found.before.results.made(first)),
            ("after", found.after.results.made(row)),
            ("exact target", _target(record)),
        ]
        cards.append(Comparison(record.instruction, pictures, row["score"]["success"], row["score"]["requests"]))
    section.comparisons(cards)


def _afterwards(page: Page, found: Findings, folder: Path) -> None:
    section = page.section("Time, files, and what to do next")
    rows = [[name, seconds(value)] for name, value in found.seconds.items()]
    section.table(Table(["stage", "took"], rows))
    pace = found.pace
    section.text(
        f"On this machine a picture takes {pace.picture:.2f} s and a training sample {1000 * pace.train:.1f} ms. The "
        f"tour fits its amounts to that: {pace.measured()} records per kind and {found.train['steps']} training steps "
        "here (at most 32 and 500)."
    )
    section.text(
        f"Beside this page: pictures/ (each file knows its seed and instruction), tour.json (all numbers), tour-work/ "
        f"(the evaluations with their own reports, the training log, the trained model). Folder: {folder.resolve()}"
    )
    section.code(
        "weft doctor                                  what works on this machine\n"
        "weft eval world --count 512                  the full measurement\n"
        'weft edit photo.png "..." --model FOLDER     a large model in diffusers layout\n'
        "weft train RECIPE                            recipes/ has complete ones"
    )


def _target(record: Record) -> Any:
    return record.load(record.target) if record.target else None


def _interval(interval: Any) -> str:
    return f"95 %: {100 * interval.low:.0f} to {100 * interval.high:.0f}, n = {interval.count}"


def _chance(group: Any) -> str:
    chance = group.baselines.get("chance")
    return f"; chance {percent(chance, 0)}" if chance is not None else ""


def _rate(interval: Any) -> str:
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _points(interval: Any) -> str:
    return f"{100 * interval.value:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"
