"""What one process has to learn from in one optimiser step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Row = tuple[int, int]  # number of the source, number of the record in it


@dataclass(slots=True)
class Fed:
    """This process's examples of one optimiser step with their record ids (unique within the step).

    `count` examples make the whole step over all processes, `micro` of them one micro-batch; `pieces` are the lengths
    of the micro-batches where they differ. `group` and `metrics` are for the log. `faults` are this process's samples
    that are left out (`count` has them until all processes agree), `error` is why there is no batch at all.
    """

    group: str
    examples: list[Any]
    ids: list[str]
    count: int
    micro: int
    pieces: list[int] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    faults: list[tuple[Row, str]] = field(default_factory=list)
    error: Exception | None = None

    def cut(self) -> Iterator[tuple[list[Any], list[str]]]:
        """The micro-batches and their ids."""
        starts = range(0, len(self.examples), self.micro)
        lengths = self.pieces if self.pieces is not None else [self.micro] * len(starts)
        start = 0
        for length in lengths:
            if length:  # all of a micro-batch can be left out
                yield self.examples[start : start + length], self.ids[start : start + length]
            start += length
