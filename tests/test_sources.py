"""Sources: public layouts, maps, folders, parquet, shards; rows used, skipped and why; nothing escapes or is lost."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from weft.data.check import check_records
from weft.data.columns import LAYOUTS, fields_of, pick
from weft.data.sources import Source, SourceConfig, load_source
from weft.errors import WeftError
from weft.record import Record, make_record, read_records, write_records


def png(colour: Any = "red", size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def folder(path: Path, **files: bytes | str) -> Path:
    """Files by name; `__` in a name is a `/` and the last `_` the dot."""
    for name, content in files.items():
        file = path / ".".join(name.replace("__", "/").rsplit("_", 1))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(path: Path, *rows: Any) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def load(kind: str, path: Path | str, **settings: Any) -> Source:
    found = load_source(SourceConfig(kind, str(path), **settings))
    assert isinstance(found, Source)
    return found


def colour(record: Record, part: Any) -> tuple[int, ...]:
    return record.load(part).getpixel((0, 0))  # type: ignore[return-value]


RED, BLUE, LIME, WHITE = (255, 0, 0), (0, 0, 255), (0, 255, 0), (255, 255, 255)


@pytest.fixture
def media(tmp_path: Path) -> Path:
    return folder(tmp_path, s_png=png(), t_png=png("blue"), r_png=png("lime"), q_png=png("white"))


# Each public layout with one row as it is published: source, references, mask, target, and what else must hold.
ROWS: dict[str, tuple[dict[str, Any], str, int]] = {
    "OmniEdit": (
        {"omni_edit_id": "task_1", "task": "removal", "src_img": "s.png", "edited_img": "t.png", "o_score": 9.0}
        | {"edited_prompt_list": ["make it blue", "turn it blue"], "width": 6, "height": 4},
        "task_1",
        0,
    ),
    "MagicBrush": (
        {"img_id": 77, "turn_index": 2, "source_img": "s.png", "mask_img": "q.png", "target_img": "t.png"}
        | {"instruction": "make it blue"},
        "77-2",
        0,
    ),
    "UltraEdit": (
        {"idx": 5, "source_image": "s.png", "edited_image": "t.png", "edit_prompt": "make it blue", "ssim": 0.5},
        "5",
        0,
    ),
    "ImgEdit": (
        {"input_images": ["s.png", "r.png", "q.png"], "output_images": ["t.png"], "prompt": "make it blue"},
        "",
        2,
    ),
    "InstructPix2Pix": ({"input_image": "s.png", "edited_image": "t.png", "edit_prompt": "make it blue"}, "", 0),
    "musubi-tuner": (
        {"image_path": "t.png", "control_path_0": "s.png", "control_path_1": "r.png", "caption": "make it blue"},
        "",
        1,
    ),
    "musubi-tuner, one control": ({"image_path": "t.png", "control_path": "s.png", "caption": "make it blue"}, "", 0),
    "NHR-Edit": (
        {"sample_id": "1", "source_file_name": "s.png", "edited_file_name": "t.png", "edit_instruction": "make it blue"}
        | {"category": "colour", "style": "photo", "img_width": 6},
        "",
        0,
    ),
    "ShareGPT-4o-Image": (
        {"input_prompt": "make it blue", "input_image": ["s.png", "r.png"], "output_image": "t.png"},
        "",
        1,
    ),
    "by name": (
        {"id": "x", "source": "s.png", "target": "t.png", "prompt": "make it blue", "references": ["r.png"]},
        "x",
        1,
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_public_layouts(media: Path, name: str) -> None:
    row, id, references = ROWS[name]
    (record,) = load("jsonl", jsonl(media / "d.jsonl", row))
    assert record.instruction == "make it blue" and record.id == (id or "d-0000000")
    assert colour(record, record.source) == RED and colour(record, record.target) == BLUE
    assert [colour(record, r) for r in record.references] == [LIME, WHITE][:references]
    assert record.task == ("multi_edit" if references else "edit")
    assert (record.mask is not None) == ("mask_img" in row)
    if name == "OmniEdit":
        assert record.meta == {"kind": "removal", "score": 9.0}
    write_records(media / "out" / "r.jsonl", [record])  # and it is one of ours from then on
    (again,) = read_records(media / "out" / "r.jsonl")
    assert again.instruction == record.instruction and colour(again, again.target) == BLUE


def test_prompts_without_targets(media: Path) -> None:
    rows = [
        {"prompt": "a", "image": "s.png", "requirement": "is it blue?"},
        {"prompt": "b", "images": ["s.png", "r.png"], "negative_prompt": "ugly"},
    ]
    one, two = load("jsonl", jsonl(media / "train_metadata.jsonl", *rows))
    assert one.target is None and one.meta == {"requirement": "is it blue?"} and colour(one, one.source) == RED
    assert two.meta == {"negative": "ugly"} and len(two.references) == 1
    assert check_records(SourceConfig("jsonl", str(media / "train_metadata.jsonl"))).without_target == 2


def test_flow_factory(media: Path) -> None:
    """Rows of requests with pictures in images/, of prompts alone, and both."""
    folder(media, images__v_png=png("lime"))
    path = jsonl(media / "train.jsonl", {"prompt": "a", "image": "v.png"})
    with pytest.raises(WeftError, match="no such file .*v.png: add the option root=images"):
        load("jsonl", path)
    (record,) = load("jsonl", path, options={"root": "images"})
    assert colour(record, record.source) == LIME
    plain, edit = load("jsonl", jsonl(media / "t.jsonl", {"prompt": "a"}, {"prompt": "b", "images": ["s.png"]}))
    assert (plain.task, plain.instruction, edit.task) == ("generate", "a", "edit")
    (plain,) = load("jsonl", jsonl(media / "n.jsonl", {"prompt": "a", "negative_prompt": "ugly"}))
    assert plain.meta == {"negative": "ugly"}
    with pytest.raises(WeftError, match="fit no known layout"):  # a column of pictures that nobody knows
        load("jsonl", jsonl(media / "u.jsonl", {"prompt": "a", "before": "s.png"}))


def test_gpt_image_edit(tmp_path: Path) -> None:
    """A JSON list in a folder of its own, with paths that begin one above."""
    folder(tmp_path, edit__input__1_png=png(), edit__output__1_png=png("blue"))
    row = {"id": "hqedit_edit_1", "dataset_source": "hqedit", "task": "edit", "input": "input/1.png"}
    row |= {"output": "output/1.png", "instruction": "make it blue", "instruction_type": "original"}
    folder(tmp_path, edit__metadata__hqedit_edit_json=json.dumps([row]))
    (record,) = load("jsonl", tmp_path / "edit" / "metadata" / "hqedit_edit.json", options={"root": ".."})
    assert (record.id, record.task, record.meta) == (row["id"], "edit", {"kind": "edit"})
    assert record.instruction == "make it blue"
    assert colour(record, record.source) == RED and colour(record, record.target) == BLUE
    write_records(tmp_path / "edit" / "records.jsonl", [record], media="keep")
    (again,) = read_records(tmp_path / "edit" / "records.jsonl")
    assert again.source is not None and again.source.path == "input/1.png"


def test_a_list_of_prompts(tmp_path: Path) -> None:
    """flow_grpo's and DiffusionNFT's dataset/*/train.txt: one prompt a line."""
    path = tmp_path / "train.txt"
    path.write_bytes('\ufeffa "red {star}"\r\n\n  caf\u00e9, 5 o\'clock \na "red {star}"\nno end'.encode())
    records = load("prompts", path)
    assert [r.instruction for r in records] == ['a "red {star}"', "caf\u00e9, 5 o'clock", 'a "red {star}"', "no end"]
    assert [r.id for r in records] == [f"train-{k:07d}" for k in range(4)]
    assert {(r.task, r.target, r.root) for r in records} == {("generate", None, tmp_path)}
    assert len(load_source(SourceConfig("prompts", str(path), limit=2))) == 2
    assert load_source(SourceConfig("prompts", str(path), task="draw"))[0].task == "draw"
    write_records(tmp_path / "r.jsonl", records)
    assert [r.instruction for r in read_records(tmp_path / "r.jsonl")] == [r.instruction for r in records]
    path.write_bytes(b"fine\n\xff\xfe\nold\x00\n")
    with pytest.raises(WeftError, match=r"2 of 3 rows are bad.*train.txt:2: prompt: not UTF-8 \(byte 1.*:3: .*control"):
        load_source(SourceConfig("prompts", str(path)))
    found = load_source(SourceConfig("prompts", str(path), options={"max_faults": 0.7}))
    assert [r.id for r in found] == ["train-0000000"]
    for settings, message in (
        ({"map": {"instruction": "x"}}, "one prompt a line, which has no columns"),
        ({"path": str(tmp_path / "no.txt")}, "no.txt: no such file"),
        ({"options": {"root": "x"}}, "'root' .* is unknown"),
    ):
        with pytest.raises(WeftError, match=message):
            load_source(SourceConfig(**({"kind": "prompts", "path": str(path)} | settings)))  # type: ignore[arg-type]
    path.write_text("\n \n")
    with pytest.raises(WeftError, match="holds no record"):
        load_source(SourceConfig("prompts", str(path)))


def test_prompts_of_geneval_keep_what_their_reward_reads(media: Path) -> None:
    """Rows as in the metadata of GenEval and of Flow-GRPO's training set."""
    asked = [{"class": "bench", "count": 2, "color": "red"}]
    rows = [{"tag": "colors", "include": asked, "prompt": "two red benches"}]
    rows.append({"tag": "counting", "include": asked, "exclude": [{"class": "bench", "count": 3}], "prompt": "benches"})
    one, two = load("jsonl", jsonl(media / "train_metadata.jsonl", *rows))
    assert (one.instruction, one.task) == ("two red benches", "generate")
    assert one.meta == {"tag": "colors", "include": asked} and set(two.meta) == {"tag", "include", "exclude"}


def test_multi_turn_rows(media: Path) -> None:
    steps = [
        {"input_images": ["s.png"], "output_images": ["t.png"], "prompt": "blue"},
        {"input_images": ["t.png"], "output_images": ["r.png"], "prompt": "now lime"},
    ]
    (record,) = load("jsonl", jsonl(media / "d.jsonl", {"data": steps}))
    assert [t.role for t in record.turns] == ["user", "assistant"] * 2
    assert colour(record, record.source) == BLUE and colour(record, record.target) == LIME
    assert record.instruction == "now lime"


def test_urls_are_looked_up_among_the_downloads(media: Path) -> None:
    row = {
        "open_image_input_url": "https://x.org/big/s.png?a=1",
        "text": "blue",
        "output_image": "t.png",
        "edit_type": "c",
    }
    path = jsonl(media / "sft.jsonl", row)
    with pytest.raises(WeftError, match="is a URL: download the file"):
        load("jsonl", path)
    (record,) = load("jsonl", path, options={"downloads": "."})
    assert colour(record, record.source) == RED and record.meta["kind"] == "c"
    path = jsonl(media / "preference.jsonl", row | {"rejected_images": ["r.png", "q.png"]})
    (record,) = load("jsonl", path, options={"downloads": "."})
    parts = record.turns[-1].parts
    assert [(p.role, colour(record, p)) for p in parts] == [(None, BLUE), ("rejected", LIME), ("rejected", WHITE)]
    assert colour(record, record.target) == BLUE


def test_pico_banana_in_several_turns(media: Path) -> None:
    files = [{"id": "edit_turn1", "url": "t.png"}, {"id": "final_image", "url": "r.png"}]
    files.append({"id": "original_input_image", "url": "https://x.org/big/s.png"})
    row = {"files": files, "metadata_edit_turn_prompts": ["blue", "now lime"]}
    path = jsonl(media / "multi-turn.jsonl", row)
    for options in ({"downloads": "."}, {}):
        if not options:
            path = jsonl(media / "mapped.jsonl", row | {"local_input_image": "s.png"})
        (record,) = load("jsonl", path, options=options)
        assert [t.role for t in record.turns] == ["user", "assistant"] * 2
        assert colour(record, record.turns[0].parts[0]) == RED and colour(record, record.turns[1].parts[0]) == BLUE
        assert colour(record, record.source) == BLUE and colour(record, record.target) == LIME
        assert record.instruction == "now lime" and record.task == "edit"
    for change, message in (
        ({"files": files[1:]}, "files: no 'edit_turn1' for 2 prompts"),
        ({"files": files[:2]}, "files: no 'original_input_image' for 2 prompts"),
        ({"metadata_edit_turn_prompts": []}, "no turns"),
        ({"files": "x"}, "not lists of files and of texts"),
    ):
        with pytest.raises(WeftError, match=message):
            load("jsonl", jsonl(media / "bad.jsonl", row | change), options={"downloads": "."})


def test_maps_and_roots(media: Path) -> None:
    folder(media, img__x_png=png("white"))
    row = {"before": "x.png", "after": {"file": "x.png"}, "texts": ["no", "yes"], "page": 3, "book": "b"}
    path = jsonl(media / "d.jsonl", row, row | {"page": 4})
    fields = {
        "source": "before",
        "target": "after.file",
        "instruction": "texts[1]",
        "id": "book+page",
        "meta.kind": "book",
    }
    records = load("jsonl", path, map=fields, options={"root": "img"}, task="mine", limit=1)
    assert len(records) == 1 and records[0].id == "b-3" and records[0].instruction == "yes"
    assert (
        records[0].task == "mine"
        and records[0].meta == {"kind": "b"}
        and colour(records[0], records[0].target) == WHITE
    )
    with pytest.raises(WeftError, match="map: unknown field 'sorce': did you mean 'source'"):
        load("jsonl", path, map=fields | {"sorce": "before"})
    with pytest.raises(WeftError, match="has no column 'befor' for source, it has before, after"):
        load("jsonl", path, map=fields | {"source": "befor"})
    with pytest.raises(WeftError, match="fit no known layout .*instruction=COLUMN"):
        load("jsonl", path)
    with pytest.raises(WeftError, match="root: .*/x: no such folder: check the options"):
        load("jsonl", path, map=fields, options={"root": "../x"})


