"""Rows: what a record's JSON object must hold, what older ones held, and where the media beside it go.

`weft.record` reads and writes whole files with these.
"""

from __future__ import annotations

import json
import shutil
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from weft.errors import WeftError, nearest
from weft.parts import PART_ROLES, TURN_ROLES, TYPES, Part, Turn, relative_path, short

if TYPE_CHECKING:
    from weft.record import Record

SCHEMA = 1
ROW_KEYS = ("schema", "id", "task", "turns", "meta")


class Lazy(Sequence["Record"]):
    """Records that are made when they are asked for: `__len__` of them, number k by `_record(k)`."""

    @abstractmethod
    def _record(self, k: int) -> Record: ...

    @overload
    def __getitem__(self, i: int) -> Record: ...
    @overload
    def __getitem__(self, i: slice) -> list[Record]: ...
    def __getitem__(self, i: int | slice) -> Record | list[Record]:
        if isinstance(i, slice):
            return [self._record(k) for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        return self._record(i if i >= 0 else i + len(self))


def lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Line number, first byte and bytes of every line of a file that is not empty."""
    with path.open("rb") as handle:
        start = 0
        for number, line in enumerate(handle, 1):
            skip = 3 if number == 1 and line.startswith(b"\xef\xbb\xbf") else 0
            if line[skip:].strip():
                yield number, start + skip, line[skip:]
            start += len(line)


def parse_json(data: bytes) -> Any:
    """The decoded row, or a file of them. Raises `WeftError`, also for half a character (as from a cut text), which
    JSON can hold and no file, tokenizer or digest can take."""
    try:
        row = json.loads(data)
        if b"\\u" in data or b"\xed" in data:  # the two ways to write one
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end]
        raise WeftError(f"row: holds half a character ({half!r}): write the text again") from error
    except (ValueError, RecursionError) as error:
        raise WeftError(f"row: not JSON ({error}): write one object a line") from error
    return row


def parse_row(row: Any) -> tuple[str, str, list[Turn], dict[str, Any]]:
    """Id, task, turns and meta of a decoded JSONL row of any schema, checked. Raises `WeftError` "field: what, fix"."""
    if not isinstance(row, dict):
        raise WeftError(f"row: {short(row)} is not an object: write {{...}}")
    row = migrate(row)
    _known_keys(row, ROW_KEYS, "")
    for key in ("id", "task"):
        if not isinstance(row.get(key), str) or not row[key]:
            raise WeftError(f"{key}: {short(row.get(key))} is not a text: give a non-empty string")
    meta = row.get("meta", {})
    if not isinstance(meta, dict):
        raise WeftError(f"meta: {short(meta)} is not an object: write {{...}}")
    given = row.get("turns")
    if not isinstance(given, list) or not given:
        raise WeftError("turns: missing or empty: give a list with a user turn")
    turns = [_turn(turn, f"turns[{k}]") for k, turn in enumerate(given)]
    if not any(turn.role == "user" for turn in turns):
        raise WeftError("turns: no user turn: add one with the instruction")
    return row["id"], row["task"], turns, meta


def _turn(row: Any, field: str) -> Turn:
    if not isinstance(row, dict):
        raise WeftError(f"{field}: {short(row)} is not an object: write {{...}}")
    _known_keys(row, ("role", "parts"), field + ".")
    _one_of(row.get("role"), TURN_ROLES, field + ".role")
    parts = row.get("parts")
    if not isinstance(parts, list) or not parts:
        raise WeftError(f"{field}.parts: missing or empty: give a list of parts")
    return Turn(row["role"], [_part(p, field, k) for k, p in enumerate(parts)])


def _part(row: Any, turn: str, k: int) -> Part:
    try:
        if not isinstance(row, dict):
            raise WeftError(f": {short(row)} is not an object: write {{...}}")
        role = row.get("role")
        kind = _one_of(row.get("type"), TYPES, ".type")
        if kind == "text":
            _known_keys(row, ("type", "text"), ".")
            if not isinstance(row.get("text"), str):
                raise WeftError(f".text: {short(row.get('text'))} is not a text: give a string")
            return Part("text", text=row["text"])
        _known_keys(row, ("type", "path", "role"), ".")
        if role is not None:
            _one_of(role, PART_ROLES, ".role")
        if not isinstance(row.get("path"), str):
            raise WeftError(f".path: {short(row.get('path'))} is not a path: name a file")
        return Part(kind, path=relative_path(row["path"], ".path"), role=role)
    except WeftError as error:
        raise WeftError(f"{turn}.parts[{k}]{error}") from error


def _known_keys(row: dict[str, Any], known: tuple[str, ...], field: str) -> None:
    for key in row:
        if key not in known:
            raise WeftError(f"{field}{short(key)}: unknown field: {nearest(key, known)}")


def _one_of(value: Any, known: tuple[str, ...], field: str) -> str:
    if not isinstance(value, str) or value not in known:
        raise WeftError(f"{field}: '{short(value)}' is unknown: {nearest(value, known)}")
    return value


def migrate(row: dict[str, Any]) -> dict[str, Any]:
    """A row of any older schema as one of the current schema.

    Schema 0 is the flat row `{id, task, instruction, source, references, target}`; a row with an `instruction`, no
    `turns` and no `schema` counts as one. Raises `WeftError` for a newer schema than this weft knows.
    """
    schema = row.get("schema", 0 if "instruction" in row and "turns" not in row else None)
    if schema is None:
        raise WeftError(f'schema: missing: add "schema": {SCHEMA}')
    if not isinstance(schema, int) or isinstance(schema, bool) or not 0 <= schema <= SCHEMA:
        raise WeftError(f"schema: {short(schema)} is unknown, this weft reads 0 to {SCHEMA}: upgrade weft")
    while schema < SCHEMA:
        row = _MIGRATIONS[schema](row)
        schema = row["schema"]
    return row


def _from_schema_0(row: dict[str, Any]) -> dict[str, Any]:
    _known_keys(row, ("schema", "id", "task", "instruction", "source", "references", "target"), "")
    references = row.get("references") or []
    if not isinstance(references, list):
        raise WeftError("references: not a list: write a list of paths")
    said: list[dict[str, Any]] = [{"type": "text", "text": row.get("instruction")}]
    if references:
        said.insert(0, {"type": "text", "text": ""})  # attached: the sentence stays as it was
    media = [(row["source"], "source")] if row.get("source") is not None else []
    media += [(path, "reference") for path in references]
    user = [{"type": "image", "path": path, "role": role} for path, role in media] + said
    turns = [{"role": "user", "parts": user}]
    if row.get("target") is not None:
        turns.append({"role": "assistant", "parts": [{"type": "image", "path": row["target"]}]})
    kind = ("multi_" if references else "") + ("edit" if row.get("source") is not None else "generate")
    return {"schema": 1, "id": row.get("id"), "task": row.get("task", kind), "turns": turns, "meta": {}}


_MIGRATIONS = {0: _from_schema_0}


def place_medium(part: Part, root: Path | None, folder: Path, media: Literal["copy", "keep"]) -> str:
    """Bring a medium under `folder`, into `media/` by its content ("keep": files under it stay where they are); returns
    its path relative to `folder`. Raises `WeftError` for a file that cannot stay or cannot be copied alone."""
    from weft.media import LazyPicture, atomic_write, picture_suffix, save_image

    if isinstance(part.value, LazyPicture):  # already encoded: its bytes are copied
        data = part.value.read()
        name = f"media/{part.digest()[:24]}{picture_suffix(data, part.value.name)}"
        if not (folder / name).exists():
            with atomic_write(folder / name) as target:
                target.write(data)
        return name
    if part.type == "motion" and part.value is not None:
        name = f"media/{part.digest()[:24]}.npz"
        if not (folder / name).exists():
            part.value.save(folder / name)
        return name
    if part.value is not None:
        name = f"media/{part.digest()[:24]}.png"
        if not (folder / name).exists():
            save_image(part.load(), folder / name)
        return name
    file = part.file(root)
    if media == "keep":
        try:
            return file.absolute().relative_to(folder.absolute()).as_posix()
        except ValueError as error:
            raise WeftError(f'{file} does not lie under {folder}: write with media="copy"') from error
    if file.suffix.lower() == ".amc":
        raise WeftError(f"{file}: an .amc cannot be read without its .asf: convert it to .bvh (weft data convert)")
    name = f"media/{part.digest(root)[:24]}{file.suffix.lower()}"
    if not (folder / name).exists():
        with file.open("rb") as source, atomic_write(folder / name) as target:
            shutil.copyfileobj(source, target)
    return name
