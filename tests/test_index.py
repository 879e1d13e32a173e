"""Large JSONL: rows are read from the file one by one, exactly those that reading it whole gives; the index is kept."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from weft.data import index
from weft.data.sources import Source, SourceConfig, load_source
from weft.errors import WeftError
from weft.record import read_records


@pytest.fixture(autouse=True)
def keep_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "KEEP", 1)


def row(k: int, **more: object) -> str:
    parts = [{"type": "text", "text": f"grün {k} \u2028" + "x" * (k % 7)}]
    return json.dumps(
        {"schema": 1, "id": f"r{k}", "task": "generate", "turns": [{"role": "user", "parts": parts}]} | more
    )


def load(path: Path, **settings: object) -> Source:
    found = load_source(SourceConfig("jsonl", str(path), **{"options": {"max_faults": 0.5}} | settings))  # type: ignore[arg-type]
    assert isinstance(found, Source)
    return found


def scans(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    done: list[Path] = []
    scan = index._scan
    monkeypatch.setattr(index, "_scan", lambda path, *rest: done.append(path) or scan(path, *rest))  # type: ignore[func-returns-value]
    return done


def mixed(path: Path) -> Path:
    """A byte order mark, empty lines, Windows line ends, older rows, faults, and no line end at the end."""
    lines = ["\ufeff" + row(0), "", row(1) + "\r", "{", json.dumps({"id": "old", "instruction": "p"}), "  ", row(1)]
    lines += [json.dumps({"id": "bad", "schema": 1, "task": "t", "turns": []}), row(2, meta={"size": [3, 4]})]
    path.write_text("\n".join(lines), encoding="utf-8", newline="")
    return path


def test_every_row_is_that_of_the_whole_file(tmp_path: Path) -> None:
    path = mixed(tmp_path / "d.jsonl")
    faults: list[str] = []
    whole = list(read_records(path, faults))
    for _ in range(2):  # read, then by the kept index
        found = load(path)
        assert [found[k] for k in (3, 0, 2, 1, -1)] == [whole[k] for k in (3, 0, 2, 1, 3)]
        assert list(found) == whole and found[1:3] == whole[1:3] and found.rows == 7
        assert [r.id for r in found] == ["r0", "r1", "old", "r2"] and found[2].task == "generate"  # migrated
        assert [f.split(": ")[:2] for f in found.faults] == [f.split(": ")[:2] for f in faults]
        assert [f.split(":")[1] for f in found.faults] == ["4", "7", "8"]
        assert "id: 'r1' stands at" in found.faults[1] and "turns: missing or empty" in found.faults[2]
    with pytest.raises(IndexError):
        found[4]
    assert [r.id for r in load(path, limit=2)] == ["r0", "r1"] and load(path, task="mine")[0].task == "mine"


def test_foreign_rows_are_read_one_by_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"caption": f"c{k}"} if k != 3 else {"caption": 3}) + "\n" for k in range(9)))
    done = scans(monkeypatch)
    for _ in range(2):
        found = load(path, map={"instruction": "caption"})
        assert [r.id for r in found] == [f"d-000000{k}" for k in range(9) if k != 3]
        assert found[3].instruction == "c4" and found.faults[0].startswith(f"{path}:4: instruction: int is not a text")
    assert len(done) == 1
    assert load(path, map={"instruction": "caption", "meta.x": "caption"})[0].meta == {"x": "c0"} and len(done) == 2


def test_an_index_of_another_file_or_time_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(row(1) + "\n" + row(2) + "\n")
    done = scans(monkeypatch)
    first = load(path)
    (kept,) = tmp_path.glob("d.jsonl.*.index")
    assert [r.id for r in load(path)] == ["r1", "r2"] and len(done) == 1
    path.write_text(row(2) + "\n" + row(1) + "\n")  # of the same size
    os.utime(path, ns=(1, 1))
    with pytest.raises(WeftError, match=r"d.jsonl:1: the file has changed since it was opened"):
        first[0]
    assert [r.id for r in load(path)] == ["r2", "r1"] and len(done) == 2
    for damage in (b"", b"PK\x03\x04", kept.read_bytes()[:-30]):
        kept.write_bytes(damage)
        assert [r.id for r in load(path)] == ["r2", "r1"]
    assert len(done) == 5 and [r.id for r in load(path)] == ["r2", "r1"] and len(done) == 5


def test_a_row_whose_picture_has_come_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"prompt": "p", "target": f"{k}.png"}) + "\n" for k in range(3)))
    for k in (0, 1):
        (tmp_path / f"{k}.png").write_bytes(b"x")
    done = scans(monkeypatch)
    assert len(load(path)) == 2 and load(path).faults[0].startswith(f"{path}:3: target: no such file")
    assert len(done) == 1
    (tmp_path / "2.png").write_bytes(b"x")
    assert len(load(path)) == len(load(path)) == 3 and load(path).faults == [] and len(done) == 2
    (tmp_path / "0.png").unlink()
    with pytest.raises(WeftError, match=r"d.jsonl:1: target: no such file"):  # as training meets it, and leaves it out
        load(path)[0]


def test_where_nothing_can_be_written_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(row(1) + "\n")

    def refused(*args: object) -> None:
        raise WeftError("read-only")

    monkeypatch.setattr(index, "_keep", refused)
    assert load(path).notes == ["its index cannot be kept, every start reads it whole: read-only"]


def test_sizes_are_kept_until_the_picture_changes(tmp_path: Path) -> None:
    from PIL import Image

    from weft.record import make_record
    from weft.train.sizes import SizeTable

    records = []
    for k in range(3):
        Image.new("RGB", (8 + k, 4)).save(tmp_path / f"{k}.png")
        records.append(make_record("p", target=f"{k}.png", root=tmp_path))

    def sizes() -> tuple[list[tuple[int, int]], int]:
        table = SizeTable(tmp_path / "sizes.npz", len(records))
        found = [table.size(k, record) for k, record in enumerate(records)]
        table.write()
        return found, table.opened

    assert sizes() == ([(4, 8), (4, 9), (4, 10)], 3)
    assert sizes() == ([(4, 8), (4, 9), (4, 10)], 0)
    Image.new("RGB", (2, 2)).save(tmp_path / "1.png")
    assert sizes() == ([(4, 8), (2, 2), (4, 10)], 1)
    records.reverse()
    assert sizes()[0] == [(4, 10), (2, 2), (4, 8)]
    records[0].meta["size"] = [7, 7]
    assert sizes()[0][0] == (7, 7)
    (tmp_path / "0.png").unlink()
    with pytest.raises(WeftError, match=r"0\.png does not exist"):
        sizes()


@pytest.mark.long
def test_a_hundred_thousand_rows_take_seconds(tmp_path: Path) -> None:
    """Prints seconds and memory; `-rP` shows them."""
    import time
    import tracemalloc

    path = tmp_path / "d.jsonl"
    path.write_text("".join(row(k, meta={"size": [512, 768]}) + "\n" for k in range(100_000)))
    seconds = []
    for _ in range(2):
        started = time.process_time()
        found = load(path)
        seconds.append(time.process_time() - started)
    started = time.process_time()
    assert all(found[k].id == f"r{k}" for k in range(0, 100_000, 10))
    each = (time.process_time() - started) / 10_000
    tracemalloc.start()
    again = load(path)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(again) == 100_000 and seconds[0] < 30 and seconds[1] < 1 and held < 8e6
    print(
        f"{path.stat().st_size / 1e6:.0f} MB: indexed in {seconds[0]:.1f} s of CPU, "
        f"opened again in {seconds[1]:.2f} s, a record in {each * 1e6:.0f} us, {held / 1e6:.1f} MB held"
    )
