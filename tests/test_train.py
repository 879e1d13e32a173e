"""The training loop keeps its promises: exact resume, exact accumulation, no update from a bad number, clean stops."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from weft.errors import WeftError
from weft.models.adapt import Ema
from weft.train import Preempted, read_recipe, run
from weft.train.checkpoint import newest, read_checkpoint
from weft.train.config import OptimRecipe
from weft.train.loop import Trainer
from weft.train.optim import schedule

ROOT = Path(__file__).resolve().parents[1]


def source(count=20, **args):
    return {"call": f"{ROOT}/tests/toy.py:numbers", "args": {"count": count, **args}}


def recipe(folder, **sections):
    """A recipe of the toy; `sections` are merged one level deep."""
    tree = {
        "trainable": f"{ROOT}/tests/toy.py:Toy",
        "model": {"train": ["net"]},
        "data": [
            {"source": source(), "weight": 2, "batch_group": "edit"},
            {"source": source(task="generate"), "weight": 1, "batch_group": "generate"},
        ],
        "optim": {"name": "adamw", "lr": 1e-2, "schedule": "cosine", "warmup": 2, "weight_decay": 0.01},
        "run": {"folder": str(folder), "steps": 12, "batch_size": 4, "checkpoint_every": 6, "log_every": 3, "ema": {}},
    }
    for key, value in sections.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) and isinstance(tree.get(key), dict) else value
    return tree


def quiet(line: str) -> None:
    pass


def state(folder):
    checkpoint = read_checkpoint(newest(Path(folder)))
    return checkpoint.step, {f"{f}:{k}": v for f, group in checkpoint.tensors.items() for k, v in group.items()}


def assert_same(a, b):
    assert a[0] == b[0] and a[1].keys() == b[1].keys()
    differing = [k for k in a[1] if not torch.equal(a[1][k], b[1][k])]
    assert not differing, differing


KILLED = """
import json, os, signal, sys
from weft.train import run
def say(line):
    if line.startswith("step 9/"):
        os.kill(os.getpid(), signal.SIGKILL)