def test_column_expressions() -> None:
    row = {"a": [1, 2, 3], "b.c": 4, "d": {"e": {"f": 5}}, "n_10": "z", "n_2": "y", "n_0": "x", "n_x": "w"}
    expected = {"a[1]": 2, "a[1:]": [2, 3], "a[7]": None, "b.c": 4, "d.e.f": 5, "d.x": None, "q|a[0]": 1}
    expected |= {"n_*": ["x", "y", "z"], "n_*[0]": "x", "n_*[1:]": ["y", "z"], "m_*": None}
    for expression, value in expected.items():
        assert pick(row, expression) == value, expression
    with pytest.raises(WeftError, match="d: dict is not a list"):
        pick(row, "d[0]")
    with pytest.raises(WeftError, match="no column expression"):
        pick(row, "a[x]")
    for layout in LAYOUTS:  # each is recognised as itself by what it needs
        columns = [need.split("|")[0] for need in layout.needs]
        assert fields_of(columns, {"id": ""}, "x") == layout.fields | {"id": ""}


# -- bad rows (skipped by name, refused by rate) --


def test_bad_rows_are_skipped_by_name(media: Path) -> None:
    good = {"source": "s.png", "target": "t.png", "prompt": "p"}
    bad = {
        "{": "row: not JSON",
        "3": "row: int is not an object",
        json.dumps(good | {"source": "../s.png"}): "source: '../s.png' leaves",
        json.dumps(good | {"source": "/etc/passwd"}): "source: '/etc/passwd' is absolute",
        json.dumps(good | {"target": "none.png"}): "target: no such file",
        json.dumps(good | {"target": 5}): "target: int is not a picture",
        json.dumps(good | {"references": ["r.png", None]}): r"references\[1\]: NoneType is not a picture",
        json.dumps(good | {"prompt": " "}): "instruction: missing or empty",
        json.dumps(good | {"prompt": ["p"]}): "instruction: list is not a text",
    }
    rows = [
        good,
        good | {"references": ["r.png"]},
        good | {"references": ["r.png", "q.png"]},
        good | {"source": ".\\s.png"},
    ]
    path = jsonl(media / "d.jsonl", *rows, *bad)
    with pytest.raises(
        WeftError, match=r"9 of 13 rows are bad \(69\.2%, the limit max_faults is 2\.0%\).*d\.jsonl:5: row"
    ):
        load("jsonl", path)
    found = load("jsonl", path, options={"max_faults": 0.7})
    assert [len(r.references) for r in found] == [0, 1, 2, 0]  # ragged references are all used
    assert found.rows == 13 and len(found.faults) == 9
    for number, (fault, message) in enumerate(zip(found.faults, bad.values(), strict=True), 5):
        assert fault.startswith(f"{path}:{number}: ")
        pytest.raises(WeftError, _raise, fault).match(message)


