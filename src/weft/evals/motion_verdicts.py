"""How an answer to a record of the motion world is judged: by the oracle, turn by turn; what is written by the reader.

Also the answers that need no model: the exact one, and a copy of what was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weft.evals.motion_answers import Answer
from weft.motion.clip import Motion
from weft.motion.files import load_part
from weft.record import Part, Record
from weft.world.motion_oracle import Verdict, judge, judge_turns
from weft.world.motion_reader import judge_text


def movement(record: Record, parts: Sequence[Part]) -> Motion | None:
    """The last movement of an answer."""
    found = [part for part in parts if part.type == "motion"]
    return load_part(found[-1], record.root) if found else None


def truth(record: Record) -> Answer:
    """The exact answer: of a chain to every turn, else to the last."""
    answers = [turn.parts for turn in record.turns if turn.role == "assistant"]
    return answers if record.task == "chain" else answers[-1:]


def shown_by(record: Record, answer: Answer) -> list[Motion | None]:
    """The movement that the user has after each turn: of a reflection without a new one, the attempt."""
    found = [movement(record, parts) for parts in answer]
    if record.task == "reflect" and found[-1] is None:
        found[-1] = movement(record, record.turns[1].parts)
    return found


def verdicts(record: Record, answer: Answer) -> list[Verdict]:
    """The oracle's verdict on each turn. Where a movement is missing, nothing that was asked for is there."""
    if record.task == "describe":
        return [judge_text(record, " ".join(part.text or "" for part in answer[-1]))]
    shown = shown_by(record, answer)
    exact = shown_by(record, truth(record))
    clips = [own or right for own, right in zip(shown, exact, strict=True)]
    known = [clip for clip in clips if clip is not None]
    found = judge_turns(record, known) if record.task == "chain" else [judge(record, known[0])]
    return [verdict if own else _missed(verdict) for own, verdict in zip(shown, found, strict=True)]


def _missed(exact: Verdict) -> Verdict:
    no = None if exact.changed is None else False
    return Verdict(False, dict.fromkeys(exact.requests, False), no, no, seen={"nothing": "no movement"})


def words(record: Record, answer: Answer) -> bool | None:
    """Whether what was written is right: a plan names what is implied, a judgement makes a new movement where the
    attempt was wrong and none where it was right."""
    if record.task == "knowledge":
        return judge_text(record, " ".join(part.text or "" for part in answer[0] if part.type == "text")).success
    if record.task == "reflect":
        return (movement(record, answer[-1]) is not None) == (record.meta["kind"] == "reflect_wrong")
    return None


def rated(record: Record, answer: Answer, found: Sequence[Verdict] | None = None) -> dict[str, Any]:
    """Success and attribute accuracy of one answer; `found` are its verdicts, if they are known."""
    found = verdicts(record, answer) if found is None else found
    success = all(verdict.success for verdict in found)
    if record.task == "reflect":
        success = success and bool(words(record, answer))
    requests = [right for verdict in found for right in verdict.requests.values()]
    return {"success": success, "share": sum(requests) / len(requests)}


def copy(record: Record) -> Answer | None:
    """What a model answers that changes nothing: the source or the first reference, at every turn; to a reflection
    that all is right. None where nothing was given that could be the answer."""
    if record.task == "reflect":
        return [[]]
    parts = [part for turn in record.turns for part in turn.parts if part.role in ("source", "reference")]
    return [parts[:1]] * len(truth(record)) if parts and record.task != "describe" else None
