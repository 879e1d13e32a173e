"""The embedded world: what it holds, that its splits are apart, and that the oracle can be trusted."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image, ImageFilter

from weft.errors import WeftError
from weft.world import Scene, records, render
from weft.world.corrupt import corruptions
from weft.world.edits import HELD_OUT_KIND, KINDS, apply, propose
from weft.world.oracle import _other_backgrounds, edit_mask, judge, requested_concepts, scenes
from weft.world.phrases import Speaker
from weft.world.references import CONCEPTS
from weft.world.render import _backdrop
from weft.world.scene import BACKGROUNDS, COLOURS, LIGHTS, PATTERNS, SHAPES, SIZES, STYLES, TONES, draw_scene
from weft.world.words import EDITS, POLITE

TASKS = ("generate", "edit", "multi_edit", "multi_generate")


def worn(image: Image.Image, seed: int = 0) -> Image.Image:
    """A picture as a model would give it back: slightly soft, slightly noisy."""
    soft = np.asarray(image.filter(ImageFilter.GaussianBlur(0.6)), np.float64)
    noisy = soft + np.random.default_rng(seed).normal(0, 5, soft.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def test_the_world_is_as_rich_as_promised() -> None:
    assert len(SHAPES) >= 8 and len(COLOURS) >= 10 and len(PATTERNS) >= 6 and len(SIZES) == 3
    assert len(LIGHTS) == 5 and len(STYLES) == 4 and len(TONES) == 4 and len(BACKGROUNDS) == 6
    seen: dict[str, set[str]] = defaultdict(set)
    counts = Counter()
    for record in records("train", count=400, seed=5):
        target = Scene.from_json(record.meta["world"]["target"])
        counts[len(target.things)] += 1
        seen["kind"].add(record.meta["kind"])
        seen["background"].add(target.background[0])
        for thing in target.things:
            for name in ("shape", "colour", "pattern", "size"):
                seen[name].add(getattr(thing, name))
    assert {1, 2, 3, 4} <= set(counts)
    assert seen["kind"] == {"generate", *KINDS} - {HELD_OUT_KIND}
    assert [len(seen[k]) for k in ("shape", "colour", "pattern", "size", "background")] == [8, 10, 6, 3, 2]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_record_is_a_function_of_its_index(task: str) -> None:
    world = records("val", count=30, seed=3, tasks=[task])
    again = records("val", count=10, seed=3, tasks=[task], start=20)
    for i in range(10):
        a, b = world[20 + i], again[i]
        assert a.meta == b.meta and a.instruction == b.instruction and a.id == b.id
        assert [p.digest(None) for p in a.inputs] == [p.digest(None) for p in b.inputs]
    assert len({r.id for r in world}) == 30
    assert [r.id for r in world[5:8]] == [world[i].id for i in (5, 6, 7)]


@pytest.mark.slow
def test_splits_never_share_a_scene() -> None:
    start: dict[str, set[str]] = {}
    for split in ("train", "val", "test"):
        start[split] = set()
        for record in records(split, count=300, seed=0):
            world = record.meta["world"]
            start[split].add(Scene.from_json(world["source"] or world["target"]).digest)
    assert not start["train"] & start["val"] and not start["train"] & start["test"] and not start["val"] & start["test"]


def test_what_is_held_out_stays_out_of_training() -> None:
    for record in records("train", count=300, seed=1, tasks=TASKS):
        world = record.meta["world"]
        scenes = [world["source"], world["target"], *world["references"]]
        assert not any(Scene.from_json(s).held_out for s in scenes if s)
        assert record.meta["kind"] != HELD_OUT_KIND
    assert all(r.meta["combo"] == "held_out" for r in records("test", count=20, combo="held_out"))
    assert {r.meta["kind"] for r in records("test", count=20, tasks=["edit"], kinds=[HELD_OUT_KIND])} == {HELD_OUT_KIND}


@pytest.mark.slow
def test_unseen_phrasings_use_known_words() -> None:
    def words(world: object) -> Counter[str]:
        return Counter(w for r in world for w in re.findall(r"[a-z-]+", r.instruction.lower()))  # type: ignore[attr-defined]

    known = words(records("train", count=3000, seed=0))
    new = words(records("test", count=600, seed=0, phrasing="unseen"))
    assert {w for w in new if known[w] < 3} == set()
    for seen, unseen in (*EDITS.values(), POLITE):
        assert not (set(seen) & set(unseen)) - {"{0}"}


def test_instructions_vary_and_point_at_one_thing() -> None:
    texts = [r.instruction for r in records("train", count=300, seed=2, tasks=["edit"])]
    assert len(set(texts)) > 270
    assert sum(bool(re.search(r"\b(left|right) of\b|\babove\b|\bbelow\b", t)) for t in texts) > 15
    assert max(len(re.findall(r"[\w-]+|[,;:?]", t)) for t in texts) <= 38


def test_sentences_are_english() -> None:
    for i in range(240):
        rng = np.random.default_rng(i)
        speaker, scene = Speaker(rng, unseen=i % 2 == 0), draw_scene(rng)
        plans = [propose(rng, scene, kind) for kind in ("background", "style", "two_in_one")]
        for text in [speaker.caption(scene)[0], *(speaker.edit(scene, plan)[0] for plan in plans if plan)]:
            assert not re.search(r"\ba [aeiou]", text), text
            assert not re.search(
                r"background (to|be|is|become|should \w+|gradient) (gradient|\w+ to \w+ grad)", text
            ), text
            polite = re.match("please|can you|i want you|.*, please$", text)
            assert not (polite and re.search(r"(and|then|also|first) (the|there|let|i) ", text)), text


def test_an_edit_changes_only_its_mask_and_undoing_nothing_copies() -> None:
    for record in records("val", count=60, seed=4, tasks=["edit"]):
        source, target = (np.asarray(p.load(None), int) for p in (record.source, record.target))  # type: ignore[union-attr]
        changed = np.abs(source - target).max(-1) > 3
        assert changed.any(), record.instruction
        assert not (changed & ~edit_mask(record)).any()
        world = record.meta["world"]
        assert apply(Scene.from_json(world["source"]), world["plan"]).to_json() == world["target"]


@pytest.mark.slow
def test_references_show_what_they_stand_for() -> None:
    for record in records("val", count=60, seed=6, tasks=["multi_edit", "multi_generate"]):
        world = record.meta["world"]
        assert len(record.references) == len(world["references"]) >= 1
        for op in (op for op in world["plan"] if "ref" in op):
            reference = Scene.from_json(world["references"][op["ref"] - 1])
            if op["op"] in ("style", "light", "tone"):
                assert getattr(reference, op["op"]) == op["value"]
            elif op["op"] in ("add", "replace"):
                assert (reference.things[0].shape, reference.things[0].colour) == (op["shape"], op["colour"])
            else:
                name = {"recolour": "colour", "repattern": "pattern", "reshape": "shape"}[op["op"]]
                assert getattr(reference.things[0], name) == op["value"]
    counts = {len(r.references) for r in records("val", count=80, seed=7, tasks=["multi_generate"])}
    assert counts == {1, 2, 3, 4}


@pytest.mark.parametrize("task", ["multi_edit", "multi_generate"])
def test_the_standard_wording_is_of_the_same_records(task: str) -> None:
    loose, fixed = (records("train", 6, seed=5, tasks=[task], standard=standard) for standard in (False, True))
    for one, other in zip(loose, fixed, strict=True):
        assert other.instruction == other.meta["standard"] == one.meta["standard"] and one.id != other.id
        assert [part.digest() for part in one.inputs] == [part.digest() for part in other.inputs]
        assert one.meta["world"] == other.meta["world"]
        named = [int(k) for k in re.findall(r"picture (\d)", other.instruction)]
        assert sorted(named) == list(range(2 - (other.source is None), len(other.inputs) + 1))


def test_references_give_what_was_asked_for() -> None:
    for concept in CONCEPTS:
        some = records("test", 3, seed=1, tasks=["multi_edit", "multi_generate"], references=[1], concepts=[concept])
        assert {c for record in some for c in requested_concepts(record).values()} == {concept}
    with pytest.raises(WeftError, match="concepts are some of concrete, local, global"):
        records(concepts=["colour"])


def test_pictures_scale_and_keep_their_aspect() -> None:
    record = records("train", count=1, size=(96, 160))[0]
    assert record.target.load(None).size == (160, 96)  # type: ignore[union-attr]
    scene = Scene.from_json(record.meta["world"]["target"])
    small, large = (np.asarray(render(scene, s, s), float) for s in (64, 128))
    shrunk = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(small - shrunk).mean() < 6
    before = _backdrop.cache_info().currsize
    render(scene, 300, 300)
    assert _backdrop.cache_info().currsize == before  # large ones are not kept in memory


@pytest.mark.slow
def test_photographs_are_a_background() -> None:
    pytest.importorskip("skimage")
    kinds = Counter()
    for record in records("train", count=30, photo=1.0, tasks=["edit"], kinds=["recolour", "add", "style"]):
        kinds[Scene.from_json(record.meta["world"]["target"]).background[0]] += 1
        assert judge(record, record.target.load(None)).success  # type: ignore[union-attr]
    assert kinds["photo"] == 30


@pytest.mark.slow
@pytest.mark.parametrize("task", [pytest.param(t, marks=pytest.mark.long) if "multi" in t else t for t in TASKS])
def test_oracle_accepts_targets_and_rejects_what_is_wrong(task: str) -> None:
    accepted, fooled = [], defaultdict(list)
    for i, record in enumerate(records("test", count=25, seed=8, tasks=[task])):
        target = record.target.load(None)  # type: ignore[union-attr]
        accepted += [judge(record, target).success, judge(record, worn(target, i)).success]
        for name, scene in corruptions(record, np.random.default_rng(i)):
            fooled[name].append(judge(record, worn(render(scene), i)).success)
        fooled["blank"].append(judge(record, Image.new("RGB", (64, 64), (200, 200, 200))).success)
    assert np.mean(accepted) >= 0.98
    assert np.mean([x for v in fooled.values() for x in v]) <= 0.02, {name: np.mean(v) for name, v in fooled.items()}


def test_oracle_names_what_is_wrong() -> None:
    record = records("test", count=1, seed=8, tasks=["edit"], kinds=["recolour"])[0]
    verdict = judge(record, record.source.load(None))  # type: ignore[union-attr]
    assert not verdict.success and verdict.requests["keep"] and verdict.collateral == pytest.approx(0, abs=0.005)
    assert [ok for name, ok in verdict.requests.items() if name.startswith("recolour")] == [False]
    perfect = judge(record, record.target.load(None))  # type: ignore[union-attr]
    assert perfect.success and perfect.psnr_outside > 40


@pytest.mark.slow
def test_one_fault_is_not_taken_for_others() -> None:
    for kind in ("add", "remove", "recolour", "tone"):
        for record in records("train", count=3, seed=11, tasks=["edit"], kinds=[kind], combo="any"):
            source, target, plan = scenes(record)
            assert source is not None
            copy = judge(record, worn(render(source))).requests
            assert copy.pop("keep") and not any(copy.values()), record.instruction  # nothing was done, nothing spoilt
            if kind != "tone":
                other = judge(record, worn(render(target.but(tone="dim"))))
                assert "tone" in other.seen and not other.requests.pop("keep")
                assert all(other.requests.values()), (record.instruction, other.seen)


def test_large_pictures_and_those_with_alpha_are_judged() -> None:
    for task, size in (("generate", 384), ("edit", (144, 192))):
        record = records("train", count=1, seed=2, tasks=[task], size=size)[0]
        target = record.target.load(None)  # type: ignore[union-attr]
        assert judge(record, target).success
    clear = target.convert("RGBA")
    assert judge(record, clear).success
    clear.putalpha(0)
    assert not judge(record, clear).success  # it shows white


def test_what_the_oracle_sees_does_not_depend_on_the_process() -> None:
    others = list(_other_backgrounds(("gradient", "white", "mint")))
    assert others[:3] == [("plain", "white"), ("gradient", "grey", "mint"), ("gradient", "white", "grey")]
    assert others[-1] == ("gradient", "mint", "white") and len(set(others)) == len(others)


def test_a_size_that_nobody_drew_is_refused_before_it_costs_memory() -> None:
    record = records("test", count=1, tasks=["edit"])[0]
    for size in ([10**6, 10**6], [64], ["64", 64], [0, 64]):
        record.meta["world"]["size"] = size
        with pytest.raises(WeftError, match="16 to 2048 pixels a side"):
            judge(record, Image.new("RGB", (64, 64)))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(WeftError, match="unknown edit kind 'recolor'"):
        records("train", kinds=["recolor"])
    with pytest.raises(WeftError, match="unknown split"):
        records("training")
    with pytest.raises(WeftError, match="1 to 4"):
        records("train", references=[5])
