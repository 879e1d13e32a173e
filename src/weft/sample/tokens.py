"""Token rollout: rows of tokens drawn one after the other, each from the tokens that a grammar allows at its place.

A row has one column (plain language models) or several (one for each residual level, drawn left to right). Nothing
here knows what the tokens mean: the grammar says what may come next, the model what is likely.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.rng import generator

BLOCK = 64
"""Rows of uniform numbers that are drawn at once for a sample."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The ids from `start` to `stop` but those in `without`, and those in `extra`. `guided`: guidance applies.
    `words`: the ids of the range are text, which the side without text does not read."""

    start: int
    stop: int
    extra: tuple[int, ...] = ()
    without: tuple[int, ...] = ()
    guided: bool = False
    words: bool = False

    def __contains__(self, token: int) -> bool:
        return (self.start <= token < self.stop and token not in self.without) or token in self.extra


class Grammar(Protocol):
    """What may come next in one sample. Columns of a row are asked and taken left to right, then the row ends."""

    @property
    def finished(self) -> bool: ...
    def choice(self, column: int) -> Choice | None:
        """The legal ids, None where the column stays empty (-1)."""
        ...

    def take(self, column: int, token: int) -> None: ...
    def advance(self) -> None: ...


class TokenNetwork(Protocol):
    """What the rollout needs of a model; the state is its own affair."""

    columns: int

    def begin(self, prompts: Sequence[Tensor], *, cache: bool) -> Any:
        """Read the prompts (rows [S, columns], lengths may differ)."""
        ...

    def logits(self, state: Any, column: int, chosen: Tensor) -> tuple[Tensor, int]:
        """(fp32 logits [B, M], the id of the first of the M) of a column, `chosen` [B, column] being taken before."""
        ...

    def feed(self, state: Any, rows: Tensor, seen: Tensor) -> None:
        """Read one more row [B, columns] of each sample in `seen` [B]; the others stay as they are."""
        ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """`temperature` 0 always takes the likeliest. `guidance` g: logits become u + g (c - u), u those without the text.

    Raises WeftError for numbers out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise WeftError(f"temperature is {self.temperature:g}; it must be 0 (the likeliest) or more")
        if self.top_k is not None and self.top_k < 1:
            raise WeftError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise WeftError(f"top_p is {self.top_p:g}; it must be above 0 and at most 1")
        if self.guidance < 1:
            raise WeftError(f"guidance is {self.guidance:g}; it must be at least 1 (1: no guidance)")


@torch.no_grad()
def sample_tokens(
    model: TokenNetwork,
    prompts: Sequence[Tensor],
    grammars: Sequence[Grammar],
    seeds: Sequence[int],
    *,
    sampling: Sampling | None = None,
    negative: Sequence[Tensor] | None = None,
    cache: bool = True,
) -> list[Tensor]:
    """Rows [N, columns] that follow each prompt until its grammar is finished (the grammars are used up).

    `negative`: prompts without the text, needed for guidance above 1; words that are drawn do not reach that side
    either, so guidance holds also for what the model has said first. Sample k is a function of its prompt, grammar
    and seed: its uniform numbers are its own. Raises WeftError if guidance has no negative prompts.
    """
    sampling = sampling or Sampling()
    guided = sampling.guidance > 1
    if guided and negative is None:
        raise WeftError(f"guidance {sampling.guidance:g} needs prompts without the text")
    count, width = len(prompts), model.columns
    state = model.begin([*prompts, *(negative or ())] if guided else list(prompts), cache=cache)
    sources = [generator(seed, "tokens") for seed in seeds]
    uniform = torch.empty(0)
    made: list[list[list[int]]] = [[] for _ in prompts]
    step = 0
    while not all(g.finished for g in grammars):
        if step % BLOCK == 0:
            uniform = torch.stack([torch.rand((BLOCK, width), generator=s, dtype=torch.float64) for s in sources])
        alive = [not g.finished for g in grammars]
        rows = torch.full((count, width), -1)
        wordless = torch.ones(count, dtype=torch.bool)
        for column in range(width):
            groups: dict[Choice, list[int]] = defaultdict(list)
            for k, grammar in enumerate(grammars):
                choice = grammar.choice(column) if alive[k] else None
                if choice is not None:
                    groups[choice].append(k)
            if not groups:
                continue
            chosen = rows[:, :column]
            logits, first = model.logits(state, column, torch.cat([chosen, chosen]) if guided else chosen)
            for choice, members in groups.items():
                index = ids(choice) - first
                part = logits[members][:, index].float().cpu()
                if guided and choice.guided:
                    plain = logits[[count + k for k in members]][:, index].float().cpu()
                    part = plain + sampling.guidance * (part - plain)
                picked = ids(choice)[pick(part, uniform[members, step % BLOCK, column], sampling)].tolist()
                for k, token in zip(members, picked, strict=True):
                    rows[k, column] = token
                    wordless[k] &= not (choice.words and choice.start <= token < choice.stop)
                    grammars[k].take(column, token)
        for k, grammar in enumerate(grammars):
            if alive[k]:
                made[k].append(rows[k].tolist())
                grammar.advance()
        step += 1
        if not all(g.finished for g in grammars):
            everything = torch.ones(count, dtype=torch.bool)
            if guided:
                model.feed(state, torch.cat([rows, rows]), torch.cat([everything, wordless]))
            else:
                model.feed(state, rows, everything)
    return [torch.tensor(r, dtype=torch.long).view(-1, width) for r in made]


@lru_cache(maxsize=256)
def ids(choice: Choice) -> Tensor:
    """The ids of a choice [M], ascending in its range, extras last."""
    without = set(choice.without)
    found = [i for i in range(choice.start, choice.stop) if i not in without] if without else None
    span = torch.arange(choice.start, choice.stop) if found is None else torch.tensor(found, dtype=torch.long)
    return torch.cat([span, torch.tensor(choice.extra, dtype=torch.long)])


def pick(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """One index [n] for each row of logits [n, M] by inversion of the distribution at `uniform` [n] in [0, 1)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probability = torch.softmax(logits.double() / sampling.temperature, -1)
    count = probability.shape[-1]
    if (sampling.top_k is not None and sampling.top_k < count) or (sampling.top_p or 1.0) < 1:
        ordered, order = probability.sort(dim=-1, descending=True, stable=True)
        keep = torch.arange(count) < (sampling.top_k or count)
        if sampling.top_p is not None:  # the fewest that hold the share: a token stays if those before it do not
            kept = ordered * keep  # the share of what top_k leaves, as transformers counts it
            kept = kept / kept.sum(-1, keepdim=True)
            keep = keep & (kept.cumsum(-1) - kept < sampling.top_p)
        probability = torch.zeros_like(probability).scatter(-1, order, ordered * keep)
    sums = probability.cumsum(-1)
    return torch.searchsorted(sums, (uniform * sums[:, -1])[:, None], right=True)[:, 0].clamp_max(count - 1)
