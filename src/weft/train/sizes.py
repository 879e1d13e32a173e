"""The sizes that pictures are trained at: buckets of a stage, and which one a picture belongs to."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from weft.errors import WeftError
from weft.media import LazyPicture, atomic_write, image_size
from weft.record import Record
from weft.train.config import StageRecipe

Size = tuple[int, int]  # height, width


def aspect_size(size: int, aspect: float, multiple: int) -> Size:
    """(height, width) of about size^2 pixels and width / height = aspect, both rounded to `multiple`."""
    height = max(multiple, round(size / aspect**0.5 / multiple) * multiple)
    width = max(multiple, round(size * aspect**0.5 / multiple) * multiple)
    return height, width


def stage_sizes(stage: StageRecipe) -> list[Size] | None:
    """The (height, width) buckets of a stage; one without aspects; None when pictures stay as they are."""
    if stage.buckets is not None:
        return [(int(h), int(w)) for h, w in stage.buckets]
    if stage.size is None:
        return None
    if stage.aspects is None:
        return [(stage.size, stage.size)] if isinstance(stage.size, int) else [(stage.size[0], stage.size[1])]
    if not isinstance(stage.size, int):
        raise WeftError("stages: aspects need size to be one number, the side of the square of that area")
    sizes = []
    for aspect in stage.aspects:
        width, colon, height = aspect.partition(":")
        if not (colon and width.isdigit() and height.isdigit() and int(width) and int(height)):
            raise WeftError(f'stages.aspects: "{aspect}" is not of the form width:height')
        sizes.append(aspect_size(stage.size, int(width) / int(height), stage.multiple))
    return list(dict.fromkeys(sizes))


def nearest_size(height: float, width: float, sizes: Sequence[Size]) -> int:
    """The bucket whose aspect ratio is nearest in log scale."""
    wanted = np.log(width / height)
    return int(np.argmin([abs(np.log(w / h) - wanted) for h, w in sizes]))


def picture_size(record: Record) -> Size:
    """(height, width) of a record's target picture (else its source): `meta["size"]`, or the file's own."""
    if record.meta.get("size"):
        height, width = record.meta["size"]
        return int(height), int(width)
    part = record.target or record.source
    if part is None:
        raise WeftError(f"record {record.id!r} has no picture to take an aspect ratio from")
    if isinstance(part.value, LazyPicture):
        width, height = part.value.size
    elif part.path is None:
        width, height = part.load(record.root).size
    else:
        width, height = image_size(part.file(record.root))  # of the header: pictures are read when they are needed
    return height, width


class SizeTable:
    """`picture_size` of a source's records, kept in a file: a picture is opened again only if its path, its bytes or
    its time of change are others. `opened` counts those that were."""

    def __init__(self, path: Path, rows: int) -> None:
        self.path, self.opened = path, 0
        self.table = np.zeros((rows, 5), dtype=np.int64)  # digest of the path, bytes, time of change; height, width
        try:
            with np.load(path) as data:
                known = data["table"][:rows]
                self.table[: len(known)] = known
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # none yet: the headers are read

    def size(self, k: int, record: Record) -> Size:
        """(height, width) of record `k`. Raises as `picture_size`."""
        part = record.target or record.source
        if record.meta.get("size") or part is None or part.path is None:
            return picture_size(record)
        try:
            stat = part.file(record.root).stat()
        except OSError:
            return picture_size(record)  # which says what is wrong
        name = int.from_bytes(hashlib.sha256(part.path.encode()).digest()[:7])
        mark = (name, stat.st_size, stat.st_mtime_ns)
        if tuple(self.table[k, :3].tolist()) != mark:
            self.table[k] = (*mark, *picture_size(record))
            self.opened += 1
        return int(self.table[k, 3]), int(self.table[k, 4])

    def write(self) -> None:
        """Keep what was read, if anything was."""
        if self.opened:
            with atomic_write(self.path) as handle:
                np.savez(handle, table=self.table)


def sized(records: Sequence[Record], sizes: Sequence[Size] | None) -> list[Record]:
    """Records whose output has the one of these sizes that is nearest in aspect; as they are without sizes."""
    if sizes is None:
        return list(records)
    which = [nearest_size(*picture_size(r), sizes) if len(sizes) > 1 else 0 for r in records]
    return [
        dataclasses.replace(r, meta={**r.meta, "size": list(sizes[k])}) for r, k in zip(records, which, strict=True)
    ]
