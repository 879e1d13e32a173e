"""The record: one training row, request or benchmark item as a list of turns of text, pictures and movements.

A record reads like a chat: turns with a role (`user`, `assistant`), each a list of parts in order. User parts are
the request, assistant parts the targets. On disk it is one JSON object a line, beside its media files::

    {"schema": 1, "id": "7", "task": "edit", "turns": [
      {"role": "user", "parts": [{"type": "image", "path": "a.png", "role": "source"},
                                 {"type": "text", "text": "make the star red"}]},
      {"role": "assistant", "parts": [{"type": "image", "path": "b.png"}]}], "meta": {}}

References are woven into the text, which names them at their place ("picture 2"). References that the text already
speaks of by itself ("the second image") stand before it and are closed off by an empty text part: they are attached,
and the text is taken as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from weft.errors import WeftError
from weft.parts import (
    IMAGE_SUFFIXES,
    MOTION_SUFFIXES,
    Part,
    Turn,
    file_digest,
    image_part,
    instruction_text,
    is_reference,
    kind_of,
    motion_part,
    relative_path,
    short,
    targets_of,
    text_part,
    weave,
)
from weft.rows import SCHEMA, lines, parse_json, parse_row, place_medium

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "IMAGE_SUFFIXES",
    "MOTION_SUFFIXES",
    "SCHEMA",
    "Part",
    "Record",
    "Turn",
    "default_task",
    "file_digest",
    "image_part",
    "instruction_text",
    "make_record",
    "motion_part",
    "read_records",
    "record_from_dict",
    "record_to_dict",
    "relative_path",
    "text_part",
    "weave",
    "write_records",
]


@dataclass(slots=True)
class Record:
    """One row: `root` is the folder of its relative media paths and is not written.

    The properties describe the last exchange: the last user turn and what the assistant answers to it.
    """

    id: str
    task: str
    turns: list[Turn]
    meta: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA
    root: Path | None = None

    def _last_user(self) -> int:
        for k in range(len(self.turns) - 1, -1, -1):
            if self.turns[k].role == "user":
                return k
        raise WeftError(f"record {self.id}: turns: no user turn, add one with the instruction")

    @property
    def request(self) -> Turn:
        """The last user turn."""
        return self.turns[self._last_user()]

    @property
    def instruction(self) -> str:
        """The text of the last user turn; woven references read "picture k" (k counts `inputs` from 1)."""
        return self.instruction_as("picture {k}")

    def instruction_as(self, name: str) -> str:
        """`instruction` with a model's own way to name a reference, e.g. "image {k}" or "<img{k}>"."""
        turn = self.request
        inherited = self.source is not None and not any(p.role == "source" for p in turn.parts)
        return instruction_text(turn, name, first=2 if inherited else 1)

    @property
    def source(self) -> Part | None:
        """The medium to edit: the source of the last user turn, else what the assistant made in the turn before."""
        k = self._last_user()
        for part in self.turns[k].parts:
            if part.role == "source":
                return part
        earlier = [p for t in self.turns[:k] if t.role == "assistant" for p in targets_of(t)]
        return earlier[-1] if earlier else None

    @property
    def references(self) -> list[Part]:
        """The reference media of the last user turn, in order."""
        return [p for p in self.request.parts if is_reference(p)]

    @property
    def inputs(self) -> list[Part]:
        """The source, if any, then the references: the order in which models and texts count them."""
        source = self.source
        return ([source] if source else []) + self.references

    @property
    def mask(self) -> Part | None:
        """The picture whose white pixels may change."""
        return next((p for p in self.request.parts if p.role == "mask"), None)

    @property
    def targets(self) -> list[Part]:
        """The media that answer the last user turn."""
        return [p for t in self.turns[self._last_user() + 1 :] for p in targets_of(t)]

    @property
    def target(self) -> Part | None:
        """The first of `targets`."""
        return next(iter(self.targets), None)

    def load(self, part: Part) -> Image.Image:
        """The picture of one of this record's parts."""
        return part.load(self.root)


