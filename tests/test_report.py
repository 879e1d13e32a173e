"""Reports: pictures stay crisp, text stays text, tables tell missing from zero, pages need nothing from elsewhere."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from weft.errors import WeftError
from weft.report import plots
from weft.report.page import Comparison, Number, Page, data_uri, environment_facts, shown_width
from weft.report.sheet import _font, _width, _wrap, contact_sheet
from weft.report.table import Table, decibel, format_cell, percent, percent_interval, seconds


def noise(width: int = 8, height: int = 8, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


# tables


def test_cells_tell_missing_from_zero() -> None:
    assert [format_cell(value) for value in (None, math.nan, 0, 0.0, True, 12345, 0.12345, 1234.5, "a")] == [
        "–", "–", "0", "0.000", "yes", "12,345", "0.123", "1,234", "a",
    ]  # fmt: skip
    assert percent(None) == decibel(None) == "–" and percent(0.8125) == "81.2 %"
    assert decibel(math.inf) == "exact" and decibel(22.04) == "22.0 dB"
    assert percent_interval(0.5, 0.25, 0.75, 0) == "50 [25, 75]"
    assert [seconds(value) for value in (0.44, 41, 59.7, 200, 7500)] == [
        "0.4 s", "41 s", "1 min 00 s", "3 min 20 s", "2 h 05 min",
    ]  # fmt: skip


def test_table_renders_alike_everywhere() -> None:
    table = Table.of([{"name": "a|b", "score": 0.5}, {"name": "<c>", "count": 3}], title="T", note="N", strong={0})
    assert table.columns == ["name", "score", "count"] and table.numeric == [False, True, True]
    assert table.plain().splitlines() == [
        "T", "", "name  score  count", "----  -----  -----", "a|b   0.500      –", "<c>       –      3", "", "N",
    ]  # fmt: skip
    assert "| **a\\|b** | **0.500** | **–** |" in table.markdown() and "|---|---:|---:|" in table.markdown()
    assert table.rich().row_count == 2
    with pytest.raises(WeftError, match="row 0 has 1 cells for 2 columns"):
        Table(["a", "b"], [[1]])
    assert Table(["a"], []).plain() == "a\n-"


def test_terminal_table_is_literal_and_whole(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    Table(["name", "value"], [["[bold]x[/bold]" * 5, 1.0]], note="[red]note[/red]").show()
    printed = capsys.readouterr().out
    assert "[bold]x[/bold]" * 5 in printed and "1.000" in printed and "[red]note[/red]" in printed


# contact sheets


def test_sheet_enlarges_without_blur_and_keeps_every_pixel() -> None:
    pictures = [noise(8, 8, seed) for seed in range(3)]
    sheet = contact_sheet([pictures], columns=["a", "b", "c"], scale=4)
    pixels = np.asarray(sheet)
    for picture in pictures:
        wanted = np.asarray(picture).repeat(4, 0).repeat(4, 1)
        windows = np.lib.stride_tricks.sliding_window_view(pixels, wanted.shape)[:, :, 0]
        first = np.argwhere((windows[:, :, 0, 0] == wanted[0, 0]).all(-1))
        assert any((windows[y, x] == wanted).all() for y, x in first)


def test_sheet_has_room_for_gaps_captions_and_different_sizes(tmp_path: Path) -> None:
    rows = [[noise(16, 8), None], [noise(8, 24)]]
    bare = contact_sheet(rows, columns=["source", "a long column label"], scale=2)
    long = "give the star the material of the cloth, and " * 4
    told = contact_sheet(rows, columns=["source", "a long column label"], captions=[long, "✓"], scale=2,
                         path=tmp_path / "deep" / "sheet.png")  # fmt: skip
    assert told.width == bare.width and told.height > bare.height + 60
    assert Image.open(tmp_path / "deep" / "sheet.png").size == told.size
    assert (np.asarray(told)[:, -6:] == 255).all()  # nothing runs into the right margin


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=120), st.integers(60, 300))
def test_wrapped_lines_fit_and_lose_nothing(text: str, width: int) -> None:
    lines = _wrap(text, _font(13), width)
    assert all(_width(line, _font(13)) <= width or len(line) == 1 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": [], "columns": ["a"]}, "0 rows"),
        ({"rows": [[None, None]], "columns": ["a"]}, "2 pictures for 1 columns"),
        ({"rows": [[None]], "columns": ["a"], "captions": []}, "0 captions for 1 rows"),
        ({"rows": [[None]], "columns": ["a"], "scale": 0}, "scale is 0"),
    ],
)
def test_sheet_refusals(arguments: dict, message: str) -> None:
    with pytest.raises(WeftError, match=message):
        contact_sheet(**arguments)


# plots


def test_plots_are_reproducible_and_touch_no_global_state(tmp_path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")  # resolves the one parameter that matplotlib itself sets late
    before = matplotlib.rcParams.copy()
    lines = {"a": plots.Series([1, 10], [1, 2], [0.5, 1], [2, 3]), "b & <c>": plots.Series([1], [2])}
    figures = [plots.curve(lines, xlabel="step", ylabel="loss", log_x=True, limits=(0, 4)) for _ in range(2)]
    assert plots.png(figures[0]) == plots.png(figures[1])
    assert plots.svg(figures[0]) == plots.svg(figures[1])
    bars = plots.bars({"x": 0.5, "y": 0.0}, intervals={"x": (0.4, 0.6)}, marks={"chance": {"x": 0.1}}, label="success",
                      percent=True, title="T")  # fmt: skip
    assert bars.axes[0].get_xlim() == (0, 100) and bars.axes[0].patches[0].get_width() == 50
    for name in ("p.png", "p.svg"):
        assert plots.save(bars, tmp_path / name).stat().st_size > 1000
    assert matplotlib.rcParams == before
    with pytest.raises(WeftError, match="not .jpg"):
        plots.save(bars, tmp_path / "p.jpg")
    with pytest.raises(WeftError, match="different lengths"):
        plots.curve({"a": plots.Series([1, 2], [1])}, xlabel="", ylabel="")
    with pytest.raises(WeftError, match="at least one"):
        plots.bars({}, label="")


def test_inline_plots_take_the_colour_of_the_page_and_repeat_no_id() -> None:
    page = Page("two plots")
    for _ in range(2):
        page.section("s").figure(plots.curve({"a": plots.Series([1, 2], [1, 2])}, xlabel="<x>", ylabel="y"))
    html = page.html()
    identities = re.findall(r'\sid="([^"]+)"', html)
    assert len(set(identities)) == len(identities)
    assert html.count("<svg") == 2 and "currentColor" in html and plots.INK not in html and "&lt;x&gt;" in html
    for reference in re.findall(r"(?:url\(|xlink:href=\")#([^)\"]+)", html):
        assert reference in identities


# pages


class Parsed(HTMLParser):
    """Collects tags and asserts that they nest."""

    VOID = {"meta", "img", "br", "link", "use", "path", "line", "rect", "circle"}

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attributes if name in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


HOSTILE = '<script>alert("x")</script> & {{ 7 * 7 }} \' "'


def hostile_page() -> Page:
    page = Page(HOSTILE, HOSTILE, {HOSTILE: HOSTILE}, [HOSTILE])
    card = Comparison(HOSTILE, [(HOSTILE, noise()), ("missing", None)], True, {HOSTILE: False}, HOSTILE)
    section = page.section(HOSTILE).text(HOSTILE).code(HOSTILE).numbers([Number(HOSTILE, HOSTILE, HOSTILE)])
    section.table(Table([HOSTILE], [[HOSTILE]], title=HOSTILE, note=HOSTILE)).picture(noise(), HOSTILE)
    section.figure(plots.bars({HOSTILE: 1.0}, label=HOSTILE, title=HOSTILE), HOSTILE)
    section.comparisons([card], title=HOSTILE, note=HOSTILE, folded=True).comparisons([card], note=HOSTILE)
    page.section("two"), page.section("three")
    return page


def test_page_escapes_everything_and_nests(tmp_path: Path) -> None:
    html = hostile_page().write(tmp_path / "deep" / "page.html").read_text("utf-8")
    parsed = Parsed(html)
    assert "<script" not in html and "49" not in "".join(parsed.words)
    assert html.startswith("<!doctype html>") and "prefers-color-scheme" in html and "width=device-width" in html
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in parsed.sources)
    assert not re.search(r"@import|url\((?!#)", html)
    assert list(tmp_path.rglob("*")) == [tmp_path / "deep", tmp_path / "deep" / "page.html"]


def test_page_shows_verdicts_in_marks_not_only_in_colour() -> None:
    page = Page("t")
    page.section("s").comparisons(
        [
            Comparison("one", [("output", noise())], True, {"a": True}),
            Comparison("two", [("output", None)], False, {"b": False}),
            Comparison("three", [("output", noise())]),
        ]
    )
    html = page.html()
    assert html.count("✓") == 2 and html.count("✗") == 2
    assert len(re.findall(r'<article class="card"', html)) == 1  # the unjudged one has no mark


def test_embedded_pictures_are_the_pictures() -> None:
    picture = noise(64, 64)
    decoded = Image.open(io.BytesIO(base64.b64decode(data_uri(picture).split(",")[1])))
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(picture))
    assert [shown_width(noise(width, 4)) for width in (16, 50, 64, 128, 200, 1024)] == [128, 150, 128, 128, 200, 256]


def test_environment_facts_name_what_is_installed() -> None:
    facts = environment_facts(("pillow", "no-such-package"))
    assert facts["versions"].startswith("pillow ") and "no-such-package" not in facts["versions"]
    assert set(facts) == {"versions", "machine", "written"}
