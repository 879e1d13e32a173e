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
        answers: list[list[Part]] = []
        for record, seed in zip(records, seeds, strict=True):
            motion = load_part(record.source, record.root) if record.source else self.clip
            if options.seconds is not None:
                motion = motion.crop(0, int(options.seconds * 20))
            said = text_part(f"{record.instruction} {len(motion)}")
            moved = Motion(motion.joints + seed % 1000, motion.fps)
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
    assert model.describe(clip) == "Describe the motion. 24"
    records = [make_record("walk", id="a"), make_record("run as in", references=[clip], id="b")]
    outputs = list(model.run(records, n=2, options=MotionOptions(batch=3)))
    again = list(model.run(records[1:], n=2))
    assert [o.seed for o in outputs[2:]] == [o.seed for o in again] and len({o.seed for o in outputs}) == 4
    with pytest.raises(WeftError, match="seconds is 0"):
        model.generate("walk", seconds=0)
    with pytest.raises(WeftError, match="give it once"):
        model.generate("walk", seconds=2, options=MotionOptions(seconds=2))
    assert isinstance(weft.MotionModel, type)


@pytest.mark.slow
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


def test_a_real_model_folder(run: Run, tmp_path: Path) -> None:
    """Random weights, the real code: from the sentence to the file, through an edit with a reference, to a text."""
    from tiny_motion import tiny_motion_folder

    model = ("--model", tiny_motion_folder(tmp_path / "model", "flat"))
    first, second = tmp_path / "a.npz", tmp_path / "b.bvh"
    words = ("generate", "a person walks", "-o", first, *model, "--seconds", 1, "--seed", 4)
    assert run(*words)[0] == 0 and len(read_motion(first)) == 20
    before = read_motion(first).digest
    assert run(*words)[0] == 0 and read_motion(first).digest == before
    told = "take the style of {" + str(first) + "}"
    assert run("edit", first, told, "-o", second, *model, "--seconds", 0.6, "--rounds", 1)[0] == 0
    assert len(read_motion(second)) == 12
    assert json.loads(second.with_suffix(".json").read_text())["rounds"] == 1
    status, _, err = run("describe", second, *model)
    assert status == 0 or "wrote nothing" in err


@pytest.mark.slow
def test_between_two_movements_and_in_a_row(run: Run, tmp_path: Path) -> None:
    """Random weights, the real code: what must hold whatever was learnt."""
    from tiny_motion import motion, tiny_motion_folder

    model = ("--model", tiny_motion_folder(tmp_path / "model", "flat"))
    a, b, out = tmp_path / "a.npz", tmp_path / "b.npz", tmp_path / "o.npz"
    write_motion(motion(12, 1), a)
    write_motion(motion(12, 2), b)
    made = ("generate", "a person walks", "-o", out, *model, "--seconds", 2)

    def frames(*words: object) -> np.ndarray:
        status, _, err = run(*made, *words)
        assert status == 0, err
        return read_motion(out).joints

    plain, between = frames(), frames("--start", a, "--end", b)
    assert len(between) == 40 and not np.allclose(between, plain)
    record = make_record("a person walks", start=a, end=b)
    assert [p.role for p in record.request.parts] == ["start", "end", None] and record.task == "between"
    assert make_record("a person walks", start=a).task == "generate"
    python = weft.load_motion(model[1]).generate("a person walks", start=a, end=str(b), seconds=2)
    assert np.allclose(between, python.joints, atol=1e-5)

    row = frames("--then", "walk faster", 1, "--then", "{" + str(a) + "} again", 0.6)
    assert len(row) == 40 + 20 + 12
    assert read_motion(out).meta["weft"]["instruction"] == (
        "a person walks (2 s), walk faster (1 s), motion 1 again (0.6 s)"
    )
    on = frames("--start", a)
    assert len(on) == 12 + 40
    assert len(frames("--start", a, "-n", 1, "--then", "walk faster", 1)) == 12 + 40 + 20
    other = weft.load_motion(model[1]).timeline([("walk faster", 1.0)], start=read_motion(a))
    assert np.allclose(other.joints[:8], on[:8], atol=1e-4), "both begin with the same movement"

    words = ("edit", a, "walk faster", "-o", out, *model)
    write_motion(motion(40, 3), a)
    assert run(*words, "--replace", 0.6, 1.4)[0] == 0 and len(read_motion(out)) == 40
    replaced = read_motion(out)
    assert replaced.meta["weft"]["seconds"] == 2.0
    assert run(*words, "--replace", 0.6, 1.4, "--seconds", 1.8)[0] == 0 and len(read_motion(out)) == 36

    for line, *told in (
        ((*made, "--start", a, "--end", b), "2 s are asked for and start and end are 2.6 s, this model makes 2.4 s"),
        ((*made, "--end", b), "--end needs a --start"),
        ((*made, "--start", b, "--end", b, "--then", "x", 1), "--end needs a --start and no --then"),
        ((*made[:-2], "--then", "walk", 1), "--seconds is missing"),
        ((*made, "--then", "walk", 0.05), "seconds is 0.05"),
        ((*made, "--then", " ", 1), "scene 1 is empty"),
        ((*made, "--then", "walk", 1, "--rounds", 1), "--rounds does nothing in a row"),
        ((*made, "--start", tmp_path / "no.bvh"), "start", "no.bvh does not exist"),
        (("generate", "a star", "-o", tmp_path / "o.png", "--start", b), "--start does nothing for pictures"),
        (("generate", "--records", b, "-o", tmp_path / "d", "--then", "x", 1), "--then does nothing with --records"),
        ((*words, "--replace", 0.2, 1), "--replace 0.2 1: of 2 s, at least 0.4 must stay"),
        ((*words, "--replace", 1, 0.8), "--replace 1 0.8"),
        ((*words, "--replace", 0.6, 1, "--mask", b), "--mask does nothing for movements"),
    ):
        is_one_line(run(*line), *told)
    with pytest.raises(WeftError, match="belong together"):
        weft.load_motion(model[1]).generate("walk", start=a)


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


