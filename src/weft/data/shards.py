"""Rows of parquet files and of webdataset shards; pictures stay where they are until they are loaded.

Shards are plain tar files, read by their index and never unpacked, so that no member can be written anywhere and
nothing is lost silently: a shard that ends early is a fault with a name.
"""

from __future__ import annotations

import importlib.util
import json
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import WeftError
from weft.media import LazyPicture

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row | WeftError]]
"""Where a row stands (for messages) and the row, or why there is none."""

MAX_CHUNK = 1 << 30  # bytes of one column in one row group; a group of pictures is usually below 0.1 GiB
MAX_TEXT = 1 << 24  # bytes of a text or JSON member
_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")


# -- parquet --


def parquet_rows(path: Path) -> Rows:
    """Rows of a parquet file. Columns of bytes are pictures and become `LazyPicture`. Needs the extra `weft[data]`."""
    if importlib.util.find_spec("pyarrow") is None:
        raise WeftError(f"{path}: parquet needs pyarrow: pip install 'weft[data]'")
    file = _open_parquet(str(path))
    leaves = [file.schema.column(k).path for k in range(len(file.schema))]
    binary = {leaf for k, leaf in enumerate(leaves) if _is_binary(file, k)}
    light = [leaf for leaf in leaves if leaf not in binary]
    pictures = {leaf.split(".")[0] for leaf in binary}
    bare = pictures - {leaf.split(".")[0] for leaf in light}  # columns of bytes without names beside them
    number = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        try:
            table = _read(file, group, light, path)
            cells = {name: _bare_cells(file, path, group, name) for name in bare}
        except (OSError, ValueError) as error:  # pyarrow's errors are these; WeftError is a ValueError
            for k in range(count):
                yield f"{path}:{number + k}", WeftError(f"row group {group} cannot be read ({error})")
            number += count
            continue
        columns = {name: table.column(name).to_pylist() for name in table.column_names} | cells
        for k in range(count):
            row = {name: values[k] for name, values in columns.items()}
            for name in pictures & set(row):
                row[name] = _lazy_cells(row[name], (str(path), group, name), k, f"{path}:{number + k} {name}")
            yield f"{path}:{number + k}", row
        number += count


