"""Replies as a JSON object of named texts: the schema for a server, and the same as a constraint on tokens in process.

The object has exactly the wanted fields, in order, each a string: what is written between the quotes is the model's,
everything else is fixed. A reply is always complete: strings are closed in time for the last brace.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.errors import WeftError


def schema(fields: Sequence[str]) -> dict[str, Any]:
    """The JSON schema of an object with these string fields and no others."""
    return {
        "type": "object",
        "properties": {name: {"type": "string"} for name in fields},
        "required": list(fields),
        "additionalProperties": False,
    }


def read_fields(text: str, fields: Sequence[str]) -> dict[str, str]:
    """The fields of a reply. Raises ValueError if it is not an object of exactly these strings."""
    found = json.loads(text)
    if not isinstance(found, dict) or set(found) != set(fields):
        raise ValueError(f"not an object with the fields {', '.join(fields)}")
    for name in fields:
        if not isinstance(found[name], str):
            raise ValueError(f"{name} is not a text")
    return {name: found[name] for name in fields}


def write_fields(tokenizer: Any, values: dict[str, str]) -> list[int]:
    """Token ids of the object as a constrained model writes it: what is fixed and what is free do not share a token."""
    ids: list[int] = []
    for name, literal in zip(values, literals(list(values)), strict=False):
        ids += _encode(tokenizer, literal) + _encode(tokenizer, json.dumps(values[name], ensure_ascii=False)[1:-1])
        ids += _encode(tokenizer, '"')
    return ids + _encode(tokenizer, "}")


def literals(fields: Sequence[str]) -> list[str]:
    """What stands before each field's text, and after the last quote."""
    return [f'{", " if k else "{"}"{name}": "' for k, name in enumerate(fields)] + ["}"]


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def writable(tokenizer: Any, size: int, special: Iterable[int]) -> Tensor:
    """Which of `size` tokens may stand inside a JSON string [size] (bool): no quote, no backslash, no control."""
    inside, barred = torch.zeros(size, dtype=torch.bool), set(special)
    for i in range(min(size, len(tokenizer))):
        text = tokenizer.decode([i])
        inside[i] = i not in barred and text != "" and not any(c in '"\\' or ord(c) < 32 for c in text)
    return inside


@dataclass(frozen=True, slots=True)
class Alphabet:
    """What a tokenizer can write inside a JSON string (`inside` [V], bool), its quote, and the ids of `pieces`: the
    fixed parts of the object."""

    inside: Tensor
    quote: int
    pieces: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tokenizer: Any, fields: Sequence[str], inside: Tensor) -> Alphabet:
        """With what `writable` found. Raises WeftError if the quote is not one token."""
        quote = _encode(tokenizer, '"')
        if len(quote) != 1:
            raise WeftError("structured replies: this tokenizer has no token for a quotation mark")
        return cls(inside, quote[0], tuple(tuple(_encode(tokenizer, text)) for text in literals(fields)))


class Writer:
    """The constraint on one reply of at most `budget` tokens, the end token `end` included."""

    def __init__(self, alphabet: Alphabet, budget: int, end: int) -> None:
        self.alphabet, self.left, self.end = alphabet, budget, end
        self.forced, self.field, self.length = list(alphabet.pieces[0]), 0, 0
        needed = len(self.forced) + 2 + self._tail(0)
        if budget < needed:
            raise WeftError(f"max_tokens is {budget}: the empty object alone has {needed} tokens")

    def _tail(self, field: int) -> int:
        """Tokens after the quote that closes `field`: at least one and a quote for each later field, and the end."""
        later = self.alphabet.pieces[field + 1 :]
        return sum(map(len, later)) + 2 * (len(later) - 1) + 1

    def bar(self, scores: Tensor) -> Tensor:
        """Scores [V] with minus infinity where the next token may not be."""
        if self.forced:
            allowed = torch.zeros_like(scores, dtype=torch.bool)
            allowed[self.forced[0]] = True
        else:
            allowed = self.alphabet.inside.clone()
            allowed[self.alphabet.quote] = self.length > 0
            if self.length > 0 and self.left <= 1 + self._tail(self.field):  # no room for one more
                allowed[:] = False
                allowed[self.alphabet.quote] = True
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)

    def push(self, token: int) -> None:
        """A token was written."""
        self.left -= 1
        if self.forced:
            self.forced.pop(0)
            return
        if token != self.alphabet.quote:
            self.length += 1
            return
        self.field, self.length = self.field + 1, 0
        last = self.field == len(self.alphabet.pieces) - 1
        self.forced = [*self.alphabet.pieces[self.field], *([self.end] if last else [])]