def make_record(
    instruction: str | Sequence[Part],
    source: Any = None,
    *,
    references: Sequence[Any] = (),
    mask: Any = None,
    start: Any = None,
    end: Any = None,
    target: Any = None,
    size: tuple[int, int] | None = None,
    task: str | None = None,
    id: str | None = None,
    meta: dict[str, Any] | None = None,
    root: Path | None = None,
) -> Record:
    """A one-exchange record: generation, or editing if there is a `source`.

    `instruction` is a text or what `weave` returns; media are paths, PIL pictures, lazy pictures, movements or
    parts.
    `references` are attached in order (the text is not changed); `start` and `end` are the movements between which the
    one that is asked for lies, both included. `size` is (height, width) in pixels and stands in
    `meta["size"]`. Without `id`, it is a digest of the request. Raises `WeftError` if the instruction is empty or
    a file is missing.
    """
    said = [text_part(instruction)] if isinstance(instruction, str) else list(instruction)
    if not any(p.type != "text" or (p.text or "").strip() for p in said):
        raise WeftError("instruction: empty, say what to make or to change")
    given = ((source, "source"), (mask, "mask"), (start, "start"), (end, "end"))
    parts = [_medium(m, role, root) for m, role in given if m is not None]
    if references:
        parts += [_medium(m, "reference", root) for m in references] + [text_part("")]
    turns = [Turn("user", parts + said)]
    if target is not None:
        turns.append(Turn("assistant", [_medium(target, None, root)]))
    record = Record("", "", turns, dict(meta or {}), root=root)
    if size is not None:
        record.meta["size"] = [int(size[0]), int(size[1])]
    record.task = task or default_task(record)
    record.id = id or _request_digest(record)
    return record


def _medium(medium: Any, role: str | None, root: Path | None) -> Part:
    if isinstance(medium, Part):
        part = Part(medium.type, path=medium.path, role=role, value=medium.value)
    elif isinstance(medium, str | Path):
        path = Path(medium) if root is not None else Path(medium).absolute()
        part = Part(kind_of(path), path=path.as_posix(), role=role)
    else:
        part = Part(getattr(medium, "kind", "image"), role=role, value=medium)
    if part.path is not None and not part.file(root).is_file():
        raise WeftError(f"{role or 'target'}: no such file {part.path}: check the path")
    return part


def default_task(record: Record) -> str:
    """`generate`, `edit`, `multi_generate` or `multi_edit`: by whether there is a source and are references; `between`
    with a start and an end."""
    if {"start", "end"} <= {part.role for part in record.request.parts}:
        return "between"
    return ("multi_" if record.references else "") + ("edit" if record.source else "generate")


def _request_digest(record: Record) -> str:
    content = [[p.type, p.role, p.digest(record.root)] for p in record.request.parts]
    return hashlib.sha256(json.dumps([content, record.meta.get("size")]).encode()).hexdigest()[:16]


# -- JSONL --


def read_records(path: str | Path, faults: list[str] | None = None) -> Iterator[Record]:
    """The records of a JSONL file, one by one; older schema versions are migrated.

    Raises `WeftError` "file:line: field: what, fix" at the first bad row; with a list `faults` it is noted there
    and the row left out. Media files are not opened.
    """
    path = Path(path)
    if not path.is_file():
        raise WeftError(f"{path}: no such file: check the path")
    seen: dict[str, int] = {}
    for number, _, line in lines(path):
        try:
            record = record_from_dict(parse_json(line), path.parent)
            if record.id in seen:
                raise WeftError(f"id: '{short(record.id)}' stands in line {seen[record.id]} too: ids must differ")
            seen[record.id] = number
        except WeftError as error:
            message = f"{path}:{number}: {error}"
            if faults is None:
                raise WeftError(message) from error
            faults.append(message)
            continue
        yield record


def record_from_dict(row: Any, root: Path | None = None) -> Record:
    """A record of one decoded JSONL row, checked. Raises `WeftError` "field: what, fix"."""
    return Record(*parse_row(row), root=root)


def write_records(path: str | Path, records: Iterable[Record], media: Literal["copy", "keep"] = "copy") -> int:
    """Write a JSONL file atomically; returns the number of records.

    Media go into the folder `media` beside it, named by content. With `media="keep"`, files that already lie under
    the JSONL's folder stay where they are (others raise `WeftError`). Pictures in memory are written as PNG, movements
    as NPZ.
    """
    from weft.media import atomic_write

    path = Path(path)
    count = 0
    with atomic_write(path) as handle:
        for record in records:
            row = record_to_dict(record, lambda part, root: place_medium(part, root, path.parent, media))
            try:
                handle.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            except (ValueError, TypeError) as error:
                raise WeftError(f"record {record.id}: not JSON ({error}): write plain values") from error
            count += 1
    return count


def record_to_dict(record: Record, place: Callable[[Part, Path | None], str] | None = None) -> dict[str, Any]:
    """The JSONL row of a record; `place` gives each medium its relative path (default: the one it has)."""
    turns = []
    for turn in record.turns:
        parts = []
        for part in turn.parts:
            if part.type == "text":
                parts.append({"type": "text", "text": part.text or ""})
                continue
            path = place(part, record.root) if place else relative_path(str(part.path or ""), "path")
            parts.append({"type": part.type, "path": path} | ({"role": part.role} if part.role else {}))
        turns.append({"role": turn.role, "parts": parts})
    return {"schema": SCHEMA, "id": record.id, "task": record.task, "turns": turns, "meta": record.meta}
