"""Motion as tokens: the extended vocabulary, four serialisations of residual codes, and what may come next.

A movement of T latent steps and L levels becomes rows of `columns` ids between the markers `<motion>` and
`</motion>`. Which code stands where is one function, `place`; writing, reading and constrained decoding all follow
from it.

flat       one column, time-major: v(0,0) v(0,1) ... v(0,L-1) v(1,0) ...
base_only  one column, level 0 alone; a predictor adds the other levels afterwards (MoMask, arXiv 2312.00063)
depth      L columns: a row is a step; levels above 0 come from a small transformer over the levels (RQ-Transformer,
           arXiv 2203.01941)
delay      L columns: level l is l rows late (MusicGen, arXiv 2306.05284)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.sample.tokens import Choice

SERIALISATIONS = ("flat", "base_only", "depth", "delay")
OPEN, CLOSE = "<motion>", "</motion>"


def code_names(levels: int, codes: int) -> list[str]:
    """The names of the code tokens, level by level: `<motion_0_0>`, `<motion_0_1>` ..."""
    return [f"<motion_{level}_{code}>" for level in range(levels) for code in range(codes)]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Ids of the extended vocabulary. Ordinary text is `[0, text)` but `special`; `end` closes an assistant's turn."""

    text: int
    special: tuple[int, ...]
    end: int
    open: int
    close: int
    first: int  # code 0 of level 0
    levels: int
    codes: int

    def block(self, level: int) -> tuple[int, int]:
        """The ids [start, stop) of a level's codes."""
        start = self.first + level * self.codes
        return start, start + self.codes


@dataclass(frozen=True, slots=True)
class Serialisation:
    """How the codes of one movement stand in rows. `levels` are those that are written (base_only: 1)."""

    name: str
    vocabulary: Vocabulary

    def __post_init__(self) -> None:
        if self.name not in SERIALISATIONS:
            raise WeftError(f"serialisation {self.name!r} is unknown; choose {', '.join(SERIALISATIONS)}")

    @property
    def levels(self) -> int:
        return 1 if self.name == "base_only" else self.vocabulary.levels

    @property
    def columns(self) -> int:
        return 1 if self.name in ("flat", "base_only") else self.vocabulary.levels

    def place(self, row: int, column: int) -> tuple[int, int]:
        """(latent step, level) of the code in a row (counted behind the opening marker) and column."""
        if self.name == "flat":
            return row // self.levels, row % self.levels
        return (row - column, column) if self.name == "delay" else (row, column)

    def length(self, steps: int) -> int:
        """Rows of a movement of `steps` latent steps, markers included."""
        if self.name == "flat":
            return steps * self.levels + 2
        return steps + 2 + (max(self.levels - 2, 0) if self.name == "delay" else 0)

    def rows(self, codes: Tensor) -> Tensor:
        """Rows [S, columns] of codes [T, L], with both markers. -1 is an empty column."""
        self._check(codes)
        step, level, kind = _table(self, len(codes))
        v = self.vocabulary
        value = v.first + level * v.codes + codes[step, level].long()
        body = torch.where(kind == 1, value, torch.where(kind == 2, v.close, -1))
        head = torch.full((1, self.columns), -1)
        head[0, 0] = v.open
        return torch.cat([head, body])

    def codes(self, rows: Tensor) -> Tensor:
        """The inverse: codes [T, levels] of rows with both markers. Raises WeftError for any illegal row."""
        grammar = Span(self, 1, len(rows))
        if not len(rows) or rows[0, 0] != self.vocabulary.open or (rows[0, 1:] != -1).any():
            raise WeftError(f"motion tokens must begin with {OPEN}")
        for number, row in enumerate(rows[1:].tolist(), 1):
            if grammar.finished:
                raise WeftError(f"motion tokens: row {number} follows {CLOSE}")
            for column, token in enumerate(row):
                choice = grammar.choice(column)
                if (choice is None) != (token == -1) or (choice is not None and token not in choice):
                    raise WeftError(f"motion tokens: id {token} is illegal in row {number}, column {column}")
                if choice is not None:
                    grammar.take(column, token)
            grammar.advance()
        if not grammar.finished or grammar.total is None:
            raise WeftError(f"motion tokens: {len(rows)} rows without an end; {CLOSE} is missing")
        step, level, kind = _table(self, grammar.total)
        v = self.vocabulary
        found = torch.zeros((grammar.total, self.levels), dtype=torch.long)
        inside = kind == 1
        found[step[inside], level[inside]] = rows[1:][inside] - v.first - level[inside] * v.codes
        return found

    def _check(self, codes: Tensor) -> None:
        v = self.vocabulary
        if codes.ndim != 2 or codes.shape[1] < self.levels:
            raise WeftError(f"codes of shape {tuple(codes.shape)}: {self.name} needs [steps, {self.levels}]")
        used = codes[:, : self.levels]
        if not len(codes):
            raise WeftError("a movement without a latent step: give at least one")
        if int(used.min()) < 0 or int(used.max()) >= v.codes:
            raise WeftError(f"codes from {int(used.min())} to {int(used.max())}: there are {v.codes} a level")


