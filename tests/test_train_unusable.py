"""Records that cannot be used are left out by name, alike in every run; above the limit it ends with nothing lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from test_online import recipe as online
from test_online import requests
from test_train import KILLED, ROOT, assert_same, quiet, recipe, source, state
from tiny import tiny_kontext_folder
from weft.errors import WeftError
from weft.record import make_record
from weft.train import read_recipe, run
from weft.train.checkpoint import newest
from weft.train.loop import Trainer


@pytest.fixture
def picture(tmp_path):
    """A JPEG that is cut off."""
    from PIL import Image

    file = tmp_path / "cut.jpg"
    Image.radial_gradient("L").save(file)
    file.write_bytes(file.read_bytes()[:600])
    return str(file)


def broken(folder, picture, *which, **sections):
    """A recipe whose edits number `which` have this picture."""
    data = [
        {"source": source(broken=list(which), picture=picture), "weight": 2, "batch_group": "edit"},
        {"source": source(task="generate"), "weight": 1, "batch_group": "generate"},
    ]
    run = {"max_faults": 0.2, "threads": 1} | sections.pop("run", {})
    return recipe(folder, data=data, run=run, **sections)


def rows_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def test_a_broken_picture_is_left_out_by_name(tmp_path, picture):
    heard: list[str] = []
    result = run(broken(tmp_path / "a", picture, 3, 7), say=heard.append)
    assert result.step == 12
    named = [line for line in heard if "skipped record edit-" in line]
    assert len(named) == 2 and all("cut.jpg is damaged or truncated" in line for line in named)
    assert any("(2 of 20 records of" in line for line in named)
    lines = [name for row in rows_of(tmp_path / "a") for name in row.get("skipped_records", [])]
    assert sorted(name.split(":")[0] for name in lines) == ["record edit-3", "record edit-7"]


def test_the_other_samples_make_the_step(tmp_path, picture):
    """The gradient is that of the mean over them, however the step is cut into micro-batches; all can be left out."""
    plain = {"trainable": f"{ROOT}/tests/toy.py:Plain"}
    gradients = []
    for size, pieces in ((4, 1), (1, 4)):
        tree = broken(tmp_path, picture, 3, 7, run={"batch_size": size, "accumulate": pieces}, **plain)
        trainer = Trainer(read_recipe(tree), {}, quiet)
        step = next(s for s in range(12) if (fed := trainer.feed.batch(s)).faults)
        fed = trainer.feed.batch(step)
        assert fed.count == 4 and len(fed.examples) == 4 - len(fed.faults)
        trainer.step = step
        trainer.feed.unusable.agree(fed, trainer.processes)
        assert fed.count == len(fed.examples) == len(fed.ids)
        total, _ = trainer.backward(fed)
        gradients.append([total, *(p.grad for p in trainer.parameters.values())])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    everything = broken(tmp_path / "x", picture, *range(20), run={"max_faults": 1.0, "steps": 3, "ema": None})
    trainer = Trainer(read_recipe(everything), {}, quiet)
    before = {k: p.detach().clone() for k, p in trainer.parameters.items()}
    assert trainer.train_step()["samples"] == 0 and trainer.step == 1
    assert all(torch.equal(before[k], p) for k, p in trainer.parameters.items())


@pytest.mark.slow
@pytest.mark.parametrize("cache", [None, {"shard": 8}, {"ahead": True, "batch": 4, "shard": 8}])
def test_a_continued_run_is_the_uninterrupted_one(tmp_path, picture, cache):
    settings = {"cache": cache, "run": {"accumulate": 2}}
    run(broken(tmp_path / "a", picture, 3, 7, **settings), say=quiet)
    tree = broken(tmp_path / "b", picture, 3, 7, **settings)
    done = subprocess.run([sys.executable, "-c", KILLED, json.dumps(tree)], timeout=300, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    run(tree, say=quiet)
    assert_same(state(tmp_path / "a"), state(tmp_path / "b"))
    if cache is not None:  # and what cannot be used costs no second encoding of what can
        trainer = Trainer(read_recipe(tree), {}, quiet)
        trainer.prepare_data()
        for _ in range(12):
            trainer.train_step()
        assert trainer.model.encoded == 0


def test_prefetch_leaves_out_the_same(tmp_path, picture):
    run(broken(tmp_path / "a", picture, 3, 7), say=quiet)
    run(broken(tmp_path / "b", picture, 3, 7, run={"prefetch": True}), say=quiet)
    assert_same(state(tmp_path / "a"), state(tmp_path / "b"))


def test_above_the_limit_it_ends_with_numbers_and_loses_nothing(tmp_path, picture):
    sampler = Trainer(read_recipe(recipe(tmp_path / "a")), {}, quiet).feed.sampler
    late = next(n for n in range(20) if all((0, n) not in sampler.batch(step).rows for step in range(4)))
    first = next(step for step in range(12) if (0, late) in sampler.batch(step).rows)
    told = r"1 of 20 rows are bad \(5.0%, the limit max_faults is 2.0%\).*record edit-\d: .*cut.jpg is damaged"
    tree = broken(tmp_path / "b", picture, late, run={"max_faults": 0.02})
    with pytest.raises(WeftError, match=told):
        run(tree, say=quiet)
    assert newest(tmp_path / "b").name == f"step-{first:06d}"
    run(tree, ["run.max_faults=0.2"], say=quiet)  # continued: nothing is lost, and the limit is free to change
    run(broken(tmp_path / "a", picture, late), say=quiet)
    assert_same(state(tmp_path / "a"), state(tmp_path / "b"))
    ahead = broken(tmp_path / "c", picture, 3, run={"max_faults": 0.02}, cache={"ahead": True})
    with pytest.raises(WeftError, match=told):
        run(ahead, say=quiet)


def test_what_only_a_batch_can_not_do_is_no_fault_of_a_record(tmp_path):
    trainer = Trainer(read_recipe(recipe(tmp_path)), {}, quiet)
    examples = trainer.model.examples

    def few(records):
        if len(records) > 1:
            raise WeftError("one at a time")
        return examples(records)

    trainer.model.examples = few
    with pytest.raises(WeftError, match="one at a time"):
        trainer.run()
    assert not trainer.feed.unusable.met and newest(tmp_path).name == "step-000000"


def test_what_looks_at_the_data_first_does_not_end_the_run(tmp_path, picture):
    trainer = Trainer(read_recipe(broken(tmp_path / "a", picture, 3)), {}, quiet)
    trainer.model.notes = lambda records: [str(r.load(r.source).size) for r in records if r.source is not None]
    (note, _) = [*trainer.feed.notes(), None]
    assert "no closer look before the first step" in note and "cut.jpg is damaged" in note


def test_held_out_records_are_left_out_too(tmp_path, picture):
    heard: list[str] = []
    held = {"source": source(6, start=9.0, broken=[2], picture=picture), "count": 6}
    run(recipe(tmp_path / "a", run={"validate_every": 6}, validate=held), say=heard.append)
    assert [row["val/loss"] > 0 for row in rows_of(tmp_path / "a") if "val/loss" in row] == [True, True]
    assert sum("not validated: record edit-2" in line for line in heard) == 1


def pictures(folder):
    """Records of ten pictures of two shapes; the third is cut off within its header, the sixth is gone."""
    from PIL import Image

    records = []
    for k in range(10):
        file = Path(folder) / f"{k}.png"
        Image.new("RGB", (8, 8 + 8 * (k % 2))).save(file)
        records.append(make_record("p", target=file, id=f"p{k}", meta={"x": [k / 10, 0.5, 0.1, 0.0]}))
        if k in (2, 5):
            file.write_bytes(file.read_bytes()[:20])
    (Path(folder) / "5.png").unlink()
    return records


def test_buckets_of_pictures_of_which_some_have_no_size(tmp_path):
    heard: list[str] = []
    tree = recipe(
        tmp_path / "a",
        data=[{"source": {"call": f"{__file__}:pictures", "args": {"folder": str(tmp_path)}}}],
        stages=[{"size": 16, "aspects": ["1:1", "1:2"], "multiple": 8}],
        run={"max_faults": 0.2},
    )
    run(tree, say=heard.append)
    assert {line.split()[2] for line in heard if line.startswith("skipped")} == {"p2:", "p5:"}
    trainer = Trainer(read_recipe(tree), {}, quiet)
    assert sorted(row for _, row in trainer.feed._bad) == [2, 5]
    assert len(list((tmp_path / "a").glob("sizes-*.npz"))) == 1


def edits(broken=(), picture=""):
    """Six requests, some of them with a source that cannot be read."""
    return [make_record("p", picture, id=r.id) if i in broken else r for i, r in enumerate(requests())]


def test_requests_that_cannot_be_read_are_replaced(tmp_path, picture):
    folder = tiny_kontext_folder(tmp_path / "tiny")
    data = [{"source": {"call": f"{__file__}:edits", "args": {"broken": [1, 4], "picture": picture}}}]
    settings = {"steps": 6, "max_faults": 0.4}
    heard: list[str] = []
    trainer = Trainer(read_recipe(online(folder, tmp_path / "a", data=data, run=settings)), {}, heard.append)
    for _ in range(3):
        trainer.train_step()
        assert len({s.group for s in trainer.method.epoch.samples}) == 2
        assert not {"r1", "r4"} & {s.record.id for s in trainer.method.epoch.samples}
        trainer.train_step()
    assert len([line for line in heard if line.startswith("skipped record r")]) == 2
    with pytest.raises(WeftError, match=r"1 of 6 rows are bad.*record r\d: .*cut.jpg is damaged"):
        run(online(folder, tmp_path / "b", data=data, run=settings | {"max_faults": 0.1}), say=quiet)
    assert newest(tmp_path / "b") is not None


FAILS = """
import torch.distributed as dist
from toy import Plain

