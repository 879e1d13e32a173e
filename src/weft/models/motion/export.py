"""Leaving weft with a model of movement: its LoRA merged into the folder, or alone with its token rows and its head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.models.adapt import save_lora
from weft.models.export import Leaver, merge_adapters
from weft.models.load import DTYPES
from weft.models.motion.heads import DepthTransformer, ResidualPredictor
from weft.models.motion.lm import MotionLM
from weft.models.motion.load import load


@torch.no_grad()
def probe(model: MotionLM) -> Tensor:
    """What two models are compared by: all next-token scores in a fixed movement, those of the upper levels by the
    head, and the movement decoded, each in units of its spread."""
    codec, head = model.codec, model.head
    codes = torch.arange(6 * codec.config.levels).view(6, -1) * 7 % codec.config.codes
    movement = model.serial.rows(codes)
    asked = torch.full((len(model.reader.markers[1]), model.serial.columns), -1)
    asked[:, 0] = torch.tensor(model.reader.markers[1])
    rows = torch.cat([asked, movement])
    states = model.network.hidden(rows[None], torch.ones((1, len(rows)), dtype=torch.long))[0].float()
    found = [model.network.vocabulary_logits(states.to(model.transformer.dtype))]
    own, given = states[-len(codes) :], codes.to(states.device)
    if isinstance(head, DepthTransformer):
        found.append(head(own, given[:, :-1]))
    elif isinstance(head, ResidualPredictor):
        found += [head(own[None], given[None], level) for level in range(1, codec.config.levels)]
    found.append(torch.from_numpy(codec.decode([codes])[0].joints))
    return torch.cat([(x.float() / x.float().std()).cpu().flatten() for x in found])


def motion_leaver(device: str | None) -> Leaver:
    """Folders of `weft.models.motion.lm` and zoo names; a LoRA as `weft.train` exports it."""

    def save(model: MotionLM, out: Path, dtype: str) -> dict[str, Any]:
        facts = {"merged_layers": merge_adapters(model.transformer)}
        model.save(out, None if dtype == "fp32" else DTYPES[dtype])
        return facts

    def save_one(model: MotionLM, out: Path) -> dict[str, Any]:
        save_lora({name: module for name, module in model.modules().items() if name != "rvq"}, out)
        config = model.transformer.peft_config["default"]
        return {"rank": config.r, "alpha": config.lora_alpha}

    return Leaver(lambda folder, lora: load(folder, device=device, dtype="fp32", lora=lora), probe, save, save_one)
