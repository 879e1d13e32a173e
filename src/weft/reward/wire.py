"""What travels between a reward client and the service: JSON with pictures beside it, never code.

A request holds items, each with an id, a record (the JSONL row, media by name) and the name of its output picture;
pictures are base64 in `media`, or the files of a multipart form whose field `request` holds the JSON. The reply names
every item by its id: a value with its parts, or none with a reason, and whether asking again may help.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from weft.errors import WeftError
from weft.parts import Part
from weft.record import Record, record_to_dict
from weft.types import Score

if TYPE_CHECKING:
    from PIL import Image

PROTOCOL = 1


class Outbox:
    """Pictures of one request, each sent once however many items show it."""

    def __init__(self, picture: str = "png"):
        """`picture`: "png" (lossless) or "jpeg"; files are sent as they are."""
        self.picture = picture
        self.media: dict[str, bytes] = {}

    def add(self, image: Image.Image) -> str:
        """The name of a picture in this request."""
        from weft.vlm.remote import encode_picture

        return self._name(encode_picture(image.convert("RGB"), self.picture), self.picture)

    def item(self, key: str, record: Record, output: Image.Image) -> dict[str, Any]:
        """One item. What the assistant answers to the last request is left out: judges do not see the target."""
        turns = list(record.turns)
        while turns and turns[-1].role != "user":
            turns.pop()
        sent = Record(record.id, record.task, turns, record.meta, root=record.root)
        return {"id": key, "record": record_to_dict(sent, self._place), "output": self.add(output)}

    def _place(self, part: Part, root: Any) -> str:
        if part.type != "image":
            raise WeftError(f"a {part.type} cannot be sent to a reward service: it takes pictures")
        if part.value is None:
            path = part.file(root)
            return self._name(path.read_bytes(), path.suffix.lstrip(".").lower())
        return self.add(part.load(root))

    def _name(self, data: bytes, suffix: str) -> str:
        name = f"{hashlib.sha256(data).hexdigest()[:32]}.{suffix}"
        self.media[name] = data
        return name


def score_to_row(key: str, score: Score, retry: bool = False) -> dict[str, Any]:
    """One line of a reply. `retry` says that a missing score may come if it is asked for again."""
    parts = {name: float(value) for name, value in score.parts.items() if math.isfinite(value)}
    if score.value is None or not math.isfinite(score.value):
        reason = score.reason or f"the value is {score.value}"
        return {"id": key, "value": None, "parts": parts, "reason": reason, "retry": retry}
    return {"id": key, "value": float(score.value), "parts": parts}


def rows_to_scores(reply: Any, keys: Sequence[str]) -> tuple[dict[str, Score], set[str]]:
    """Scores by id of a decoded reply, and the ids that may be asked for again.

    Only asked ids are taken; one that comes twice is taken as missing, since nobody can say which is meant. Ids that
    are absent can be asked for again. Raises ValueError for what is no reply at all.
    """
    rows = reply.get("scores") if isinstance(reply, dict) else None
    if not isinstance(rows, list):
        raise ValueError("no list of scores")
    wanted, scores, again, seen = set(keys), dict[str, Score](), set(keys), set[str]()
    for row in rows:
        key = row.get("id") if isinstance(row, dict) else None
        if not isinstance(key, str) or key not in wanted:
            continue
        if key in seen:
            scores[key] = Score(None, reason="the reply has two scores for one id")
            again.add(key)
            continue
        seen.add(key)
        scores[key], retry = _score(row)
        if not retry:
            again.discard(key)
    return scores, again


def _score(row: Mapping[str, Any]) -> tuple[Score, bool]:
    value, found = row.get("value"), row.get("parts")
    parts = {str(k): float(v) for k, v in found.items() if _number(v)} if isinstance(found, dict) else {}
    if _number(value):
        return Score(float(value), parts), False  # type: ignore[arg-type]
    if value is None:
        return Score(None, parts, str(row.get("reason") or "the service gives no reason")[:500]), bool(row.get("retry"))
    return Score(None, parts, f"the service sent {str(value)[:40]!r} as a value"), True


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
