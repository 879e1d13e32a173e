"""Whether the letters in a picture are those that were asked for: edit distance over any OCR."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from PIL import Image

from weft.record import Record
from weft.reward.mix import Pair
from weft.settings import load_object
from weft.types import Score


class TextScore:
    """1 - min(distance, n) / n, of n letters asked for, without blanks and case; 1 where they stand somewhere in what
    was read (yifan123/flow_grpo, flow_grpo/ocr.py). The text is `meta["text"]`, else the first in double quotes of the
    instruction. An OCR that fails, or a record without a text, gives a missing score (the public code: 0)."""

    def __init__(self, read: Callable[[Image.Image], str] | str) -> None:
        """`read` returns what stands in a picture: a function, or its name as `file.py:name`."""
        self.read: Callable[[Image.Image], str] = load_object(read, "read") if isinstance(read, str) else read

    def __call__(self, batch: Sequence[Pair]) -> list[Score]:
        return [self._one(record, image) for record, image in batch]

    def _one(self, record: Record, image: Image.Image) -> Score:
        wanted = wanted_text(record)
        if not wanted:
            return Score(None, reason='no text is asked for: quote it with "..." or put it in meta.text')
        try:
            found = self.read(image)
        except Exception as error:  # any OCR package, any exception
            return Score(None, reason=f"the OCR failed: {type(error).__name__}: {error}")
        if not isinstance(found, str):
            return Score(None, reason=f"the OCR returned a {type(found).__name__} instead of a text")
        return Score(text_score(found, wanted))


def wanted_text(record: Record) -> str | None:
    """The letters that a record asks for."""
    text = record.meta.get("text")
    if isinstance(text, str) and text.strip():
        return text
    quoted = re.search(r'"([^"]*)"|\u201c([^\u201d]*)\u201d', record.instruction)
    return (quoted[1] or quoted[2] or "").strip() or None if quoted else None


def text_score(found: str, wanted: str) -> float:
    """The score of a text that was read for one that was asked for."""
    found, wanted = (re.sub(r"\s", "", text).lower() for text in (found, wanted))
    distance = 0 if wanted in found else edit_distance(found, wanted)
    return 1 - min(distance, len(wanted)) / len(wanted)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions, replacements."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]
