"""The record: JSONL round trip, migration, weaving, and messages that name file, line, field and the fix."""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from weft.errors import WeftError
from weft.media import LazyPicture
from weft.record import (
    Part,
    Record,
    Turn,
    image_part,
    instruction_text,
    make_record,
    motion_part,
    read_records,
    record_from_dict,
    record_to_dict,
    text_part,
    weave,
    write_records,
)
from weft.rows import migrate

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)  # no lone surrogates: they are no text
NAME = st.text(string.ascii_letters + "äö雪 _-", min_size=1, max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ROLE = st.sampled_from([None, "source", "reference", "mask", "start", "end", "rejected"])
MEDIUM = st.builds(
    lambda kind, names, role: Part(kind, path="/".join(names) + ".x", role=role),
    st.sampled_from(["image", "motion"]),
    st.lists(NAME, min_size=1, max_size=3),
    ROLE,
)
PARTS = st.lists(st.builds(text_part, TEXT) | MEDIUM, min_size=1, max_size=4)
RECORD = st.builds(
    lambda id, task, first, more, meta: Record(id, task, [Turn("user", first), *more], meta),
    TEXT.filter(bool),
    TEXT.filter(bool),
    PARTS,
    st.lists(st.builds(Turn, st.sampled_from(["user", "assistant"]), PARTS), max_size=3),
    st.dictionaries(TEXT, JSON, max_size=3),
)


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), colour).save(path)
    return path


def rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def row(*parts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    said = list(parts) or [{"type": "text", "text": "hi"}]
    return {"schema": 1, "id": "a", "task": "edit", "turns": [{"role": "user", "parts": said}], "meta": {}} | changes


# -- JSONL --


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.lists(RECORD, max_size=4, unique_by=lambda r: r.id))
def test_round_trip(records: list[Record]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for record in records:
            record.root = Path(folder)
        path = Path(folder, "a.jsonl")
        assert write_records(path, records, media="keep") == len(records)
        first = path.read_bytes()
        assert list(read_records(path)) == records
        write_records(path, read_records(path), media="keep")
        assert path.read_bytes() == first


@settings(max_examples=100, deadline=None)
@given(RECORD)
def test_dict_round_trip(record: Record) -> None:
    assert record_from_dict(json.loads(json.dumps(record_to_dict(record)))) == record


def test_media_travel_with_the_records(tmp_path: Path) -> None:
    source, reference = picture(tmp_path / "in" / "a.PNG"), picture(tmp_path / "in" / "b.jpg", "blue")
    data = reference.read_bytes()
    record = make_record(
        "swap", source=source, references=[LazyPicture("cell", lambda: data)], target=Image.new("L", (3, 3), 9)
    )
    again = make_record("again", source=source)
    out = tmp_path / "out" / "r.jsonl"
    write_records(out, [record, again])
    source.unlink()
    reference.unlink()
    found = list(read_records(out))
    assert len(list((out.parent / "media").iterdir())) == 3  # equal content is written once
    assert [p.path.rpartition(".")[2] for p in found[0].inputs] == ["png", "jpg"]  # type: ignore[union-attr]
    assert (out.parent / str(found[0].references[0].path)).read_bytes() == data  # encoded bytes are not encoded again
    assert found[0].load(found[0].inputs[0]).getpixel((0, 0)) == (255, 0, 0)
    assert found[0].load(found[0].targets[0]).getpixel((0, 0)) == (9, 9, 9)
    assert found[0].instruction == "swap" and found[0].root == out.parent


def test_keep_refuses_files_elsewhere(tmp_path: Path) -> None:
    record = make_record("x", source=picture(tmp_path / "a" / "a.png"))
    with pytest.raises(WeftError, match=r'a\.png does not lie under .*write with media="copy"'):
        write_records(tmp_path / "b" / "r.jsonl", [record], media="keep")
    assert not (tmp_path / "b" / "r.jsonl").exists()
    with pytest.raises(WeftError, match="no such file|cannot be read"):
        write_records(tmp_path / "r.jsonl", [Record("a", "t", [Turn("user", [Part("image", path="gone.png")])])])


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_records(path, [make_record("one")])
    before = path.read_bytes()
    for bad in ({"x": float("nan")}, {"x": object()}, {"x": "\ud800"}):
        with pytest.raises(WeftError, match="not JSON"):
            write_records(path, [make_record("two"), make_record("three", meta=bad)])
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.jsonl"]


BAD = {
    "{": r"r\.jsonl:2: row: not JSON .*write one object a line",
    "[1]": r"r\.jsonl:2: row: \[1\] is not an object",
    '{"id": "\xff': "not JSON",
    "[" * 5000: "not JSON",
    json.dumps(row({"type": "text", "text": "cut \ud83d"})): r"half a character \('\\ud83d'\): write the text",
    json.dumps(row(meta={"a": {"\udc00": 1}})): "holds half a character",
    json.dumps(row(schema=2)): r"schema: 2 is unknown, this weft reads 0 to 1: upgrade weft",
    json.dumps(row(schema=True)): "schema: True is unknown",
    json.dumps({k: v for k, v in row().items() if k != "schema"}): 'schema: missing: add "schema": 1',
    json.dumps(row(id=7)): "id: 7 is not a text: give a non-empty string",
    json.dumps(row(id="")): "id: ",
    json.dumps(row(task=None)): "task: None is not a text",
    json.dumps(row(turn=[])): r"turn: unknown field: did you mean 'turns'\?",
    json.dumps(row(colour=1)): "colour: unknown field: use one of schema, id",
    json.dumps(row(meta=[])): "meta: .* is not an object",
    json.dumps(row(turns=[])): "turns: missing or empty",
    json.dumps(row(turns=[3])): r"turns\[0\]: 3 is not an object",
    json.dumps(row(turns=[{"role": "User", "parts": [{"type": "text", "text": "x"}]}])): (
        r"turns\[0\]\.role: 'User' is unknown: did you mean 'user'\?"
    ),
    json.dumps(row(turns=[{"role": "assistant", "parts": [{"type": "text", "text": "x"}]}])): "no user turn",
    json.dumps(row(turns=[{"role": "user", "parts": []}])): r"turns\[0\]\.parts: missing or empty",
    json.dumps(row({"type": "text", "text": "a"}, {"type": "picture", "path": "a"})): (
        r"turns\[0\]\.parts\[1\]\.type: 'picture' is unknown: use one of text, image, motion"
    ),
    json.dumps(row({"type": ["text"]})): r"parts\[0\]\.type: .* is unknown",
    json.dumps(row({"type": "text"})): r"parts\[0\]\.text: None is not a text",
    json.dumps(row({"type": "text", "text": "a", "role": "source"})): r"parts\[0\]\.role: unknown field",
    json.dumps(row({"type": "image", "path": "a", "role": "ref"})): r"parts\[0\]\.role: 'ref' is unknown",
    json.dumps(row({"type": "image", "path": "a", "role": "referense"})): r"did you mean 'reference'\?",
    json.dumps(row({"type": "image"})): r"parts\[0\]\.path: None is not a path: name a file",
    json.dumps(row({"type": "image", "path": 3})): r"parts\[0\]\.path: 3 is not a path",
    json.dumps(row({"type": "image", "path": "a", "value": "b"})): r"parts\[0\]\.value: unknown field",
    json.dumps(row(id="first")): "id: 'first' stands in line 1 too: ids must differ",
}


@pytest.mark.parametrize("line", BAD)
def test_messages(tmp_path: Path, line: str) -> None:
    path = rows(tmp_path / "r.jsonl", row(id="first"), line, row(id="last"))
    with pytest.raises(WeftError, match=BAD[line]) as caught:
        list(read_records(path))
    assert str(caught.value).startswith(f"{path}:2: ") and "\n" not in str(caught.value)
    faults: list[str] = []
    assert [r.id for r in read_records(path, faults)] == ["first", "last"]
    assert faults == [str(caught.value)]


ESCAPES = (
    "../a.png",
    "../../etc/passwd",
    "a/../../b.png",
    "a/..",
    "/etc/passwd",
    "\\etc\\passwd",
    "..\\a.png",
    "a\\..\\..\\b.png",
    "C:\\a.png",
    "c:/a.png",
    "//host/share/a.png",
    "\\\\host\\share\\a.png",
    "file:///etc/passwd",
    "http://169.254.169.254/x.png",
    "https://x.org/a.png",
    "s3://bucket/a.png",
    "data:image/png;base64,AAAA",
    "a\0.png",
    "iVBORw0KGgo" + "A" * 300,
    "ü" * 130 + ".png",
    "a/" * 600 + "b.png",
    "",
)


@pytest.mark.parametrize("path", ESCAPES)
def test_no_path_leads_out_of_the_folder(tmp_path: Path, path: str) -> None:
    file = rows(tmp_path / "r.jsonl", row({"type": "image", "path": path}))
    with pytest.raises(WeftError, match=r"r\.jsonl:1: turns\[0\]\.parts\[0\]\.path: "):
        list(read_records(file))
    with pytest.raises(WeftError):
        record_to_dict(Record("a", "t", [Turn("user", [Part("image", path=path)])]))
    picture(tmp_path / "a.png")
    (tmp_path / "in").mkdir()
    if path:
        with pytest.raises(WeftError):
            weave(f"like {{{path}}}", root=tmp_path / "in")


def test_backslashes_and_byte_order_mark(tmp_path: Path) -> None:
    picture(tmp_path / "sub" / "a.png")
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row({"type": "image", "path": "sub\\a.png"})).encode() + b"\r\n\r\n")
    (record,) = read_records(path)
    assert record.turns[0].parts[0].path == "sub/a.png"
    assert record.load(record.references[0]).size == (6, 4)