def _raise(message: str) -> None:
    raise WeftError(message)


def test_refusals(media: Path) -> None:
    path = jsonl(media / "d.jsonl", {"prompt": "p", "image": "s.png"})
    for settings, message in (
        ({"kind": "csv"}, "source kind 'csv' is unknown: use one of jsonl"),
        ({"options": {"max_fault": 1}}, "source option 'max_fault' .* did you mean 'max_faults'"),
        ({"options": {"max_faults": 2}}, "max_faults: 2 is not a share"),
        ({"limit": 0}, "limit: 0"),
        ({"path": str(media / "none.jsonl")}, "none.jsonl: no such file"),
        ({"kind": "folder", "map": {"id": "x"}}, "has no columns"),
        ({"kind": "parquet", "path": str(media)}, r"no \.parquet file below it"),
        ({"kind": "python", "path": "weft.record"}, "names no function"),
        ({"kind": "python", "path": "weft.nothing:f"}, "no module 'weft.nothing'"),
        ({"kind": "python", "path": "weft.record:f"}, "has no function 'f'"),
        ({"kind": "python", "path": "gone.py:f"}, "gone.py: no such file"),
    ):
        with pytest.raises(WeftError, match=message):
            load_source(SourceConfig(**({"kind": "jsonl", "path": path} | settings)))  # type: ignore[arg-type]
    (media / "empty.jsonl").write_text("\n")
    with pytest.raises(WeftError, match="empty.jsonl holds no record"):
        load("jsonl", media / "empty.jsonl")


