"""Captions of motion files: a text beside the file, a folder of texts, or a table such as the CMU database's index."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from weft.errors import WeftError
from weft.motion.files.humanml3d import Caption, read_captions

QUESTION = "Describe the motion."
"""What is asked about a movement where nothing else is said: in words that tiny-motion has read."""
_CAPTION = ("caption", "text", "description", "motion description")
_NAME = ("name", "file", "clip", "id")


class Captions:
    """Captions by the name of a motion file.

    `source` is None (a .txt of the same stem beside the file), a folder of such texts in HumanML3D's form, or a .csv
    with the columns name (or file, clip, id), caption (or text, description); or subject, trial and motion
    description, as the CMU database's: its row 2, 1 belongs to 02_01.amc and to 002_01.bvh.
    Raises `WeftError` for a table without such columns.
    """

    def __init__(self, source: str | Path | None = None) -> None:
        self.folder: Path | None = None
        self.table: dict[str, list[Caption]] | None = None
        if source is None:
            return
        path = Path(source)
        if path.is_dir():
            self.folder = path
        elif path.suffix.lower() == ".csv":
            self.table = _table(path)
        else:
            raise WeftError(f"captions {path}: neither a folder of texts nor a .csv that exists: check the path")

    def of(self, file: Path) -> tuple[list[Caption], list[str]]:
        """The captions of a motion file, none if it has none, and the faults of its text file."""
        if self.table is not None:
            return self.table.get(file.stem, self.table.get(_key(file.stem), [])), []
        text = (self.folder or file.parent) / f"{file.stem}.txt"
        return read_captions(text) if text.is_file() else ([], [])


def _table(path: Path) -> dict[str, list[Caption]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            rows = list(csv.reader(handle))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise WeftError(f"{path} cannot be read ({error}): save it as CSV in UTF-8") from error
    head = [re.sub(r"[^a-z ]", "", name.lower()).strip() for name in (rows[0] if rows else [])]
    caption = next((head.index(n) for n in _CAPTION if n in head), None)
    name = next((head.index(n) for n in _NAME if n in head), None)
    if caption is None or (name is None and not {"subject", "trial"} <= set(head)):
        raise WeftError(f"{path}: columns {', '.join(head) or 'none'}: expected name and caption, or subject and trial")
    table: dict[str, list[Caption]] = {}
    for row in rows[1:]:
        if len(row) <= caption or not row[caption].strip():
            continue
        if name is not None:
            key = Path(row[name]).stem
        else:
            key = _key(f"{row[head.index('subject')]}_{row[head.index('trial')]}")
        table.setdefault(key, []).append(Caption(" ".join(row[caption].split())))
    return table


def _key(stem: str) -> str:
    """02_01, 2_1 and 002_01 are one trial: numbers without leading zeros."""
    return "_".join(word.lstrip("0") or "0" for word in stem.split("_")) if re.fullmatch(r"\d+_\d+", stem) else stem