def test_missing_file() -> None:
    with pytest.raises(WeftError, match="none.jsonl: no such file"):
        list(read_records("none.jsonl"))


# -- schema 0 --


def test_flat_rows_of_schema_0(tmp_path: Path) -> None:
    flat = {"id": "1", "task": "edit", "instruction": "put image 2 on image 1", "source": "a.png"}
    flat |= {"references": ["b.png", "c.png"], "target": "d.png"}
    path = rows(tmp_path / "r.jsonl", flat, flat | {"id": "2", "schema": 0}, {"id": "3", "instruction": "a star"})
    one, two, three = read_records(path)
    assert one.turns == two.turns and one.schema == 1
    assert one.instruction == "put image 2 on image 1"  # the text stays as it was
    assert [p.path for p in one.inputs] == ["a.png", "b.png", "c.png"] and one.source is one.inputs[0]
    assert one.target == Part("image", path="d.png")
    assert three.task == "generate" and three.target is None and three.inputs == []
    write_records(tmp_path / "new.jsonl", [three])
    assert json.loads((tmp_path / "new.jsonl").read_text())["schema"] == 1
    assert migrate(migrate(flat)) == migrate(flat)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction": 3}, r"parts\[\d\]\.text: 3 is not a text"),
        ({"references": "b.png"}, "references: not a list: write a list of paths"),
        ({"references": [None]}, r"parts\[1\]\.path: None is not a path"),
        ({"source": "../a.png"}, "leaves the records' folder"),
        ({"targets": "x"}, r"targets: unknown field: did you mean 'target'\?"),
    ],
)
def test_bad_rows_of_schema_0(change: dict[str, Any], message: str) -> None:
    with pytest.raises(WeftError, match=message):
        record_from_dict({"schema": 0, "id": "1", "instruction": "x", "source": "a.png"} | change)


# -- what a record says --


def test_woven_references_are_named_at_their_place() -> None:
    a, b, source = (
        image_part(f"{x}.png", role) for x, role in (("a", "reference"), ("b", "reference"), ("s", "source"))
    )
    turn = Turn("user", [source, text_part("give it the hat of "), a, text_part(" and "), b, text_part("'s shoes")])
    assert instruction_text(turn) == "give it the hat of picture 2 and picture 3's shoes"
    assert instruction_text(turn, "<img{k}>") == "give it the hat of <img2> and <img3>'s shoes"
    record = Record("r", "multi_edit", [turn])
    assert record.inputs == [source, a, b] and record.instruction_as("image {k}").endswith("image 3's shoes")
    assert instruction_text(Turn("user", [a, text_part(" with "), b])) == "picture 1 with picture 2"
    assert instruction_text(Turn("user", [text_part("wear"), a, text_part("now")])) == "wear picture 1 now"
    assert instruction_text(Turn("user", [source, a, b, text_part(""), text_part("dog of image 2, hat of "), a])) == (
        "dog of image 2, hat of picture 4"
    )
    moves = [text_part("as in "), motion_part("m.bvh", "reference"), text_part(" by "), a]
    assert instruction_text(Turn("user", moves)) == "as in motion 1 by picture 1"


def test_the_last_exchange_counts() -> None:
    turns = [
        Turn("user", [image_part("s.png", "source"), text_part("red")]),
        Turn("assistant", [image_part("1.png"), image_part("bad.png", "rejected"), text_part("done")]),
        Turn("user", [text_part("with the hat of "), image_part("h.png", "reference")]),
        Turn("assistant", [image_part("2.png"), image_part("3.png")]),
    ]
    record = Record("r", "edit", turns)
    assert record.source is turns[1].parts[0] and record.target is turns[3].parts[0]
    assert len(record.targets) == 2 and record.instruction == "with the hat of picture 2"
    first = Record("r", "edit", turns[:2])
    assert first.targets == [turns[1].parts[0]] and first.instruction == "red" and first.mask is None


