"""Questions to a multimodal LLM, and its replies: what `local`, `remote` and `replies` have in common.

A question is a list of `weft.record.Turn`s whose pictures are in memory or absolute paths; a system turn may stand
first. A failure is a `Reply` with an `error`, never an invented text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol, runtime_checkable

from weft.record import Turn

Question = Sequence[Turn]


@dataclass(slots=True, frozen=True)
class Ask:
    """How to ask. `choices` are texts whose probability is wanted at every generated position: exactly in process,
    from a server as far as they are among its `top` most probable tokens; `top` 0 without choices: none are wanted, and
    a server need not know them. `temperature` 0 is greedy decoding.
    A sampled reply is a function of (`seed`, question) and of nothing else where the model runs in process. `fields`:
    the reply is a JSON object of exactly these texts (`weft.vlm.structured`), by a constraint on the tokens in process,
    by the server's structured output elsewhere; probabilities are those without the constraint in process."""

    max_tokens: int = 1
    choices: tuple[str, ...] = ()
    temperature: float = 0.0
    seed: int = 0
    top: int = 20
    fields: tuple[str, ...] = ()


@dataclass(slots=True)
class Token:
    """One generated token: its text, its log-probability (natural, temperature 1) and that of other candidates."""

    text: str
    logprob: float
    top: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Reply:
    """An answer: `text` without special tokens; `tokens` may end with the end token; `error` says why there is none."""

    text: str
    tokens: list[Token] = field(default_factory=list)
    error: str | None = None


@runtime_checkable
class VLM(Protocol):
    """Anything that answers questions. `name` identifies the weights: replies under one name are comparable."""

    name: str

    def ask(self, questions: Sequence[Question], how: Ask) -> list[Reply]:
        """One reply for each question, in order."""
        ...


def plain(text: str, special: Sequence[str] = ()) -> str:
    """`text` in which no special token can be read: their marks are broken by a blank, so that a person still sees
    what stood there. Texts come from users; a chat template must not be closed from inside."""
    breaks = {"<|": "< |", **{token: f"{token[0]} {token[1:]}" for token in special if len(token) > 1}}
    for token in sorted(breaks, key=len, reverse=True):
        text = text.replace(token, breaks[token])
    return text


def question_digest(question: Question) -> str:
    """SHA-256 (hexadecimal) of a question: roles, texts, and the content of its pictures, in order."""
    digest = hashlib.sha256()
    for turn in question:
        parts = [[part.type, part.text if part.type == "text" else part.digest()] for part in turn.parts]
        digest.update(json.dumps([turn.role, parts]).encode())
    return digest.hexdigest()


def ask_key(name: str, question: Question, how: Ask) -> str:
    """What a stored reply is found by: the model, the question and how it was asked."""
    asked = {key: value for key, value in asdict(how).items() if key != "fields" or value}  # older keys stay good
    return hashlib.sha256(json.dumps([name, question_digest(question), asked]).encode()).hexdigest()
