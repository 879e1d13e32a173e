"""How the motion benchmark asks a model, and how its answers are kept.

An answer is a list of turns, each a list of parts (texts and movements), as `weft.types.TokenModel.respond` gives them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weft.errors import WeftError
from weft.evals.runner import Output, Row, kept_bytes
from weft.motion.clip import Motion
from weft.motion.files.arrays import write_npy
from weft.motion.skeleton import layout_of
from weft.record import Part, Record, Turn, motion_part, text_part
from weft.rng import seed_of

if TYPE_CHECKING:
    from weft.types import TokenModel

Answer = list[list[Part]]


@dataclass(slots=True, frozen=True)
class Asking:
    """How answers are drawn: the options of `TokenModel.respond`, without a length (the model finds the right one).

    `captions` is the temperature of texts about a movement (0 takes the likeliest token, as `weft describe` does); with
    `rounds` the model judges its movement in words and makes it again, at most so often.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 1.0
    captions: float = 0.0
    rounds: int = 0
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise WeftError(f"batch_size is {self.batch_size}; it must be at least 1")

    def facts(self) -> dict[str, Any]:
        """What determines the answers: all but the batch size, on which no answer depends."""
        return {name: value for name, value in asdict(self).items() if name != "batch_size"}

    def draw(self, model: TokenModel, records: Sequence[Record]) -> Iterator[Output[Answer]]:
        """The answers to records, in order, as batches finish. Records of one task share a batch, for their sequences
        are of like length.

        A chain is played: turn 2 is asked after the model's own movement of turn 1, as a user would. An answer's seed
        is a function of (`seed`, record id) and of nothing else.
        """
        found: dict[int, Output[Answer]] = {}
        by_task: dict[str, list[int]] = {}
        for k, record in enumerate(records):
            by_task.setdefault(record.task, []).append(k)
        batches = [
            members[start : start + self.batch_size]
            for members in by_task.values()
            for start in range(0, len(members), self.batch_size)
        ]
        given = 0
        for members in batches:
            batch = [records[k] for k in members]
            seeds = [seed_of(self.seed, "output", record=record.id) for record in batch]
            for k, record, made, seed in zip(members, batch, self._played(model, batch, seeds), seeds, strict=True):
                found[k] = Output(record, made, seed)
            while given in found:
                yield found.pop(given)
                given += 1

    def _played(self, model: TokenModel, records: Sequence[Record], seeds: Sequence[int]) -> list[Answer]:
        """The answers to records of one task."""
        if records[0].task != "chain":
            return [[parts] for parts in self._asked(model, records, seeds)]
        answers: list[Answer] = [[] for _ in records]
        while open_ := [k for k, record in enumerate(records) if len(answers[k]) < len(requests(record))]:
            talks = [_so_far(records[k], answers[k]) for k in open_]
            # the first turn's seed is the record's own, so that it is answered as a single edit would be
            own = [seed_of(seeds[k], "turn", len(answers[k])) if answers[k] else seeds[k] for k in open_]
            for k, parts in zip(open_, self._asked(model, talks, own), strict=True):
                answers[k].append(parts)
        return answers

    def _asked(self, model: TokenModel, records: Sequence[Record], seeds: Sequence[int]) -> list[list[Part]]:
        from weft.models.motion.think import think

        if records[0].task in ("describe", "reflect"):
            captions = records[0].task == "describe"
            options = dataclasses.replace(self, temperature=self.captions) if captions else self
            return model.respond(records, seeds=seeds, options=options)
        return think(model, records, seeds=seeds, rounds=self.rounds, options=self)


def requests(record: Record) -> list[Turn]:
    """The user's turns."""
    return [turn for turn in record.turns if turn.role == "user"]


def _so_far(record: Record, answers: Answer) -> Record:
    """The conversation up to the user's next turn with the model's own answers: what it said before its first movement,
    and its last one (that of a reflection)."""
    turns: list[Turn] = []
    for asked, own in zip(requests(record), answers, strict=False):
        moved = [k for k, part in enumerate(own) if part.type == "motion"]
        said = [part for part in own[: moved[0]] if part.type == "text"] if moved else []
        turns += [asked, Turn("assistant", said + [motion_part(own[k].value) for k in moved[-1:]])]
    return dataclasses.replace(record, turns=[*turns, requests(record)[len(answers)]])


class Movements:
    """Answers in a results folder: texts in the row, movements as motions/NAME-TURN-PART.npy of joints [T, J, 3], which
    `weft data convert` turns into BVH or GLB. A `weft.evals.runner.Medium`; such a file has no place for metadata,
    which stand in the row and in run.json."""

    def keep(self, folder: Path, name: str, made: Answer, metadata: Mapping[str, Any]) -> dict[str, Any]:
        (folder / "motions").mkdir(exist_ok=True)
        turns: list[list[dict[str, Any]]] = []
        for t, parts in enumerate(made):
            turns.append([])
            for p, part in enumerate(parts):
                if part.type == "text":
                    turns[-1].append({"type": "text", "text": part.text})
                    continue
                path = f"motions/{name}-{t + 1}-{p + 1}.npy"
                clip: Motion = part.value
                write_npy(clip, folder / path)
                digest = hashlib.sha256((folder / path).read_bytes()).hexdigest()
                turns[-1].append({"type": "motion", "path": path, "fps": clip.fps, "sha256": digest})
        return {"answer": turns}

    def read(self, folder: Path, row: Row) -> Answer:
        return [[self._part(folder, part) for part in parts] for parts in row["answer"]]

    def _part(self, folder: Path, part: Mapping[str, Any]) -> Part:
        if part["type"] == "text":
            return text_part(part["text"])
        joints = np.load(io.BytesIO(kept_bytes(folder / part["path"], part["sha256"])), allow_pickle=False)
        return motion_part(Motion(joints, part["fps"], layout_of(joints.shape[1])))


MOVEMENTS = Movements()
