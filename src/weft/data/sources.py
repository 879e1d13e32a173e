"""Sources of records: weft's own JSONL, foreign rows, folders, parquet, webdataset shards, or a Python function."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

from weft.data.columns import convert, fields_of
from weft.data.folder import folder_records
from weft.data.index import indexed
from weft.data.shards import Row, Rows, parquet_rows, shard_rows
from weft.errors import WeftError, nearest
from weft.record import Record, record_from_dict
from weft.rows import lines, parse_json
from weft.settings import check_arguments, load_object

MAX_FAULTS = 0.02  # of all rows: above it, something is wrong with the whole, not with a row
_OPTIONS = {
    "jsonl": ("max_faults", "root", "downloads"),
    "prompts": ("max_faults",),
    "folder": ("max_faults", "target", "source", "references", "mask", "captions"),
    "parquet": ("max_faults", "root"),
    "webdataset": ("max_faults",),
    "motion": ("max_faults", "captions", "tasks", "window", "hop", "least", "fps", "skeleton", "unit", "up"),
    "humanml3d": ("max_faults", "split", "least", "most"),
}


@dataclass(slots=True)
class SourceConfig:
    """Where records come from.

    `kind`: `jsonl` (weft's records, or any rows: `.jsonl`, `.json`), `prompts` (a text file with one instruction a
    line, as flow_grpo's and DiffusionNFT's `train.txt`), `folder` (pictures by stem), `parquet` and `webdataset` (a
    file, a folder of them, or a glob pattern), `motion` (motion files with captions), `humanml3d` (a folder in
    HumanML3D's layout), `python` (`path` is `file.py:function` or `package.module:function`, called with `options` as
    keywords, returning a sequence of records).

    `map` names the column of each field (`weft.data.columns`), `limit` takes the first so many rows, `task` overrides
    the task. Options: `max_faults` (share of bad rows that is skipped, default 0.02); jsonl and parquet: `root` (the
    folder of the media that rows name by their paths, relative to the file's folder); jsonl: `downloads` (the folder
    below it where the files of URLs lie, by their last name); folder: `target`, `source`, `references`, `mask`,
    `captions` (folders); motion: those of `weft.motion.convert.motion_records` and `Reading`; humanml3d: those of
    `weft.motion.files.humanml3d.records`.
    """

    kind: str
    path: str
    map: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    task: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


class Source(Sequence[Record]):
    """Records in memory (their pictures on disk), or of JSONL in the file; `rows` counts what was read, `faults` says
    what was skipped, `notes` what else one should know."""

    def __init__(self, records: Sequence[Record], faults: list[str], notes: Sequence[str] = ()) -> None:
        self.records, self.faults, self.notes = records, faults, notes
        self.rows = len(records) + len(faults)

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        return self.records[index]


def load_source(config: SourceConfig) -> Sequence[Record]:
    """The records of a source; bad rows are skipped and listed in `Source.faults`.

    Raises `WeftError` if more than the option `max_faults` of the rows are bad (with the first three of them), if
    nothing is left, or for an unknown kind, option, field or column.
    """
    if config.kind == "python":
        return _call(config)
    if config.kind not in _OPTIONS:
        raise WeftError(f"source kind '{config.kind}' is unknown: use one of {', '.join([*_OPTIONS, 'python'])}")
    for name in config.options:
        if name not in _OPTIONS[config.kind]:
            fix = nearest(name, _OPTIONS[config.kind])
            raise WeftError(f"source option '{name}' of {config.path} is unknown: {fix}")
    if config.limit is not None and config.limit < 1:
        raise WeftError(f"limit: {config.limit} rows of {config.path} leave nothing: give 1 or more")
    source = read_source(config)
    refuse_faults(source.faults, source.rows, _rate(config.options.get("max_faults", MAX_FAULTS)), config.path)
    if not source.records:
        raise WeftError(f"{config.path} holds no record: check the path and the kind '{config.kind}'")
    return source


def read_source(config: SourceConfig) -> Source:
    """As `load_source`, for a kind of files and without any limit of faults."""
    faults: list[str] = []
    path = Path(config.path)
    if config.kind == "jsonl" and not config.map and _is_weft(path):
        if extra := set(config.options) - {"max_faults"}:
            raise WeftError(f"source option '{extra.pop()}': {path} holds weft's own records, which need none")

        def own(item: Any, count: int) -> Record:
            record = record_from_dict(item, path.parent)
            record.task = config.task or record.task
            return record

        return _indexed(config, own, "ids must differ")
    if config.kind == "prompts":
        if config.map:
            raise WeftError(f"map: {path} holds one prompt a line, which has no columns: remove the map")
        named = replace(config, map={"instruction": "prompt"})
        return Source(list(_converted(_prompts(path), named, path.parent, faults)), faults)
    if config.kind == "folder":
        if config.map:
            raise WeftError(f"map: {path} is a folder of pictures, which has no columns: remove the map")
        found = folder_records(path, config.options, config.task, faults)
        return Source(list(itertools.islice(found, config.limit)), faults)
    if config.kind in ("motion", "humanml3d"):
        if config.map:
            raise WeftError(f"map: {path} holds movements, which have no columns: remove the map")
        notes: list[str] = []
        found = itertools.islice(_movements(config, faults, notes), config.limit)
        return Source([replace(record, task=config.task or record.task) for record in found], faults, notes)
    if config.kind == "jsonl":
        root = _root(config, path.parent)
        downloads = config.options.get("downloads")
        if path.suffix == ".json":
            return Source(list(_converted(_json_rows(path, downloads), config, root, faults)), faults)
        first = next((row for _, row in _json_rows(path, downloads) if not isinstance(row, WeftError)), None)
        fields = {} if first is None else fields_of(first, config.map, config.path)

        def foreign(item: Any, count: int) -> Record:
            row = _row(item, downloads)
            if isinstance(row, WeftError):
                raise row
            return convert(row, fields, _name(config, count), root, config.task)

        return _indexed(config, foreign, "map another column, or id=")
    reader = {"parquet": parquet_rows, "webdataset": shard_rows}[config.kind]
    suffixes = (".parquet",) if config.kind == "parquet" else (".tar",)
    files = _files(path, suffixes)
    rows = itertools.chain.from_iterable(reader(file) for file in files)
    beside = None if config.kind == "webdataset" else _root(config, path if path.is_dir() else path.parent)
    return Source(list(_converted(rows, config, beside, faults)), faults, _splits(files))


def _root(config: SourceConfig, folder: Path) -> Path:
    """Where the media lie that rows name: the user's own configuration may lead anywhere, the rows not out of it."""
    root = Path(os.path.normpath(folder / str(config.options.get("root", "."))))  # records hold no ".."
    if not root.is_dir():
        raise WeftError(f"root: {root}: no such folder: check the options of {config.path}")
    return root


