"""Comparisons as records: several attempts at one request, and which of them are better.

A comparison is an edit record whose assistant turn holds two or more pictures. Either `meta["grade"]` lists a grade for
each of them in order (null: nobody graded it; only the order of the grades counts), or those with the role `rejected`
are worse than the others (`weft data convert` writes that from a column of the name, or `rejected=COLUMN`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from weft.errors import WeftError
from weft.record import Part, Record, Turn, image_part, read_records
from weft.reward.graded import MAKERS, WEIGHTS, attempt
from weft.rng import numpy_rng
from weft.rows import Lazy
from weft.world import World
from weft.world import records as world_records


def candidates(record: Record, key: str = "grade") -> tuple[list[Part], list[float]]:
    """The pictures of a comparison and their grades (NaN: missing). Raises WeftError for a record that is none."""
    pictures = [part for turn in record.turns[_asked(record) :] for part in turn.parts if part.type == "image"]
    if len(pictures) < 2:
        raise WeftError(
            f"record {record.id!r} has {len(pictures)} picture to compare: put two or more attempts into the assistant "
            f"turn (weft.reward.preferences:grouped joins graded attempts at one request)"
        )
    said = record.meta.get(key)
    if said is None:
        grades = [0.0 if part.role == "rejected" else 1.0 for part in pictures]
        if len(set(grades)) < 2:
            raise WeftError(f'record {record.id!r} does not say which is better: list meta["{key}"] or mark `rejected`')
        return pictures, grades
    if not isinstance(said, list) or len(said) != len(pictures):
        count = len(said) if isinstance(said, list) else repr(said)
        raise WeftError(f'record {record.id!r}: meta["{key}"] is {count} for {len(pictures)} pictures: list one each')
    return pictures, [_number(value, f'record {record.id!r}: meta["{key}"][{k}]') for k, value in enumerate(said)]


def _asked(record: Record) -> int:
    """How many turns there are up to the last request, with it."""
    return max((k + 1 for k, turn in enumerate(record.turns) if turn.role == "user"), default=0)


def _number(value: Any, where: str) -> float:
    if value is None:
        return math.nan
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise WeftError(f"{where} is {value!r}: give a number, or null where nobody graded it")
    return float(value)


def request_of(record: Record) -> str:
    """What makes two records attempts at the same request: the instruction and the media before it."""
    return json.dumps([record.instruction, [part.digest(record.root) for part in record.inputs]])


class Comparisons(list[Record]):
    """Records, and what is to be said of them before training."""

    notes: tuple[str, ...] = ()


def grouped(path: str, key: str = "grade") -> Comparisons:
    """The graded attempts of a JSONL file (one picture and one grade a record), those at one request in one record.

    Groups may be of any size; a request with fewer than two graded attempts is left out, counted in `notes`. For a
    recipe: `source: {call: "weft.reward.preferences:grouped", args: {path: ...}}`. Raises WeftError if none is left.
    """
    return group(read_records(path), key, str(path))


def group(records: Iterable[Record], key: str = "grade", where: str = "records") -> Comparisons:
    """`grouped` for records in memory."""
    requests: dict[str, list[Record]] = {}
    for record in records:
        requests.setdefault(request_of(record), []).append(record)
    found = Comparisons()
    for tries in requests.values():
        if sum(record.meta.get(key) is not None for record in tries) >= 2:
            found.append(_joined(tries, key))
    left = len(requests) - len(found)
    if not found:
        raise WeftError(f"{where}: none of {len(requests)} requests has two graded attempts to compare")
    if left:
        found.notes = (f"{left} of {len(requests)} requests have fewer than two graded attempts and are left out",)
    return found


def _joined(tries: Sequence[Record], key: str) -> Record:
    """One record of attempts at a request; what their meta have in common stays."""
    first = tries[0]
    common = {k: v for k, v in first.meta.items() if all(k in r.meta and r.meta[k] == v for r in tries)}
    pictures: list[Part] = []
    for record in tries:
        if record.target is None or record.target.type != "image":
            raise WeftError(f"record {record.id!r} has no picture to compare: its assistant turn must hold one")
        pictures.append(replace(record.target, role=None))
    meta = {**common, key: [r.meta.get(key) for r in tries], "attempts": [r.id for r in tries]}
    return replace(first, turns=[*first.turns[: _asked(first)], Turn("assistant", pictures)], meta=meta)


@dataclass(frozen=True)
class Attempts(Lazy):
    """A lazy sequence of comparisons: record i of `world` with `size` attempts by different makers."""

    world: World
    weights: tuple[tuple[str, float], ...]
    size: int
    seed: int
    wear: bool = True

    def __len__(self) -> int:
        return len(self.world)

    def _record(self, k: int) -> Record:
        record = self.world[k]
        rng = numpy_rng(self.seed, "attempts", record=record.id)
        names, weights = zip(*self.weights, strict=True)
        shares = np.array(weights) / sum(weights)
        drawn = [names[n] for n in rng.choice(len(names), self.size, replace=False, p=shares).tolist()]
        made = [attempt(record, name, rng, wear=self.wear) for name in drawn]
        pictures = [image_part(one.load(one.target)) for one in made if one.target is not None]
        meta = {**record.meta, "grade": [one.meta["grade"] for one in made], "made": drawn}
        return replace(record, turns=[record.turns[0], Turn("assistant", pictures)], meta=meta)


def attempts(
    split: str = "train",
    count: int = 1000,
    seed: int = 0,
    start: int = 0,
    size: int = 4,
    tasks: dict[str, float] | Sequence[str] = ("edit",),
    kinds: dict[str, float] | Sequence[str] = (),
    phrasing: str = "seen",
    weights: dict[str, float] | None = None,
    wear: bool = True,
) -> Attempts:
    """Comparisons without end from the embedded world: `size` attempts at each of its records, graded by the program.

    `weights` of the makers (default: `weft.reward.graded.WEIGHTS` but for `spoken`, which changes the request). Raises
    WeftError for unknown names, and for a size that the makers cannot fill.
    """
    chosen = {k: v for k, v in WEIGHTS.items() if k != "spoken"} if weights is None else weights
    for name in chosen:
        if name not in MAKERS or name == "spoken":
            known = ", ".join(k for k in MAKERS if k != "spoken")
            raise WeftError(f"attempts: maker {name!r} is unknown or changes the request; use {known}")
    chosen = {k: chosen[k] for k in sorted(chosen) if chosen[k] > 0}  # a draw does not depend on the recipe's order
    if not 2 <= size <= len(chosen):
        raise WeftError(f"attempts: size {size} with {len(chosen)} makers: give 2 to {len(chosen)}")
    world = world_records(split, count, seed=seed, start=start, tasks=tasks, kinds=kinds, phrasing=phrasing)
    return Attempts(world, tuple(chosen.items()), size, seed, wear)
