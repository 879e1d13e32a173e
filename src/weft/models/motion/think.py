"""Self-reflection: make a movement, judge it in words, make it again ("OmniMoGen-Think", arXiv 2512.19159).

The judgement and the new attempt are one answer of the same model; only turns are added to the record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from weft.errors import WeftError
from weft.record import Part, Record, Turn, motion_part, text_part
from weft.rng import seed_of
from weft.types import TokenModel

CHECK = "does the motion match the text?"


def think(
    model: TokenModel,
    records: Sequence[Record],
    *,
    seeds: Sequence[int],
    rounds: int = 3,
    check: str = CHECK,
    options: Any = None,
) -> list[list[Part]]:
    """The answers to records after at most `rounds` judgements each: the parts of the first answer, then of each
    judgement, in order; the last movement is the one to keep.

    A record stops early when a judgement brings no new movement. Longer reflection does not help the original: after
    four rounds its scores fall. Raises WeftError for a negative number of rounds, and as `TokenModel.respond`.
    """
    if rounds < 0:
        raise WeftError(f"rounds is {rounds}; it must be 0 (no reflection) or more")
    answers = model.respond(records, seeds=seeds, options=options)
    kept = [list(parts) for parts in answers]
    talks = [_with(record, parts, check) for record, parts in zip(records, answers, strict=True)]
    open_ = [k for k, parts in enumerate(answers) if any(p.type == "motion" for p in parts)]
    for number in range(rounds):
        if not open_:
            break
        own = [seed_of(seeds[k], "reflect", number) for k in open_]
        judged = model.respond([talks[k] for k in open_], seeds=own, options=options)
        still = []
        for k, parts in zip(open_, judged, strict=True):
            kept[k] += parts
            if any(p.type == "motion" for p in parts):
                talks[k] = _with(talks[k], parts, check)
                still.append(k)
        open_ = still
    return kept


def _with(record: Record, parts: Sequence[Part], check: str) -> Record:
    """The record with an answer to its last user turn, and the question whether it is right."""
    last = max(k for k, turn in enumerate(record.turns) if turn.role == "user")
    said = [motion_part(p.value) if p.type == "motion" else p for p in parts]
    turns = [*record.turns[: last + 1], Turn("assistant", said), Turn("user", [text_part(check)])]
    return dataclasses.replace(record, task="reflect", turns=turns)