def _indexed(config: SourceConfig, make: Callable[[Any, int], Record], ids: str) -> Source:
    facts = [config.map, config.task, {k: str(v) for k, v in config.options.items() if k != "max_faults"}]
    notes: list[str] = []
    records = indexed(Path(config.path), make, json.dumps(facts, sort_keys=True), config.limit, ids, notes)
    return Source(records, records.faults, notes)


def _name(config: SourceConfig, count: int) -> str:
    path = Path(config.path)
    return f"{path.parent.absolute().name if '*' in path.name else path.stem}-{count:07d}"


def refuse_faults(faults: Sequence[str], rows: int, limit: float, name: str) -> None:
    """Raise `WeftError` if more than `limit` of the rows have a fault."""
    if len(faults) > limit * rows:
        first = "; ".join(faults[:3])
        raise WeftError(
            f"{name}: {len(faults)} of {rows} rows are bad ({len(faults) / rows:.1%}, the limit max_faults is "
            f"{limit:.1%}): mend them or raise the limit. The first: {first}"
        )


def hold_out(records: Sequence[Record], share: float) -> tuple[list[Record], list[Record]]:
    """The records in two parts, the second with this share of the takes: records of one `meta["clip"]` stay together,
    others are a take of their own. Which ones is decided by their names alone.

    Raises `WeftError` for a share that leaves one part empty.
    """
    names = [str(record.meta.get("clip", record.id)) for record in records]
    takes = sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).digest())
    held = set(takes[: max(round(share * len(takes)), 1)])
    if not 0 < share < 1 or len(held) == len(takes):
        raise WeftError(f"{share:g} of {len(takes)} takes leaves one part empty: give a share between 0 and 1")
    parts: tuple[list[Record], list[Record]] = [], []
    for record, name in zip(records, names, strict=True):
        parts[name in held].append(record)
    return parts


def _rate(value: Any) -> float:
    try:
        rate = float(value)
    except (TypeError, ValueError):
        rate = -1.0
    if not 0 <= rate <= 1:
        raise WeftError(f"max_faults: {value!r} is not a share: give a number from 0 to 1")
    return rate


def _converted(rows: Rows, config: SourceConfig, root: Path | None, faults: list[str]) -> Iterator[Record]:
    fields: dict[str, str] | None = None
    seen: dict[str, str] = {}
    for count, (where, row) in enumerate(itertools.islice(rows, config.limit)):
        try:
            if isinstance(row, WeftError):
                raise row
            if fields is None:
                fields = fields_of(row, config.map, config.path)
        except WeftError as error:
            if fields is None and not isinstance(row, WeftError):
                raise
            faults.append(f"{where}: {error}")
            continue
        try:
            record = convert(row, fields, _name(config, count), root, config.task)
            if record.id in seen:
                raise WeftError(f"id: '{record.id}' stands at {seen[record.id]} too: map another column, or id=")
        except WeftError as error:
            faults.append(f"{where}: {error}")
            continue
        seen[record.id] = where
        yield record


def _splits(files: list[Path]) -> list[str]:
    """A note where the files are those of several splits, which one rarely wants as one."""
    found = {match[0] for file in files if (match := re.match("train|validation|valid|val|dev|test", file.name))}
    if len(found) < 2:
        return []
    return [f"files of the splits {', '.join(sorted(found))} are read as one: a pattern names those of one, "
            f"as {max(found)}-*{files[0].suffix}"]  # fmt: skip