ACCLAIM_LIKE = {"pelvis": "Hip", "neck": ["Chest", "Head", 0.5]}


def folder_of_clips(folder: Path, clip: Motion) -> Path:
    (folder / "02").mkdir(parents=True)
    write_motion(clip, folder / "02" / "02_01.bvh")
    write_motion(Motion(clip.joints * 1.0, 30), folder / "02" / "02_02.npz")
    (folder / "02" / "02_03.bvh").write_text("HIERARCHY\nROOT a\n{\n")
    (folder / "d.csv").write_text('Subject,Trial #,"Motion Description",fps\n2,1,"walk, turn left",120\n2,2,run,120\n')
    return folder


@pytest.mark.slow
def test_convert_files(run: Run, clip: Motion, tmp_path: Path) -> None:
    clips = folder_of_clips(tmp_path / "in", clip)
    one = clips / "02" / "02_01.bvh"
    for name in ("a.glb", "a.npz", "a.gif", "a.mp4"):
        small = ("--size", 32) if name in ("a.gif", "a.mp4") else ()
        words = ("data", "convert", one, "-o", tmp_path / name, "--fps", 10, *small)
        assert run(*words)[:2] == (0, f"{tmp_path / name}\n")
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 12 and gif.info["duration"] == 100
    assert read_motion(tmp_path / "a.npz").fps == 10 and len(read_motion(tmp_path / "a.npz")) == 12
    assert run("data", "convert", one, "-o", tmp_path / "f.npy", "--to", "features", "--heading", "correct")[0] == 0
    assert np.abs(np.load(tmp_path / "f.npy") - read_motion(one).features(heading="correct")).max() < 1e-6
    status, out, err = run("data", "convert", clips, "-o", tmp_path / "out", "--to", "glb", "--place")
    assert status == 1 and "02_03.bvh" in err and "2 files, 1 faults" in err
    found = read_motion(tmp_path / "out" / "02" / "02_02.glb", fps=30)
    assert len(found) == 24 and np.abs(found.joints[0, 0, [0, 2]]).max() < 1e-4
    table = {k: k for k in clip.layout.joints}
    (tmp_path / "t.json").write_text(json.dumps(table | {"spine2": ["spine1", "spine3", 0.4]}))
    assert run("data", "convert", one, "-o", tmp_path / "t.npy", "--skeleton", tmp_path / "t.json")[0] == 0
    moved = np.load(tmp_path / "t.npy") - read_motion(one).joints
    assert np.abs(np.delete(moved, 6, axis=1)).max() < 1e-6 < 1e-3 < np.abs(moved[:, 6]).max()
    is_one_line(run("data", "convert", one, "-o", tmp_path / "x.bvh", "--skeleton", "poser"), "poser", "mixamo")
    is_one_line(run("data", "convert", one, "-o", tmp_path / "x.bvh", "--skeleton", "mixamo"), "no joint 'Hips'")
    is_one_line(run("data", "convert", one, "-o", tmp_path / "x.npy", "--heading", "correct"), "--heading does nothing")
    is_one_line(run("data", "convert", one, "-o", tmp_path / "x.npz", "--exact"), "exact does nothing")
    is_one_line(run("data", "convert", one, "-o", tmp_path / "x.glb", "--to", "bvh"), "contradict")
    is_one_line(run("data", "convert", clips, "-o", tmp_path / "x.glb"), "folder")
    is_one_line(run("data", "convert", one, "-o", tmp_path / "x.glb", "--task", "edit"), "--task does nothing")
    is_one_line(run("data", "convert", one, "-o", tmp_path / "x.jsonl", "--fps", 20), "--fps does nothing")
    is_one_line(run("data", "convert", clips / "02" / "02_03.bvh", "-o", tmp_path / "x.glb"), "02_03.bvh", "cut off")


