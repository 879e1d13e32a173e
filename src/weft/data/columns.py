"""From the columns of a foreign data set to a record: the layouts of public sets, and a small language for the rest.

A map names for each field of a record the column that holds it:

    source=src_img target=edited_img instruction=edited_prompt_list[0] references=control_path_*

`a|b` takes the first column that the row has, `a[0]` and `a[1:]` pick from a list, `a.b` from an object, `a_*` is
the list of the numbered columns a_0, a_1 ..., `a+b` (for ids) joins by "-", and an empty expression means none.
A column whose whole name fits goes first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.errors import WeftError, nearest
from weft.media import LazyPicture
from weft.record import Part, Record, Turn, default_task, image_part, relative_path, text_part

FIELDS = ("id", "task", "instruction", "source", "references", "mask", "target", "rejected", "size")
Row = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """A public format: recognised by the columns that it `needs`; with `alone` only if there are none
    but those and these."""

    name: str
    needs: tuple[str, ...]
    fields: dict[str, str]
    alone: tuple[str, ...] | None = None


_REQUEST = {"source": "image|images[0]", "references": "images[1:]", "instruction": "prompt"} | {
    "meta.requirement": "requirement", "meta.negative": "negative_prompt"
}  # fmt: skip

# First the formats with telling names. Sources: the data sets' cards and the readers of the named repositories.
LAYOUTS = (
    Layout(
        "OmniEdit",
        ("src_img", "edited_img", "edited_prompt_list"),
        {"id": "omni_edit_id", "source": "src_img", "target": "edited_img", "instruction": "edited_prompt_list[0]"}
        | {"meta.kind": "task", "meta.score": "o_score"},
    ),
    Layout(
        "MagicBrush",
        ("source_img", "target_img", "instruction"),
        {"id": "img_id+turn_index", "source": "source_img", "mask": "mask_img", "target": "target_img"}
        | {"instruction": "instruction"},
    ),
    Layout(
        "UltraEdit",
        ("source_image", "edited_image", "edit_prompt"),
        {"id": "idx", "source": "source_image", "target": "edited_image", "mask": "mask_image"}
        | {"instruction": "edit_prompt", "meta.target_caption": "target_caption"},
    ),
    Layout(
        "ImgEdit",
        ("input_images", "output_images", "prompt"),
        {"instruction": "prompt"}
        | {"source": "input_images[0]", "references": "input_images[1:]", "target": "output_images[0]"},
    ),  # fmt: skip
    Layout("ImgEdit multi-turn", ("data",), {}),
    Layout(
        "pico-banana-400k",
        ("open_image_input_url", "text"),
        {"source": "local_input_image|open_image_input_url", "target": "output_image", "instruction": "text"}
        | {"rejected": "rejected_images", "meta.kind": "edit_type"},
    ),
    Layout("pico-banana-400k multi-turn", ("files", "metadata_edit_turn_prompts"), {}),
    Layout(
        "NHR-Edit",
        ("source_file_name|source_image", "edited_file_name|edited_image", "edit_instruction"),
        {"source": "source_file_name|source_image", "target": "edited_file_name|edited_image"}
        | {"instruction": "edit_instruction", "meta.kind": "category"},
    ),
    Layout(
        "GPT-Image-Edit-1.5M",
        ("input", "output", "instruction", "dataset_source"),
        {"id": "id", "source": "input", "target": "output", "instruction": "instruction", "meta.kind": "task"},
    ),
    Layout(
        "ShareGPT-4o-Image",
        ("input_prompt", "output_image"),
        {"source": "input_image[0]", "references": "input_image[1:]", "target": "output_image"}
        | {"instruction": "input_prompt"},
    ),
    Layout(
        "InstructPix2Pix",
        ("input_image", "edited_image", "edit_prompt"),
        {"source": "input_image", "target": "edited_image", "instruction": "edit_prompt"},
    ),
    Layout(
        "musubi-tuner",
        ("image_path", "caption"),
        {"source": "control_path|control_path_*[0]", "references": "control_path_*[1:]", "target": "image_path"}
        | {"instruction": "caption"},
    ),
    Layout("Edit-R1 or Flow-Factory", ("prompt", "image|images"), _REQUEST),
    Layout(
        "GenEval",
        ("prompt", "tag", "include"),
        {"instruction": "prompt", "meta.tag": "tag", "meta.include": "include", "meta.exclude": "exclude"},
    ),
    Layout("Flow-Factory prompts", ("prompt",), _REQUEST, alone=("negative_prompt",)),
    Layout(
        "fields by name",
        ("instruction|prompt|caption|txt", "target|source|references|reference_*|jpg|jpeg|png|webp"),
        {"id": "id", "task": "task", "source": "source", "references": "references|reference_*", "mask": "mask"}
        | {"target": "target|jpg|jpeg|png|webp", "rejected": "rejected"}
        | {"instruction": "instruction|prompt|caption|txt", "meta.kind": "kind"},
    ),
)


def fields_of(columns: Iterable[str], given: dict[str, str], where: str) -> dict[str, str]:
    """The map of a data set with these columns: that of the layout they fit, overridden by the `given` entries.

    Raises `WeftError` for an unknown field or column, or if no layout fits and the map names no instruction.
    """
    columns = list(columns)
    row = dict.fromkeys(columns, True)
    for name, expression in given.items():
        if name not in FIELDS and not name.startswith("meta."):
            fix = nearest(name, FIELDS, f"use one of {', '.join(FIELDS)}, meta.NAME")
            raise WeftError(f"map: unknown field '{name}': {fix}")
        missing = [c for c in re.split(r"[|+]", expression) if c and not _present(row, c)]
        if missing and len(missing) == len(re.split(r"[|+]", expression)):
            raise WeftError(f"map: {where} has no column '{missing[0]}' for {name}, it has {', '.join(columns)}")
    for layout in LAYOUTS:
        others = set(columns) - {*layout.needs, *(layout.alone or columns)}
        if all(_present(row, need) for need in layout.needs) and not others:
            return layout.fields | given
    if "instruction" not in given:
        raise WeftError(
            f"{where}: columns {', '.join(columns)} fit no known layout ({', '.join(x.name for x in LAYOUTS)}): "
            "map them, as in instruction=COLUMN source=COLUMN target=COLUMN"
        )
    return dict(given)


def _present(row: Row, expression: str) -> bool:
    for option in expression.split("|"):
        name = option if option in row else re.split(r"[\[.]", option)[0]
        if name in row or name.endswith("*") and _numbered(row, name):
            return True
    return False


def _numbered(row: Row, pattern: str) -> list[str]:
    stem = re.compile(re.escape(pattern[:-1]) + r"\d+")
    return sorted((c for c in row if stem.fullmatch(c)), key=lambda c: int(c[len(pattern) - 1 :]))


def pick(row: Row, expression: str) -> Any:
    """The value of a column expression in a row; None where the row has none of its columns."""
    if expression in row:
        return row[expression]
    for option in expression.split("|"):
        value = _pick(row, option)
        if value is not None:
            return value
    return None


def _pick(row: Row, expression: str) -> Any:
    if expression in row:
        return row[expression]
    match = re.fullmatch(r"([^\[]*?)(?:\[(\d+)(:?)\])?", expression)
    if match is None:
        raise WeftError(f"map: '{expression}' is no column expression: write name, name[0], name[1:] or name.key")
    name, index, rest = match[1], match[2], match[3]
    if name.endswith("*"):
        value: Any = [row[c] for c in _numbered(row, name) if row[c] is not None] or None
    else:
        value = row
        for key in [name] if name in row else name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
    if index is None or value is None:
        return value
    if not isinstance(value, list | tuple):
        raise WeftError(f"{name}: {type(value).__name__} is not a list: map it without the brackets of '{expression}'")
    if rest:
        return list(value[int(index) :])
    return value[int(index)] if int(index) < len(value) else None


def convert(row: Row, fields: dict[str, str], name: str, root: Path | None, task: str | None) -> Record:
    """The record of a row. `name` is its id where the map gives none; paths are relative to `root`.

    Raises `WeftError` "field: what, fix" for a missing instruction, a medium of a wrong type, a path that leads out
    of the folder or to no file.
    """
    found = {field: _id(row, x) if field == "id" else pick(row, x) for field, x in fields.items() if x}
    meta = {x[5:]: _plain(value, x) for x, value in found.items() if x.startswith("meta.") and value is not None}
    if found.get("size") is not None:
        size = found["size"]
        if not isinstance(size, list | tuple) or len(size) != 2 or not all(isinstance(n, int) for n in size):
            raise WeftError(f"size: {size!r} is not [height, width]")
        meta["size"] = list(size)
    steps = None if "instruction" in fields else _steps(row)
    if isinstance(steps, list):
        turns = [turn for k, part in enumerate(steps) for turn in _imgedit_turns(part, k, steps, root)]
    else:
        turns = _exchange(found, root)
    record = Record(found.get("id") or name, "", turns, meta, root=root)
    if not any(t.role == "user" for t in turns):
        raise WeftError("data: no turns: give at least one")
    record.task = task or _text(found.get("task"), "task") or default_task(record)
    return record


def _id(row: Row, expression: str) -> str | None:
    if expression in row or "+" not in expression:
        value = pick(row, expression)
        return None if value is None else str(value)
    values = [pick(row, part) for part in expression.split("+")]
    return None if values[0] is None else "-".join(str(v) for v in values if v is not None)


def _plain(value: Any, field: str) -> Any:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise WeftError(f"{field}: {type(value).__name__} is not a JSON value: map another column") from error
    return value


def _text(value: Any, field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise WeftError(f"{field}: {type(value).__name__} is not a text: map a text column")
    return value.strip()


def _exchange(found: Row, root: Path | None) -> list[Turn]:
    instruction = _text(found.get("instruction"), "instruction")
    if not instruction:
        raise WeftError("instruction: missing or empty: give a text")
    user = [_media(found[role], role, root) for role in ("source", "mask") if found.get(role) is not None]
    references = _all_media(found, "references", "reference", root)
    user += [*references, text_part("")] if references else []  # attached: the text speaks of them in its own words
    turns = [Turn("user", [*user, text_part(instruction)])]
    answers = [_media(found["target"], None, root, "target")] if found.get("target") is not None else []
    answers += _all_media(found, "rejected", "rejected", root)
    return turns + ([Turn("assistant", answers)] if answers else [])


def _all_media(found: Row, field: str, role: str, root: Path | None) -> list[Part]:
    """The media of a field that holds one or a list of them."""
    value = found.get(field)
    if not isinstance(value, list | tuple):
        return [] if value is None else [_media(value, role, root, field)]
    return [_media(medium, role, root, f"{field}[{k}]") for k, medium in enumerate(value)]


def _steps(row: Row) -> Any:
    """The steps of a multi-turn edit as ImgEdit writes them; pico-banana's are brought into that form."""
    if "metadata_edit_turn_prompts" not in row:
        return row.get("data")
    prompts, files = row["metadata_edit_turn_prompts"], row.get("files")
    if not isinstance(prompts, list) or not isinstance(files, list) or not all(isinstance(f, dict) for f in files):
        raise WeftError("files, metadata_edit_turn_prompts: not lists of files and of texts")
    places = {file.get("id"): file.get("url") for file in files}
    if row.get("local_input_image"):  # of the data set's own script
        places["original_input_image"] = row["local_input_image"]
    names = ["original_input_image", *(f"edit_turn{k}" for k in range(1, len(prompts))), "final_image"]
    for name in names:
        if places.get(name) is None:
            raise WeftError(f"files: no '{name}' for {len(prompts)} prompts")
    pictures = [places[name] for name in names]
    return [
        {"input_images": [before], "output_images": [after], "prompt": prompt}
        for before, after, prompt in zip(pictures, pictures[1:], prompts, strict=False)
    ]