def _files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.name.lower().endswith(suffixes))
    elif path.is_file():
        files = [path]
    else:
        files = sorted(path.parent.glob(path.name)) if path.parent.is_dir() else []
    if not files:
        raise WeftError(f"{path}: no such file, and no {' or '.join(suffixes)} file below it: check the path")
    return files


# -- JSON rows --


def _is_weft(path: Path) -> bool:
    """Whether the first row is one of weft's own records, of any schema."""
    if path.suffix == ".json":
        return False
    row = next((row for _, row in _json_rows(path, None)), {})
    flat = {"id", "task", "instruction", "source", "references", "target"}
    return isinstance(row, dict) and ("turns" in row or "schema" in row or {"id", "instruction"} <= set(row) <= flat)


def _json_rows(path: Path, downloads: str | None) -> Rows:
    if not path.is_file():
        raise WeftError(f"{path}: no such file: check the path")
    if path.suffix == ".json":
        try:
            items = parse_json(path.read_bytes())
        except WeftError as error:
            raise WeftError(f"{path}: {error}") from error
        if not isinstance(items, list):
            raise WeftError(f"{path}: not a JSON list: write one, or JSONL with one object a line")
        yield from ((f"{path}[{k}]", _row(item, downloads)) for k, item in enumerate(items))
        return
    for number, _, line in lines(path):
        try:
            yield f"{path}:{number}", _row(parse_json(line), downloads)
        except WeftError as error:
            yield f"{path}:{number}", error


def _row(item: Any, downloads: str | None) -> Row | WeftError:
    if not isinstance(item, dict):
        return WeftError(f"row: {type(item).__name__} is not an object: write {{...}}")
    if downloads is None:
        return item
    return _downloaded(item, downloads)


def _downloaded(value: Any, folder: str) -> Any:
    """A row with the path of a file in `folder` in the place of each URL."""
    if isinstance(value, dict):
        return {key: _downloaded(inner, folder) for key, inner in value.items()}
    if isinstance(value, list):
        return [_downloaded(inner, folder) for inner in value]
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        return f"{folder}/{value.split('?')[0].rpartition('/')[2]}"
    return value


def _prompts(path: Path) -> Rows:
    """The lines of a text file that hold anything, as rows."""
    if not path.is_file():
        raise WeftError(f"{path}: no such file: check the path")
    for number, _, line in lines(path):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            yield where, WeftError(f"prompt: not UTF-8 (byte {error.start + 1} of the line): save the file as UTF-8")
            continue
        bad = any(unicodedata.category(letter) == "Cc" and letter != "\t" for letter in text)
        yield where, WeftError("prompt: control characters: is this a text file?") if bad else {"prompt": text}


# -- movements --


def _movements(config: SourceConfig, faults: list[str], notes: list[str]) -> Iterator[Record]:
    from weft.motion.captions import Captions
    from weft.motion.convert import Converted, Reading, motion_records, read_table
    from weft.motion.files.humanml3d import records

    options = {key: value for key, value in config.options.items() if key != "max_faults"}
    numbers: dict[str, Any] = {
        key: _number(key, options.pop(key)) for key in ("hop", "least", "most", "fps") if key in options
    }
    if config.kind == "humanml3d":
        frames = {key: int(value) for key, value in numbers.items()}
        made = records(config.path, str(options.get("split", "train")), limit=config.limit, **frames)
        faults += sorted({fault for record in made for fault in record.meta.get("faults", ())})
        return iter(made)
    reading = Reading(
        fps=numbers.pop("fps", None), table=read_table(str(options.get("skeleton", "auto"))),
        unit=options.get("unit"), up=options.get("up"),
    )  # fmt: skip
    if "window" in options:
        whole = options["window"] in (None, "none")
        numbers["window"] = None if whole else _number("window", options["window"])
    if "tasks" in options:
        given = options["tasks"]
        numbers["tasks"] = [w.strip() for w in given.split(",")] if isinstance(given, str) else list(given)
    texts, done = Captions(options.get("captions")), Converted(faults=faults, notes=notes)
    return motion_records(config.path, reading, done, captions=texts, **numbers)


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 < number < 1e9:
        raise WeftError(f"{name}: {value!r} is not a number above 0")
    return number


# -- Python --


def _call(config: SourceConfig) -> Sequence[Record]:
    if config.map:
        raise WeftError(f"map: {config.path} returns records, which need none: remove the map")
    function = load_object(config.path, "source")
    check_arguments(function, config.options, f"options of {config.path}")
    found = function(**config.options)
    records = found if isinstance(found, Sequence) else list(found) if isinstance(found, Iterable) else None
    if records is None or not len(records) or not isinstance(records[0], Record):
        raise WeftError(f"{config.path} returned no records: return a sequence of weft.Record")
    if config.limit is not None:
        records = (
            records[: config.limit]
            if isinstance(records, list)
            else [records[k] for k in range(min(config.limit, len(records)))]
        )
    if config.task is not None:
        raise WeftError(f"task: {config.path} returns records with their task: remove the task")
    return records
