"""The world benchmark on models whose scores are known: one that returns the target, one that returns the source."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from weft.errors import WeftError
from weft.evals.runner import Output, Results, Sampling, evaluate, file_name, fingerprint, outputs, rescore
from weft.evals.world import EDIT_MEAN, evaluate_world, psnr_outside, rescore_world, world_evaluator
from weft.evals.world_groups import GROUPS, expand, world_items
from weft.record import Record
from weft.types import Batch, Condition
from weft.world import records
from weft.world.oracle import judge, requested_concepts

Answer = Callable[[Record], Image.Image]


class Ideal:
    """A flow model over pixels whose velocity points straight from the noise to the answer: (x - x0) / sigma."""

    name, multiple, channels, downsample = "ideal", 1, 3, 1

    def __init__(self, answer: Answer, blur: int = 0):
        self.answer, self.blur, self.calls, self.seen = answer, blur, 0, []  # type: ignore[var-annotated]

    def modules(self) -> dict[str, torch.nn.Module]:
        return {}

    def encode(self, batch: Sequence[Record], *, negative: str | None = None) -> list[Condition]:
        self.seen += [(record.id, negative) for record in batch]
        answers = [self.answer(record) for record in batch]
        return [
            Condition(record.id, (image.height, image.width), {"answer": tensor_of(image)})
            for record, image in zip(batch, answers, strict=True)
        ]

    def encode_images(self, images: Sequence[Image.Image]) -> list[Tensor]:
        return [tensor_of(image) for image in images]

    def prepare(self, conditions: Sequence[Condition]) -> Batch:
        return {"answer": torch.stack([condition.tensors["answer"] for condition in conditions])}

    def velocity(self, x: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        self.calls += 1
        return (x - batch["answer"]) / sigma.view(-1, 1, 1, 1)

    def decode(self, latents: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
        pixels = ((latents.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(picture[:h, :w]) for picture, (h, w) in zip(pixels, sizes, strict=True)]

    def sigmas(self, steps: int, size: tuple[int, int]) -> Tensor:
        return torch.linspace(1, 0, steps + 1)


def tensor_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image.convert("RGB"), np.float32) / 127.5 - 1).permute(2, 0, 1)


def target(record: Record) -> Image.Image:
    assert record.target is not None
    return record.load(record.target)


def source(record: Record) -> Image.Image:
    return record.load(record.source) if record.source else Image.new("RGB", (64, 64))


SMALL = ["generate", "edit/recolour", "edit/move", "edit/unseen phrasing"]
QUICK = {"groups": SMALL, "count": 4, "steps": 2, "baseline_count": 2}


@pytest.mark.slow
def test_the_target_scores_everything_and_the_report_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    report = evaluate_world(Ideal(target), out=tmp_path, show=True, **QUICK)
    assert [group.count for group in report.groups.values()] == [4, 4, 4, 8, 4]
    assert list(report.groups) == ["generate", "edit/recolour", "edit/move", EDIT_MEAN, "edit/unseen phrasing"]
    for group in report.groups.values():
        assert group.success.value == 1 and group.kept == 1 and group.requests and group.requests.value == 1
        assert group.vae_success == 1  # this model's pictures are its latents
        assert group.baselines["blank"] == 0 and group.baselines["copy"] in (0, None)
    move = report.groups["edit/move"]
    assert move.psnr and move.psnr.value > 50 and move.vae_psnr and move.vae_psnr > 50
    assert report.groups["generate"].psnr is None and report.groups["generate"].baselines["copy"] is None
    assert report.differences["edit/unseen phrasing"].value == 0
    assert report.metrics()["edit/move"] == report.metrics()["edit"] == 1 and report.metrics()["psnr_outside"] > 50

    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["groups"][EDIT_MEAN]["success"] == {"value": 1, "low": 1, "high": 1, "count": 8, "level": 0.95}
    assert saved["groups"]["generate"]["wilson"]["low"] < 0.6  # four of four prove little
    html = (tmp_path / "report.html").read_text()
    assert not re.search(r"""(?:src|href|url)\W{1,2}https?:""", html)  # nothing is loaded from elsewhere
    assert "generation" in html and "edit: recolour" in html and "not selected" in html
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 16 and all((tmp_path / line["image"]).exists() for line in lines)
    assert lines[0]["instruction"] and isinstance(lines[0]["seed"], int)
    printed = capsys.readouterr().out
    assert "100.0 [100.0, 100.0]" in printed and "edit: unseen phrasing" in printed and "…" not in printed


@pytest.mark.slow
def test_copying_the_source_scores_nothing_but_keeps_the_rest() -> None:
    report = evaluate_world(Ideal(source), **QUICK)
    for name in ("edit/recolour", "edit/move", EDIT_MEAN, "edit/unseen phrasing"):
        group = report.groups[name]
        assert group.success.value == 0 and group.requests and group.requests.value == 0
        assert group.psnr and group.psnr.value > 50
    assert report.groups["generate"].success.value == 0


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    evaluate_world(Ideal(target), out=whole, batch_size=3, **QUICK)
    broken = Ideal(target)
    broken.decode = _fails_after(broken.decode, 4)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="power cut"):
        evaluate_world(broken, out=torn, batch_size=3, **QUICK)
    done = (torn / "results.jsonl").read_bytes()
    assert 0 < done.count(b"\n") < 16
    (torn / "results.jsonl").write_bytes(done + b'{"key": "gene')  # a line torn by the crash
    again = Ideal(target)
    evaluate_world(again, out=torn, batch_size=2, **QUICK)
    assert len(again.seen) == 16 - done.count(b"\n")  # nothing is run twice
    first, second = (_lines(folder) for folder in (whole, torn))
    assert first == second
    assert (whole / "results.json").read_bytes() == (torn / "results.json").read_bytes()
    idle = Ideal(target)
    evaluate_world(idle, out=torn, **QUICK)
    assert idle.calls == 0


def _fails_after(function: Callable, times: int) -> Callable:
    left = iter(range(times))

    def call(*args: object) -> object:
        if next(left, None) is None:
            raise RuntimeError("power cut")
        return function(*args)

    return call


def _lines(folder: Path) -> dict[str, dict]:
    rows = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    return {row["key"]: row for row in rows}


@pytest.mark.slow
def test_results_of_another_run_are_not_mixed(tmp_path: Path) -> None:
    evaluate_world(Ideal(target), out=tmp_path, **QUICK)
    with pytest.raises(WeftError, match="steps was 2, is 3"):
        evaluate_world(Ideal(target), out=tmp_path, **{**QUICK, "steps": 3})


@pytest.mark.slow
def test_pictures_are_judged_again_without_a_model(tmp_path: Path) -> None:
    before = evaluate_world(Ideal(target), out=tmp_path, **QUICK)
    rows = before.results.rows  # type: ignore[union-attr]
    key = next(key for key in rows if key.startswith("edit/recolour"))
    before.results.rewrite({**rows, key: {**rows[key], "score": {**rows[key]["score"], "success": False}}})  # type: ignore[union-attr]
    after = rescore_world(tmp_path)
    assert after.dict() == before.dict()
    assert list(_lines(tmp_path)) == list(rows)

    # An unfinished evaluation can be judged as far as it went, and says that it is unfinished.
    text = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_text("".join(text[:6]))
    partial = rescore_world(tmp_path)
    assert [group.count for group in partial.groups.values()] == [4, 2]
    assert "Unfinished: 10 records" in (tmp_path / "report.html").read_text()

    # A picture that changed since is not judged.
    path = tmp_path / rows[key]["image"]
    Image.new("RGB", (64, 64)).save(path)
    with pytest.raises(WeftError, match="changed since"):
        rescore_world(tmp_path)
    with pytest.raises(WeftError, match="no results here"):
        rescore_world(tmp_path / "elsewhere")


def test_an_output_does_not_depend_on_its_batch() -> None:
    class Noisy(Ideal):
        def velocity(self, x: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
            return x * 0.5  # the output keeps the noise, so it shows the seed

    items = list(world_items("val", ["generate"], 5, 0).values())
    together = [np.asarray(output.made) for output in outputs(Noisy(target), items, Sampling(steps=2))]
    alone = next(outputs(Noisy(target), items[3:4], Sampling(steps=2, batch_size=1)))
    np.testing.assert_array_equal(together[3], np.asarray(alone.made))
    assert not np.array_equal(together[3], together[4])
    other = next(outputs(Noisy(target), items[3:4], Sampling(steps=2, seed=1)))
    assert not np.array_equal(together[3], np.asarray(other.made))
    with pytest.raises(WeftError, match="solver 'heun' is unknown"):
        next(outputs(Noisy(target), items[3:4], Sampling(steps=2, solver="heun")))
    assert Sampling(solver="ab2").facts()["solver"] == "ab2" and "solver" not in Sampling().facts()


def test_guidance_encodes_the_negative_text() -> None:
    model, items = Ideal(target), list(world_items("val", ["generate"], 2, 0).values())
    assert len(list(outputs(model, items, Sampling(steps=1, guidance=3.0, negative="blurred")))) == 2
    assert [negative for _, negative in model.seen] == [None, None, "blurred", "blurred"]
    model = Ideal(target)
    list(outputs(model, items, Sampling(steps=1)))
    assert len(model.seen) == 2


@pytest.mark.slow
def test_groups_are_independent_and_stable() -> None:
    names = expand(["generate", "edit", "unseen", "held-out pair", "held-out kind"])
    names += expand(["multi_edit", "multi_generate", "references", "concepts"])
    assert names == list(GROUPS)
    items = world_items("test", names, 2, 0)
    ids = [record.id for record in items.values()]
    assert len(set(ids)) == len(ids) == 2 * len(GROUPS)
    for name in expand(["references", "concepts"]):
        some = [record for key, record in items.items() if key.rpartition("/")[0] == name]
        what = name.partition("/")[2]
        assert {record.task for record in some} == {name.partition("/")[0]}
        assert {len(record.references) for record in some} == {int(what[0]) if what[0].isdigit() else 1}
        assert what[0].isdigit() or {c for r in some for c in requested_concepts(r).values()} == {what}
    assert list(world_items("test", ["edit/move"], 1, 0)) == [key for key in items if key.startswith("edit/move/")][:1]
    meta = {name: items[next(key for key in items if key.startswith(name + "/world"))].meta for name in names}
    assert meta["edit/move"]["kind"] == "move" and meta["edit/move"]["phrasing"] == "seen"
    assert meta["edit/unseen phrasing"]["phrasing"] == "unseen"
    assert meta["generate/held-out pair"]["combo"] == "held_out" and meta["generate"]["combo"] == "seen"
    with pytest.raises(WeftError, match="unknown group 'fly'; known: edit, unseen"):
        expand(["fly"])


@pytest.mark.slow
def test_groups_with_references_say_what_they_gave(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    groups = ["multi_edit/3 references", "multi_generate/3 references", "multi_edit/global"]
    report = evaluate_world(Ideal(target), groups=groups, count=3, steps=1, baseline_count=2, out=tmp_path, show=True)
    for group in report.groups.values():
        assert group.success.value == 1 and all(value.value == 1 for value in group.concepts.values())
        assert {kind: group.baselines[kind] for kind in ("reference", "blank", "chance")} == {
            "reference": 0, "blank": 0, "chance": 0
        }  # fmt: skip
    three = report.groups["multi_generate/3 references"]
    assert sum(value.count for value in three.concepts.values()) == 9  # each reference is one request
    assert list(report.groups["multi_edit/global"].concepts) == ["global"]
    out = capsys.readouterr().out
    assert "editing from references: 3" in out and "copy %" in out and "local %" in out
    copied = evaluate_world(Ideal(source), groups=["multi_edit/3 references"], count=3, steps=1)
    group = copied.groups["multi_edit/3 references"]
    # among three changes that are missing the oracle may take one for done, never all
    assert group.success.value == 0 and group.requests and group.requests.value < 0.5


def test_evaluator_for_training_is_a_plain_function() -> None:
    measure = world_evaluator(groups=["edit/remove"], count=2, steps=1)
    assert measure(Ideal(target), 100) == measure(Ideal(target)) == {"edit/remove": 1.0}


def test_fingerprint_tells_weights_apart() -> None:
    class Weighted(Ideal):
        linear = torch.nn.Linear(600, 600)

        def modules(self) -> dict[str, torch.nn.Module]:
            return {"transformer": self.linear}

    model = Weighted(target)
    before = fingerprint(model)
    assert before == fingerprint(model)
    with torch.no_grad():
        model.linear.weight += 1e-4
    assert fingerprint(model) != before


def test_psnr_outside_agrees_with_the_oracle() -> None:
    generator = np.random.default_rng(0)
    for record in records("test", 6, seed=3, tasks=["edit"]):
        noisy = np.asarray(target(record), np.float32) + generator.normal(0, 8, (64, 64, 3))
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        theirs, ours = judge(record, image).psnr_outside, psnr_outside(record, image)
        assert (theirs is None) == (ours is None)
        if theirs is not None:
            assert ours == pytest.approx(theirs, abs=0.05)


def test_runner_serves_any_records_and_scorer(tmp_path: Path) -> None:
    items = world_items("val", ["edit/light"], 3, 0)

    def mean(key: str, record: Record, image: Image.Image) -> dict:
        return {"mean": float(np.asarray(image).mean())}

    sampling, done = Sampling(steps=1, batch_size=2), []
    results = Results(tmp_path, {"benchmark": "mean"})
    rows = evaluate(Ideal(source), items, mean, sampling=sampling, results=results, advance=done.append)
    assert sum(done) == 3 and list(rows) == list(items)
    assert rescore(Results(tmp_path), items, mean) == rows
    with pytest.raises(WeftError, match="1 rows have no record"):
        rescore(Results(tmp_path), dict(list(items.items())[:2]), mean)
    (tmp_path / "results.jsonl").write_text("{}\n")
    with pytest.raises(WeftError, match="results.jsonl:1: not a result row"):
        Results(tmp_path)


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = next(iter(world_items("val", ["generate"], 1, 0).values()))
    results = Results(tmp_path, {})
    results.append("first", Output(record, target(record), 1), {}, {})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(WeftError, match="No space left"):
        results.append("second", Output(record, target(record), 2), {}, {})
    monkeypatch.undo()
    assert list(Results(tmp_path).rows) == ["first"]


def test_file_names_are_portable_and_unique() -> None:
    assert file_name("plain-1") == "plain-1"
    names = [file_name(key) for key in ("a/b", "a:b", "../a", "ä", "x" * 300, "x" * 301, "")]
    assert len(set(names)) == len(names)
    assert all("/" not in name and not name.startswith(".") and len(name) < 100 for name in names)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
