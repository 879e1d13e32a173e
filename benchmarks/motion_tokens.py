"""Speed of motion tokens on one machine: ratios, printed per serialisation.

    python benchmarks/motion_tokens.py [FOLDER] [--clips 1000] [--seconds 9.8] [--threads 2] [--cpu] [--json FILE]
    python benchmarks/motion_tokens.py --width 768 --layers 12 --clips 0 --only base_only depth delay

1. Tokenising mixed-length clips in masked batches against one by one, feature extraction included and apart; the
   codes are compared. 2. Generation at batch 1 with the KV cache against reading everything again at every token.
3. Generation at batch 8 against real time. Without FOLDER the networks are those of recipes/tiny/motion_model.yaml
with random weights: speed does not depend on training, only on sizes. `--width` and `--layers` change those of the
transformer: of the tiny one a step costs Python's time, of a larger one the network's, where the cache saves.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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


REPEAT = 3


def seconds(work: Callable[[], Any], repeat: int = 1) -> float:
    """The least of `repeat` times: what else the machine does only adds."""
    found = []
    for _ in range(repeat):
        start = CLOCK()
        work()
        found.append(CLOCK() - start)
    return min(found)


def tokenising(model: MotionLM, count: int) -> dict[str, float]:
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
    return {"clips": count, "ratio": ratio, "times_real": times, "codes_compared": total, "codes_differ": different}


def generating(model: MotionLM, length: float) -> dict[str, float]:
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
        ratios[label] = seconds(one(record, False), REPEAT) / seconds(one(record, True), REPEAT)
    eight = seconds(lambda: model.generate([text] * 8, seeds=list(range(8)), seconds=length), REPEAT)
    rows = model.serial.length(steps)
    cached = f"cache {ratios['text']:.1f}x (text), {ratios['edit']:.1f}x (edit)"
    fast = f"batch 8: {8 * length / eight:.0f}x real time, {1000 * eight / rows:.1f} ms a row"
    print(f"{name:10} {rows:4} rows for {length:g} s: {cached}; {fast}", flush=True)
    return {
        "rows": rows,
        "cache_text": ratios["text"],
        "cache_edit": ratios["edit"],
        "times_real_batch_8": 8 * length / eight,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=9.8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--width", type=int, help="of the transformer; heads of 64 from 512 on")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--only", nargs="+", default=list(SERIALISATIONS), choices=SERIALISATIONS)
    parser.add_argument("--json", help="write the figures here, too")
    parser.add_argument("--cpu", action="store_true", help="count processor time: with one thread, on a busy machine")
    options = parser.parse_args()
    if options.cpu:
        global CLOCK
        CLOCK = time.process_time
        options.threads = 1
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {"command": sys.argv[1:], "threads": options.threads, "torch": torch.__version__,
                               "cores": os.cpu_count(), "machine": platform.machine()}  # fmt: skip

    def measured(model: MotionLM, clips: int) -> None:
        if clips:
            figures["tokenising"] = tokenising(model, clips)
        figures[model.options.serialisation] = generating(model, options.seconds)

    if options.folder is not None:
        measured(load(options.folder, device="cpu"), options.clips)
        keep(figures, options.json)
        return
    settings = yaml.safe_load((ROOT / "recipes" / "tiny" / "motion_model.yaml").read_text("utf-8"))
    settings["statistics"] = settings["corpus"] = {"kind": "python", "path": f"{__file__}:corpus"}
    settings["tokenizer"]["min_count"] = 1
    network = settings["transformer"]
    network["vocab_size"] = 1000  # the world's words
    network["num_hidden_layers"] = options.layers or network["num_hidden_layers"]
    if options.width:
        side = 64 if options.width >= 512 else network["head_dim"]
        network |= {"hidden_size": options.width, "intermediate_size": 4 * options.width, "head_dim": side,
                    "query_pre_attn_scalar": side, "num_attention_heads": options.width // side,
                    "num_key_value_heads": max(1, options.width // side // 2)}  # fmt: skip
    sizes = {"width": 128, "layers": 2, "heads": 4}
    with tempfile.TemporaryDirectory() as root:
        for name in options.only:
            settings["tokens"] = {"serialisation": name, "depth": sizes, "residual": sizes, "window": 60, "words": 0}
            model = load(build(settings, Path(root) / name), device="cpu")
            if name == options.only[0]:
                count = sum(p.numel() for p in model.transformer.parameters())
                print(f"{count / 1e6:.1f} M parameters, {options.threads} thread(s), torch {torch.__version__}")
                figures["parameters"] = count
            measured(model, options.clips if name == options.only[0] else 0)
    keep(figures, options.json)


def keep(figures: dict[str, Any], file: str | None) -> None:
    if file:
        Path(file).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
