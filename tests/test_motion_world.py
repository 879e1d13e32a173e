"""The motion world: what it holds, that its clips are plausible and its splits apart, and that its texts say them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from weft.errors import WeftError
from weft.motion import extract, load_part, recover
from weft.motion import physics as P
from weft.record import Record, read_records, write_records
from weft.world.endless import split_of
from weft.world.motion_acts import clip_joints
from weft.world.motion_concepts import CONCEPTS
from weft.world.motion_edits import HELD_OUT_KIND, KINDS, apply
from weft.world.motion_phrases import MotionSpeaker, gerund, third
from weft.world.motion_reader import judge_text, read
from weft.world.motion_scripts import EVERY_ACT, HELD_OUT, STYLES, VARIANTS, Act, Script, draw_script
from weft.world.motion_tasks import FRAMES, TASKS, joints
from weft.world.motions import records, script_of


def scripts_in(record: Record) -> list[Script]:
    return [p.value.script for t in record.turns for p in t.parts if p.type == "motion"]


def some_scripts(count: int) -> list[Script]:
    rng = np.random.default_rng(0)
    return [draw_script(rng, "train") for _ in range(count)]


# --- clips --------------------------------------------------------------------------------------------------------


def test_clips_are_of_one_body_on_the_floor_from_the_origin() -> None:
    for script in some_scripts(40):
        x = clip_joints(script)
        assert x.dtype == np.float32 and x.shape[1:] == (22, 3) and np.isfinite(x).all()
        assert P.bone_drift(x) < 1e-4 and x[..., 1].min() == 0
        assert np.abs(x[0, 0, [0, 2]]).max() < 0.2
        across = x[0, 1] - x[0, 2] + x[0, 16] - x[0, 17]
        assert abs(np.arctan2(across[2], across[0])) < 0.2  # the left hip at +x: facing +z
        assert 1.3 < x[0, 15, 1] < 1.75


def test_a_toe_on_the_floor_stands_still() -> None:
    for script in some_scripts(40):
        toes = clip_joints(script)[:, [10, 11]].astype(np.float64)
        down = toes[..., 1] < 0.008
        still = np.linalg.norm(np.diff(toes, axis=0)[..., [0, 2]], axis=-1)[down[1:] & down[:-1]]
        assert (still < 0.012).mean() > 0.97, script.canonical


def test_clips_are_smooth_and_touch_the_ground() -> None:
    rows = [P.measure(load_part(r.target)) for r in records("val", 40, seed=2, tasks=["generate"])]
    mean = P.average(rows)
    assert mean["jitter"] < 120 and max(r["jitter"] for r in rows) < 700  # a fast run
    assert mean["penetration"] == 0 and mean["floating"] < 0.02 and mean["contact_score"] > 0.95


def test_features_recover_to_the_clip() -> None:
    for act in (Act("walk", path="circle", direction="left"), Act("turn", direction="right"), Act("sit")):
        x = clip_joints(Script((act,), "zombie"))
        back = recover(extract(x, heading="correct"))
        assert P.mpjpe(np.asarray(back), x[: len(back)]) < 0.02


def test_the_jitter_makes_different_clips_of_one_script() -> None:
    for act in EVERY_ACT:
        lengths = {len(clip_joints(Script((act,), jitter=(v, -v, v, -v, v, v)))) for v in (-3, 0, 3)}
        assert len(lengths) > 1, act.name


# --- records ------------------------------------------------------------------------------------------------------


def test_the_world_is_as_rich_as_promised() -> None:
    assert len(VARIANTS) >= 14 and len(EVERY_ACT) >= 38 and len(STYLES) == 6
    seen: dict[str, set[str]] = defaultdict(set)
    lengths = []
    for record in records("train", 150, seed=5, tasks=dict.fromkeys(TASKS, 1.0) | {"edit": 7.0}):
        seen["task"].add(record.task)
        seen["kind"].add(record.meta["kind"])
        target = script_of(record)
        seen["style"].add(target.style)
        seen["speed"].add(target.speed)
        seen["action"] |= {a.action for a in target.acts}
        lengths += [len(joints(s)) for s in scripts_in(record)]
        assert record.meta["attributes"] == target.attributes and record.meta["canonical"]
    assert seen["task"] == set(TASKS) and len(seen["style"]) == 6 and len(seen["speed"]) == 3
    assert set(KINDS) - {HELD_OUT_KIND} <= seen["kind"] and len(seen["action"]) >= 14
    assert FRAMES[0] <= min(lengths) and max(lengths) <= FRAMES[1] and len(set(lengths)) > 30


@pytest.mark.parametrize("task", TASKS)
def test_record_is_a_function_of_its_index(task: str) -> None:
    world = records("val", 8, seed=3, tasks=[task])
    again = records("val", 3, seed=3, tasks=[task], start=5)
    for i in range(3):
        a, b = world[5 + i], again[i]
        assert a.meta == b.meta and a.id == b.id
        parts = [[p for t in r.turns for p in t.parts] for r in (a, b)]
        assert [p.digest(None) for p in parts[0]] == [p.digest(None) for p in parts[1]]
    assert len({r.id for r in world}) == 8 and [r.id for r in world[5:7]] == [world[i].id for i in (5, 6)]


def test_splits_never_share_a_clip() -> None:
    for split in ("train", "val", "test"):
        for record in records(split, 40, seed=0, tasks=tuple(TASKS)):
            assert {s.split for s in scripts_in(record)} == {split}
    shown = Script((Act("bow"),), jitter=(1, 2, 3, 0, 0, 0))
    assert shown.split == shown.but(style="tired", acts=(Act("clap"),)).split  # an edit stays in its split
    assert split_of(shown) in ("train", "val", "test")


def test_what_is_held_out_stays_out_of_training() -> None:
    for record in records("train", 120, seed=1, tasks=tuple(TASKS)):
        assert not any(s.held_out for s in scripts_in(record)) and record.meta["kind"] != HELD_OUT_KIND
    for record in records("test", 10, combo="held_out"):
        assert any((a.action, script_of(record).style) in HELD_OUT for a in script_of(record).acts)
        assert record.meta["combo"] == "held_out"
    assert {r.meta["kind"] for r in records("test", 5, tasks=["edit"], kinds=[HELD_OUT_KIND])} == {HELD_OUT_KIND}


def words(record: Record) -> list[str]:
    texts = [p.text or "" for t in record.turns for p in t.parts if p.type == "text"]
    return re.findall(r"[a-z-]+", " ".join(texts).lower())


def test_unseen_phrasings_use_known_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.world.motions.length_fits", lambda script: True)  # the texts alone
    monkeypatch.setattr("weft.world.motion_tasks.joints", lambda script: np.zeros((80, 22, 3)))
    known = Counter(w for r in records("train", 1500, tasks=tuple(TASKS)) for w in words(r))
    new = {w for r in records("test", 500, phrasing="unseen", tasks=tuple(TASKS)) for w in words(r)}
    assert {w for w in new if not known[w]} == set()
    texts = [r.instruction for r in records("train", 300, seed=2)]
    assert len(set(texts)) > 250
    assert max(len(words(r)) for r in records("train", 300, seed=2)) <= 60


def test_verbs_are_conjugated() -> None:
    assert third("*reach out and *clap") == "reaches out and claps"
    assert gerund("*wave and *sit down while running") == "waving and sitting down while running"
    speaker = MotionSpeaker(np.random.default_rng(0))
    for act in EVERY_ACT:
        for _ in range(8):
            said = speaker.act(act)
            assert "{" not in said and "*" in said and "None" not in said, said


def test_captions_are_read_back() -> None:
    rng = np.random.default_rng(1)
    for unseen in (False, True):
        speaker = MotionSpeaker(rng, unseen)
        for script in some_scripts(400):
            for text in (
                speaker.caption(script)[0],
                speaker.caption(script, answer=True)[0],
                speaker.statement(script),
            ):
                seen = read(text)
                assert (seen.acts, seen.style, seen.speed) == (script.acts, script.style, script.speed), text
    assert read("the quick brown fox").unclear
    record = records("test", 1, seed=3, tasks=["describe"])[0]
    right = judge_text(record, record.turns[1].parts[0].text or "")
    assert right.success and not judge_text(record, "a person bows like a zombie, then claps").success


# --- tasks --------------------------------------------------------------------------------------------------------


def test_edits_are_exact_and_change_something() -> None:
    for record in records("val", 60, seed=4, tasks=["edit"], kinds=KINDS):
        world = record.meta["motion"]
        source = Script.from_json(world["source"])
        assert apply(source, world["plan"]).to_json() == world["target"] != world["source"]
        assert record.source.value.script == source and record.target.value.script == script_of(record)
        assert source.jitter == script_of(record).jitter


def test_a_chain_edits_what_it_made() -> None:
    for record in records("val", 12, seed=4, tasks=["chain"]):
        world, turns = record.meta["motion"], record.turns
        assert len(turns) == {"two_turn": 4, "three_turn": 6}[record.meta["kind"]]
        made = [p.value.script.to_json() for t in turns for p in t.parts if p.type == "motion"]
        assert made == world["steps"]
        assert record.source.value.script.to_json() == world["steps"][-2]


def test_references_give_what_they_are_asked_for() -> None:
    for record in records("val", 30, seed=6, tasks=["in_context"]):
        kind, target = record.meta["kind"].removeprefix("context_"), script_of(record)
        *_, other = (p.value.script for p in record.inputs) if "2" in record.meta["canonical"] else (None,)
        given = Script.from_json(record.meta["motion"]["references"][-1])
        assert other is not None and given in [p.value.script for p in record.references]
        if kind == "trajectory":
            assert (target.acts[0].path, target.acts[0].direction) == (given.acts[0].path, given.acts[0].direction)
        else:
            assert getattr(target, kind) == getattr(given, kind)
        assert len(record.references) == (1 if record.source else 2)


def test_between_reflect_and_knowledge() -> None:
    for record in records("val", 8, seed=6, tasks=["between"]):
        start, end = (p for p in record.request.parts if p.type == "motion")
        whole = load_part(record.target).joints
        assert (start.role, end.role) == ("start", "end")
        assert np.array_equal(load_part(start).joints, whole[: len(load_part(start))])
        assert np.array_equal(load_part(end).joints, whole[-len(load_part(end)) :])
    for record in records("val", 8, seed=6, tasks=["reflect"], kinds=["reflect_wrong"]):
        tried = record.turns[1].parts[0]
        assert tried.role == "rejected" and tried.value.script.attributes != script_of(record).attributes
        assert record.turns[-1].parts[0].text and record.target.value.script == script_of(record)
    for record in records("val", 4, seed=6, tasks=["reflect"], kinds=["reflect_right"]):
        assert record.targets == [] and record.turns[1].parts[0].role is None
    concepts = {r.meta["motion"]["concept"] for r in records("val", 60, seed=6, tasks=["knowledge"])}
    assert len(concepts) > 10 and concepts <= set(CONCEPTS)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(WeftError, match="unknown task 'dance'"):
        records("train", tasks=["dance"])
    with pytest.raises(WeftError, match="unknown kind 'recolour'"):
        records("train", kinds=["recolour"])
    with pytest.raises(WeftError, match="unknown split"):
        records("training")


def test_records_are_written_and_read_as_files(tmp_path: Path) -> None:
    world = records("val", 3, seed=1, tasks=["between", "edit"])
    assert write_records(tmp_path / "all.jsonl", world) == 3
    for made, found in zip(world, read_records(tmp_path / "all.jsonl"), strict=True):
        assert found.meta == made.meta
        parts = [[p for t in r.turns for p in t.parts] for r in (made, found)]
        for a, b in zip(*parts, strict=True):
            assert (a.type, a.role, a.text) == (b.type, b.role, b.text)
            if a.type == "motion":
                assert np.abs(load_part(a).joints - load_part(b, found.root).joints).max() < 1e-5


def test_plans_say_what_comes() -> None:
    """With `plans` every movement is announced in words that name it; nothing else changes in an edit."""
    from weft.world.motion_oracle import compare
    from weft.world.motion_reader import read

    tasks = ["edit", "in_context", "chain", "between", "generate", "knowledge"]
    for record in records("train", 60, seed=4, tasks=tasks, plans=True):
        for turn in record.turns[1::2]:
            text, clip = turn.parts
            assert text.type == "text" and clip.type == "motion"
            assert all(compare(clip.value.script, read(text.text or "")).values()), text.text
    for planned, plain in zip(records("train", 20, seed=4, tasks=["edit"], plans=True),
                              records("train", 20, seed=4, tasks=["edit"]), strict=True):  # fmt: skip
        assert planned.turns[0] == plain.turns[0] and planned.turns[1].parts[1:] == plain.turns[1].parts
    for record in records("train", 10, seed=4, tasks=["reflect"], plans=True):
        assert [p.type for p in record.turns[1].parts] == ["motion"], "a plan would tell right attempts from wrong"
