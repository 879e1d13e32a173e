"""What the benchmarks of the embedded worlds share: groups of records, a run that can be interrupted and judged again,
baselines on the first records of each group, and a report.

`weft.evals.world` (pictures) and `weft.evals.motion_world` (movements) are a `Benchmark` each.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from weft.errors import WeftError
from weft.evals import runner
from weft.evals.runner import Drawing, Medium, Results, Row, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from weft.evals.stats import Interval
    from weft.record import Record
    from weft.report.page import Page
    from weft.report.table import Table

EDIT_MEAN = "edit, mean over kinds"
PLACES = 100_000  # records of a group, at most


@dataclass(frozen=True)
class Groups:
    """The groups of a benchmark: what each asks of `records`, and short names for several.

    The order of `table` is fixed: a group's place gives its records their own indices, so that records of two groups
    are independent and no two share an id.
    """

    table: Mapping[str, Mapping[str, Any]]
    short: Mapping[str, Sequence[str]]
    records: Callable[..., Sequence[Record]]

    def expand(self, groups: Sequence[str]) -> list[str]:
        """Names of the table, short names resolved, without repeats, in the order given."""
        names = [name for group in groups for name in self.short.get(group, [group])]
        known = ", ".join([*self.short, *self.table])
        for name in names:
            if name not in self.table:
                raise WeftError(f"unknown group {name!r}; known: {known}")
        if not names:
            raise WeftError(f"no group to evaluate; known: {known}")
        return list(dict.fromkeys(names))

    def items(self, split: str, groups: Sequence[str], count: int, data_seed: int) -> dict[str, Record]:
        """The records by key (group and id). Record i of a group is the same for every `count`."""
        if not 1 <= count <= PLACES:
            raise WeftError(f"count is {count}; it must be 1 to {PLACES} records per group")
        place = {name: index for index, name in enumerate(self.table)}
        items: dict[str, Record] = {}
        for name in groups:
            start = place[name] * PLACES
            for record in self.records(split, count=count, seed=data_seed, start=start, **self.table[name]):
                items[f"{name}/{record.id}"] = record
        return items


def group_of(key: str) -> str:
    """The group in a key of `Groups.items`."""
    return key.rpartition("/")[0]


def by_group(rows: Mapping[str, Row]) -> dict[str, list[Row]]:
    """Rows of each group, groups in order of appearance."""
    found: dict[str, list[Row]] = {}
    for key, row in rows.items():
        found.setdefault(group_of(key), []).append(row)
    return found


class BaselineScorer(ABC):
    """A scorer that knows, for the first `baseline_count` records of each group, the record whose target stands in
    for chance (`chance`: None in a group of one)."""

    def __init__(self, items: Mapping[str, Record], baseline_count: int):
        groups: dict[str, list[str]] = {}
        for key in items:
            groups.setdefault(group_of(key), []).append(key)
        self.chance: dict[str, Record | None] = {}
        for keys in groups.values():
            for index, key in enumerate(keys[:baseline_count]):
                other = keys[(index + 1) % len(keys)]  # records are in random order, so the next is a random one
                self.chance[key] = items[other] if other != key else None

    @abstractmethod
    def __call__(self, key: str, record: Record, made: Any) -> dict[str, Any]:
        """The score of an output, as JSON values."""

    @abstractmethod
    def extra(self, model: Any, keys: Sequence[str], records: Sequence[Record]) -> list[dict[str, Any]]:
        """Facts of rows that need the model, such as what its autoencoder leaves of the target."""


G = TypeVar("G")


@dataclass(slots=True)
class Report(ABC, Generic[G]):
    """A benchmark's results: scores by group, differences between groups (in fractions), and what they were measured
    with. `rows` are the single results, `items` their records."""

    groups: dict[str, G]
    differences: dict[str, Interval]
    settings: dict[str, Any]
    rows: dict[str, Row]
    items: dict[str, Record]
    results: Results | None = None

    def dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "settings": self.settings,
            "groups": {name: asdict(group) for name, group in self.groups.items()},  # type: ignore[call-overload]
            "differences": {name: value.dict() for name, value in self.differences.items()},
        }

    @abstractmethod
    def page(self, shown: int) -> Page:
        """The HTML report, with the first `shown` records of each group."""

    @abstractmethod
    def table(self, brief: bool = False) -> Table:
        """All groups; `brief` for the terminal."""

    def write(self, folder: str | Path, *, shown: int = 8) -> Path:
        """Write results.json and report.html (with the first `shown` records of each group); returns the page."""
        write_atomically(Path(folder) / "results.json", json.dumps(self.dict(), indent=2) + "\n")
        return self.page(shown).write(Path(folder) / "report.html")

    def show(self) -> None:
        """Print the table."""
        self.table(brief=True).show()

    @property
    def unfinished(self) -> list[str]:
        """A line for the page if records are left to be run."""
        left = len(self.items) - len(self.rows)
        return [f"Unfinished: {left:,} records have not been run yet."] if left else []


R = TypeVar("R", bound=Report[Any])
Summary = Callable[[Mapping[str, Row], Mapping[str, "Record"], Mapping[str, Any], "Results | None"], R]


@dataclass(frozen=True)
class Benchmark(Generic[R]):
    """A benchmark by its `name`; `renderer` is the version of the program that makes its records."""

    name: str
    renderer: int
    groups: Groups
    medium: Medium
    scorer: Callable[[Mapping[str, Record], int], BaselineScorer]
    summarise: Summary[R]

    def run(
        self,
        model: Any,
        sampling: Drawing,
        *,
        name: str,
        split: str,
        groups: Sequence[str],
        count: int,
        data_seed: int,
        baseline_count: int,
        facts: Mapping[str, Any],
        extra: bool,
        out: str | Path | None,
        shown: int,
        progress: bool,
        show: bool,
    ) -> R:
        """Run what is not yet in `out` and report. `name` is the model's; `facts` are further settings that must agree
        with those of `out`; `extra` measures what needs the model beside its outputs.

        Raises:
            WeftError: unknown group or split, no records; `out` holds the results of another run.
        """
        data: dict[str, Any] = {
            "split": split, "groups": self.groups.expand(groups), "count": count, "data_seed": data_seed
        }  # fmt: skip
        items = self.groups.items(**data)
        settings = {
            "benchmark": self.name,
            "renderer": self.renderer,
            "model": name,
            "weights": runner.fingerprint(model),
            **data,
            **sampling.facts(),
            "baseline_count": baseline_count,
            **facts,
        }
        results = Results(out, settings, self.medium) if out is not None else None
        scorer = self.scorer(items, baseline_count)
        with runner.progress_bar(len(items), self.name) if progress else nullcontext() as advance:
            rows = runner.evaluate(
                model, items, scorer, sampling=sampling, results=results, advance=advance,
                extra=scorer.extra if extra else None,
            )  # fmt: skip
        return self._report(rows, items, settings, results, shown, show)

    def rescore(self, folder: str | Path, *, shown: int, show: bool) -> R:
        """Judge the recorded outputs of a results folder again, without a model, finished or not; rewrites its report.

        Raises:
            WeftError: the folder is of another benchmark or version, or empty; an output is missing or changed.
        """
        results = Results(folder, medium=self.medium)
        settings = results.settings
        if settings.get("benchmark") != self.name or settings.get("renderer") != self.renderer:
            raise WeftError(
                f"{folder}: recorded for benchmark {settings.get('benchmark')!r}, renderer {settings.get('renderer')}; "
                f"this is {self.name!r}, renderer {self.renderer}: run the evaluation again"
            )
        items = self.groups.items(**{key: settings[key] for key in ("split", "groups", "count", "data_seed")})
        rows = runner.rescore(results, items, self.scorer(items, settings["baseline_count"]))
        if not rows:
            raise WeftError(f"{results.path}: no finished result to score")
        return self._report(rows, items, settings, results, shown, show)

    def _report(
        self,
        rows: Mapping[str, Row],
        items: Mapping[str, Record],
        settings: Mapping[str, Any],
        results: Results | None,
        shown: int,
        show: bool,
    ) -> R:
        report = self.summarise(rows, items, settings, results)
        if results is not None:
            report.write(results.folder, shown=shown)
        if show:
            report.show()
        return report


def mean(values: Sequence[float | bool | None]) -> float | None:
    """The mean of what is there; None if nothing is."""
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None


def inserted(groups: Mapping[str, G], after: str, name: str, value: G) -> dict[str, G]:
    """The groups with one more behind `after`."""
    found: dict[str, G] = {}
    for key, group in groups.items():
        found[key] = group
        if key == after:
            found[name] = value
    return found


def title(name: str, titles: Mapping[str, str]) -> str:
    """A group's name for people: 'edit/recolour' -> 'edit: recolour'; `titles` are those of tasks, or whole ones."""
    if name in titles:
        return titles[name]
    task, _, what = name.partition("/")
    head, what = titles.get(task, task), what.partition(" reference")[0].replace("_", " ")
    return f"{head}: {what}" if what else head


def points(value: float) -> str:
    """A difference of fractions in percentage points: '+1.2', '−3.0'."""
    return f"{100 * value:+.1f}".replace("-", "−")


def bars(values: Mapping[str, Interval], marks: Mapping[str, Mapping[str, float | None]], label: str) -> Figure:
    """Groups by title as bars with their intervals; `marks` are baselines by label and title."""
    from weft.report import plots

    known = {kind: {name: v for name, v in row.items() if v is not None} for kind, row in marks.items()}
    return plots.bars(
        {name: value.value for name, value in values.items()},
        intervals={name: (value.low, value.high) for name, value in values.items()},
        marks={kind: row for kind, row in known.items() if row},
        label=label,
        percent=True,
        width=7.2,
    )
