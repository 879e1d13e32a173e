"""JSONL without holding it: every row is checked once, its place in the file is kept, and a record is read from there
when it is asked for."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from weft.errors import WeftError
from weft.media import atomic_write
from weft.parts import short
from weft.record import Record
from weft.rows import SCHEMA, Lazy, lines, parse_json

VERSION = 3  # of kept indexes: to be raised when another row becomes a fault
KEEP = 4 << 20  # bytes of a file from which on its index is kept: below, reading it again takes no time

Make = Callable[[Any, int], Record]
"""A record of a decoded row and its number from 0; raises `WeftError` "field: what, fix"."""


class Indexed(Lazy):
    """The records of a JSONL file, by `rows` [N, 4]: byte, length, line and number of each (int64). `faults` are the
    other rows. Safe in threads. Raises `WeftError` if the file changes meanwhile."""

    def __init__(self, path: Path, make: Make, rows: np.ndarray, faults: list[str]) -> None:
        self.path, self.make, self.rows, self.faults = path, make, rows, faults
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._stamp = stamp(os.fstat(self._file))

    def __len__(self) -> int:
        return len(self.rows)

    def _record(self, k: int) -> Record:
        start, length, line, number = (int(v) for v in self.rows[k])
        try:
            if stamp(os.fstat(self._file)) != self._stamp:
                raise WeftError("the file has changed since it was opened: start again")
            return self.make(parse_json(os.pread(self._file, length, start)), number)
        except WeftError as error:
            raise WeftError(f"{self.path}:{line}: {error}") from error


def indexed(path: Path, make: Make, facts: str, limit: int | None, ids: str, notes: list[str]) -> Indexed:
    """The records of a JSONL file, of its first `limit` rows. The index of a large one is kept beside it and is valid
    while the file's place, size and time of change and the `facts` (all that `make` depends on) stay, and no bad row
    has become good (its picture may have come); `notes` says where it cannot be kept. `ids` is what to do about an id
    that stands there twice."""
    if not path.is_file():
        raise WeftError(f"{path}: no such file: check the path")
    now = stamp(path.stat())
    print_ = hashlib.sha256(json.dumps([VERSION, SCHEMA, str(path.absolute()), facts, limit, *now]).encode()).digest()
    name = hashlib.sha256(json.dumps([facts, limit]).encode()).hexdigest()[:8]
    kept = path.with_name(f"{path.name}.{name}.index")
    found = _kept(kept, print_)
    if found is None or _mended(path, make, found[2]):
        found = _scan(path, make, limit, ids)
        if now[0] >= KEEP:
            try:
                _keep(kept, print_, *found)
            except WeftError as error:
                notes.append(f"its index cannot be kept, every start reads it whole: {error}")
    opened = Indexed(path, make, *found[:2])
    if opened._stamp != now:
        raise WeftError(f"{path} has changed while it was read: start again")
    return opened


def stamp(stat: os.stat_result) -> tuple[int, int]:
    """Size and time of change of a file."""
    return stat.st_size, stat.st_mtime_ns


Found = tuple[np.ndarray, list[str], np.ndarray]
"""`Indexed.rows`, the faults, and the rows of those that may be mended without a change of the file."""


def _scan(path: Path, make: Make, limit: int | None, ids: str) -> Found:
    rows, bad = list[tuple[int, int, int, int]](), list[tuple[int, int, int, int]]()
    faults, seen = list[str](), dict[str, int]()
    for number, (line, start, data) in enumerate(lines(path)):
        if number == limit:
            break
        place = (start, len(data), line, number)
        try:
            record = make(parse_json(data), number)
        except WeftError as error:
            faults.append(f"{path}:{line}: {error}")
            bad.append(place)
            continue
        if record.id in seen:
            faults.append(f"{path}:{line}: id: '{short(record.id)}' stands at {path}:{seen[record.id]} too: {ids}")
            continue
        seen[record.id] = line
        rows.append(place)
    return np.array(rows, dtype=np.int64).reshape(-1, 4), faults, np.array(bad, dtype=np.int64).reshape(-1, 4)


def _mended(path: Path, make: Make, bad: np.ndarray) -> bool:
    again = Indexed(path, make, bad, [])
    for k in range(len(bad)):
        try:
            again[k]
            return True
        except WeftError:
            continue
    return False


def _keep(kept: Path, print_: bytes, rows: np.ndarray, faults: list[str], bad: np.ndarray) -> None:
    with atomic_write(kept) as handle:
        text = np.frombuffer(json.dumps(faults).encode(), dtype=np.uint8)
        np.savez(handle, print=np.frombuffer(print_, dtype=np.uint8), rows=rows, faults=text, bad=bad)


def _kept(kept: Path, print_: bytes) -> Found | None:
    try:
        with np.load(kept) as data:
            if data["print"].tobytes() == print_ and data["rows"].shape[1:] == (4,):
                return data["rows"], json.loads(data["faults"].tobytes()), data["bad"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # none, or of another time: the file is read
    return None
