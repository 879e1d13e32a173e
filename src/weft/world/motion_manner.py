"""How an act of the motion world is done, and what all acts begin with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from weft.world.motion_body import Take, stand
from weft.world.motion_gait import times
from weft.world.motion_scripts import Act
from weft.world.motion_styles import Style, pose

SHORTEST = 2.05  # seconds: an act that is over sooner is followed by standing


@dataclass(frozen=True, slots=True)
class Manner:
    """How an act is done: `tempo` 1 is normal; `size`, `length`, `more` and `late` are the script's jitter in -1..1;
    `brief` acts are part of a longer clip."""

    style: Style
    tempo: float
    size: float
    length: float
    more: float
    late: float
    first: int
    brief: bool

    @property
    def rest(self) -> float:
        """Seconds of standing before and after the act."""
        return 0.3 if self.brief else 0.4


def begin(seconds: float, how: Manner, strength: float = 1.0) -> tuple[Take, np.ndarray]:
    """A styled, standing take; the act begins at `start_of(how)`."""
    t = times(seconds if how.brief else max(seconds, SHORTEST))
    take = stand(len(t), how.style.stance)
    pose(take, how.style, t, strength)
    return take, t


def start_of(how: Manner) -> float:
    return how.rest + 0.1 * how.late


def sides_of(act: Act) -> tuple[int, ...]:
    return {"left": (0,), "right": (1,)}.get(act.side, (0, 1))


def hold_hand(take: Take, side: int, share: np.ndarray, hand: object, elbow: object = None) -> None:
    """Brings a hand to `hand` ([3] or [T, 3]) by `share` [T]."""
    s = share[:, None]
    take.hands[:, side] = (1 - s) * take.hands[:, side] + s * np.asarray(hand)
    if elbow is not None:
        take.elbows[:, side] = (1 - s) * take.elbows[:, side] + s * np.asarray(elbow)


def repeats(how: Manner, least: int, most: int) -> int:
    """A number of repeats between two by the jitter; the least in brief acts."""
    return least if how.brief else int(round(least + (most - least) * (how.more + 1) / 2))
