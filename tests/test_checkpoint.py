"""Checkpoints are whole or absent: kills at any byte, full disks, damaged files."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from weft.errors import WeftError
from weft.train import checkpoint
from weft.train.checkpoint import differences, fault, newest, read_checkpoint, write_checkpoint


def tensors(step: int, size: int = 100):
    return {"model": {"w": torch.full((size,), float(step)), "scalar": torch.tensor(step)}, "ema": {"w": torch.ones(2)}}


def test_round_trip_and_keep(tmp_path):
    for step in (1, 2, 10):
        write_checkpoint(tmp_path, step, tensors(step), {"note": "x"}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000010"]
    read = read_checkpoint(newest(tmp_path))
    assert read.step == 10 and read.state["note"] == "x"
    assert (
        torch.equal(read.tensors["model"]["w"], torch.full((100,), 10.0)) and int(read.tensors["model"]["scalar"]) == 10
    )


@pytest.mark.parametrize("damage", ["flip", "missing", "manifest", "bytes", "no manifest"])
def test_a_damaged_checkpoint_is_skipped_by_name(tmp_path, damage):
    for step in (1, 2):
        path = write_checkpoint(tmp_path, step, tensors(step), {}, keep=5)
    victim = path / "model.safetensors"
    if damage == "flip":
        data = bytearray(victim.read_bytes())
        data[-1] ^= 1
        victim.write_bytes(data)
    elif damage == "missing":
        victim.unlink()
    elif damage == "manifest":
        (path / "manifest.json").write_text("{")
    elif damage == "bytes":
        (path / "manifest.json").write_bytes(b"{\xff}")
    else:
        (path / "manifest.json").unlink()
    heard: list[str] = []
    assert newest(tmp_path, heard.append).name == "step-000001"
    assert len(heard) == 1 and "step-000002" in heard[0]
    with pytest.raises(WeftError, match="earlier checkpoint"):
        read_checkpoint(path)


@pytest.mark.parametrize("where", ["save_file", "sync", "_write_json"])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, where):
    write_checkpoint(tmp_path, 1, tensors(1), {}, keep=1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, where, full)
    with pytest.raises(WeftError, match="No space left.*MB are free.*step-000001 is intact"):
        write_checkpoint(tmp_path, 2, tensors(2), {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"] and fault(tmp_path / "step-000001") is None


@pytest.mark.slow
def test_a_file_size_limit_is_a_clean_error(tmp_path):
    """The real system call fails half-way (RLIMIT_FSIZE, the portable stand-in for a full disk)."""
    code = """
import resource, signal, sys, torch
from pathlib import Path
from weft.errors import WeftError
from weft.train.checkpoint import write_checkpoint
folder = Path(sys.argv[1])
write_checkpoint(folder, 1, {"model": {"w": torch.ones(10)}}, {}, 2)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_checkpoint(folder, 2, {"model": {"w": torch.ones(100_000)}}, {}, 2)
except WeftError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "could not write checkpoint" in done.stdout and "step-000001 is intact" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


@pytest.mark.slow
def test_killed_at_any_byte_it_recovers(tmp_path, monkeypatch):
    """What a kill leaves is a prefix of the write sequence; every prefix resolves to a complete checkpoint."""
    monkeypatch.setattr(checkpoint, "sync", lambda path: None)  # for speed: no power is cut here
    whole = tmp_path / "whole"
    path = write_checkpoint(whole, 2, tensors(2, 2000), {"a": 1}, keep=5)
    order = ["ema.safetensors", "model.safetensors", "state.json", "manifest.json"]
    sizes = [(path / name).stat().st_size for name in order]
    draw = random.Random(0)
    for trial in range(200):
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        write_checkpoint(folder, 1, tensors(1, 2000), {"a": 1}, keep=5)
        offset = draw.randrange(sum(sizes) + 2)
        target = folder / (".writing-step-000002" if trial % 4 else "step-000002")  # also without the atomic rename
        target.mkdir()
        left = offset
        for name, size in zip(order, sizes, strict=True):
            if left <= 0:
                break
            (target / name).write_bytes((path / name).read_bytes()[:left])
            left -= size
        complete = trial % 4 == 0 and offset >= sum(sizes) - 1  # the manifest's newline does not count
        assert newest(folder).name == ("step-000002" if complete else "step-000001")
        write_checkpoint(folder, 3, tensors(3), {}, keep=5)
        assert newest(folder).name == "step-000003" and not list(folder.glob(".writing*"))


@pytest.mark.slow
def test_killed_for_real_it_recovers(tmp_path):
    code = """
import sys, torch
from pathlib import Path
from weft.train.checkpoint import write_checkpoint
tensors = {"model": {"w": torch.ones(300_000)}}
step = 0
while True:
    step += 1
    write_checkpoint(Path(sys.argv[1]), step, tensors, {}, 2)
    print(step, flush=True)
"""
    draw = random.Random(1)
    process = None
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(draw.random() * 0.2)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        done = [int(line) for line in process.stdout.read().split()] or [1]
        found = newest(tmp_path)
        assert found is not None
        assert int(found.name[5:]) >= max(1, done[-1]) or json.loads((found / "state.json").read_text())["step"] >= 1


def test_a_cache_may_change_unless_it_rounds():
    kept, rounded = {"folder": "a", "text_dtype": "fp32"}, {"folder": "b", "text_dtype": "bf16"}
    assert differences({"cache": None}, {"cache": kept}) == differences({"cache": rounded}, {"cache": rounded}) == []
    assert differences({"cache": kept}, {"cache": rounded}) == ["cache.text_dtype: fp32 -> bf16"]
    assert differences({"cache": rounded}, {"cache": None}) == ["cache.text_dtype: bf16 -> fp32"]


def test_what_a_continued_run_may_change():
    def recipe(args, **options):
        source = {"call": "x:y", "args": args, "limit": None}
        return {"method": {"name": "sft", "options": options}, "data": [{"source": source, "weight": 1.0}]}

    old = recipe({"count": 4, "kinds": {"add": 1}}, text_dropout=0.1)
    assert differences(old, recipe({"count": 4, "kinds": {"add": 1}}, text_dropout=0.1)) == []
    newer = recipe({"count": 4, "kinds": {"add": 1}}, text_dropout=0.1)
    newer["data"][0]["fresh"] = newer["method"]["fresh"] = False  # options that the older weft did not have, and off
    assert differences(old, newer) == []
    # an option that is left out has its default, and 0 is no default
    assert differences(old, recipe({"count": 4, "kinds": {"add": 1}})) == ["method.options.text_dropout: 0.1 -> None"]
    assert differences(recipe({}), recipe({}, text_dropout=0.0)) == ["method.options.text_dropout: None -> 0.0"]
    assert differences(old, recipe({"count": 4}, text_dropout=0.1)) == ["data.0.source.args.kinds: {'add': 1} -> None"]
    fewer = recipe({"count": 4, "kinds": {"add": 1, "move": 0}}, text_dropout=0.1)
    assert differences(old, fewer) == ["data.0.source.args.kinds.move: None -> 0"]
