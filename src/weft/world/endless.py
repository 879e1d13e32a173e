"""What the image world and the motion world share: endless sequences of records, and splits that never overlap."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from weft.errors import WeftError
from weft.record import Record
from weft.rows import Lazy

SPLITS = ("train", "val", "test")


class Digested(Protocol):
    """A scene or a script."""

    @property
    def digest(self) -> str: ...


def split_of(scene: Digested) -> str:
    """The split that a scene or a script belongs to: 90 % train, 5 % val, 5 % test, by its digest."""
    bucket = int(scene.digest[:8], 16) % 100
    return "train" if bucket < 90 else "val" if bucket < 95 else "test"


@dataclass(frozen=True, kw_only=True)
class Endless(Lazy):
    """`length` records from `start` on; record i is a function of (seed, split, i) and made when it is asked for.

    `phrasing`: "seen", "unseen" or "mixed". `combo`: "seen" (no held-out pair of attributes), "held_out" (one in the
    target) or "any". Raises `WeftError` for an unknown one of these, or an unknown split.
    """

    split: str
    length: int
    seed: int
    start: int
    phrasing: str
    combo: str

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise WeftError(f"world: unknown split {self.split!r}; known: {', '.join(SPLITS)}")
        if self.phrasing not in ("seen", "unseen", "mixed") or self.combo not in ("seen", "held_out", "any"):
            raise WeftError("world: phrasing is seen, unseen or mixed; combo is seen, held_out or any")

    def __len__(self) -> int:
        return self.length

    def _record(self, k: int) -> Record:
        return self._make(self.start + k)

    @abstractmethod
    def _make(self, index: int) -> Record:
        """Record `index`."""


def named_weights(
    given: dict[str, float] | Sequence[str], known: Sequence[str], what: str
) -> tuple[tuple[str, float], ...]:
    """Weights by name, equal ones for a list of names. Raises `WeftError` for an unknown name."""
    items = dict(given) if isinstance(given, dict) else dict.fromkeys(given, 1.0)
    for name in items:
        if name not in known:
            raise WeftError(f"world: unknown {what} {name!r}; known: {', '.join(known)}")
    return tuple(items.items())