run(json.loads(sys.argv[1]), say=say)
"""


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_twelve_steps_equal_six_kill_resume(tmp_path, optimizer):
    """Also with dropout inside the module, a buffer that training changes, EMA, cache and accumulation."""
    extra = {"optim": {"name": optimizer}, "cache": {"ahead": True, "shard": 8}}
    through = recipe(tmp_path / "a", run={"accumulate": 2, "threads": 1}, **extra)
    run(through, say=quiet)
    broken = recipe(tmp_path / "b", run={"accumulate": 2, "threads": 1}, **extra)
    done = subprocess.run([sys.executable, "-c", KILLED, json.dumps(broken)], timeout=120, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert newest(tmp_path / "b").name == "step-000006"
    heard: list[str] = []
    run(broken, say=heard.append)
    assert any("resumed" in line and "step-000006" in line for line in heard)
    a, b = state(tmp_path / "a"), state(tmp_path / "b")
    assert a[0] == 12
    kinds = {k.split(":")[0] for k in a[1]}
    assert kinds == {"model", "ema", "optimizer", "buffers"}
    assert any(k.endswith("momentum_buffer") for k in a[1]) == (optimizer == "muon")
    assert "buffers:net.seen" in a[1] and "buffers:net.table" not in a[1]
    assert_same(a, b)
    exported = [load_file(tmp_path / x / "export" / "net.safetensors") for x in "ab"]
    assert all(torch.equal(exported[0][k], exported[1][k]) for k in exported[0])
    steps = [json.loads(line)["step"] for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert steps == [3, 6, 9, 12]  # what the killed run logged after its checkpoint is not there twice


@pytest.mark.parametrize("extra", [{}, {"optim": {"name": "muon"}, "cache": {"shard": 5}}], ids=["adamw", "muon"])
def test_it_continues_from_any_step_bit_for_bit(tmp_path, extra):
    """Through stages with other buckets, batch sizes and none, with several groups and sources, and a rare average."""

    def shaped(**args):
        return {"call": f"{ROOT}/tests/toy.py:shaped", "args": args}

    settings = {"steps": 18, "batch_size": 3, "accumulate": 2, "keep": 99, "export": False, "threads": 1}
    tree = recipe(
        tmp_path / "a",
        data=[
            {"source": shaped(), "weight": 2, "batch_group": "edit"},
            {"source": shaped(count=7, seed=3), "batch_group": "edit"},
            {"source": shaped(task="generate", seed=1), "batch_group": "generate"},
        ],
        stages=[
            {"until_step": 4, "size": 64, "aspects": ["1:1", "4:3", "3:4"], "multiple": 16},
            {"until_step": 9, "size": 96, "aspects": ["1:1", "3:2", "2:3"]},
            {"until_step": 13, "batch_size": 2, "accumulate": 4},
            {"buckets": [[64, 64], [64, 96], [96, 64]], "batch_size": 2, "accumulate": 3},
        ],
        run={**settings, "checkpoint_every": 1, "ema": {"every": 3, "start": 1}},
        **extra,
    )
    run(tree, say=quiet)
    through = state(tmp_path / "a")
    for step in (2, 5, 8, 11, 14, 17):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "a" / f"step-{step:06d}", folder / f"step-{step:06d}")
        run(tree, [f"run.folder={folder}", "run.checkpoint_every=99"], say=quiet)
        assert_same(through, state(folder))


def test_accumulation_is_a_large_batch(tmp_path):
    plain = {"trainable_args": {"dropout": 0.0}}
    run(recipe(tmp_path / "a", run={"batch_size": 8}, **plain), say=quiet)
    run(recipe(tmp_path / "b", run={"batch_size": 4, "accumulate": 2}, **plain), say=quiet)
    a, b = state(tmp_path / "a")[1], state(tmp_path / "b")[1]
    for key in a:
        if key.startswith(("model", "ema")):
            torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-6)
    logs = [[json.loads(x)["loss"] for x in (tmp_path / d / "log.jsonl").read_text().splitlines()] for d in "ab"]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_cached_and_online_training_are_the_same(tmp_path):
    run(recipe(tmp_path / "a"), say=quiet)
    run(recipe(tmp_path / "b", cache={}), say=quiet)
    run(recipe(tmp_path / "c", cache={"ahead": True, "folder": str(tmp_path / "b" / "cache")}), say=quiet)
    assert_same(state(tmp_path / "a"), state(tmp_path / "b"))
    assert_same(state(tmp_path / "a"), state(tmp_path / "c"))


def test_batches_made_ahead_are_the_same(tmp_path):
    run(recipe(tmp_path / "a"), say=quiet)
    heard: list[str] = []
    run(recipe(tmp_path / "b", run={"prefetch": True, "steps": 12}), say=heard.append)
    assert_same(state(tmp_path / "a"), state(tmp_path / "b"))
    with pytest.raises(WeftError, match="not finite.*edit-7"):
        bad = [{"source": source(bad=7), "batch_group": "edit"}]
        run(recipe(tmp_path / "c", run={"prefetch": True}, data=bad), say=quiet)


def test_the_cache_encodes_each_record_once(tmp_path):
    def encoded(**cache):
        trainer = Trainer(read_recipe(recipe(tmp_path, cache=cache)), {}, quiet)
        trainer.prepare_data()
        for _ in range(12):
            trainer.train_step()
        trainer.feed.cache.flush()
        return trainer.model.encoded

    assert encoded(ahead=True) == 40
    assert encoded(ahead=True) == 0 and encoded() == 0
    assert len(list((tmp_path / "cache").glob("keys-*.json"))) == 2


def test_other_encoder_weights_are_other_examples(tmp_path):
    for seed in (0, 1):  # the toy's encoder is random, seeded by run.seed
        trainer = Trainer(read_recipe(recipe(tmp_path, cache={"ahead": True}, run={"seed": seed})), {}, quiet)
        trainer.prepare_data()
        assert trainer.model.encoded == 40
    assert len(trainer.feed.cache) == 80


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_bad_number_stops_before_the_update(tmp_path, where):
    bad = {"data": [{"source": source(bad=7), "batch_group": "edit"}]}
    trainer = Trainer(read_recipe(recipe(tmp_path, **(bad if where == "loss" else {}))), {}, quiet)
    if where == "gradient":
        trainer.step = 3
        trainer.model.net.enter.weight.register_hook(lambda g: g * float("inf"))
    with pytest.raises(WeftError, match="not finite.*weights are unchanged.*edit-") as error:
        while True:
            before = {k: p.detach().clone() for k, p in trainer.parameters.items()}
            shadow = {k: s.clone() for k, s in trainer.ema.shadow.items()}
            step, moments = trainer.step, {k: v.clone() for k, v in trainer.optimizers.state().items()}
            trainer.train_step()
    if where == "loss":
        assert "samples edit-7" in str(error.value)
    assert trainer.step == step and all(torch.equal(before[k], p) for k, p in trainer.parameters.items())
    assert all(torch.equal(shadow[k], s) for k, s in trainer.ema.shadow.items())
    assert all(torch.equal(moments[k], v) for k, v in trainer.optimizers.state().items())
    assert all(p.grad is None for p in trainer.parameters.values())


def test_sigterm_saves_and_exits_143(tmp_path):
    tree = recipe(tmp_path / "b")

    def say(line):
        if line.startswith("step 3/"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted) as stop:
        run(tree, say=say)
    assert stop.value.code == 143
    assert newest(tmp_path / "b").name == "step-000003"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run(tree, say=quiet)
    run(recipe(tmp_path / "a"), say=quiet)
    assert_same(state(tmp_path / "a"), state(tmp_path / "b"))


@pytest.mark.slow
def test_the_command_line_exits_143_and_2(tmp_path):
    import yaml

    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(recipe(tmp_path / "run", run={"steps": 10**9, "log_every": 50})))
    command = [sys.executable, "-m", "weft.train", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while "steps/s" not in process.stdout.readline():
        pass
    process.terminate()
    assert process.wait(60) == 143
    assert newest(tmp_path / "run") is not None
    done = subprocess.run([*command, "run.stepz=3"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.strip() == f"weft: {file}: unknown key 'run.stepz': did you mean 'steps'?"


def test_another_recipe_is_refused_at_resume(tmp_path):
    run(recipe(tmp_path), say=quiet)
    with pytest.raises(WeftError, match=r"optim.lr: 0.01 -> 0.02.*run.allow_changes=true"):
        run(recipe(tmp_path), ["optim.lr=2e-2", "run.steps=14"], say=quiet)
    with pytest.raises(WeftError, match=r"run.steps: 12 -> 14"):  # it shapes the schedule
        run(recipe(tmp_path), ["run.steps=14"], say=quiet)
    result = run(recipe(tmp_path), ["run.steps=14", "run.allow_changes=true", "run.log_every=1"], say=quiet)
    assert result.step == 14


def test_validation_and_evaluators_see_averaged_weights(tmp_path):
    seen = {}

    def evaluator(model, step):
        assert not model.net.training
        seen[step] = model.net.enter.weight.detach().clone()
        return {"norm": float(seen[step].norm())}

    tree = recipe(
        tmp_path, run={"evaluate_every": 6, "validate_every": 6}, validate={"source": source(5, start=9.0), "count": 5}
    )
    trainer = Trainer(read_recipe(tree), {"mine": evaluator}, quiet)
    trainer.run()
    assert set(seen) == {6, 12} and trainer.model.net.training
    assert torch.equal(seen[12], trainer.ema.shadow["net.enter.weight"])
    assert not torch.equal(seen[12], trainer.model.net.enter.weight)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "val/loss" in r and "mine/norm" in r] == [6, 12]
    assert trainer.validate() == trainer.validate()


def test_a_save_inside_validation_keeps_raw_and_averaged_apart(tmp_path):
    trainer = Trainer(read_recipe(recipe(tmp_path)), {}, quiet)
    for _ in range(4):
        trainer.train_step()
    raw = {k: p.detach().clone() for k, p in trainer.parameters.items()}
    with pytest.raises(RuntimeError), trainer.averaged():
        raise RuntimeError
    trainer.save()
    again = Trainer(read_recipe(recipe(tmp_path)), {}, quiet)
    again.resume()
    assert all(torch.equal(raw[k], p) for k, p in again.parameters.items())
    assert all(torch.equal(trainer.ema.shadow[k], s) for k, s in again.ema.shadow.items())


def test_ema_follows_its_formula():
    parameter = nn.Parameter(torch.tensor([1.0]))
    ema = Ema({"p": parameter}, 0.9)
    expected = 1.0
    for n in range(200):
        parameter.data.fill_(float(n))
        ema.update(n)
        d = min(0.9, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * n
    assert float(ema.shadow["p"]) == pytest.approx(expected, rel=1e-5)


def test_ema_is_that_of_diffusers_after_its_first_update():
    from diffusers.training_utils import EMAModel

    parameter = nn.Parameter(torch.ones(3))
    ours, theirs = Ema({"p": parameter}, 0.8), EMAModel([parameter], decay=0.8)
    for n in range(60):
        if n:  # at the first one diffusers takes the weights as they are
            parameter.data = torch.full((3,), float(n % 7))
        ours.update(n)
        theirs.step([parameter])
        torch.testing.assert_close(ours.shadow["p"], theirs.shadow_params[0])


def test_ema_of_every_eighth_update_is_that_of_flow_grpo():
    """flow_grpo/ema.py: update n counts when n + 1 is a multiple of the interval, with the decay of that n."""
    parameter = nn.Parameter(torch.tensor([1.0]))
    ema, expected = Ema({"p": parameter}, 0.9, every=8), 1.0
    for n in range(1, 41):
        parameter.data.fill_(float(n))
        ema.update(n)
        if n in (7, 15, 23, 31, 39):
            expected += (1 - min(0.9, (1 + n) / (10 + n))) * (n - expected)
        assert float(ema.shadow["p"]) == pytest.approx(expected, rel=1e-5), n
    with pytest.raises(WeftError, match="ema.every is 0"):
        Ema({"p": parameter}, 0.9, every=0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("constant", [0.1, 0.55, 1, 1, 1]), ("linear", [0.1, 0.55, 1, 0.6, 0.2]), ("cosine", [0.1, 0.55, 1, 0.6, 0.2])],
)
def test_schedules(name, expected):
    config = OptimRecipe(schedule=name, warmup=10, warmup_start=0.1, final=0.2)
    assert [schedule(config, s, 110) for s in (0, 5, 10, 60, 110)] == pytest.approx(expected)
    share = OptimRecipe(schedule=name, warmup=10 / 110, warmup_start=0.1, final=0.2)
    assert schedule(share, 5, 110) == pytest.approx(expected[1])


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("steps", "warmup"), [(37, 0), (37, 5), (30, 0.07), (3, 2)])
def test_schedules_are_those_of_transformers(name, steps, warmup):
    from transformers import TrainingArguments, get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    first = TrainingArguments.get_warmup_steps(type("Given", (), {"warmup_steps": warmup}), steps)
    kind = "constant_with_warmup" if name == "constant" else name
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=first, num_training_steps=steps)
    for step in range(steps):
        assert schedule(OptimRecipe(schedule=name, warmup=warmup, warmup_start=0), step, steps) == pytest.approx(
            scheduler.get_last_lr()[0], abs=1e-12
        )
        optimizer.step()
        scheduler.step()


def test_muon_takes_the_matrices_inside_blocks(tmp_path):
    trainer = Trainer(read_recipe(recipe(tmp_path, optim={"name": "muon"})), {}, quiet)
    adam, muon = trainer.optimizers.names
    assert sorted(muon[0]) == ["net.blocks.0.1.weight", "net.blocks.1.1.weight"]
    assert sorted(adam[0]) == ["net.enter.weight", "net.leave.weight"]
    assert all(name.endswith("bias") or ".0.weight" in name for name in adam[1])
    with pytest.raises(WeftError, match="use adamw"):
        tree = recipe(tmp_path, optim={"name": "muon", "muon_exclude": ["blocks"]})
        Trainer(read_recipe(tree), {}, quiet)


def test_bf16_keeps_fp32_weights_and_state(tmp_path):
    run(recipe(tmp_path, run={"precision": "bf16"}), say=quiet)
    assert {v.dtype for k, v in state(tmp_path)[1].items() if "seen" not in k} == {torch.float32}


def test_tensorboard_gets_the_numbers(tmp_path):
    run(recipe(tmp_path, run={"trackers": ["tensorboard"]}), say=quiet)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [3, 6, 9, 12]
    assert (tmp_path / "log.jsonl").exists()
    with pytest.raises(WeftError, match=r"weft\[track\]|unknown"):
        run(recipe(tmp_path / "x", run={"trackers": ["wandbb"]}), say=quiet)


def test_pictures_of_what_draws_none_are_refused_at_the_start(tmp_path):
    with pytest.raises(WeftError, match="run.grid_every: Toy draws no pictures; set it to 0"):
        run(recipe(tmp_path, run={"grid_every": 6}, grid={"source": source(2)}), say=quiet)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    from weft.train import checkpoint

    run(recipe(tmp_path, run={"steps": 6}), say=quiet)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(WeftError, match="No space left.*step-000006 is intact"):
            run(recipe(tmp_path, run={"steps": 12, "allow_changes": True}), say=quiet)
    assert run(recipe(tmp_path, run={"steps": 12, "allow_changes": True}), say=quiet).step == 12
    before = (tmp_path / "export" / "net.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("weft.train.exports.json", SimpleNamespace(dumps=full))
        with pytest.raises(WeftError, match="could not write .*export: .*No space left.* checkpoints are intact"):
            run(recipe(tmp_path, run={"steps": 12, "allow_changes": True, "log_every": 99}), say=quiet)
    assert (tmp_path / "export" / "net.safetensors").read_bytes() == before and not list(tmp_path.glob(".export*"))


def of_two(file, tree):
    """A run of two processes."""
    import yaml

    file.write_text(yaml.safe_dump(tree))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "weft.train", str(file)]
    return subprocess.run([sys.executable, *launch], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_signal_between_two_steps_of_one_process_stops_both_at_the_same(tmp_path):
    """One saves and waits for the other, which would wait for it in the next step."""
    settings = {"accumulate": 2, "threads": 1, "validate_every": 4}
    interrupted = {"trainable": f"{ROOT}/tests/toy.py:Interrupted", "validate": {"source": source(5)}}
    done = of_two(tmp_path / "r.yaml", recipe(tmp_path / "run", run=settings, **interrupted))
    assert done.returncode != 0 and "stopped by signal 15 at step 4, state saved" in done.stdout, done.stderr
    assert newest(tmp_path / "run").name == "step-000004"


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(tmp_path):
    """torchrun with gloo: the same global batch, gradients summed; also a bad sample stops both, by its name."""
    plain = {"trainable": f"{ROOT}/tests/toy.py:Plain", "cache": {"ahead": True}}
    run(recipe(tmp_path / "a", run={"accumulate": 2}, **plain), say=quiet)

    def torchrun(name, **sections):
        tree = recipe(tmp_path / name, run={"accumulate": 2, "threads": 1}, **plain, **sections)
        return of_two(tmp_path / f"{name}.yaml", tree)

    done = torchrun("b")
    assert done.returncode == 0, done.stderr
    a, b = state(tmp_path / "a"), state(tmp_path / "b")
    assert a[0] == b[0] == 12 and a[1].keys() == b[1].keys()
    for key, value in a[1].items():
        torch.testing.assert_close(value, b[1][key], rtol=2e-4, atol=1e-6)
    logs = [[json.loads(x)["loss"] for x in (tmp_path / d / "log.jsonl").read_text().splitlines()] for d in "ab"]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)
    done = torchrun("c", data=[{"source": source(bad=7), "batch_group": "edit"}])
    assert done.returncode != 0 and "not finite, the weights are unchanged; samples edit-7" in done.stderr


def test_processes_wait_longer_than_torchs_ten_minutes(monkeypatch):
    """The first process alone encodes ahead and evaluates: hours, in which the others stand at a barrier."""
    import torch.distributed as dist

    from weft.train.parallel import Processes

    asked = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: asked.update(options))
    assert Processes().size == 2 and asked["timeout"].total_seconds() >= 24 * 3600


def test_other_processes_know_what_the_first_one_exports(tmp_path, monkeypatch):
    """The next stage starts from it in all of them; the numbers are the first one's."""
    from weft.train.stages import run_stages

    monkeypatch.setenv("RANK", "1")
    trees = [recipe(tmp_path / name, run={"steps": 2}, trainable=f"{ROOT}/tests/toy.py:Plain") for name in "ab"]
    results = run_stages(trees, say=quiet, continues=False)
    assert [r.export for r in results] == [tmp_path / name / "export" for name in "ab"]
    assert not (tmp_path / "a" / "export").exists() and not (tmp_path / "stages.json").exists()


def test_accumulate_must_be_shared_out(monkeypatch):
    from weft.train.parallel import Processes

    alone = Processes()
    assert list(alone.own(3)) == [0, 1, 2]
    alone.rank, alone.size = 1, 2
    assert list(alone.own(4)) == [2, 3]
    with pytest.raises(WeftError, match="accumulate 3 cannot be shared by 2 processes"):
        alone.own(3)


def test_sigterm_while_encoding_keeps_what_is_encoded(tmp_path):
    trainer = Trainer(read_recipe(recipe(tmp_path, cache={"ahead": True, "batch": 4})), {}, quiet)
    examples = trainer.model.examples

    def slow(records):
        if trainer.model.encoded >= 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return examples(records)

    trainer.model.examples = slow
    with pytest.raises(Preempted):
        trainer.run()
    assert trainer.model.encoded == 12 and newest(tmp_path).name == "step-000000"
    again = Trainer(read_recipe(recipe(tmp_path, cache={"ahead": True, "batch": 4})), {}, quiet)
    again.run()
    assert again.step == 12 and again.model.encoded == 28
