"""Pictures while training: the same records with the same noise each time, beside source, references and target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from weft.errors import WeftError
from weft.record import Record
from weft.report.sheet import contact_sheet
from weft.sample.rollout import sample_flow
from weft.train.config import GridRecipe
from weft.train.feed import Feed, open_source
from weft.train.unusable import read_pictures
from weft.types import FlowModel, Trainable


@torch.no_grad()
def draw_grid(model: Trainable, config: GridRecipe | None, feed: Feed, path: Path) -> Path:
    """Sample the first `count` records of the grid's source and write a contact sheet. Seeds are 0, 1, 2 ..."""
    if config is None or not isinstance(model, FlowModel):
        raise WeftError("run.grid_every: pictures need a grid section and a flow model")
    source = open_source(config.source)
    records: list[Record] = []
    for record in (source[i] for i in range(min(config.count, len(source)))):
        try:
            read_pictures(record)
            records += feed.sized([record])
        except WeftError as error:
            feed.say(f"not drawn: record {record.id}: {error}")
    if not records:
        raise WeftError(f"grid.source: none of the first {config.count} records can be used")
    rows: list[list[Image.Image | None]] = []
    captions: list[str] = []
    widest = max(len(record.references) for record in records)
    for record, made in zip(records, draw(model, config, records), strict=True):
        references = [part.load(record.root) for part in record.references]
        row = [record.source.load(record.root) if record.source else None, *references]
        row += [None] * (1 + widest - len(row))
        rows.append([*row, made, record.target.load(record.root) if record.target else None])
        captions.append(record.instruction)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = ["source", *(f"reference {k + 1}" for k in range(widest)), "output", "target"]
    side = max(image.width for row in rows for image in row if image is not None)
    contact_sheet(rows, columns=columns, captions=captions, scale=3 if side <= 128 else 1, path=path)
    return path


@torch.no_grad()
def draw(model: Trainable, config: GridRecipe, records: Sequence[Record]) -> list[Image.Image]:
    """One picture for each record, sampled as `config` says; seeds are 0, 1, 2 ..."""
    flow: Any = model
    out: list[Image.Image] = []
    for seed, record in enumerate(records):  # one by one: sizes and reference counts may differ for any family
        conditions = flow.encode([record])
        negative = flow.encode([record], negative=config.negative) if config.guidance > 1 else None
        rollout = sample_flow(
            flow, conditions, steps=config.steps, guidance=config.guidance, negative=negative, seeds=[seed]
        )
        out.append(flow.decode(rollout.latents, rollout.sizes)[0])
    return out
