"""One table, four renderings: plain text, Markdown, rich (terminal) and, in `weft.report.page`, HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weft.errors import WeftError

if TYPE_CHECKING:
    from rich.table import Table as RichTable

MISSING = "–"


def format_cell(value: Any) -> str:
    """A cell as text: None and NaN are a dash (missing, never zero), floats have three significant decimals."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if math.isnan(value):
            return MISSING
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def percent(value: float | None, digits: int = 1) -> str:
    """0.8125 -> '81.2 %'; None -> a dash."""
    return MISSING if value is None else f"{100 * value:.{digits}f} %"


def percent_interval(value: float, low: float, high: float, digits: int = 1) -> str:
    """'81.2 [78.0, 84.1]': the value and its interval, in percent, for a column whose head has the sign."""
    return f"{100 * value:.{digits}f} [{100 * low:.{digits}f}, {100 * high:.{digits}f}]"


def decibel(value: float | None) -> str:
    """'24.3 dB'; an identical picture has infinite PSNR and says so; None -> a dash."""
    if value is None or math.isnan(value):
        return MISSING
    return "exact" if math.isinf(value) else f"{value:.1f} dB"


def seconds(value: float) -> str:
    """A duration for people: '0.4 s', '41 s', '3 min 20 s', '2 h 05 min'."""
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@dataclass(slots=True)
class Table:
    """Rows under named columns. `strong` are indices of rows to emphasise; `note` stands below the table.

    Columns whose cells are all numbers (or begin with a digit or a dash) are set flush right.
    """

    columns: list[str]
    rows: list[list[Any]]
    title: str | None = None
    note: str | None = None
    strong: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise WeftError(f"table row {index} has {len(row)} cells for {len(self.columns)} columns")

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None, **options: Any) -> Table:
        """A table of dicts; columns default to all keys in order of appearance, absent keys are missing cells."""
        names = list(columns) if columns is not None else list(dict.fromkeys(key for row in rows for key in row))
        return cls(names, [[row.get(name) for name in names] for row in rows], **options)

    @property
    def cells(self) -> list[list[str]]:
        """All cells as text."""
        return [[format_cell(value) for value in row] for row in self.rows]

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether it is set flush right."""
        columns = zip(*self.cells, strict=True) if self.rows else ((),) * len(self.columns)
        return [
            bool(cells) and any(cell != MISSING for cell in cells) and all(_numeric(cell) for cell in cells)
            for cells in map(tuple, columns)
        ]

    def plain(self) -> str:
        """Aligned text for logs and terminals without styles."""
        grid = [self.columns, *self.cells]
        widths = [max(len(row[i]) for row in grid) for i in range(len(self.columns))]
        right = self.numeric

        def line(row: Sequence[str]) -> str:
            pairs = zip(row, widths, right, strict=True)
            return "  ".join(cell.rjust(width) if flush else cell.ljust(width) for cell, width, flush in pairs).rstrip()

        lines = [line(self.columns), "  ".join("-" * width for width in widths), *map(line, self.cells)]
        return "\n".join([*([self.title, ""] if self.title else []), *lines, *(["", self.note] if self.note else [])])

    def markdown(self) -> str:
        """A GitHub-flavoured Markdown table; pipes and line breaks in cells are escaped."""

        def line(row: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", "<br>") for cell in row) + " |"

        rule = "|" + "|".join("---:" if flush else "---" for flush in self.numeric) + "|"
        body = [
            [f"**{cell}**" for cell in row] if index in self.strong else row for index, row in enumerate(self.cells)
        ]
        lines = [line(self.columns), rule, *map(line, body)]
        head = [f"**{self.title}**", ""] if self.title else []
        return "\n".join([*head, *lines, *(["", self.note] if self.note else [])])

    def rich(self) -> RichTable:
        """A `rich.table.Table`; cells are literal text, never markup."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=self.title, caption=self.note, box=box.SIMPLE_HEAD, title_justify="left")
        for name, flush in zip(self.columns, self.numeric, strict=True):
            table.add_column(Text(name), justify="right" if flush else "left", no_wrap=True)
        for index, row in enumerate(self.cells):
            table.add_row(*map(Text, row), style="bold" if index in self.strong else None)
        return table

    def show(self) -> None:
        """Print to the terminal. A table wider than the terminal keeps its cells whole."""
        from rich.console import Console

        table = self.rich()
        table.caption = None  # set below, as running text
        console, needed = Console(), Console(width=10_000).measure(table).maximum
        (console if needed <= console.width else Console(width=needed)).print(table)
        if self.note:
            console.print(self.note, markup=False, highlight=False, style="dim")


def _numeric(cell: str) -> bool:
    return cell in (MISSING, "exact") or cell[:1].isdigit() or (cell[:1] in "+-−<>≥≤" and cell[1:2].isdigit())
