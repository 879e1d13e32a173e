"""Records as rows of tokens: turn markers, the parts in order, end markers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.models.motion.codec import Codec
from weft.models.motion.tokens import CLOSE, OPEN, Serialisation, Vocabulary, code_names
from weft.motion.clip import Motion
from weft.motion.files import load_part
from weft.record import Record, Turn

TEMPLATES = (
    ("<start_of_turn>", "<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>", "\n"),  # Gemma
    ("<|im_start|>", "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>", "\n"),  # ChatML
)
OWN = ("<user>", "<assistant>", "<end>")
ROLE_WORDS = {"start": "start ", "end": "end "}
"""What is written before a movement of these roles: nothing else tells the two apart."""


@dataclass(slots=True)
class Rows:
    """A record as tokens: `rows` [S, columns]; `kind` [S]: 0 frame, 1 the user's text, 2 what is to be answered, 3 the
    words of an answer that say its movement first; and `above` [S, L-1], for base_only, the codes of the levels that
    are not written (-1 elsewhere)."""

    rows: Tensor
    kind: Tensor
    above: Tensor


def learned(kind: Tensor) -> Tensor:
    """What is to be answered, of `Rows.kind` [S]."""
    return kind >= 2


def wordless(kind: Tensor) -> Tensor:
    """What is left, of `Rows.kind` [S], without the words that a movement follows from: the user's, and those that an
    answer says before it."""
    return (kind != 1) & (kind != 3)


class Reader:
    """Turns records into rows for one vocabulary. `markers` are the ids before a user's and an assistant's turn, after
    a turn, and between two turns; `limit` the longest sequence."""

    def __init__(
        self, codec: Codec, tokenizer: Any, serial: Serialisation, markers: tuple[list[int], ...], limit: int
    ) -> None:
        self.codec, self.tokenizer, self.serial, self.markers, self.limit = codec, tokenizer, serial, markers, limit

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text. Raises WeftError if it spells one of the model's own markers."""
        ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        for i in ids:
            if i >= self.serial.vocabulary.text or i in self.serial.vocabulary.special:
                if i != self.tokenizer.unk_token_id:
                    raise WeftError(f"the text holds {self.tokenizer.convert_ids_to_tokens(i)!r}, a marker: remove it")
        return ids

    def encode(self, records: Sequence[Record], *, answers: bool) -> list[Rows]:
        """Records as rows; with `answers` whole, else up to the place where the last user turn is to be answered.

        Raises WeftError for pictures, texts that hold markers, and clips of another skeleton.
        """
        clips: list[Motion] = []
        places: dict[tuple[int, int, int], int] = {}
        for r, record in enumerate(records):
            turns = record.turns if answers else asked(record)
            for t, turn in enumerate(turns):
                for p, part in enumerate(turn.parts):
                    if part.type == "motion":
                        places[r, t, p] = len(clips)
                        clips.append(load_part(part, record.root, fps=None))
                    elif part.type != "text":
                        raise WeftError(f"record {record.id}: a {part.type}: this model reads text and movements")
        codes = self.codec.encode(clips)
        return [
            self._rows(record, {k[1:]: codes[i] for k, i in places.items() if k[0] == r}, answers)
            for r, record in enumerate(records)
        ]

    def _rows(self, record: Record, codes: dict[tuple[int, int], Tensor], answers: bool) -> Rows:
        pieces: list[tuple[Tensor, int, Tensor | None]] = []

        def write(ids: list[int], kind: int) -> None:
            rows = torch.full((len(ids), self.serial.columns), -1)
            rows[:, 0] = torch.tensor(ids, dtype=torch.long)
            pieces.append((rows, kind, None))

        user, assistant, end, between = self.markers
        if self.tokenizer.bos_token_id is not None:
            write([self.tokenizer.bos_token_id], 0)
        for t, turn in enumerate(record.turns if answers else asked(record)):
            mine = turn.role == "assistant"
            write((between if t else []) + (assistant if mine else user), 0)
            answered = False
            last = max((p for p, part in enumerate(turn.parts) if part.type == "motion"), default=-1)
            for p, part in enumerate(turn.parts):
                kind = 2 if mine and part.role != "rejected" else 0
                if part.type == "text" and part.text:
                    write(self.text_ids(part.text), (3 if p < last else 2) if mine else 1)
                    answered |= mine
                elif part.type == "motion":
                    if not mine and part.role in ROLE_WORDS:
                        write(self.text_ids(ROLE_WORDS[part.role]), 0)
                    own = codes[t, p]
                    pieces.append((self.serial.rows(own), kind, own))
                    answered |= kind == 2
            write(end, 2 if answered else 0)
        if not answers:
            write(between + assistant, 0)
        length, limit = sum(len(rows) for rows, _, _ in pieces), self.limit
        if length > limit:
            raise WeftError(
                f"record {record.id}: {length} tokens, the model reads {limit}: cut its movements to "
                f"{limit / length:.0%} of their length, or leave turns out"
            )
        above = [self._above(rows, own) for rows, _, own in pieces]
        kinds = [torch.full((len(rows),), kind, dtype=torch.uint8) for rows, kind, _ in pieces]
        return Rows(torch.cat([p[0] for p in pieces]), torch.cat(kinds), torch.cat(above))

    def _above(self, rows: Tensor, codes: Tensor | None) -> Tensor:
        levels = self.codec.config.levels - 1 if self.serial.name == "base_only" else 0
        above = torch.full((len(rows), levels), -1)
        if codes is not None and levels:
            above[1 : 1 + len(codes)] = codes[:, 1:]
        return above


def asked(record: Record) -> list[Turn]:
    """The turns up to the last one of the user."""
    last = max((k for k, turn in enumerate(record.turns) if turn.role == "user"), default=-1)
    if last < 0:
        raise WeftError(f"record {record.id}: turns: no user turn, add one with the instruction")
    return record.turns[: last + 1]


def read_vocabulary(codec: Codec, tokenizer: Any, serialisation: str) -> tuple[Vocabulary, tuple[list[int], ...]]:
    """The extended vocabulary of a tokenizer, and the ids of the markers (`Reader`).

    Raises WeftError if the tokenizer was not extended for this codec.
    """
    levels = 1 if serialisation == "base_only" else codec.config.levels
    known = tokenizer.get_vocab()
    names = code_names(levels, codec.config.codes)
    wrong = [n for n in (OPEN, CLOSE, names[0], names[-1]) if n not in known]
    if wrong or known[names[-1]] - known[names[0]] != len(names) - 1:
        raise WeftError(f"the tokenizer lacks {(wrong or names)[0]}: build the model from this quantiser")
    template = next((t[1:] for t in TEMPLATES if t[0] in known), (*OWN, ""))
    markers = tuple(list(tokenizer(text, add_special_tokens=False).input_ids) for text in template)
    if len(markers[2]) != 1:
        raise WeftError(f"the tokenizer writes {template[2]} in {len(markers[2])} tokens; it must be one")
    first = min(known[OPEN], known[OWN[0]]) if OWN[0] in known else known[OPEN]
    special = tuple(
        sorted(
            {i for i in tokenizer.all_special_ids if i < first}
            | {m for k in markers for m in k if m in tokenizer.all_special_ids}
        )
    )
    vocabulary = Vocabulary(first, special, markers[2][0], known[OPEN], known[CLOSE], known[names[0]], levels,
                            codec.config.codes)  # fmt: skip
    return vocabulary, markers