def test_feature_folder_and_records(run: Run, clip: Motion, tmp_path: Path) -> None:
    clips, out = folder_of_clips(tmp_path / "in", clip), tmp_path / "set"
    words = ("data", "convert", clips, "-o", out, "--to", "humanml3d", "--captions", clips / "d.csv")
    status, _, err = run(*words)
    assert status == 1 and "4 files, 1 faults" in err
    assert (out / "all.txt").read_text().split() == ["02_02_01", "M02_02_01", "02_02_02", "M02_02_02"]
    assert (
        (out / "texts" / "M02_02_01.txt").read_text().startswith("walk, turn right#walk/OTHER turn/OTHER right/OTHER#")
    )
    assert np.load(out / "Std.npy").shape == (263,) and np.load(out / "new_joints" / "02_02_02.npy").shape[1:] == (
        22,
        3,
    )
    said = tmp_path / "said"
    said.mkdir()
    (said / "02_01.txt").write_text("turns left#turn/VERB left/ADJ#0.2#0.8\n")  # times and tokens are kept
    again = ("data", "convert", clips, "-o", tmp_path / "set2", "--to", "humanml3d", "--captions", said)
    assert run(*again)[0] == 1
    assert (tmp_path / "set2" / "texts" / "02_02_01.txt").read_text() == "turns left#turn/VERB left/ADJ#0.2#0.8\n"
    assert (tmp_path / "set2" / "texts" / "M02_02_01.txt").read_text() == "turns right#turn/VERB right/ADJ#0.2#0.8\n"

    made = tmp_path / "h.jsonl"
    options = ("--option", "split=all", "--option", "least=10")
    assert run("data", "convert", out, "-o", made, "--kind", "humanml3d", *options)[0] == 0
    assert [r.instruction for r in read_records(made)][1] == "walk, turn right"

    made = tmp_path / "cmu" / "r.jsonl"
    common = ("data", "convert", clips, "-o", made, "--kind", "motion", "--option", f"captions={clips / 'd.csv'}")
    is_one_line(run(*common), "2 of 3 rows are bad", "02_03")
    pieces = ("--option", "max_faults=0.5", "--option", "window=0.5", "--option", "least=0.4", "--option", "fps=20")
    status, _, err = run(*common, *pieces)
    assert status == 0 and "02_03.bvh" in err
    assert "2 takes are longer than 0.5 s: cut" in err
    records = list(read_records(made))
    walk, fast = ("walk, turn left", "02_02_01"), ("run", "02_02_02")
    assert [((r.instruction, r.meta["clip"]), r.meta["frames"]) for r in records] == [
        (walk, [0, 8]), (walk, [8, 16]), (walk, [16, 24]), (fast, [0, 8]), (fast, [8, 16]),
    ]  # fmt: skip
    target = records[1].target
    assert target and np.abs(load_part(target, records[1].root).joints - clip.joints[8:16]).max() < 0.05
    status, text, _ = run("data", "check", made)
    assert status == 0 and "movements: 5, 2.0 s in all (humanml3d 5)" in text
    next((made.parent / "media").iterdir()).write_bytes(b"PK")
    status, text, _ = run("data", "check", made)
    assert status == 1 and "damaged" in text
    is_one_line(run(*common, "--option", "window=-1"), "window", "above 0")
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    common = ("data", "convert", clips, "-o", made, "--kind", "motion", "--option", f"captions={tmp_path / 'bad.csv'}")
    is_one_line(run(*common), "expected name and caption")