def test_a_picture_as_text_is_a_bad_row_and_not_the_end(media: Path) -> None:
    rows = [{"prompt": "p", "image": "s.png"}, {"prompt": "q", "image": "iVBORw0KGgo" + "A" * 5000}]
    for name in ("d.jsonl", "d.json"):
        (media / name).write_text(json.dumps(rows) if name == "d.json" else "".join(json.dumps(r) + "\n" for r in rows))
        found = load("jsonl", media / name, options={"max_faults": 0.5})
        assert len(found) == 1 and "source: 'iVBORw0KGgoAAA" in found.faults[0] and len(found.faults[0]) < 300


def test_weft_records_and_duplicates(media: Path) -> None:
    write_records(media / "r.jsonl", [make_record(f"{k}", media / "s.png", id=str(k)) for k in range(5)])
    assert [r.id for r in load("jsonl", media / "r.jsonl", limit=3)] == ["0", "1", "2"]
    assert load("jsonl", media / "r.jsonl", task="mine")[0].task == "mine"
    flat = {"id": "0", "instruction": "p", "source": "s.png"}
    assert load("jsonl", jsonl(media / "flat.jsonl", flat))[0].instruction == "p"
    twice = jsonl(media / "d.jsonl", *[{"id": "1", "prompt": "p", "source": "s.png"}] * 2)
    with pytest.raises(WeftError, match=r"id: '1' stands at .*:1 too"):
        load("jsonl", twice)
    assert len(load("jsonl", twice, map={"id": ""})) == 2


