"""A trainable of a few parameters, for tests of the training loop."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from weft.record import Record, make_record
from weft.rng import normal, numpy_rng
from weft.types import Draw, Example, Loss


class Net(nn.Module):
    """Linear in, blocks with dropout, linear out: has matrices for Muon and a buffer that training changes."""

    def __init__(self, width: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.counts = True
        self.enter = nn.Linear(4, width)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()) for _ in range(2)]
        )
        self.dropout = nn.Dropout(dropout)
        self.leave = nn.Linear(width, 4)
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.counts:
            self.seen += x.detach().float().sum(0)
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x)
        return self.leave(self.dropout(x))


class Toy:
    """Learns to undo noise on the four numbers of a record; `dropout` 0 makes the loss free of global randomness."""

    name = "toy"

    def __init__(self, width: int = 8, dropout: float = 0.1) -> None:
        self.net = Net(width, dropout)
        self.encoder = nn.Linear(4, 4).requires_grad_(False)
        self.encoded = 0

    def modules(self) -> dict[str, nn.Module]:
        return {"net": self.net, "encoder": self.encoder}

    def examples(self, records: Sequence[Record]) -> list[Example]:
        for record in records:
            if record.source is not None:
                record.load(record.source)
        self.encoded += len(records)
        return [{"x": self.encoder(torch.tensor(r.meta["x"]))} for r in records]

    def loss(self, examples: Sequence[Example], draw: Draw) -> Loss:
        x = torch.stack([e["x"] for e in examples])
        noise = torch.stack([normal((4,), draw.seed, "noise", draw.step, name) for name in draw.record_ids])
        error = (self.net(x + 0.1 * noise).float() - x).square().mean(1)
        return Loss(error, {"noise": float(noise.abs().mean())})

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.net.state_dict().items()}, folder / "net.safetensors")


class Plain(Toy):
    """Without dropout and without a changing buffer: what several processes can train."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width, dropout=0.0)
        self.net.counts = False


class Interrupted(Plain):
    """Gets a SIGTERM while it is validated, which the first of several processes does alone."""

    def loss(self, examples: Sequence[Example], draw: Draw) -> Loss:
        if not torch.is_grad_enabled():
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(examples, draw)


def shaped(count: int = 20, task: str = "edit", seed: int = 0) -> list[Record]:
    """`numbers` whose outputs are of several sizes."""
    found, random = numbers(count, task=task), numpy_rng(seed, "shapes")
    for record in found:
        record.meta["size"] = [[64, 64], [64, 80], [64, 100], [100, 64]][int(random.integers(4))]
    return found


def numbers(
    count: int = 20,
    start: float = 0.0,
    task: str = "edit",
    bad: int = -1,
    broken: Sequence[int] = (),
    picture: str = "",
) -> list[Record]:
    """Records of four numbers each; record `bad` holds a NaN, the `broken` ones have the source `picture`."""
    records = []
    for i in range(count):
        x = [start + i / count, 1.0, -0.5, float("nan") if i == bad else i % 3 / 3]
        source = picture if i in broken else None
        records.append(make_record(f"number {i}", source, task=task, id=f"{task}-{i}", meta={"x": x}))
    return records
