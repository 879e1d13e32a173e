"""Which records make up the batch of a step: pure functions of (seed, step), so that resuming needs no loader state.

Batches are homogeneous: all records of one come from one group (say, editing or generation), and with aspect buckets
from one bucket. Groups alternate in the exact ratio of their weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import lcm

import numpy as np

from weft.errors import WeftError
from weft.rng import numpy_rng

LONGEST_PERIOD = 100_000


class Interleave:
    """An endless, evenly spread sequence of the numbers 0..n-1 in the exact ratio of `weights`.

    Smooth weighted round robin: after every prefix of t items, number i has occurred t * weight_i times to within
    one, and exactly so after each period.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        fractions = [Fraction(str(w)).limit_denominator(1000) for w in weights]
        if not fractions or min(fractions) <= 0:
            raise WeftError(f"weights {list(weights)} must be positive (at least 0.001)")
        scale = lcm(*(f.denominator for f in fractions))
        shares = np.array([int(f * scale) for f in fractions], dtype=np.int64)
        shares //= np.gcd.reduce(shares)
        self.period = int(shares.sum())
        if self.period > LONGEST_PERIOD:
            raise WeftError(f"weights {list(weights)} repeat only after {self.period} batches: use rounder numbers")
        credit = np.zeros(len(shares), dtype=np.int64)
        table = np.empty(self.period, dtype=np.int64)
        for t in range(self.period):
            credit += shares
            table[t] = i = int(credit.argmax())
            credit[i] -= self.period
        self.table = table
        one_hot = table[:, None] == np.arange(len(shares))
        self.prefix = np.vstack([np.zeros((1, len(shares)), dtype=np.int64), one_hot.cumsum(0)])  # [period + 1, n]

    def at(self, t: int) -> int:
        """The number at position t."""
        return int(self.table[t % self.period])

    def count(self, i: int, t: int) -> int:
        """How often number i occurs before position t."""
        rounds, rest = divmod(t, self.period)
        return int(rounds * self.prefix[-1, i] + self.prefix[rest, i])


@dataclass(slots=True)
class Stream:
    """One source's records in endless epochs; each epoch is a new permutation keyed by (seed, name, epoch)."""

    name: str
    length: int
    seed: int
    _epochs: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.length < 1:
            raise WeftError(f"source {self.name} has no records")

    def _remember(self, key: tuple[str, int], value: np.ndarray) -> np.ndarray:
        while len(self._epochs) >= 4:  # a batch looks at two epochs at most
            del self._epochs[next(iter(self._epochs))]
        self._epochs[key] = value
        return value

    def order(self, epoch: int) -> np.ndarray:
        """The permutation [length] of an epoch."""
        key = ("", epoch)
        if key in self._epochs:
            return self._epochs[key]
        return self._remember(key, numpy_rng(self.seed, "order", epoch, self.name).permutation(self.length))

    def row(self, position: int) -> int:
        """The record at a position of the endless stream."""
        epoch, place = divmod(position, self.length)
        return int(self.order(epoch)[place])

    def bucketed(self, number: int, batch: int, bucket_of: np.ndarray) -> tuple[int, list[int]]:
        """Bucket and record numbers of the `number`-th batch when each batch holds one bucket.

        `bucket_of` [length] gives every record's bucket. An epoch has ceil(n / batch) batches of each bucket, in
        shuffled order; the last batch of a bucket is filled from the bucket's start, so no record is left out.
        """
        sizes = np.bincount(bucket_of)
        counts = -(-sizes // batch)
        per_epoch = int(counts.sum())
        epoch, place = divmod(number, per_epoch)
        key = (f"batches/{counts.tolist()}", epoch)  # of another stage are others, which must not be remembered here
        if key not in self._epochs:
            batches = np.repeat(np.arange(len(sizes)), counts)
            first = np.concatenate([np.arange(c) for c in counts])
            shuffle = numpy_rng(self.seed, "buckets", epoch, self.name).permutation(per_epoch)
            self._remember(key, np.stack([batches, first], 1)[shuffle])
        bucket, first_batch = (int(v) for v in self._epochs[key][place])
        order = self.order(epoch)
        members = order[bucket_of[order] == bucket]
        rows = [int(members[(first_batch * batch + j) % len(members)]) for j in range(batch)]
        return bucket, rows


@dataclass(frozen=True, slots=True)
class Batch:
    """The records of one optimiser step: (source number, record number) pairs, all of one group and bucket."""

    step: int
    stage: int
    group: str
    bucket: int | None
    rows: list[tuple[int, int]]


@dataclass(slots=True)
class Span:
    """A stage of training: its first step and the number of records per optimiser step."""

    start: int
    batch: int
    buckets: dict[int, np.ndarray] | None = None  # source number -> bucket of each record


class Sampler:
    """The batch of every step. `groups[s]`, `weights[s]` and `lengths[s]` describe source s."""

    def __init__(
        self,
        lengths: Sequence[int],
        weights: Sequence[float],
        groups: Sequence[str],
        spans: Sequence[Span],
        seed: int,
    ) -> None:
        self.names = list(dict.fromkeys(groups))
        self.members = {name: [s for s, g in enumerate(groups) if g == name] for name in self.names}
        totals = [sum(Fraction(str(weights[s])) for s in self.members[name]) for name in self.names]
        self.outer = Interleave([float(t) for t in totals])
        self.inner = {name: Interleave([weights[s] for s in self.members[name]]) for name in self.names}
        self.streams = [Stream(f"{g}/{s}", n, seed) for s, (g, n) in enumerate(zip(groups, lengths, strict=True))]
        self.spans = list(spans)
        if not self.spans or self.spans[0].start != 0:
            raise WeftError("the first stage must start at step 0")

    def batch(self, step: int) -> Batch:
        """The records of optimiser step `step` (counted from 0)."""
        stage = max(i for i, span in enumerate(self.spans) if span.start <= step)
        span = self.spans[stage]
        number = self.outer.at(step)
        group = self.names[number]
        members, inner = self.members[group], self.inner[group]
        before = self.outer.count(number, step)
        if span.buckets is not None:
            # whole batches rotate among the sources, because a batch holds one bucket of one source
            turn = inner.at(before)
            bucket, rows = self.streams[members[turn]].bucketed(
                inner.count(turn, before), span.batch, span.buckets[members[turn]]
            )
            return Batch(step, stage, group, bucket, [(members[turn], row) for row in rows])
        position = self._consumed(number, stage) + (before - self.outer.count(number, span.start)) * span.batch
        pairs = []
        for p in range(position, position + span.batch):
            turn = inner.at(p)
            pairs.append((members[turn], self.streams[members[turn]].row(inner.count(turn, p))))
        return Batch(step, stage, group, None, pairs)

    def _consumed(self, number: int, stage: int) -> int:
        """Records that a group used in the stages before `stage`."""
        total = 0
        for span, after in zip(self.spans[:stage], self.spans[1 : stage + 1], strict=True):
            total += span.batch * (self.outer.count(number, after.start) - self.outer.count(number, span.start))
        return total