@lru_cache(maxsize=512)
def _table(serial: Serialisation, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """For every row behind the opening marker and column: step, level, and 1 a code, 2 the closing marker, 0 empty."""
    count = serial.length(steps) - 1
    cells = [[serial.place(r, c) for c in range(serial.columns)] for r in range(count)]
    place = torch.tensor(cells, dtype=torch.long)  # [S - 1, columns, 2]
    step, level = place[..., 0], place[..., 1]
    kind = ((step >= 0) & (step < steps)).long()
    kind[(step == steps) & (level == 0)] = 2
    kind[(step < 0) | (step > steps) | ((step == steps) & (level > 0))] = 0
    return step.clamp(0, max(steps - 1, 0)), level, kind


class Span:
    """Inside one movement, behind the opening marker: a `weft.sample.tokens.Grammar`.

    It may end after `least` and must end after `most` latent steps.
    """

    def __init__(self, serial: Serialisation, least: int, most: int) -> None:
        if not 0 <= least <= most:
            raise WeftError(f"a movement of {least} to {most} latent steps: the first must not be above the second")
        self.serial, self.least, self.most = serial, least, most
        self.row = 0
        self.total: int | None = None  # latent steps, known once the end is taken

    @property
    def finished(self) -> bool:
        if self.total is None:
            return False
        places = (self.serial.place(self.row, c) for c in range(self.serial.columns))
        return not any(0 <= step < self.total for step, _ in places) and self.row > 0

    def choice(self, column: int) -> Choice | None:
        step, level = self.serial.place(self.row, column)
        v = self.serial.vocabulary
        if step < 0 or (self.total is not None and step >= self.total):
            return None
        start, stop = v.block(level)
        if level or self.total is not None or step < self.least:
            return Choice(start, stop, guided=True)
        return Choice(v.close, v.close + 1) if step >= self.most else Choice(start, stop, (v.close,), guided=True)

    def take(self, column: int, token: int) -> None:
        if token == self.serial.vocabulary.close:
            self.total = self.serial.place(self.row, column)[0]

    def advance(self) -> None:
        self.row += 1


class Reply:
    """One assistant's turn: text, then at most one movement, then the end marker; a grammar.

    `motion`: "must" come, "may" come, or "never". `words` bounds the text in tokens; then the movement (or the end)
    comes. `least`, `most`: its latent steps. `bare`: no text at all before the movement.
    """

    def __init__(
        self, serial: Serialisation, *, motion: str, words: int, least: int, most: int, bare: bool = False
    ) -> None:
        if motion not in ("must", "may", "never"):
            raise WeftError(f"motion {motion!r}: choose must, may or never")
        self.serial, self.motion, self.words = serial, motion, 0 if bare else words
        self.least, self.most = least, most
        self.span: Span | None = None
        self.moved = self.finished = False
        self.written = 0

    def choice(self, column: int) -> Choice | None:
        if self.span is not None:
            return self.span.choice(column)
        if column:
            return None
        v = self.serial.vocabulary
        if self.moved:
            return Choice(v.end, v.end + 1)
        extra: tuple[int, ...] = () if self.motion == "never" else (v.open,)
        if self.motion != "must" and self.written:
            extra += (v.end,)
        if self.written < self.words:
            return Choice(0, v.text, extra, tuple(i for i in v.special if i < v.text), words=True)
        return Choice(0, 0, extra or (v.end,))

    def take(self, column: int, token: int) -> None:
        v = self.serial.vocabulary
        if self.span is not None:
            self.span.take(column, token)
        elif token == v.open:
            self.span = Span(self.serial, self.least, self.most)
            self.span.row = -1  # this row is the marker's
        elif token == v.end:
            self.finished = True
        else:
            self.written += 1

    def advance(self) -> None:
        if self.span is None:
            return
        self.span.advance()
        if self.span.finished:
            self.span, self.moved = None, True

    def prime(self, rows: Tensor) -> None:
        """Go through rows that are given, not drawn (the beginning of a movement that is to be continued)."""
        for row in rows.tolist():
            for column, token in enumerate(row):
                choice = self.choice(column)
                if choice is not None:
                    if token not in choice and token != -1:
                        raise WeftError(f"id {token} is illegal at the beginning of this answer")
                    self.take(column, token)
            self.advance()
