"""The example cache: what goes in comes out, damage is seen, interruption loses only what was not written."""

from __future__ import annotations

import json
import time

import pytest
import torch

from weft.data.cache import ExampleCache, example_key
from weft.errors import WeftError


def example(i: int, references: int = 0):
    g = torch.Generator().manual_seed(i)
    made = {"text": torch.randn(6, 8, generator=g), "target": torch.randn(4, 2, 2, generator=g)}
    return made | {f"reference.{k}": torch.randn(4, 2, 2, generator=g) for k in range(references)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def filled(folder, count=10, **options):
    cache = ExampleCache(folder, shard=4, **options)
    for i in range(count):
        cache.add(str(i), example(i, i % 3))
    return cache


def test_round_trip_before_and_after_the_disk(tmp_path):
    cache = filled(tmp_path)
    order = ["7", "0", "9", "0"]
    for reader in (cache, None):
        if reader is None:
            cache.flush()
            reader = ExampleCache(tmp_path)
        assert len(reader) == 10 and "3" in reader and "x" not in reader
        assert all(same(e, example(int(k), int(k) % 3)) for k, e in zip(order, reader.get(order), strict=True))
    with pytest.raises(KeyError):
        cache.get(["x"])


def test_narrow_stores_half_and_returns_fp32(tmp_path):
    cache = filled(tmp_path, narrow=("text",))
    cache.flush()
    got = ExampleCache(tmp_path, narrow=("text",)).get(["1"])[0]
    assert got["text"].dtype == torch.float32 and torch.equal(got["text"], example(1, 1)["text"].bfloat16().float())
    assert torch.equal(got["target"], example(1, 1)["target"])


def test_a_flipped_byte_is_named(tmp_path):
    filled(tmp_path).flush()
    path = max(tmp_path.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    keys = json.loads(path.with_suffix(".json").read_text())["keys"]
    with pytest.raises(WeftError, match=f"{path.name} is damaged.*delete {path.stem}.json"):
        ExampleCache(tmp_path).get(keys)
    path.unlink()
    with pytest.raises(WeftError, match="is missing"):
        ExampleCache(tmp_path).get(keys)
    path.with_suffix(".json").unlink()  # the advice
    cache = ExampleCache(tmp_path)
    assert len(cache) == 10 - len(keys) and keys[0] not in cache


def test_shards_without_index_do_not_exist(tmp_path):
    cache = filled(tmp_path, 9)
    cache.flush()
    victim = next(tmp_path.glob("*.json"))
    lost = json.loads(victim.read_text())["keys"]
    victim.unlink()  # as if killed between the two renames
    again = ExampleCache(tmp_path, shard=4)
    assert not any(k in again for k in lost)
    for k in lost:
        again.add(k, example(int(k), int(k) % 3))
    again.flush()
    assert len(ExampleCache(tmp_path)) == 9
    assert not list(tmp_path.glob(".*"))


def test_two_runs_write_one_folder(tmp_path):
    """The same records, encoded on two machines to different last bits: neither replaces what the other reads."""
    one, two = ExampleCache(tmp_path), ExampleCache(tmp_path)
    for k in range(3):
        one.add(str(k), example(k))
        two.add(str(k), {name: t + 1e-6 for name, t in example(k).items()})
    one.flush()
    two.flush()
    assert same(one.get(["1"])[0], example(1))
    assert len(ExampleCache(tmp_path).get(["0", "1", "2"])) == 3


@pytest.mark.parametrize("index", [b"\xff\xfe", b"[]", b'{"keys": 3, "sha256": ""}', b""])
def test_a_damaged_index_is_named(tmp_path, index):
    filled(tmp_path).flush()
    path = next(tmp_path.glob("*.json"))
    path.write_bytes(index)
    with pytest.raises(WeftError, match=f"cache index {path} is damaged: delete it"):
        ExampleCache(tmp_path)


def test_keys_depend_on_every_part():
    keys = {example_key("e", "c", "s"), example_key("f", "c", "s"), example_key("e", "d", "s"), example_key("e", "c")}
    assert len(keys) == 4


@pytest.mark.slow
def test_hundred_thousand_entries_are_fast(tmp_path):
    """100 k entries (small ones here, the tables are what counts) and batches of 64 of the real size in < 2 ms."""
    cache = ExampleCache(tmp_path, shard=25_000)
    for i in range(100_000):
        cache.add(f"k{i}", {"x": torch.tensor([float(i)])})
    big = {"text": torch.randn(56, 128), "pooled": torch.randn(64), "target": torch.randn(16, 8, 8)}
    big["reference.0"] = torch.randn(16, 8, 8)
    for i in range(512):
        cache.add(f"big{i}", {k: v + i for k, v in big.items()})
    cache.flush()
    reader = ExampleCache(tmp_path)
    assert float(reader.get(["k31415"])[0]["x"]) == 31415
    names = [[f"big{(i * 37 + j * 91) % 512}" for j in range(64)] for i in range(20)]
    reader.get(names[0])
    times = []
    for batch in names:
        started = time.perf_counter()
        reader.get(batch)
        times.append(time.perf_counter() - started)
    assert sorted(times)[len(times) // 2] < 0.004  # 2 ms on an idle core; the median, with room for a busy machine