@pytest.mark.slow
def test_a_fine_tune_from_the_folder_to_the_movement(run: Run, tmp_path: Path) -> None:
    """Recordings and a table of descriptions -> records of both tasks -> the recipe -> a movement, by four commands."""
    from tiny_motion import tiny_motion_folder

    rig = Motion(place(retarget(procedural(90, 7, swing=0.1))))
    clips = tmp_path / "cmu"
    clips.mkdir()
    for k in range(1, 5):
        write_motion(rig.crop(0, 20 * k), clips / f"0{k}_01.bvh")
    lines = (clips / "04_01.bvh").read_text().splitlines()
    first = next(k for k, line in enumerate(lines) if line.startswith("Frame Time")) + 1
    lines.insert(first, " ".join(["9.0", "0.9", "9.0", *["0.0"] * (len(lines[first].split()) - 3)]))  # a T-pose
    text = "\n".join(lines).replace("Frames: 80", "Frames: 81")
    (clips / "04_01.bvh").write_text(text + "\n")
    (clips / "d.csv").write_text(
        "Subject,Trial #,Motion Description\n1,1,a person walks\n2,1,a person walks faster\n3,1,zigzag hurdles\n"
        "4,1,a person walks in a circle\n"
    )
    made = tmp_path / "data" / "records.jsonl"
    words = ("data", "convert", clips, "-o", made, "--kind", "motion", "--option", f"captions={clips / 'd.csv'}")
    status, out, err = run(*words, "--option", "window=2.0", "--option", "tasks=generate,describe", "--hold", 0.25)
    held = made.with_name("held_out.jsonl")
    assert (status, out.split()) == (0, [str(made), str(held)])
    assert "04_01.bvh begins with a T-pose" in err and "2 takes are longer than 2 s" in err
    train, kept = list(read_records(made)), list(read_records(held))
    assert len({r.meta["clip"] for r in kept}) == 1 and not {r.meta["clip"] for r in kept} & {
        r.meta["clip"] for r in train
    }
    both = sorted(train + kept, key=lambda r: r.id)
    assert [r.task for r in both] == ["describe", "generate"] * 6
    assert both[0].source and both[0].turns[1].parts[0].text == "a person walks" == both[1].instruction
    last = [r for r in both if r.meta["clip"] == "04_01" and r.task == "generate"]
    assert [r.meta["frames"] for r in last] == [[0, 40], [40, 80]]
    assert last[0].target and np.abs(load_part(last[0].target, last[0].root).joints - rig.joints[:40]).max() < 0.01

    model = tiny_motion_folder(tmp_path / "model", "depth")
    learnt = (f"model.path={model}", f"data.0.source.path={made}", f"validate.source.path={held}", "run.steps=2",
              "data.1.source.args.count=4", "run.batch_size=4", "run.validate_every=2")  # fmt: skip
    status, out, err = run("train", "tiny/motion_finetune_rvq", *learnt, "-o", tmp_path / "rvq")
    assert status == 0 and "val/joints_mm" in out, err
    model = tmp_path / "rvq" / "export"  # the whole model, with another quantiser
    overrides = (f"model.path={model}", f"data.0.source.path={made}", f"validate.source.path={held}",
                 "data.1.source.args.count=4", "data.2.source.args.count=4", "run.steps=2", "run.batch_size=2",
                 "run.validate_every=2",
                 "model.lora={rank: 4, alpha: 8, targets: [q_proj, up_proj]}")  # fmt: skip
    status, out, err = run("train", "tiny/motion_finetune", *overrides, "-o", tmp_path / "run")
    assert (
        status == 0
        and "the vocabulary lacks" in out
        and "letter by letter" in out
        and "mm a joint" in out
        and "val/loss" in out
    ), err
    lora = ("--model", model, "--lora", tmp_path / "run" / "export")
    assert run("generate", "zigzag", "-o", tmp_path / "x.bvh", *lora, "--seconds", 1)[0] == 0
    assert len(read_motion(tmp_path / "x.bvh")) == 20
    assert run("describe", tmp_path / "x.bvh", *lora)[0] in (0, 2)  # 2: it wrote nothing
    status, out, err = run("export", model, "-o", tmp_path / "merged", "--lora", tmp_path / "run" / "export")
    assert status == 0 and "opened again" in err
    alone = ("--model", tmp_path / "merged", "--seconds", 1)
    assert run("generate", "zigzag", "-o", tmp_path / "y.bvh", *alone)[0] == 0
    bad = (*words, "--option", "tasks=dance")
    is_one_line(run(*bad), "'dance' is unknown", "generate and describe")
    is_one_line(run(*words, "--hold", 1), "leaves one part empty")


