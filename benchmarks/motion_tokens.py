"""Speed of motion tokens on one machine: ratios, printed per serialisation.

    python benchmarks/motion_tokens.py [FOLDER] [--clips 1000] [--seconds 9.8] [--threads 2] [--cpu]

1. Tokenising mixed-length clips in masked batches against one by one, feature extraction included and apart; the
   codes are compared. 2. Generation at batch 1 with the KV cache against reading everything again at every token.
3. Generation at batch 8 against real time. Without FOLDER the networks are those of recipes/tiny/motion_model.yaml
with random weights: speed does not depend on training, only on sizes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from motion_clips import procedural  # noqa: E402
from weft.models.motion.build import build  # noqa: E402
from weft.models.motion.lm import MotionLM  # noqa: E402
from weft.models.motion.load import load  # noqa: E402
from weft.models.motion.tokens import SERIALISATIONS  # noqa: E402
from weft.motion.clip import Motion  # noqa: E402
from weft.record import Record, Turn, motion_part, text_part  # noqa: E402


def corpus() -> list[Record]:
    """Stands for the world: movements for the statistics, words for the tokenizer."""
    clips = [Motion(procedural(80, k)) for k in range(8)]
    return [
        Record(str(k), "generate", [Turn("user", [text_part("a person walks in a circle")] * 3),
                                    Turn("assistant", [motion_part(clip)])])
        for k, clip in enumerate(clips)
    ]  # fmt: skip


CLOCK = time.perf_counter


def seconds(work: Callable[[], Any]) -> float:
    start = CLOCK()
    work()
    return CLOCK() - start


def tokenising(model: MotionLM, count: int) -> None:
    draw = np.random.default_rng(0)
    clips = [Motion(procedural(int(n), k % 50)) for k, n in enumerate(draw.integers(40, 200, count))]
    codec = model.codec
    together = codec.encode(clips)  # also the warm-up
    batched, single = seconds(lambda: codec.encode(clips)), seconds(lambda: [codec.encode([c]) for c in clips])
    alone = [codec.encode([c])[0] for c in clips[:200]]
    different = sum(int((a != b).sum()) for a, b in zip(alone, together, strict=False))
    total = sum(a.numel() for a in alone)
    length = sum(c.seconds for c in clips)
    ratio, times = single / batched, length / batched
    print(
        f"tokenise {count} clips, {length / 60:.0f} min of movement: batched {batched:.2f} s, one by one {single:.2f} s"
    )
    print(f"  ratio {ratio:.1f}; {times:.0f}x real time; {different} of {total} codes differ")
    rows = [torch.from_numpy(r) for r in codec.features(clips)]

    def alone_net() -> None:
        for row in rows:
            codec.rvq.encode(row[None])

    features = seconds(lambda: codec.features(clips))
    print(
        f"  of it features {features:.2f} s; the network alone: ratio {seconds(alone_net) / (batched - features):.1f}"
    )


def generating(model: MotionLM, length: float) -> None:
    source = motion_part(Motion(procedural(int(length * 20), 1)), "source")
    edit = Record("e", "edit", [Turn("user", [source, text_part("a person walks in a circle")])])
    text = Record("g", "generate", [Turn("user", [text_part("a person walks in a circle")])])
    name = model.options.serialisation
    steps = round(length * 5)

    def one(record: Record, cache: bool) -> Callable[[], Any]:
        return lambda: model.generate([record], seeds=[1], seconds=length, cache=cache)

    seconds(one(text, True))
    ratios = {}
    for label, record in (("text", text), ("edit", edit)):
        ratios[label] = seconds(one(record, False)) / seconds(one(record, True))
    eight = seconds(lambda: model.generate([text] * 8, seeds=list(range(8)), seconds=length))
    rows = model.serial.length(steps)
    cached = f"cache {ratios['text']:.1f}x (text), {ratios['edit']:.1f}x (edit)"
    fast = f"batch 8: {8 * length / eight:.0f}x real time, {1000 * eight / rows:.1f} ms a row"
    print(f"{name:10} {rows:4} rows for {length:g} s: {cached}; {fast}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=9.8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="count processor time: with one thread, on a busy machine")
    options = parser.parse_args()
    if options.cpu:
        global CLOCK
        CLOCK = time.process_time
        options.threads = 1
    torch.set_num_threads(options.threads)
    if options.folder is not None:
        model = load(options.folder, device="cpu")
        tokenising(model, options.clips)
        generating(model, options.seconds)
        return
    settings = yaml.safe_load((ROOT / "recipes" / "tiny" / "motion_model.yaml").read_text("utf-8"))
    settings["statistics"] = settings["corpus"] = {"kind": "python", "path": f"{__file__}:corpus"}
    settings["tokenizer"]["min_count"] = 1
    settings["transformer"]["vocab_size"] = 1000  # the world's words
    sizes = {"width": 128, "layers": 2, "heads": 4}
    with tempfile.TemporaryDirectory() as root:
        for name in SERIALISATIONS:
            settings["tokens"] = {"serialisation": name, "depth": sizes, "residual": sizes, "window": 60}
            model = load(build(settings, Path(root) / name), device="cpu")
            if name == SERIALISATIONS[0]:
                count = sum(p.numel() for p in model.transformer.parameters())
                print(f"{count / 1e6:.1f} M parameters, {options.threads} thread(s), torch {torch.__version__}")
                tokenising(model, options.clips)
            generating(model, options.seconds)


if __name__ == "__main__":
    main()
