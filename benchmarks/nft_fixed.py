"""Does DiffusionNFT raise the reward that it is given? Four fixed edits; the reward is closeness to the exact target.

    python benchmarks/nft_fixed.py -o runs/nft_fixed                 # recipes/tiny/nft_judge.yaml's settings, 15 epochs
    python benchmarks/nft_fixed.py -o runs/nft_fixed_fast --steps 12 optim.lr=1.0e-4 optim.warmup=0 rollout.updates=2 \\
        method.options.advantage.clip=5.0                                # steps that are too large

The same requests every epoch and a dense reward: what would take many epochs on new requests shows in a few. The reward
is 1 - 4 x the mean absolute difference of the pictures (in 0 to 1), over 192 samples an epoch. About 20 s an epoch on
one idle core. Prints the reward by epoch with its standard error; writes OUT/results.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from weft.errors import WeftError
from weft.record import Record
from weft.train import run
from weft.types import Score

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "tiny" / "nft_judge.yaml"
REQUESTS, SAMPLES = 4, 48


def near(batch: Sequence[tuple[Record, object]]) -> list[Score]:
    """1 - 4 x the mean absolute difference from the record's target."""
    scores = []
    for record, picture in batch:
        assert record.target is not None
        target = np.asarray(record.load(record.target).convert("RGB"), np.float32)
        made = np.asarray(picture, np.float32)
        scores.append(Score(float(1 - 4 * np.abs(made - target).mean() / 255)))
    return scores


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True, help="a new folder, or one to go on in")
    parser.add_argument("--steps", type=int, default=15, help="optimiser steps; an epoch has rollout.updates of them")
    parser.add_argument("overrides", nargs="*", help="key=value of the recipe")
    options = parser.parse_args()
    fixed = [
        "reward=null", f"data.0.source.args.count={REQUESTS}",
        f"rollout.groups={REQUESTS}", f"rollout.group_size={SAMPLES}", "rollout.batch=96", "run.log_every=1",
        f"run.steps={options.steps}", f"run.folder={json.dumps(str(options.out))}", "run.export=false",
        "run.grid_every=0",
    ]  # fmt: skip
    try:
        run(RECIPE, [*fixed, *options.overrides], reward=near, say=lambda line: print(line, file=sys.stderr))
    except WeftError as error:
        print(f"nft_fixed: {error}", file=sys.stderr)
        return 2
    rows = [json.loads(line) for line in (options.out / "log.jsonl").read_text("utf-8").splitlines()]
    found = [(int(row["epoch"]), row["reward"], row["reward_group_std"] / (REQUESTS * SAMPLES) ** 0.5)
             for row in rows if "epoch" in row]  # fmt: skip
    for epoch, reward, error in found:
        print(f"epoch {epoch:3d}: reward {reward:.4f} +- {error:.4f}")
    print(f"last - first: {found[-1][1] - found[0][1]:+.4f}")
    facts = [{"epoch": e, "reward": r, "standard_error": s} for e, r, s in found]
    (options.out / "results.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