def _imgedit_turns(item: Any, k: int, items: list[Any], root: Path | None) -> list[Turn]:
    """One step of a multi-turn edit; an input that is the step before's output is left to the order of the turns."""
    if not isinstance(item, dict):
        raise WeftError(f"data[{k}]: {type(item).__name__} is not an object: write {{...}}")
    inputs, outputs = item.get("input_images") or [], item.get("output_images") or []
    before = (items[k - 1].get("output_images") or []) if k else []
    found = {"instruction": item.get("prompt"), "references": inputs[1:] or None}
    found["source"] = inputs[0] if inputs and inputs[:1] != before[:1] else None
    found["target"] = outputs[0] if outputs else None
    try:
        return _exchange(found, root)
    except WeftError as error:
        raise WeftError(f"data[{k}].{error}") from error


def _media(value: Any, role: str | None, root: Path | None, field: str | None = None) -> Part:
    field = field or role or "target"
    if isinstance(value, dict) and set(value) <= {"bytes", "path"}:  # the `Image` feature of datasets
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, LazyPicture):
        return image_part(value, role)
    if isinstance(value, bytes):
        data = value
        return image_part(LazyPicture(field, lambda: data), role)
    if not isinstance(value, str):
        raise WeftError(f"{field}: {type(value).__name__} is not a picture: give a relative path")
    if root is None:
        raise WeftError(f"{field}: '{value}' is a path, but shards hold their pictures themselves: map another column")
    path = relative_path(value, field)
    if not (root / path).is_file():
        inside = (root / "images" / path).is_file()
        fix = "add the option root=images" if inside else "check the path or the option root"
        raise WeftError(f"{field}: no such file {root / path}: {fix}")
    return image_part(path, role)