class Failing(Plain):
    def examples(self, records):
        if dist.get_rank() == 1 and any(r.id == "edit-7" for r in records):
            raise RuntimeError("out of memory")
        return super().examples(records)
"""


@pytest.mark.slow
def test_two_processes_decide_alike(tmp_path, picture):
    """One of two sees a bad picture, another error, or the limit: both leave out the same, or save and end."""
    plain = {"trainable": f"{ROOT}/tests/toy.py:Plain"}

    def torchrun(name, *which, trainable=None, **settings):
        tree = broken(tmp_path / name, picture, *which, run={"accumulate": 2, **settings}, **(trainable or plain))
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(tree))
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "weft.train", str(file)]
        return subprocess.run([sys.executable, *launch], capture_output=True, text=True, timeout=300)

    run(broken(tmp_path / "a", picture, 3, 7, run={"accumulate": 2}, **plain), say=quiet)
    done = torchrun("b", 3, 7)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("skipped record edit-") == 2
    a, b = state(tmp_path / "a"), state(tmp_path / "b")
    assert a[0] == b[0] == 12
    for key, value in a[1].items():
        torch.testing.assert_close(value, b[1][key], rtol=2e-4, atol=1e-6)

    done = torchrun("c", 3, 7, max_faults=0.02)
    assert done.returncode != 0 and done.stderr.count("1 of 20 rows are bad") >= 2  # each process says so
    assert newest(tmp_path / "c") is not None

    (tmp_path / "failing.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n{FAILS}")
    done = torchrun("d", trainable={"trainable": f"{tmp_path}/failing.py:Failing"})
    assert done.returncode != 0 and "RuntimeError: out of memory" in done.stderr
    assert "weft: out of memory" in done.stderr and newest(tmp_path / "d") is not None
