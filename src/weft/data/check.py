"""What of a data set can be used: every row, picture and movement read once, faults by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from weft.data.sources import SourceConfig, read_source
from weft.errors import WeftError
from weft.motion import Motion, load_part
from weft.record import Record


@dataclass(slots=True)
class Report:
    """Rows read, used and skipped, each fault by name, the `usable` records and what they hold."""

    name: str
    rows: int = 0
    faults: list[str] = field(default_factory=list)
    tasks: Counter[str] = field(default_factory=Counter)
    references: Counter[int] = field(default_factory=Counter)  # references of a record -> records
    pictures: int = 0
    movements: int = 0
    seconds: float = 0.0  # of all movements
    skeletons: Counter[str] = field(default_factory=Counter)
    without_target: int = 0
    aspect_changes: int = 0  # source and target differ in aspect by over 2 %: the edit cannot be aligned
    usable: list[Record] = field(default_factory=list)

    @property
    def used(self) -> int:
        return len(self.usable)

    @property
    def skipped(self) -> int:
        return self.rows - self.used

    def reasons(self) -> Counter[str]:
        """The faults by kind: what is said after the place, without names and numbers."""
        return Counter(_reason(fault) for fault in self.faults)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.rows} rows, {self.used} used, {self.skipped} skipped"]
        if self.used:
            lines.append("tasks: " + ", ".join(f"{task} {n}" for task, n in sorted(self.tasks.items())))
            lines.append("references: " + ", ".join(f"{k} in {n}" for k, n in sorted(self.references.items())))
            lines.append(f"pictures: {self.pictures}")
        if self.movements:
            kinds = ", ".join(f"{name} {n}" for name, n in sorted(self.skeletons.items()))
            lines.append(f"movements: {self.movements}, {self.seconds:.1f} s in all ({kinds})")
        if self.without_target:
            lines.append(f"without a target (prompts only): {self.without_target}")
        if self.aspect_changes:
            lines.append(f"source and target of different aspect: {self.aspect_changes}")
        lines += [f"skipped {n}: {reason}" for reason, n in self.reasons().most_common()]
        lines += [f"  {fault}" for fault in self.faults[:20]]
        if len(self.faults) > 20:
            lines.append(f"  and {len(self.faults) - 20} more")
        return "\n".join(lines)


def _reason(fault: str) -> str:
    what = fault.split(": ", 1)[-1]
    what = re.sub(r"\S*[/\\]\S*|'[^']*'|\([^)]*\)", "...", what)
    return re.sub(r"\d+", "N", what)[:120]


def check_records(source: str | Path | SourceConfig) -> Report:
    """Read a JSONL file of records, or any source of files, with all pictures and movements.

    Bad rows are reported, never raised.
    """
    config = source if isinstance(source, SourceConfig) else SourceConfig("jsonl", str(source))
    found = read_source(config)
    report = Report(config.path, rows=found.rows, faults=list(found.faults))
    _look(found.records, report)
    return report


def _look(records: Sequence[Record], report: Report) -> None:
    for record in records:
        try:
            sizes, movements = _sizes(record), _movements(record)
        except WeftError as error:
            report.faults.append(f"record {record.id}: {error}")
            continue
        report.usable.append(record)
        report.tasks[record.task] += 1
        report.references[len(record.references)] += 1
        report.pictures += len(sizes)
        report.movements += len(movements)
        report.seconds += sum(motion.seconds for motion in movements)
        report.skeletons.update(motion.layout.name for motion in movements)
        source, target = record.source, record.target
        if target is None and not any(t.role == "assistant" for t in record.turns):
            report.without_target += 1
        if source and target and {id(source), id(target)} <= set(sizes):
            (w, h), (tw, th) = sizes[id(source)], sizes[id(target)]
            report.aspect_changes += abs(w * th / (h * tw) - 1) > 0.02


def _sizes(record: Record) -> dict[int, tuple[int, int]]:
    """(width, height) of every picture, decoded in full: a cut file shows its fault only then."""
    pictures = [part for turn in record.turns for part in turn.parts if part.type == "image"]
    return {id(part): part.load(record.root).size for part in pictures}


def _movements(record: Record) -> list[Motion]:
    """Every movement, read in full."""
    parts = [part for turn in record.turns for part in turn.parts if part.type == "motion"]
    return [load_part(part, record.root, fps=None) for part in parts]