# -- folders and functions --


def test_folder_of_pairs(tmp_path: Path) -> None:
    folder(
        tmp_path,
        source__a_jpg=png(),
        target__a_png=png("blue"),
        target__a_txt=" make it blue \n",
        mask__a_png=png("white"),
    )
    folder(tmp_path, source__b_png=png(), target__b_png=png("lime"), b_txt="make it lime")
    folder(tmp_path, reference__b_png=png("white"), reference_2__b_png=png("lime"))
    a, b = load("folder", tmp_path)
    assert (a.id, a.instruction, a.task) == ("a", "make it blue", "edit") and a.mask is not None
    assert colour(a, a.source) == RED and colour(a, a.target) == BLUE
    assert (b.instruction, b.task) == ("make it lime", "multi_edit")
    assert [colour(b, r) for r in b.references] == [WHITE, LIME]
    folder(
        tmp_path, source__c_png=png(), target__d_png=png(), target__d_txt="x", target__e_png=png(), source__e_png=png()
    )
    found = load("folder", tmp_path, options={"max_faults": 1.0})
    assert [r.id for r in found] == ["a", "b"]
    assert "source: no picture 'd'" in found.faults[0] and "no e.txt in" in found.faults[1]
    assert "target: no picture 'c'" in found.faults[2]
    many = {f"reference_{k}__b_png": png((k, 0, 0)) for k in (10, 3)}
    folder(tmp_path, **many, target__01_png=b"", source__x_txt="")
    (tmp_path / "target" / "01.png").rename(tmp_path / "target" / "._a.png")  # what macOS puts beside a picture
    _, b = load("folder", tmp_path, options={"max_faults": 1.0})
    assert [colour(b, r) for r in b.references] == [WHITE, LIME, (3, 0, 0), (10, 0, 0)]
    folder(tmp_path, source__a_png=png())
    with pytest.raises(WeftError, match="a.png and a.jpg have one stem"):
        load("folder", tmp_path)