def test_show(run: Run, clip: Motion, tmp_path: Path) -> None:
    records = [
        make_record("slower", clip, target=clip.mirror(), id="<b>"),
        make_record("a star", target=Image.new("RGB", (8, 8)), id="p"),
    ]
    write_records(tmp_path / "r.jsonl", records)
    status, out, _ = run("data", "show", tmp_path / "r.jsonl")
    assert status == 0 and out.split() == [str(tmp_path / n) for n in ("r.html", "r-motion.html")]
    page = (tmp_path / "r-motion.html").read_text()
    data = json.loads(page.split('id="clips">')[1].split("</script>")[0])
    assert data["scenes"][0]["title"] == "<b>" and "<b>" not in page
    assert [c["name"] for c in data["scenes"][0]["clips"]] == ["source", "target"]
    assert data["scenes"][0]["text"] == "edit: slower"
    write_motion(clip, tmp_path / "w.bvh")
    assert run("data", "show", tmp_path / "w.bvh")[:2] == (0, f"{tmp_path / 'w.html'}\n")


def test_build_humanml3d_from_amass(run: Run, tmp_path: Path) -> None:
    from test_motion_files import body_file

    (tmp_path / "smplh" / "male").mkdir(parents=True)
    body_file(tmp_path / "smplh" / "male" / "model.npz")
    amass = tmp_path / "amass"
    rng = np.random.default_rng(0)
    for name, rate in (("CMU/05/05_07", 120.0), ("Transitions_mocap/a/b", 60.0)):
        (amass / name).parent.mkdir(parents=True)
        poses = np.cumsum(rng.normal(size=(360, 66)) * 0.004, axis=0)
        np.savez(amass / f"{name}_poses.npz", poses=poses, trans=poses[:, :3], betas=np.zeros(16), gender="male",
                 mocap_framerate=rate)  # fmt: skip
    (tmp_path / "index.csv").write_text(
        "source_path,start_frame,end_frame,new_name\n"
        "./pose_data/CMU/05/05_07_poses.npy,0,50,000218.npy\n"
        "./pose_data/Transitions_mocap/a/b_poses.npy,5,-1,000219.npy\n"
    )
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "000218.txt").write_text("a man turns left#a/DET man/NOUN turn/VERB left/ADV#0.0#0.0\n")
    words = ("data", "convert", amass, "-o", tmp_path / "h", "--to", "humanml3d", "--index", tmp_path / "index.csv")
    status, out, err = run(*words, "--bodies", tmp_path / "smplh", "--captions", tmp_path / "texts")
    assert status == 0 and "2 clips, 4 with mirrors, 2 texts, 0 left out" in err
    # 360 frames at 60 fps: every third, less half a second, 5 to the last but one, less one for the differences
    assert len(np.load(tmp_path / "h" / "new_joint_vecs" / "000219.npy")) == 120 - 10 - 5 - 1 - 1
    assert len(np.load(tmp_path / "h" / "new_joint_vecs" / "M000218.npy")) == 49
    assert np.load(tmp_path / "h" / "Mean.npy").shape == (263,)
    is_one_line(run(*words), "--bodies")
    is_one_line(run(*words, "--bodies", tmp_path / "smplh", "--place"), "--place does nothing")
