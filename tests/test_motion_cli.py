"""Movements at the command line and in the Python face: generate, edit, describe, convert, check, show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import weft
from motion_clips import procedural
from test_cli import Run, is_one_line
from test_cli import weft as weft_run  # noqa: F401  (a fixture)
from weft.api_motion import MotionModel, MotionOptions
from weft.errors import WeftError
from weft.motion import Motion, load_part, place, read_motion, retarget, write_motion
from weft.record import Part, Record, make_record, motion_part, read_records, text_part, write_records


@pytest.fixture
def run(weft_run: Run) -> Run:  # noqa: F811
    return weft_run


@pytest.fixture(scope="module")
def clip() -> Motion:
    return Motion(place(retarget(procedural(24, 5, swing=0.2))))


class Echo:
    """Answers with the source turned by its seed in degrees and a text, or a clip of the asked length."""

    name = "echo"

    def __init__(self, clip: Motion) -> None:
        self.clip = clip

    def respond(self, records: Sequence[Record], *, seeds: Sequence[int], options: MotionOptions) -> list[list[Part]]:
        answers = []
        for record, seed in zip(records, seeds, strict=True):
            motion = load_part(record.source, record.root) if record.source else self.clip
            if options.seconds is not None:
                motion = motion.crop(0, int(options.seconds * 20))
            said = text_part(f"{record.instruction} {len(motion)}")
            moved = Motion(motion.joints + seed, motion.fps)
            answers.append([said] if record.task == "describe" else [said, motion_part(moved)])
        return answers


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch, clip: Motion) -> None:
    monkeypatch.setattr("weft.load_motion", lambda *_, **__: MotionModel(Echo(clip), "echo"))


def test_python_face(clip: Motion, tmp_path: Path) -> None:
    model = MotionModel(Echo(clip))
    write_motion(clip, tmp_path / "a.npz")
    assert np.allclose(model.generate("walk", seed=3).joints, clip.joints + 3)
    assert len(model.edit(tmp_path / "a.npz", "slower", seconds=0.5)) == 10
    assert model.describe(clip) == "Describe the movement. 24"
    records = [make_record("walk", id="a"), make_record("run as in", references=[clip], id="b")]
    outputs = list(model.run(records, n=2, options=MotionOptions(batch=3)))
    again = list(model.run(records[1:], n=2))
    assert [o.seed for o in outputs[2:]] == [o.seed for o in again] and len({o.seed for o in outputs}) == 4
    with pytest.raises(WeftError, match="seconds is 0"):
        model.generate("walk", seconds=0)
    with pytest.raises(WeftError, match="give it once"):
        model.generate("walk", seconds=2, options=MotionOptions(seconds=2))
    assert isinstance(weft.MotionModel, type)


def test_make_and_describe(run: Run, echo: None, clip: Motion, tmp_path: Path) -> None:
    walk = tmp_path / "walk.bvh"
    for suffix in ("bvh", "glb", "npz", "npy", "gif"):
        status, out, err = run("generate", "a person walks", "-o", tmp_path / f"o.{suffix}", "--seconds", "0.3")
        assert status == 0 and out.strip().endswith(f"o.{suffix}") and "1 movement(s)" in err
    facts = json.loads((tmp_path / "o.json").read_text())
    assert facts["instruction"] == "a person walks" and facts["seconds"] == 0.3 and facts["model"] == "echo"
    assert read_motion(tmp_path / "o.npz").meta["weft"]["seed"] == 0
    assert read_motion(tmp_path / "o.glb", fps=20).meta["weft"]["seed"] == 0
    with Image.open(tmp_path / "o.gif") as gif:
        assert gif.n_frames == 6 and json.loads(gif.info["comment"])["seed"] == 0
    write_motion(clip, walk)
    told = "keep the action, take the style of {" + str(walk) + "}"
    status, out, _ = run("edit", walk, told, "-o", tmp_path / "e.npy", "-n", 2, "--no-metadata")
    assert status == 0 and out.split() == [str(tmp_path / f"e-{k}.npy") for k in (0, 1)]
    difference = np.load(tmp_path / "e-1.npy") - np.load(tmp_path / "e-0.npy")
    assert np.allclose(difference, 1, atol=1e-5) and not (tmp_path / "e-0.json").exists()
    assert run("describe", walk, "what is it?")[1] == "what is it? 24\n"
    write_records(tmp_path / "r.jsonl", [make_record("walk", clip, id="a/1"), make_record("walk", clip, id="b")])
    status, out, _ = run("edit", "--records", tmp_path / "r.jsonl", "-o", tmp_path / "many", "--format", "npz")
    assert status == 0 and [Path(p).name for p in out.split()] == ["a_1.npz", "b.npz"]


def test_bad_requests(run: Run, clip: Motion, tmp_path: Path) -> None:
    walk, out = tmp_path / "walk.npz", tmp_path / "o.bvh"
    write_motion(clip, walk)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    is_one_line(run("generate", "walk", "-o", out, "--model", "tiny-nothing"), "tiny-nothing", "motion models there")
    is_one_line(run("generate", "walk", "-o", out, "--model", "tiny-kontext"), "does not make movements")
    is_one_line(run("generate", "walk", "-o", out, "--steps", 3), "--steps does nothing for movements")
    is_one_line(run("generate", "walk", "-o", out, "--tiling"), "--tiling does nothing for movements")
    is_one_line(run("generate", "walk", "-o", out, "--seconds", 0), "seconds is 0")
    is_one_line(run("generate", "walk", "-o", tmp_path / "o.png", "--top-k", 3), "--top-k does nothing for pictures")
    is_one_line(run("generate", "walk", "-o", tmp_path / "o.fbx"), ".bvh", ".png")
    is_one_line(run("edit", walk, "slower", "-o", tmp_path / "o.png"), "holds a movement")
    is_one_line(run("edit", tmp_path / "a.png", "slower", "-o", out), "holds a picture")
    is_one_line(run("describe", walk, "--vlm", "x"), "--vlm does nothing for movements")
    is_one_line(run("describe", tmp_path / "a.png"), "pictures need --vlm")
    is_one_line(run("describe", walk, " "), "empty")
    is_one_line(run("describe", walk, "--model", "none"), "no motion model 'none'")
    assert not out.exists()


def test_records_hold_movements(clip: Motion, tmp_path: Path) -> None:
    write_motion(clip, tmp_path / "a.npz")
    parts = weft.weave("walk as in {a.npz}", root=tmp_path)
    record = make_record(parts, source=clip, target=clip.mirror(), id="1")
    assert record.task == "multi_edit" and record.instruction == "walk as in motion 2"
    write_records(tmp_path / "set" / "r.jsonl", [record])
    (again,) = read_records(tmp_path / "set" / "r.jsonl")
    assert again.source and again.target and again.instruction == record.instruction
    assert load_part(again.source, again.root).digest == clip.digest
    assert load_part(again.target, again.root).digest == clip.mirror().digest
    with pytest.raises(WeftError, match="load_part"):
        again.load(again.source)
    (tmp_path / "a.amc").write_text("1\n")
    with pytest.raises(WeftError, match="convert it to .bvh"):
        write_records(tmp_path / "x.jsonl", [make_record("walk", tmp_path / "a.amc")])