@settings(max_examples=200, deadline=None)
@given(TEXT)
def test_escaped_braces_weave_to_the_text_itself(text: str) -> None:
    assert weave(text.replace("{", "{{").replace("}", "}}")) == [text_part(text)]


def test_weave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "walk.bvh").write_text("")
    monkeypatch.chdir(tmp_path)
    parts = weave("the object of {a.png} and { walk.bvh } {{x}}")
    assert [p.type for p in parts] == ["text", "image", "text", "motion", "text"]
    assert parts[1].role == "reference" and parts[1].path == (tmp_path / "a.png").as_posix()
    assert parts[-1].text == " {x}"
    assert weave("{a.png}", root=tmp_path)[0].load().size == (6, 4)
    assert make_record(weave("{a.png} in blue")).instruction == "picture 1 in blue"
    for text, message in {
        "of {none.png}": r"\{none\.png\}: no such file .*none\.png",
        "of {a.png": "'{' at character 4 is not closed",
        "of a.png}": "'}' at character 9 closes nothing",
        "of {}": "names no file",
    }.items():
        with pytest.raises(WeftError, match=message):
            weave(text)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(WeftError, match=r"unknown suffix '\.txt', use one of \.png"):
        weave("{a.txt}")


def test_make_record(tmp_path: Path) -> None:
    a, b = picture(tmp_path / "a.png"), picture(tmp_path / "b.png", "blue")
    assert make_record("x").task == "generate" and make_record("x", a).task == "edit"
    assert make_record(weave(f"x {{{b}}}"), a).task == "multi_edit"
    assert make_record("x", references=[b]).task == "multi_generate"
    record = make_record("swap image 2", a, references=[b], mask=b, target=a, size=(64, 96), meta={"k": 1})
    assert record.meta == {"k": 1, "size": [64, 96]} and record.mask is not None and len(record.inputs) == 2
    assert record.instruction == "swap image 2"
    assert make_record("x", a).id == make_record("x", str(a)).id != make_record("x", b).id
    assert make_record("x", a, size=(8, 8)).id != make_record("x", a).id
    for empty in ("", " \n", [], [text_part("")]):
        with pytest.raises(WeftError, match="instruction: empty"):
            make_record(empty, a)
    with pytest.raises(WeftError, match=r"source: no such file .*none\.png"):
        make_record("x", tmp_path / "none.png")
    with pytest.raises(WeftError, match="unknown suffix"):
        make_record("x", tmp_path / "none.xyz")


def test_digest_follows_the_content(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    part = image_part("a.png")
    first = part.digest(tmp_path)
    assert part.digest(tmp_path) == first
    picture(path, "blue")
    os.utime(path, ns=(1, 1))
    assert part.digest(tmp_path) != first
    image = Image.fromarray(np.zeros((2, 6, 3), np.uint8))
    assert image_part(image).digest() == image_part(image.copy()).digest()
    assert image_part(image).digest() != image_part(image.resize((3, 4))).digest()
    assert image_part(LazyPicture("x", path.read_bytes)).digest() == part.digest(tmp_path)
    with pytest.raises(WeftError, match="cannot be read"):
        image_part("none.png").digest(tmp_path)
    with pytest.raises(WeftError, match="is not a picture"):
        motion_part("a.bvh").load()
    with pytest.raises(WeftError, match="lives in memory"):
        image_part(image).file()


# -- cost --


@pytest.mark.slow
def test_reading_100k_rows_takes_seconds(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    turns = [
        {
            "role": "user",
            "parts": [{"type": "image", "path": "a/b.png", "role": "source"}, {"type": "text", "text": "x" * 80}],
        },
        {"role": "assistant", "parts": [{"type": "image", "path": "a/c.png"}]},
    ]
    with path.open("w") as file:
        for k in range(100_000):
            file.write(json.dumps(row(id=str(k), turns=turns)) + "\n")
    start = time.process_time()
    assert sum(1 for _ in read_records(path)) == 100_000
    assert time.process_time() - start < 8  # about 1.5 on an idle core


def test_importing_the_record_is_cheap() -> None:
    code = "import sys, weft.record; print([m for m in ('torch', 'PIL', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
