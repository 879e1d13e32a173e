"""What models really make, graded by the oracle and kept as records: training data and test items of judges.

    python -m weft.evals.samples -o runs/tiny/samples tiny-kontext --steps 3 6 12 --count 800

Each record stands beside `meta["grade"]` (0 to 5) and `meta["made"]` (model, steps).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from weft.errors import WeftError
from weft.evals.runner import Sampling, outputs
from weft.record import Record, read_records, write_records
from weft.reward.graded import graded
from weft.types import FlowModel
from weft.world import records as world_records


def samples(
    model: FlowModel, name: str, records: Sequence[Record], steps: Sequence[int], seeds: Sequence[int] = (0,)
) -> Iterator[Record]:
    """One graded record for each record, step count and seed, as they are made."""
    for count in steps:
        for seed in seeds:
            for output in outputs(model, records, Sampling(steps=count, seed=seed, batch_size=64)):
                made = f"{name}/{count}"
                yield graded(output.record, output.made, f"{output.record.id}@{made}#{seed}", made)


@dataclass(frozen=True)
class Wanted:
    """Samples to be judged: of the model in `folder`, called `model`, `seeds` of each of `count` requests."""

    folder: str
    model: str
    steps: int
    seeds: int
    count: int
    split: str
    data_seed: int
    kinds: Sequence[str] = ()


def stored(folder: Path, wanted: Wanted) -> list[Record]:
    """The samples, made once and kept in `folder`: the same request of the same weights is not made again."""
    from weft.evals.runner import fingerprint
    from weft.models.load import load

    model = load(wanted.folder)
    facts = {**{k: v for k, v in asdict(wanted).items() if k != "folder"}, "weights": fingerprint(model)}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / key / "records.jsonl"
    if not path.is_file():
        data = world_records(wanted.split, wanted.count, seed=wanted.data_seed, tasks=["edit"], kinds=wanted.kinds)
        write_records(path, samples(model, wanted.model, data, [wanted.steps], range(wanted.seeds)))
    return list(read_records(path))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m weft.evals.samples", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="+", help="zoo names or model folders; NAME=FOLDER gives a name")
    parser.add_argument("-o", "--out", required=True, help="folder for records.jsonl and its pictures")
    parser.add_argument("--steps", type=int, nargs="+", default=[12])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--count", type=int, default=256, help="records for each model, step count and seed")
    parser.add_argument("--split", default="train")
    parser.add_argument("--seed", type=int, default=0, help="draws the records")
    parser.add_argument("--start", type=int, default=0, help="the first record's number")
    parser.add_argument("--tasks", nargs="+", default=["edit"])
    parser.add_argument("--kinds", nargs="+", default=[])
    parser.add_argument("--phrasing", default="seen")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    options = parser.parse_args(arguments)
    try:
        import torch

        from weft.models.load import load

        def made() -> Iterator[Record]:
            started, done = time.monotonic(), 0
            for model in options.models:
                name, _, folder = model.rpartition("=")
                flow = load(folder, dtype=torch.bfloat16 if options.dtype == "bf16" else torch.float32)
                data = world_records(
                    options.split, options.count, seed=options.seed, start=options.start, tasks=options.tasks,
                    kinds=options.kinds, phrasing=options.phrasing,
                )  # fmt: skip
                for record in samples(flow, name or Path(folder).name, data, options.steps, options.seeds):
                    yield record
                    done += 1
                    if done % 100 == 0:
                        print(f"{done} pictures, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

        path = Path(options.out) / "records.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"wrote {write_records(path, made())} records to {path}")
    except WeftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