def test_folder_of_captions_with_controls_elsewhere(tmp_path: Path) -> None:
    folder(tmp_path, set__a_png=png("blue"), set__a_txt="blue", one__a_png=png(), two__a_webp=png("lime"))
    (plain,) = load("folder", tmp_path / "set")
    assert plain.task == "generate" and colour(plain, plain.target) == BLUE
    (edit,) = load("folder", tmp_path / "set", options={"source": "../one", "references": ["../two"]})
    assert colour(edit, edit.source) == RED and colour(edit, edit.references[0]) == LIME
    with pytest.raises(WeftError, match="three: no such folder"):
        load("folder", tmp_path / "set", options={"source": "../three"})


def test_python_function(tmp_path: Path) -> None:
    code = "from weft.record import make_record\ndef mine(n=2, word='x'):\n"
    code += "    return (make_record(f'{word}{k}') for k in range(n))\n"
    (tmp_path / "my_source.py").write_text(code + "def none():\n    return 3\n")
    path = f"{tmp_path / 'my_source.py'}:mine"
    records = load_source(SourceConfig("python", path, options={"n": 4, "word": "y"}, limit=3))
    assert [r.instruction for r in records] == ["y0", "y1", "y2"]
    with pytest.raises(WeftError, match="returned no records"):
        load_source(SourceConfig("python", path.replace("mine", "none")))


# -- parquet --


