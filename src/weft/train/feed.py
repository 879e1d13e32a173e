"""From step to examples: the sampler's rows, the records behind them, their sizes, the encoders and the cache.

A file of its own because it is the one place where data meets the model; the loop sees only `Feed.batch(step)`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from weft.data.cache import ExampleCache, example_key
from weft.data.sampler import Sampler, Span
from weft.errors import WeftError
from weft.media import atomic_write
from weft.record import Record
from weft.settings import check_arguments, load_object
from weft.train.config import Recipe, SourceRecipe, StageRecipe
from weft.train.digests import code_digest, content_digest, fingerprint, texts_in
from weft.train.fed import Fed, Row
from weft.train.parallel import Processes
from weft.train.sizes import Size, SizeTable, nearest_size, sized, stage_sizes
from weft.train.unusable import Unusable, read_pictures
from weft.types import Condition, Example, Trainable

Placed = tuple[Row, Record]
LOOK_AT = 10_000  # records of a source that are read before the first step, for `Feed.notes`


def open_source(config: SourceRecipe) -> Sequence[Record]:
    """The records of a source. Raises WeftError for a wrong callable, argument, kind or path."""
    if config.call is not None:
        function = load_object(config.call, "source.call")
        check_arguments(function, config.args, f"source.args of {config.call}")
        records = function(**config.args)
    else:
        from weft.data.sources import SourceConfig, load_source

        fields = {f.name for f in dataclasses.fields(SourceConfig)}
        given = dataclasses.asdict(config)
        records = load_source(SourceConfig(**{k: v for k, v in given.items() if k in fields}))
    return records[: config.limit] if config.limit is not None and len(records) > config.limit else records


class Feed:
    """Examples of any step. With a cache only records that are not in it are made and encoded."""

    def __init__(
        self,
        recipe: Recipe,
        trainable: Trainable,
        trained: dict[str, nn.Module],
        processes: Processes,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.recipe, self.trainable, self.processes, self.say = recipe, trainable, processes, say
        self.sources = [open_source(item.source) for item in recipe.data]
        self.stages = recipe.stages or [StageRecipe()]
        self.sizes = [stage_sizes(stage) for stage in self.stages]
        for i, (height, width) in ((i, size) for i, sizes in enumerate(self.sizes) for size in sizes or ()):
            multiple = getattr(trainable, "multiple", 1)
            if height % multiple or width % multiple:  # a later stage would fail days later
                raise WeftError(f"stages[{i}]: {height}x{width} (height x width): make both multiples of {multiple}")
        self.cache: ExampleCache | None = None
        self.print = ""
        self._keys: dict[tuple[int, int, Size | None], tuple[str, str]] = {}  # (source, row, size) -> key, id
        self._bad: dict[Row, str] = {}  # why a record cannot be used
        names = [str(item.source.path or item.source.call) for item in recipe.data]
        self.unusable = Unusable(names, [len(source) for source in self.sources], recipe.run.max_faults, say)
        if recipe.cache is not None:
            self.cache = self._open_cache()
            self.print = fingerprint(trainable, trained, {**recipe.trainable_args, "narrow": self.cache.narrow})
        spans, start = [], 0
        for stage, sizes in zip(self.stages, self.sizes, strict=True):
            rows = (stage.batch_size or recipe.run.batch_size) * (stage.accumulate or recipe.run.accumulate)
            if recipe.rollout is not None:
                rows = recipe.rollout.groups  # and the sampler counts epochs
            spans.append(Span(start, rows, self._buckets(sizes)))
            start = stage.until_step if stage.until_step is not None else recipe.run.steps
        self.sampler = Sampler(
            [len(source) for source in self.sources],
            [item.weight for item in recipe.data],
            [item.batch_group for item in recipe.data],
            spans,
            recipe.run.seed,
        )

    def notes(self) -> list[str]:
        """What the sources, and the trainable if it has `notes`, have to say of the data before the first step. The
        trainable sees records from all over each source (fewer of generated ones, which have to be made)."""
        found = []
        for source, item in zip(self.sources, self.recipe.data, strict=True):
            own = list(getattr(source, "notes", ()))
            if hasattr(self.trainable, "notes"):
                most = min(len(source), LOOK_AT if item.source.call is None else LOOK_AT // 40)
                rows = np.linspace(0, len(source) - 1, most).astype(int).tolist()
                try:
                    own += self.trainable.notes([source[i] for i in rows])
                except WeftError as error:  # of one record, which is left out when its turn comes
                    own.append(f"no closer look before the first step: {error}")
            found += [f"{item.source.path or item.source.call}: {note}" for note in own]
        return found

    def _open_cache(self) -> ExampleCache:
        config = self.recipe.cache
        assert config is not None
        folder = Path(config.folder) if config.folder else Path(self.recipe.run.folder) / "cache"
        names = getattr(self.trainable, "text_tensors", ("text", "pooled"))
        narrow = names if config.text_dtype == "bf16" else ()
        return ExampleCache(folder, shard=config.shard, narrow=narrow)

    def _buckets(self, sizes: list[Size] | None) -> dict[int, np.ndarray] | None:
        if sizes is None or len(sizes) == 1:
            return None
        if not hasattr(self, "_shapes"):
            self._shapes = [self._sizes_of(s) for s in range(len(self.sources))]
        return {
            s: np.array([nearest_size(h, w, sizes) for h, w in shapes], dtype=np.int64)
            for s, shapes in enumerate(self._shapes)
        }

    def _sizes_of(self, s: int) -> list[Size]:
        source, config = self.sources[s], self.recipe.data[s].source
        name = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True, default=str).encode()).hexdigest()
        folder = self.cache.folder if self.cache is not None else Path(self.recipe.run.folder)
        table = SizeTable(folder / f"sizes-{name[:16]}.npz", len(source))
        found: list[Size] = []
        for k in range(len(source)):
            found.append((1, 1))  # if it cannot be used, any size: it is left out when its turn comes
            with self._noting((s, k)):
                record = source[k]
                with self._noting((s, k), record):
                    found[k] = table.size(k, record)
        if self.processes.first:
            table.write()
        return found

    @contextmanager
    def _noting(self, row: Row, record: Record | None = None) -> Iterator[None]:
        """What a user could mend inside the block makes the record unusable."""
        try:
            yield
        except WeftError as error:
            self._bad[row] = f"record {record.id if record else row[1]}: {error}"

    def _sized(self, record: Record, size: Size | None) -> Record:
        return sized([record], None if size is None else [size])[0]

    def _encode(self, records: Sequence[Record], size: Size | None) -> list[Example]:
        with self._resolution(size), torch.no_grad():
            return self.trainable.examples(records)

    def _usable(self, records: list[Placed], size: Size | None) -> tuple[list[Placed], list[Example]]:
        """Those that can be encoded, and their examples; the others are noted. Raises WeftError if each can alone, but
        not all together."""
        try:
            if records:
                return records, self._encode([record for _, record in records], size)
        except WeftError:
            self._probe(records, size)
            good = [(row, record) for row, record in records if row not in self._bad]
            if len(good) == len(records):
                raise
            return self._usable(good, size)
        return [], []

    def _probe(self, records: list[Placed], size: Size | None) -> None:
        for row, record in records:
            with self._noting(row, record):
                self._encode([record], size)

    @contextmanager
    def _resolution(self, size: Size | None) -> Iterator[None]:
        """The model encodes at a stage's size inside the block: references follow it too, at their own aspect."""
        model: Any = self.trainable
        own = getattr(model, "resolution", None)
        if size is not None and own is not None:
            model.resolution = getattr(model, "resolution_of", max)(size)
        try:
            yield
        finally:
            if own is not None:
                model.resolution = own

    def sized(self, records: Sequence[Record]) -> list[Record]:
        """Held-out records with the sizes that the last stage trains at."""
        return sized(records, self.sizes[-1])

    def fixed(self, records: Sequence[Record], batch: int) -> tuple[list[Example], list[str]]:
        """Examples of held-out records at the sizes of the last stage (past the cache), and their ids. Raises WeftError
        if none of them can be used."""
        sizes = self.sizes[-1]
        largest = None if sizes is None else max(sizes, key=max)
        examples, ids = list[Example](), list[str]()
        for start in range(0, len(records), batch):
            part: list[Placed] = []
            for i, record in enumerate(records[start : start + batch], start):
                with self._noting((-1, i), record):
                    part += [((-1, i), self.sized([record])[0])]
            kept, some = self._usable(part, largest)
            examples, ids = examples + some, ids + [record.id for _, record in kept]
        lost = [why for (s, _), why in self._bad.items() if s == -1]
        for why in lost:
            self.say(f"not validated: {why}")
        if not examples:
            raise WeftError(f"validate.source: none of {len(records)} records can be used, the first: {lost[0]}")
        return examples, ids

    def batch(self, step: int) -> Fed:
        """This process's examples and ids of an optimiser step (from 0). What fails is in `Fed.error`: another process
        may not fail, and they have to end together."""
        try:
            return self._batch(step)
        except Exception as error:
            return Fed("", [], [], 0, 1, error=error)

    def _batch(self, step: int) -> Fed:
        batch = self.sampler.batch(step)
        sizes = self.sizes[batch.stage]
        size = None if sizes is None else sizes[batch.bucket or 0]
        pieces = self.stages[batch.stage].accumulate or self.recipe.run.accumulate
        micro, own = len(batch.rows) // pieces, self.processes.own(pieces)
        rows = batch.rows[own.start * micro : own.stop * micro]
        if self.cache is None:
            kept, examples = self._usable(self._read(rows, size), size)
            names = {row: record.id for row, record in kept}
        else:
            self._lookup(rows, size)
            memos = {row: self._keys[*row, size] for row in rows if row not in self._bad}
            examples = self.cache.get(memos[row][0] for row in rows if row in memos)
            names = {row: name for row, (_, name) in memos.items()}
        lengths, ids, faults = [0] * len(own), list[str](), list[tuple[Row, str]]()
        before = batch.rows[: own.start * micro]
        for i, row in enumerate(rows):
            if row in self._bad:
                faults.append((row, self._bad[row]))
                continue
            lengths[i // micro] += 1
            # the same record again: other noise, however the step is cut into micro-batches
            again = before.count(row) + rows[:i].count(row)
            ids.append(names[row] + (f"#{again + 1}" if again else ""))
        return Fed(batch.group, examples, ids, len(batch.rows), micro, pieces=lengths, faults=faults)

    def _read(self, rows: Sequence[Row], size: Size | None) -> list[Placed]:
        """The sized records of those rows that can be read; the others are noted."""
        found: list[Placed] = []
        for s, row in rows:
            if (s, row) not in self._bad:
                with self._noting((s, row)):
                    record = self.sources[s][row]
                    with self._noting((s, row), record):
                        found += [((s, row), self._sized(record, size))]
        return found

    # -- for methods that sample: requests instead of examples

    def requests(self, epoch: int) -> tuple[str, list[Record | None]]:
        """Batch group and records (sized) of an epoch of rollouts: `rollout.groups` of one group and bucket."""
        batch = self.sampler.batch(epoch)
        return batch.group, [self.request(epoch, row) for row in batch.rows]

    def request(self, epoch: int, row: Row) -> Record | None:
        """One record at the size of that epoch's stage and bucket; None if it or one of its pictures cannot be read,
        which is noted and counted. Raises WeftError above `run.max_faults`."""
        batch = self.sampler.batch(epoch)
        sizes = self.sizes[batch.stage]
        for _, record in self._read([row], None if sizes is None else sizes[batch.bucket or 0]):
            with self._noting(row, record):
                read_pictures(record)
                return record
        self.unusable.meet({row: self._bad[row]})
        return None

    def rows_like(self, epoch: int) -> list[tuple[int, int]]:
        """All (source, row) pairs that could stand in an epoch: of its batch group, and of its bucket."""
        batch = self.sampler.batch(epoch)
        buckets = self.sampler.spans[batch.stage].buckets
        return [
            (s, row)
            for s in self.sampler.members[batch.group]
            for row in range(len(self.sources[s]))
            if buckets is None or batch.bucket is None or int(buckets[s][row]) == batch.bucket
        ]

    def conditions(self, records: Sequence[Record], negative: str | None = None) -> list[Condition]:
        """Conditions of sized records; references follow the stage's size at their own aspect."""
        sizes = self.sizes[-1]
        model: Any = self.trainable
        with self._resolution(None if sizes is None else max(sizes, key=max)), torch.no_grad():
            return model.encode(records, negative=negative)

    def _lookup(self, rows: Sequence[Row], size: Size | None) -> None:
        """Bring these rows into the cache and `_keys`; those that cannot be used are noted.

        If one is missing all are encoded together: an encoder's last bits depend on its batch, and so the values
        stored are those of the uninterrupted run even if a part of them was written before a kill.
        """
        assert self.cache is not None
        rows = [row for row in rows if row not in self._bad]
        known = [self._keys.get((*row, size)) for row in rows]
        if all(memo is not None and memo[0] in self.cache for memo in known):
            return
        together: dict[str, Placed] = {}
        for row, record in self._read(rows, size):
            with self._noting(row, record):
                key = example_key(self.print, content_digest(record), str(size))
                self._keys[*row, size] = (key, record.id)
                together[key] = (row, record)
        missing = [pair for key, pair in together.items() if key not in self.cache]
        if len(missing) < len(together):  # those that an earlier run could not use, or that a kill lost
            self._probe(missing, size)
        if any(row not in self._bad for row, _ in missing):
            pairs = [pair for pair in together.values() if pair[0] not in self._bad]
            for (row, _), example in zip(*self._usable(pairs, size), strict=True):
                self.cache.add(self._keys[*row, size][0], example)
        for row in rows:
            if row not in self._bad and (twin := together[self._keys[*row, size][0]][0]) in self._bad:
                self._bad[row] = self._bad[twin]  # of the same content

    def ahead(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Encode every record at every size that training will ask for, and remember the keys on disk.

        Returns False if `stop` said to leave; what was encoded until then is kept. The first process encodes.
        """
        if not self.processes.first:
            self.processes.wait()
            self.cache = self._open_cache()
        done = self._ahead(stop)
        if self.processes.first:
            self.processes.wait()
        return done

    def _ahead(self, stop: Callable[[], bool]) -> bool:
        assert self.cache is not None and self.recipe.cache is not None
        chunk, started, spoke = self.recipe.cache.batch, time.monotonic(), time.monotonic()
        for span, sizes in zip(self.sampler.spans, self.sizes, strict=True):
            for s, source in enumerate(self.sources):
                config = self.recipe.data[s].source
                by_size: dict[Size | None, list[int]] = {}
                if sizes is None or len(sizes) == 1:
                    by_size[sizes[0] if sizes else None] = list(range(len(source)))
                else:
                    assert span.buckets is not None
                    for b, bucket_size in enumerate(sizes):
                        by_size[bucket_size] = np.flatnonzero(span.buckets[s] == b).tolist()
                for size, numbers in by_size.items():
                    memory = self._memory(config, size)
                    if memory is not None and self._recall(memory, s, size, numbers):
                        continue
                    for i in range(0, len(numbers), chunk):
                        if stop():
                            self.cache.flush()
                            return False
                        some = [(s, n) for n in numbers[i : i + chunk]]
                        self._lookup(some, size)
                        self.unusable.meet({row: self._bad[row] for row in some if row in self._bad})
                        if time.monotonic() - spoke > 20:
                            spoke = time.monotonic()
                            done = i + chunk
                            self.say(f"encoding source {s}: {done}/{len(numbers)}, {spoke - started:.0f} s so far")
                    self.cache.flush()
                    if memory is not None and not any((s, n) in self._bad for n in numbers):
                        entries = [self._keys[s, n, size] for n in numbers]
                        with atomic_write(memory) as handle:
                            handle.write(json.dumps(entries).encode())
        return True

    def _memory(self, config: SourceRecipe, size: Size | None) -> Path | None:
        """Where the keys of a generated source are remembered; files on disk may change, so theirs are not, nor those
        of a callable that reads a file."""
        if config.call is None or self.cache is None:
            return None
        if any(os.path.exists(text) for text in texts_in(config.args)):  # False for one that is too long to be a path
            return None
        facts = [config.call, config.args, config.limit, code_digest(config.call), size, self.print]
        return self.cache.folder / f"keys-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()}.json"

    def _recall(self, memory: Path, s: int, size: Size | None, numbers: list[int]) -> bool:
        assert self.cache is not None
        try:
            entries = json.loads(memory.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        if len(entries) != len(numbers) or any(key not in self.cache for key, _ in entries):
            return False
        for n, (key, name) in zip(numbers, entries, strict=True):
            self._keys[s, n, size] = (key, name)
        return True
