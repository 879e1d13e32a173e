"""A report as one HTML file: inline style, embedded pictures, nothing loaded from elsewhere, readable on a phone."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from weft.media import atomic_write
from weft.report.table import Table, format_cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(slots=True)
class Comparison:
    """Pictures side by side under one instruction, with a verdict.

    `pictures` are (label, picture) pairs, None where there is none; `verdict` is None where nothing was judged;
    `checks` names what was asked and whether it happened; `detail` is a line of measurements. `strips`: every picture
    is a strip of moments; they stand below one another, as wide as the card.
    """

    caption: str
    pictures: Sequence[tuple[str, Image.Image | None]]
    verdict: bool | None = None
    checks: Mapping[str, bool] = field(default_factory=dict)
    detail: str | None = None
    strips: bool = False


@dataclass(slots=True)
class Number:
    """A headline figure: '82.4 %', what it measures, and a line of context (its interval, its baseline)."""

    value: str
    label: str
    note: str = ""


@dataclass(slots=True)
class Section:
    """A part of a page; its methods append blocks and return the section, so that they chain."""

    title: str
    key: str
    blocks: list[dict[str, Any]] = field(default_factory=list)

    def text(self, text: str) -> Section:
        """Plain paragraphs, separated by blank lines; never markup."""
        return self._add("text", paragraphs=[part.strip() for part in text.split("\n\n") if part.strip()])

    def code(self, text: str) -> Section:
        """A command or a listing, in a fixed-width face."""
        return self._add("code", text=text)

    def numbers(self, numbers: Sequence[Number]) -> Section:
        """A row of headline figures."""
        return self._add("numbers", numbers=list(numbers))

    def table(self, table: Table) -> Section:
        """A table; wide ones scroll sideways inside their frame."""
        return self._add("table", table=table)

    def figure(self, figure: Figure, caption: str = "") -> Section:
        """A plot from `weft.report.plots`, drawn in the page's own colours."""
        return self._add("figure", figure=figure, caption=caption)

    def picture(self, image: Image.Image, caption: str = "") -> Section:
        """One picture at full width, such as a contact sheet."""
        return self._add("picture", image=image, caption=caption)

    def comparisons(
        self, comparisons: Sequence[Comparison], *, title: str | None = None, note: str = "", folded: bool = False
    ) -> Section:
        """Cards of pictures side by side. With a `title` they can be folded; `folded` says whether they start so."""
        return self._add("comparisons", items=list(comparisons), title=title, note=note, folded=folded)

    def _add(self, kind: str, **content: Any) -> Section:
        self.blocks.append({"kind": kind, **content})
        return self


@dataclass(slots=True)
class Page:
    """A report: a header of facts (model, data, seeds, versions), honest labels, then sections.

    `facts` are shown as given; `labels` are the sentences a reader must not miss (what is embedded, small,
    synthetic or not measured). All text is escaped.
    """

    title: str
    summary: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    labels: Sequence[str] = ()
    sections: list[Section] = field(default_factory=list)

    def section(self, title: str) -> Section:
        """Append a section and return it."""
        section = Section(title, f"s{len(self.sections) + 1}")
        self.sections.append(section)
        return section

    def html(self) -> str:
        """The whole page."""
        from jinja2 import Environment, FunctionLoader
        from markupsafe import Markup

        from weft.report import plots

        numbered = iter(range(10**6))

        def draw(figure: Figure) -> Markup:
            # The SVG is ours and matplotlib escapes the texts in it, so it may enter the page unescaped.
            return Markup(plots.svg(figure, salt=f"figure{next(numbered)}", inline=True))

        folder = files("weft.report")
        environment = Environment(
            loader=FunctionLoader(lambda name: folder.joinpath(name).read_text("utf-8")),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters |= {"cell": format_cell, "uri": data_uri, "draw": draw, "shown_width": shown_width}
        style = Markup(folder.joinpath("page.css").read_text("utf-8"))
        return environment.get_template("page.html.j2").render(page=self, style=style)

    def write(self, path: str | Path) -> Path:
        """Write the page, all or nothing; returns its path."""
        path = Path(path)
        with atomic_write(path) as file:
            file.write(self.html().encode())
        return path


def environment_facts(packages: Sequence[str] = ("weft", "torch", "diffusers", "transformers")) -> dict[str, str]:
    """Versions, machine and time, for a page's header. A package that is not installed is left out."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in packages:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return {
        "versions": ", ".join([*found, f"Python {platform.python_version()}"]),
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def data_uri(image: Image.Image) -> str:
    """The picture as an embedded PNG; an animation that was opened from a file as that file."""
    if getattr(image, "is_animated", False):
        file = Path(image.filename)  # type: ignore[attr-defined]
        return f"data:image/{str(image.format).lower()};base64," + base64.b64encode(file.read_bytes()).decode()
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=image.width * image.height <= 256 * 256)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def shown_width(image: Image.Image, wanted: int = 128) -> int:
    """Width in CSS pixels: small pictures are enlarged by a whole factor, so that their pixels stay square."""
    return image.width * max(1, round(wanted / image.width)) if image.width < wanted else min(image.width, 2 * wanted)