def test_parquet_with_pictures_in_cells(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")

    def cell(c: str) -> dict[str, Any]:
        return {"bytes": png(c), "path": f"{c}.png"}

    table = pa.table(
        {
            "input_images": [[cell("red")], [cell("red"), cell("lime")], [cell("red"), cell("lime"), cell("white")]],
            "output_images": [[cell("blue")]] * 3,
            "prompt": ["a", "b", "c"],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    records = load("parquet", tmp_path)
    assert [r.id for r in records] == [f"{tmp_path.name}-000000{k}" for k in range(3)]
    assert [[colour(r, p) for p in r.inputs] for r in records] == [[RED], [RED, LIME], [RED, LIME, WHITE]]
    assert all(colour(r, r.target) == BLUE for r in records)
    assert records[0].source.digest() == records[1].source.digest() != records[0].target.digest()  # type: ignore[union-attr]
    write_records(tmp_path / "out" / "r.jsonl", records)
    assert len(list((tmp_path / "out" / "media").glob("*.png"))) == 4
    flat = pa.table(
        {"source": [png(), b"", None], "target": [cell("blue"), cell("blue"), None], "prompt": ["a", "b", "c"]}
    )
    pq.write_table(flat, tmp_path / "flat.parquet")
    rows = load("parquet", tmp_path / "flat.parquet")
    assert colour(rows[0], rows[0].source) == RED and rows[2].target is None
    report = check_records(SourceConfig("parquet", str(tmp_path / "flat.parquet")))
    assert (report.used, report.skipped) == (1, 2) and "flat.parquet:1 source is empty" in report.faults[0]


def test_parquet_with_bytes_alone_and_lists_of_them(tmp_path: Path) -> None:
    """Nothing beside the bytes says how many there are: they were once taken for none."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    references = [[png("lime")], [png("lime"), png("white")], [], None]
    columns = {"source": [{"bytes": png()}] * 4, "target": [png("blue")] * 4, "prompt": list("abcd")}
    pq.write_table(pa.table(columns | {"references": references}), tmp_path / "a.parquet", row_group_size=3)
    records = load("parquet", tmp_path / "a.parquet")
    assert [[colour(r, p) for p in r.inputs] for r in records] == [[RED, LIME], [RED, LIME, WHITE], [RED], [RED]]
    assert [colour(r, r.target) for r in records] == [BLUE] * 4


def test_parquet_of_paths(media: Path) -> None:
    """ImgEdit: rows in parquet, pictures of split tars in folders beside it; single edits and several turns."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    folder(media, single__o_png=png(), single__r_png=png("blue"), Parquet__keep_txt="")
    one = {"input_images": ["single/o.png"], "output_images": ["single/r.png"], "prompt": "make it blue"}
    pq.write_table(pa.Table.from_pylist([one]), media / "Parquet" / "add_part0.parquet")
    with pytest.raises(WeftError, match="no such file .*single/o.png: check the path or the option root"):
        load("parquet", media / "Parquet")
    two = one | {"input_images": ["single/r.png"], "output_images": ["single/o.png"], "prompt": "and back"}
    pq.write_table(pa.Table.from_pylist([{"data": [one, two]}]), media / "turns.parquet")
    for path, options in ((media / "Parquet" / "add_part0.parquet", {"root": ".."}), (media / "turns.parquet", {})):
        (record,) = load("parquet", path, options=options)
        assert colour(record, record.turns[0].parts[0]) == RED and colour(record, record.turns[1].parts[0]) == BLUE
    assert [t.role for t in record.turns] == ["user", "assistant"] * 2 and record.instruction == "and back"
    assert colour(record, record.source) == BLUE


def test_parquet_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(WeftError, match="bad.parquet is not a parquet file"):
        load("parquet", tmp_path / "bad.parquet")
    bomb = pa.table({"source": [bytes(3_000_000)], "target": [b"x"], "prompt": ["a" * 3_000_000]})
    pq.write_table(bomb, tmp_path / "bomb.parquet", compression="gzip")
    monkeypatch.setattr("weft.data.shards.MAX_CHUNK", 1 << 20)
    with pytest.raises(WeftError, match="column prompt has 30.* bytes in one row group, the limit is 1048576"):
        load("parquet", tmp_path / "bomb.parquet")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WeftError, match=r"parquet needs pyarrow: pip install 'weft\[data\]'$"):
        load("parquet", tmp_path / "bomb.parquet")


# -- shards --


def shard(path: Path, *members: tuple[str, bytes | str] | tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            data = member[1] if isinstance(member[1], bytes) else member[1].encode()
            info = tarfile.TarInfo(member[0])
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, **more: bytes) -> list[tuple[str, bytes | str]]:
    pictures = {"source": png(), "target": png("blue")} | more
    return [(f"{key}.{name}.png", data) for name, data in pictures.items()] + [(f"{key}.txt", "make it blue")]


def test_shards(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", *sample("x/1"), *sample("x/2", reference_0=png("lime"), reference_1=png("white")))
    shard(tmp_path / "1.tar", ("7.jpg", png("lime")), ("7.json", '{"caption": "a lime picture", "kind": "k"}'))
    edits = load("webdataset", tmp_path / "0.tar")
    assert [len(r.references) for r in edits] == [0, 2] and colour(edits[1], edits[1].references[1]) == WHITE
    assert colour(edits[0], edits[0].source) == RED and colour(edits[0], edits[0].target) == BLUE
    (made,) = load("webdataset", tmp_path / "1.tar")
    assert (made.task, made.instruction, made.meta) == ("generate", "a lime picture", {"kind": "k"})
    both = load("webdataset", tmp_path / "*.tar", map={"instruction": "txt|caption", "target": "target|jpg"})
    assert [r.id for r in both] == [f"{tmp_path.name}-000000{k}" for k in range(3)] and both.notes == []
    (tmp_path / "0.tar").rename(tmp_path / "train-0.tar")
    shard(tmp_path / "dev-0.tar", *sample("x/3"))
    (note,) = load("webdataset", tmp_path, map={"instruction": "txt|caption", "target": "target|jpg"}).notes
    assert note.startswith("files of the splits dev, train are read as one") and note.endswith("train-*.tar")


def test_cut_and_damaged_shards_are_named(tmp_path: Path) -> None:
    whole = shard(tmp_path / "a.tar", *(member for k in range(8) for member in sample(f"{k}"))).read_bytes()
    found = load("webdataset", tmp_path / "a.tar")
    assert len(found) == 8 and found.faults == []
    step = 6 * 512  # a sample: three members of a header and a block
    for cut in range(512, 8 * step, 700):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        config = SourceConfig("webdataset", str(tmp_path / "cut.tar"), options={"max_faults": 1.0})
        try:
            part = load_source(config)
        except WeftError as error:  # nothing whole is left
            assert cut < step + 512 and "cut.tar" in str(error)
            continue
        assert isinstance(part, Source) and part.faults, cut
        assert len(part) >= (cut - 512) // step  # the sample before the cut may lack a member: it is left out
        for record in part:
            assert record.source is not None and record.target is not None
            assert colour(record, record.target) == BLUE
    damaged = bytearray(whole)
    damaged[3 * step : 3 * step + 512] = b"\x55" * 512  # tarfile alone would take it for the end
    (tmp_path / "bad.tar").write_bytes(damaged)
    with pytest.raises(WeftError, match="1 of 3 rows are bad .*bad.tar: damaged after byte 9216"):
        load("webdataset", tmp_path / "bad.tar")


def test_a_sample_with_a_bad_member_is_left_out_whole(tmp_path: Path) -> None:
    """Without its source an edit would be learned as a new picture."""
    link = tarfile.TarInfo("1.source.png")
    link.type, link.linkname = tarfile.SYMTYPE, "0.source.png"
    shard(tmp_path / "a.tar", *sample("0"), link, ("1.target.png", png("blue")), ("1.txt", "x"), *sample("2"))
    found = load("webdataset", tmp_path / "a.tar", options={"max_faults": 0.5})
    assert [r.source is not None for r in found] == [True, True] and found.rows == 3
    assert found.faults == [f"{tmp_path}/a.tar:1.source.png: a link or a device, not a file: remove the member"]


def test_nothing_escapes_from_a_shard(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    folder(tmp_path, secret_txt="secret")
    hostile: list[Any] = [("../up.txt", "x"), ("/abs.txt", "x"), ("a/../../up.png", png()), ("..\\up.txt", "x")]
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        info = tarfile.TarInfo(f"9.{kind.decode()}.txt")
        info.type, info.linkname = kind, "../secret.txt"
        hostile.append(info)
    hostile.append(("8.json", json.dumps({"source": "../secret.txt", "target": "/etc/passwd", "prompt": "x"})))
    hostile.append(("7.json", "[" * 100_000))
    shard(inside / "a.tar", *sample("1"), *hostile)
    found = load("webdataset", inside / "a.tar", options={"max_faults": 1.0})
    assert [r.id for r in found] == ["a-0000000"]
    text = "\n".join(found.faults)
    assert text.count("leads out of the shard") == 4 and text.count("a link or a device") == 4
    assert "shards hold their pictures themselves" in text and "7.json is not json" in text
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.tar", "in", "secret.txt"]


# -- pictures --


FAULTS = {
    "cut.jpg": lambda: _jpeg()[: len(_jpeg()) // 2],
    "empty.png": lambda: b"",
    "page.jpg": lambda: b"<html>404 not found</html>",
}


def _jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_five_percent_of_bad_pictures(tmp_path: Path) -> None:
    records = []
    for k in range(60):
        name = f"{k}.png"
        (tmp_path / name).write_bytes(png())
        records.append(make_record("x", name, target=name, id=str(k), root=tmp_path))
    odd = {"cmyk.jpg": ("CMYK", "JPEG"), "grey.png": ("I;16", "PNG"), "alpha.gif": ("P", "GIF")}
    for name, (mode, kind) in odd.items():  # unusual, not bad
        Image.new(mode, (5, 5)).save(tmp_path / name, kind)
        records.append(make_record("x", name, target="0.png", id=name, root=tmp_path))
    for name, make in FAULTS.items():
        (tmp_path / name).write_bytes(make())
        records.insert(7, make_record("x", "0.png", target=name, id=name, root=tmp_path))
    write_records(tmp_path / "r.jsonl", records, media="keep")
    checked = check_records(tmp_path / "r.jsonl")
    assert (checked.rows, checked.used, checked.pictures, checked.skipped) == (66, 63, 126, 3)
    assert [r.id for r in checked.usable] == [r.id for r in records if r.id not in FAULTS]
    assert [f.split(":")[0] for f in checked.faults] == [f"record {n}" for n in reversed(FAULTS)]
    assert sum(checked.reasons().values()) == 3 and checked.aspect_changes == 3
    text = str(checked)
    assert "66 rows, 63 used, 3 skipped" in text and "page.jpg is a web page" in text and "references: 0 in 63" in text
