"""A tiny motion model and records of every task, for the tests: a few thousand weights, 16 codes, untrained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from motion_clips import procedural
from weft.models.motion.build import build
from weft.motion.clip import Motion
from weft.record import Record, Turn, motion_part, text_part

LEVELS, CODES = 3, 16


def motion(frames: int, seed: int) -> Motion:
    return Motion(procedural(frames, seed))


def record(k: int, task: str = "generate") -> Record:
    """One record of each form the model must read."""
    clip = motion_part(motion(20 + 4 * k, k))
    user: list[Any] = [text_part("a person walks in a circle")]
    answer: list[Any] = [clip]
    if task == "edit":
        user = [motion_part(motion(24, k + 1), "source"), text_part("walk faster")]
    elif task == "in_context":
        a, b = motion_part(motion(16, 5), "reference"), motion_part(motion(20, 6), "reference")
        user = [text_part("take the style of "), a, text_part(" and the action of "), b]
    elif task == "between":
        user = [motion_part(motion(8, 1), "start"), motion_part(motion(8, 2), "end"), text_part("a person walks")]
    elif task == "describe":
        user, answer = [motion_part(motion(24, k), "source"), text_part("what happens?")], [text_part("a person walks")]
    elif task == "knowledge":
        answer = [text_part("the person walks in a circle"), clip]
    turns = [Turn("user", user), Turn("assistant", answer)]
    if task == "chain":
        turns += [Turn("user", [text_part("now faster")]), Turn("assistant", [motion_part(motion(16, 9))])]
    if task == "reflect":
        tried = Turn("assistant", [motion_part(motion(16, 9), "rejected")])
        check = Turn("user", [text_part("does it match?")])
        turns = [Turn("user", user), tried, check, Turn("assistant", [text_part("the person walks"), clip])]
    return Record(f"{task}-{k}", task, turns)


TASKS = ("generate", "edit", "in_context", "between", "describe", "knowledge", "chain", "reflect")


def corpus() -> list[Record]:
    return [record(k, task) for k in range(3) for task in TASKS]


def settings_for(serialisation: str, **options: Any) -> dict[str, Any]:
    source = {"kind": "python", "path": "tiny_motion:corpus"}
    heads = {"depth": {"width": 16, "layers": 1, "heads": 2}, "residual": {"width": 16, "layers": 1, "heads": 2}}
    return {
        "seed": 3,
        "statistics": source,
        "corpus": source,
        "rvq": {"levels": LEVELS, "codes": CODES, "code_width": 8, "width": 16, "depth": 1, "dropout": 0.0},
        "tokenizer": {"length": 256, "min_count": 1},
        "transformer": {
            "model_type": "gemma2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16,
            "max_position_embeddings": 512, "sliding_window": 64, "attn_logit_softcapping": None,
        },
        "tokens": {"serialisation": serialisation, "window": 12, "overlap": 3, "words": 6} | heads | options,
    }  # fmt: skip


def spread(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "rvq" / "model.safetensors"
    state = load_file(path)
    generator = torch.Generator().manual_seed(1)
    for key in state:
        if key.endswith("codebook"):
            state[key] = torch.randn(state[key].shape, generator=generator) * 0.3
    save_file(state, path)


def tiny_motion_folder(path: Path, serialisation: str = "depth") -> Path:
    """A model folder whose codebooks have values (they are trained, never drawn)."""
    folder = build(settings_for(serialisation), path)
    spread(folder)
    return folder
