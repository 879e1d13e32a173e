"""Data parallelism under torchrun: every process takes its micro-batches of the same global batch.

Gradients are sums of per-sample losses over the global count, so N processes make the step that one would make, up to
the order of additions. Weights, EMA and optimiser are replicated; process 0 alone writes.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from weft.errors import WeftError

BUCKET = 25_000_000  # gradients reduced at once, in elements
PATIENCE = timedelta(days=2)
"""How long processes wait for the first one, which alone encodes ahead, evaluates and writes; torch's ten minutes would
end the run there. One that has died is seen by torchrun at once."""


def _leave() -> None:
    """Close the connections before the interpreter does: left open, a peer's end can abort a process that is done."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Processes:
    """The processes of a run; without torchrun the only one, and then every method is trivial."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
            atexit.register(_leave)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """This process's own device of a kind."""
        if self.size > 1 and device.type == "cuda":
            torch.cuda.set_device(self.local)
            return torch.device("cuda", self.local)
        return device

    def own(self, pieces: int) -> range:
        """Which of the step's micro-batches are this process's. Raises WeftError if they cannot be shared out."""
        if pieces % self.size:
            raise WeftError(
                f"accumulate {pieces} cannot be shared by {self.size} processes: make it a multiple of {self.size} "
                f"(batch_size x accumulate is the global batch)"
            )
        share = pieces // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def sum(self, *values: float) -> list[float]:
        """Each number summed over the processes (NaN spreads)."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        if dist.get_backend() == "nccl":
            tensor = tensor.cuda()
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, values: Sequence[str]) -> list[str]:
        """The lists of all processes, joined."""
        if self.size == 1:
            return list(values)
        lists: list[Any] = [None] * self.size
        dist.all_gather_object(lists, list(values))
        return [value for part in lists for value in part]

    def gather_tensors(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The dictionaries of all processes, joined (on the CPU)."""
        if self.size == 1:
            return values
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, {k: v.cpu() for k, v in values.items()})
        return {k: v for part in found for k, v in part.items()}

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum gradients over the processes in place; a gradient that only some have counts as zero in the others."""
        if self.size == 1:
            return
        device = parameters[0].device
        present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=device)
        dist.all_reduce(present, op=dist.ReduceOp.MAX)
        active = [p for p, flag in zip(parameters, present.tolist(), strict=True) if flag]
        for parameter in active:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        start = 0
        while start < len(active):
            stop, elements = start, 0
            while stop < len(active) and (stop == start or elements + active[stop].numel() <= BUCKET):
                elements += active[stop].numel()
                stop += 1
            gradients = [p.grad for p in active[start:stop] if p.grad is not None]
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
            start = stop

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()