def _bare_cells(file: pq.ParquetFile, path: Path, group: int, name: str) -> list[Any]:
    """What stands for the cells of a column of bytes alone until they are read: one place each, or a list of places,
    for whose number the column has to be read once."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = file.schema_arrow.field(name).type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return [b""] * file.metadata.row_group(group).num_rows
    lengths = pc.list_value_length(_chunk(str(path), group, name)).to_pylist()
    return [None if length is None else [b""] * length for length in lengths]


def _is_binary(file: pq.ParquetFile, k: int) -> bool:
    column = file.schema.column(k)
    return column.physical_type == "BYTE_ARRAY" and str(column.logical_type.type) not in ("STRING", "JSON", "ENUM")


@lru_cache(maxsize=64)
def _open_parquet(path: str) -> pq.ParquetFile:
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, memory_map=True)
    except (OSError, ValueError) as error:
        raise WeftError(f"{path} is not a parquet file ({error}): download it again") from error


def _read(file: pq.ParquetFile, group: int, columns: list[str], path: str | Path) -> pa.Table:
    described = file.metadata.row_group(group)
    for k in range(described.num_columns):
        chunk = described.column(k)
        if chunk.path_in_schema in columns and chunk.total_uncompressed_size > MAX_CHUNK:
            size = chunk.total_uncompressed_size
            raise WeftError(f"{path}: column {chunk.path_in_schema} has {size} bytes in one row group, "
                            f"the limit is {MAX_CHUNK}: rewrite it with smaller groups")  # fmt: skip
    return file.read_row_group(group, columns=columns)


@lru_cache(maxsize=4)
def _chunk(path: str, group: int, column: str) -> pa.ChunkedArray:
    file = _open_parquet(path)
    leaves = [file.schema.column(k).path for k in range(len(file.schema))]
    return _read(file, group, [x for x in leaves if x.split(".")[0] == column], path).column(column)


def _lazy_cells(light: Any, chunk: tuple[str, int, str], k: int, name: str) -> Any:
    """A cell read without its bytes, with lazy pictures in their place: one, or a list of them."""
    if light is None:
        return None
    if isinstance(light, list):
        return [LazyPicture(f"{name}[{j}]", lambda j=j: _bytes(_chunk(*chunk)[k].as_py()[j], name))  # type: ignore[misc]
                for j in range(len(light))]  # fmt: skip
    return LazyPicture(name, lambda: _bytes(_chunk(*chunk)[k].as_py(), name))


def _bytes(cell: Any, name: str) -> bytes:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        raise WeftError(f"{name} holds no picture: the cell is empty")
    return data


# -- webdataset --


def shard_rows(path: Path) -> Rows:
    """Samples of a webdataset shard: members of one name, by their suffix (`7.source.png` is column `source`).

    Text members are read, JSON objects are merged into the row, pictures stay in the file. Links, devices and names
    that lead out of the shard are faults, and so is an early end. A sample with a faulty member is left out whole, and
    so is the last one before an early end: without its source an edit would be another task.
    """
    current, row = "", Row()
    faults: list[tuple[str, WeftError]] = []

    def sample() -> Rows:
        if faults or not row:
            yield from faults
        else:
            yield f"{path}:{current}", row

    for name, member in _members(path):
        key, suffix = _split(name) if name else (current, "")
        if key != current:
            yield from sample()
            current, row, faults = key, {"__key__": key}, []
        try:
            if isinstance(member, WeftError):
                raise member
            row |= _member(path, member, suffix)
        except WeftError as error:
            faults.append((f"{path}:{name}" if name else str(path), error))
    yield from sample()


def _members(path: Path) -> Iterator[tuple[str, tarfile.TarInfo | WeftError]]:
    """Every member by its name, or why it cannot be used; an early end has no name."""
    size = path.stat().st_size
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                if not member.isreg():
                    yield member.name, WeftError("a link or a device, not a file: remove the member")
                elif member.name.startswith(("/", "\\")) or ".." in member.name.replace("\\", "/").split("/"):
                    yield member.name, WeftError("the name leads out of the shard: rename the member")
                elif member.offset_data + member.size > size:
                    yield member.name, WeftError("the shard ends inside this member: download it again")
                else:
                    yield member.name, member
                end = tar.offset
    except (tarfile.TarError, OSError, ValueError) as error:
        why = (
            "compressed shards have no index, decompress it" if path.suffix in (".gz", ".tgz") else "download it again"
        )
        yield "", WeftError(f"the shard cannot be read further ({error}): {why}")
        return
    with path.open("rb") as handle:  # tarfile takes a damaged header for the end
        handle.seek(end)
        if any(handle.read(512)):
            yield "", WeftError(f"damaged after byte {end} of {size}: download the shard again")
        elif end > size or handle.tell() < end + 512:
            yield "", WeftError(f"no end mark at byte {end}: the download was cut, repeat it")


def _split(name: str) -> tuple[str, str]:
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), suffix


def _member(path: Path, member: tarfile.TarInfo, suffix: str) -> Row:
    offset, size = member.offset_data, member.size
    last = suffix.rpartition(".")[2].lower()
    if last in _PICTURES:
        name = suffix.rpartition(".")[0] or last
        return {name: LazyPicture(f"{path}:{member.name}", lambda: _slice(path, offset, size))}
    if last not in ("json", "txt"):
        return {}
    if size > MAX_TEXT:
        raise WeftError(f"{member.name} has {size} bytes, the limit of a text is {MAX_TEXT}")
    try:
        text = _slice(path, offset, size).decode()
        found = json.loads(text) if last == "json" else {suffix.rpartition(".")[0] or "txt": text}
    except (ValueError, RecursionError) as error:
        raise WeftError(f"{member.name} is not {last} ({error}): write it again") from error
    if not isinstance(found, dict):
        raise WeftError(f"{member.name} is not a JSON object: write {{...}}")
    return found


def _slice(path: Path, offset: int, size: int) -> bytes:
    try:
        with path.open("rb") as handle:
            handle.seek(offset)
            return handle.read(size)
    except OSError as error:
        raise WeftError(f"{path} cannot be read ({error.strerror}): check the shard") from error
