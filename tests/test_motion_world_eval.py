"""The motion benchmark on models whose scores are known: the exact answer, a copy of the source, random weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from test_cli import Run
from test_cli import weft as weft_run  # noqa: F401  (a fixture)
from tiny_motion import tiny_motion_folder
from weft.api_motion import MotionModel
from weft.errors import WeftError
from weft.evals.benchmark import EDIT_MEAN, group_of
from weft.evals.motion_answers import Answer, Asking
from weft.evals.motion_groups import DEFAULT, GROUPS, MOTIONS
from weft.evals.motion_verdicts import copy, shown_by, truth, verdicts, words
from weft.evals.motion_world import evaluate_motion_world, motion_world_evaluator, rescore_motion_world
from weft.evals.runner import Results
from weft.models.motion.lm import MotionLM
from weft.models.motion.load import load
from weft.motion import Motion, load_part
from weft.record import Part, Record, motion_part, text_part
from weft.sample.tokens import Sampling


class Known:
    """Answers the world's records with what `answer` gives for the whole record, also of a conversation half way."""

    name = "known"

    def __init__(self, items: dict[str, Record], answer: Any) -> None:
        self.records = {record.id: record for record in items.values()}
        self.answer, self.asked, self.codec = answer, [], self  # type: ignore[var-annotated]

    def modules(self) -> dict[str, torch.nn.Module]:
        return {}

    def sampling(self, options: Any) -> Sampling:
        return Sampling()

    def encode(self, clips: Sequence[Motion]) -> list[Motion]:
        return list(clips)

    def decode(self, codes: Sequence[Motion]) -> list[Motion]:
        return [Motion(clip.joints[: len(clip) // 4 * 4], clip.fps) for clip in codes]

    def respond(self, records: Sequence[Record], *, seeds: Sequence[int], options: Any) -> list[list[Part]]:
        self.asked += [(record.id, record, seed, options) for record, seed in zip(records, seeds, strict=True)]
        found = []
        for record in records:
            whole = self.records[record.id]
            turn = sum(t.role == "user" for t in record.turns) - 1 if record.task == "chain" else 0
            parts = (self.answer(whole) or [[]])[turn]
            clips = {id(p): motion_part(load_part(p)) for p in parts if p.type == "motion"}
            found.append([clips.get(id(p), p) for p in parts])
        return found


SMALL = ["generate", "edit/style", "edit/drop", "chain/two_turn", "reflect", "knowledge", "describe"]
QUICK: dict[str, Any] = {"groups": SMALL, "count": 2, "data_seed": 1, "baseline_count": 2, "shown": 0}
ITEMS = MOTIONS.items("test", SMALL, 2, 1)


def lines(folder: Path) -> dict[str, dict]:
    rows = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    return {row["key"]: row for row in rows}


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exact")
    evaluate_motion_world(Known(ITEMS, truth), out=folder, **QUICK)
    return folder


@pytest.mark.slow
def test_the_exact_answer_scores_everything_and_the_report_says_so(exact: Path) -> None:
    report = rescore_motion_world(exact, shown=0)
    assert list(report.groups) == [*SMALL[:3], EDIT_MEAN, *SMALL[3:]]
    for name, group in report.groups.items():
        assert group.success.value == group.accuracy.value == 1, name
        assert all(value.value == 1 for value in group.attributes.values())
        assert group.baselines["target"] and group.baselines["target"].success == 1
        if name != "describe":  # this model's quantiser only cuts what does not fill four frames
            assert group.codec and group.codec.accuracy == 1 and group.codec_error == group.codec_drift == 0
            assert group.physics["result"] == group.physics["truth"]
    assert report.groups["edit/style"].changed == report.groups["edit/style"].kept == 1
    assert report.groups["knowledge"].words == report.groups["reflect"].words == 1
    assert [rates.success for rates in report.groups["chain/two_turn"].turns] == [1, 1]
    assert report.metrics()["edit"] == report.metrics()["edit/attributes"] == 1
    saved = json.loads((exact / "results.json").read_text())
    assert saved["groups"]["generate"]["wilson"]["low"] < 0.5  # two of two prove little
    for row in lines(exact).values():
        for part in (part for turn in row["answer"] for part in turn if part["type"] == "motion"):
            assert np.load(exact / part["path"]).shape[1:] == (22, 3)


@pytest.mark.slow
def test_the_page_shows_what_was_asked_and_made(exact: Path) -> None:
    rescore_motion_world(exact, shown=1)
    html = (exact / "report.html").read_text()
    assert not re.search(r"""(?:src|href|url)\W{1,2}https?:""", html)  # nothing is loaded from elsewhere
    for text in (
        "text to motion",
        "two turns, played",
        "turn 2: style",
        "a right caption",
        "not selected",
        "attempt",
    ):
        assert text in html, text
    viewer = (exact / "viewer.html").read_text()
    assert "two turns, played 1 (right)" in viewer and "result, turn 2" in viewer


@pytest.mark.slow
def test_a_copy_of_the_source_keeps_the_rest_and_changes_nothing() -> None:
    groups = ["edit/style", "edit/trajectory", "chain/three_turn", "in_context"]
    items = MOTIONS.items("test", groups, 2, 0)
    report = evaluate_motion_world(Known(items, copy), groups=groups, count=2, baseline_count=2)
    for name, group in report.groups.items():
        assert group.success.value == 0 and 0.2 < group.accuracy.value < 0.95, name
        copied = group.baselines["copy"]
        assert copied and copied.accuracy == pytest.approx(group.accuracy.value)
    for name in ("edit/style", "edit/trajectory"):
        assert report.groups[name].changed == 0 and report.groups[name].kept == 1
    assert report.groups["edit/style"].attributes["style"].value == 0
    assert report.groups["edit/style"].attributes["action"].value == 1


def test_a_chain_goes_on_from_the_models_own_movement() -> None:
    items = MOTIONS.items("test", ["chain/three_turn"], 2, 0)
    model = Known(items, copy)
    outputs = list(Asking(seed=4).draw(model, list(items.values())))
    assert [len(output.made) for output in outputs] == [3, 3] and len(model.asked) == 6
    record = outputs[0].record
    source = load_part(record.turns[0].parts[0])
    talk = next(r for name, r, _, _ in model.asked[4:] if name == record.id)  # the third turn
    said = [turn.parts for turn in talk.turns if turn.role == "assistant"]
    assert [turn.role for turn in talk.turns] == ["user", "assistant"] * 2 + ["user"]
    assert all(np.array_equal(parts[0].value.joints, source.joints) for parts in said)  # not the world's targets
    assert talk.turns[4].parts == record.turns[4].parts
    seeds = [seed for name, _, seed, _ in model.asked if name == record.id]
    assert len(set(seeds)) == 3 and seeds[0] == outputs[0].seed


def test_answers_do_not_depend_on_their_batch_and_captions_are_greedy() -> None:
    records = [record for record in ITEMS.values() if record.task != "chain"]
    together, alone = Known(ITEMS, truth), Known(ITEMS, truth)
    order = [output.record.id for output in Asking(batch_size=4, temperature=0.7).draw(together, records)]
    assert order == [record.id for record in records]
    list(Asking(batch_size=1, temperature=0.7).draw(alone, records))
    assert {(name, seed) for name, _, seed, _ in together.asked} == {(name, seed) for name, _, seed, _ in alone.asked}
    heat = {ITEMS[key].task: options.temperature for key in ITEMS for name, _, _, options in together.asked
            if ITEMS[key].id == name}  # fmt: skip
    assert heat["describe"] == 0 and heat["generate"] == 0.7


def test_a_missing_movement_is_no_success() -> None:
    record = next(iter(MOTIONS.items("test", ["edit/style"], 1, 0).values()))
    (found,) = verdicts(record, [[text_part("no")]])
    assert not found.success and not any(found.requests.values()) and found.changed is found.kept is False


def test_a_reflection_is_right_in_words_and_in_movement() -> None:
    items = MOTIONS.items("test", ["reflect"], 8, 0).values()
    wrong = next(r for r in items if r.meta["kind"] == "reflect_wrong")
    right = next(r for r in items if r.meta["kind"] == "reflect_right")
    silent: Answer = [[text_part("yes, that is right.")]]
    assert words(right, silent) and not words(wrong, silent)
    assert verdicts(right, silent)[0].success and not verdicts(wrong, silent)[0].success
    again = [[motion_part(load_part(right.turns[1].parts[0]))]]
    assert verdicts(right, again)[0].success and not words(right, again)  # a needless new attempt
    assert shown_by(wrong, silent)[0] is not None  # the attempt stands


def test_an_interrupted_run_goes_on_and_equals_an_uninterrupted_one(exact: Path, tmp_path: Path) -> None:
    class Failing(Known):
        def respond(self, records: Sequence[Record], *, seeds: Sequence[int], options: Any) -> list[list[Part]]:
            if len(self.asked) > 6:
                raise RuntimeError("power cut")
            return super().respond(records, seeds=seeds, options=options)

    with pytest.raises(RuntimeError, match="power cut"):
        evaluate_motion_world(Failing(ITEMS, truth), out=tmp_path, batch_size=3, **QUICK)
    done = (tmp_path / "results.jsonl").read_bytes()
    assert 0 < done.count(b"\n") < len(ITEMS)
    (tmp_path / "results.jsonl").write_bytes(done + b'{"key": "gene')
    again = Known(ITEMS, truth)
    evaluate_motion_world(again, out=tmp_path, batch_size=2, **QUICK)
    assert len({name for name, *_ in again.asked}) == len(ITEMS) - done.count(b"\n")
    assert lines(tmp_path) == lines(exact)
    assert (tmp_path / "results.json").read_bytes() == (exact / "results.json").read_bytes()
    with pytest.raises(WeftError, match="top_k was None, is 3"):
        evaluate_motion_world(again, out=tmp_path, top_k=3, **QUICK)


@pytest.mark.slow
def test_movements_are_judged_again_without_a_model(exact: Path) -> None:
    before = rescore_motion_world(exact, shown=0)
    rows = before.results.rows  # type: ignore[union-attr]
    key = next(key for key in rows if key.startswith("chain"))
    spoilt = {**rows[key], "score": {**rows[key]["score"], "success": False, "share": 0.0}}
    before.results.rewrite({**rows, key: spoilt})  # type: ignore[union-attr]
    assert rescore_motion_world(exact, shown=0).dict() == before.dict()
    path = exact / rows[key]["answer"][1][0]["path"]
    kept = path.read_bytes()
    np.save(path, np.zeros((8, 22, 3), np.float32))
    with pytest.raises(WeftError, match="changed since it was recorded"):
        rescore_motion_world(exact, shown=0)
    path.write_bytes(kept)
    manifest = json.loads((exact / "run.json").read_text())
    (exact / "run.json").write_text(json.dumps({**manifest, "benchmark": "world"}))
    with pytest.raises(WeftError, match="recorded for benchmark 'world'"):
        rescore_motion_world(exact, shown=0)
    (exact / "run.json").write_text(json.dumps(manifest))


def test_groups_are_independent_and_short_names_cover_them() -> None:
    names = MOTIONS.expand([*DEFAULT, "held-out pair", "held-out kind"])
    assert names == list(GROUPS)
    items = MOTIONS.items("test", names, 1, 0)
    assert len({record.id for record in items.values()}) == len(items) == len(GROUPS)
    meta = {group_of(key): record.meta for key, record in items.items()}
    assert meta["edit/direction (held out)"]["kind"] == "direction" and meta["edit/drop"]["kind"] == "drop"
    assert meta["generate/unseen phrasing"]["phrasing"] == "unseen" and meta["generate"]["phrasing"] == "seen"
    assert meta["generate/held-out pair"]["combo"] == "held_out"
    with pytest.raises(WeftError, match="unknown group 'fly'"):
        MOTIONS.expand(["fly"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> MotionLM:
    return load(tiny_motion_folder(tmp_path_factory.mktemp("tiny") / "model"), device="cpu")


@pytest.mark.slow
def test_a_random_model_end_to_end(
    tiny: MotionLM, weft_run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setattr("weft.load_motion", lambda *_, **__: MotionModel(tiny, "random"))
    options = ["--groups", "generate", "chain/two_turn", "describe", "--count", "2", "--shown", "1", "--top-k", "5"]
    status, out, err = weft_run("eval", "motion-world", "-o", tmp_path, *options)
    assert status == 0, err
    assert "text to motion" in out and out.strip().endswith("report.html")
    settings = Results(tmp_path).settings
    assert settings["model"] == "random" and settings["top_k"] == 5 and settings["temperature"] == 1.0
    saved = json.loads((tmp_path / "results.json").read_text())
    codec = saved["groups"]["generate"]
    assert codec["codec_error"] > 0.01 and codec["codec"]["accuracy"] < 1  # a random quantiser
    status, again, _ = weft_run("eval", "motion-world", "--rescore", tmp_path, "--shown", "0")
    assert status == 0 and json.loads((tmp_path / "results.json").read_text()) == saved
    status, _, err = weft_run("eval", "motion-world", "--seconds", "2")
    assert status == 2 and "leave out --seconds" in err


def test_answers_of_a_real_model_do_not_depend_on_the_batch(tiny: MotionLM) -> None:
    records = list(MOTIONS.items("test", ["generate", "chain/two_turn"], 2, 0).values())
    together = list(Asking(batch_size=4).draw(tiny, records))
    alone = list(Asking(batch_size=1).draw(tiny, records))
    for a, b in zip(together, alone, strict=True):
        for mine, theirs in zip(shown_by(a.record, a.made), shown_by(b.record, b.made), strict=True):
            assert mine is not None and theirs is not None
            np.testing.assert_allclose(mine.joints, theirs.joints, atol=1e-5)


def test_evaluator_for_training_is_a_plain_function(tiny: MotionLM) -> None:
    measure = motion_world_evaluator(groups=["generate"], count=1)
    assert set(measure(tiny, 100)) == {"generate", "generate/attributes"}
    assert measure(SimpleNamespace(model=tiny)) == measure(tiny)  # what the training loop has
    with pytest.raises(WeftError, match="makes no movements"):
        measure(object())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
