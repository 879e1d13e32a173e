"""The tour on a tiny random model, with the smallest amounts of work: every stage runs, and the report is complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from weft import tour
from weft.cli.main import main
from weft.media import read_metadata
from weft.world.oracle import judge, scenes


@pytest.mark.slow
def test_the_tour_runs_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny import tiny_kontext_folder

    model = tiny_kontext_folder(tmp_path / "tiny")
    monkeypatch.setattr(tour, "_between", lambda value, low, high: 2)
    monkeypatch.setattr(tour, "probe", lambda model: tour.Pace(0.01, 0.01, 0.01, 0.01, steps=2, guidance=1.0))
    monkeypatch.setattr(tour, "SENTENCES", 2)
    monkeypatch.setattr(tour, "CHAINS", (("recolour", "add"),))
    monkeypatch.setattr("weft.cli.shipped.picture_model", lambda references: "tiny-kontext")  # see test_omni.py
    monkeypatch.setattr("weft.cli.shipped.zoo_models", dict)  # no stage on movement: see below
    lines: list[str] = []
    out = tmp_path / "tour"
    (out / tour.WORK).mkdir(parents=True)
    (out / tour.WORK / "old").touch()
    page = tour.run_tour(out, model=str(model), say=lines.append)

    text = page.read_text()
    for words in ("A tour of weft", "1. Generate", "2. Edit", "3. Measure", "4. Teach", "chance", "never seen"):
        assert words in text
    assert text.count("data:image/png;base64") > 30
    numbers = json.loads((out / "tour.json").read_text())
    assert numbers["world"]["groups"]["generate"]["success"]["count"] == 2
    assert numbers["tone_before"]["groups"].keys() == numbers["tone_after"]["groups"].keys()
    assert set(numbers["seconds"]) == {*tour.STAGES, "all"}
    assert numbers["train"]["steps"] == 2
    pictures = list((out / "pictures").glob("*.png"))
    assert (out / "pictures" / "overview.png").is_file()
    made = [path for path in pictures if "source" not in path.name and path.name != "overview.png"]
    assert len(made) == 2 * 2 + 11 + 2
    assert all(read_metadata(path)["model"] == str(model) for path in made)
    assert not (out / tour.WORK / "old").exists()

    # The page's own commands make its pictures again.
    first = read_metadata(out / "pictures" / "edit-1.png")
    source, again = out / "pictures" / "edit-1-source.png", tmp_path / "again.png"
    words = ["edit", str(source), first["instruction"], "--seed", str(first["seed"]), "-o", str(again)]
    assert main([*words, "--model", str(model)]) == 0
    close = ImageChops.difference(Image.open(again), Image.open(out / "pictures" / "edit-1.png")).getextrema()
    assert max(high for _, high in close) <= 1
    assert [line for line in lines if line.startswith("[4/4]")]


@pytest.mark.slow
def test_movements_join_the_tour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the model that ships: files that open, a page that plays them, and verdicts on what is shown."""
    from weft import tour_motion
    from weft.motion import read_motion
    from weft.report.page import Page

    monkeypatch.setattr(tour_motion, "ASKED", (("generate", 1), ("edit", 1), ("describe", 1)))
    monkeypatch.setattr(tour_motion, "SIZE", 32)
    found = tour.Findings(tour.Pace(0.01, 0.01, 0.01, 0.01))
    said: list[str] = []
    tour_motion.move(None, found, tmp_path, 0, said.append)  # type: ignore[arg-type]
    made, edited, told = found.moved
    assert len(read_motion(tmp_path / "movements" / "1.bvh")) == len(made.output.motion)
    assert [name for name, _ in edited.files] == ["source", "output", "exact target"]
    assert told.output.text and told.output.text in said[2]
    with Image.open(tmp_path / "movements" / "overview.gif") as sheet:
        assert sheet.n_frames >= 20
    page = Page("t")
    tour_motion.moved_section(page, found, 5)
    assert page.html().count("data:image/gif;base64") == sum(len(m.files) for m in found.moved)


@pytest.mark.slow
def test_chains_are_exact(tmp_path: Path) -> None:
    for kinds in tour.CHAINS:
        for seed in range(3):
            chain = tour.chain_records(kinds, seed)
            assert [record.meta["kind"] for record in chain] == list(kinds)
            for record, after in zip(chain, chain[1:], strict=False):
                assert scenes(record)[1] == scenes(after)[0]
            for record in chain:
                assert record.target and judge(record, record.load(record.target)).success
                assert record.source and not judge(record, record.load(record.source)).success


def test_the_amounts_follow_the_machine() -> None:
    fast, slow = tour.Pace(1e-5, 1e-4, 1e-4, 1e-5), tour.Pace(0.02, 0.3, 0.2, 0.1)
    assert (fast.measured(), fast.held_out(), fast.examples(), fast.train_steps(32)) == (32, 64, 704, 500)
    assert (slow.measured(), slow.held_out(), slow.examples(), slow.train_steps(32)) == (4, 8, 96, 20)
    normal = tour.Pace(0.002, 0.05, 0.03, 0.006)
    work = 11 * normal.measured() * (normal.picture + 2 * normal.judge) + 2 * normal.held_out() * normal.picture
    work += normal.examples() * normal.example + normal.train_steps(32) * 32 * normal.train
    assert 80 < work < 160, "with start, pictures and report: under three minutes"


def test_the_probe_is_quick_and_positive(tmp_path: Path) -> None:
    import weft
    from tiny import tiny_kontext_folder

    model = weft.load(tiny_kontext_folder(tmp_path / "tiny"))
    pace = tour.probe(model)
    assert min(pace.step, pace.judge, pace.example, pace.train) > 0
    network = model.flow.modules()["transformer"]
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
