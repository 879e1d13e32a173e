"""What a clip of the motion world shows, as data: one or two acts, done in a style and at a speed.

A script determines its clip to the last bit. What it leaves open within an attribute (stride, height, timing, number
of repeats) is in its `jitter`, so that many different clips show the same thing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from weft.world.endless import split_of
from weft.world.scene import pick

STYLES = ("neutral", "zombie", "happy", "tired", "proud", "sneaky")
SPEEDS = ("normal", "slow", "fast")
SIDES = ("left", "right", "both")
ARMS = ("wave", "raise", "punch", "reach")  # acts of one arm or both
LEGS = ("kick", "hop")  # acts of one leg
TRAVELS = ("walk", "run")  # acts with a path
JITTERS, JITTER = 6, 3  # six numbers from -3 to 3


@dataclass(frozen=True, slots=True)
class Act:
    """One thing that the body does. What does not apply to it is empty.

    `side`: of the arm or leg that does it; `direction`: where to (left and right of turns, circles and curves; up,
    forward, down); `path`: of walking and running.
    """

    action: str
    side: str = ""
    direction: str = ""
    path: str = ""

    @property
    def name(self) -> str:
        """A canonical name, such as `walk circle left` or `wave right`."""
        return " ".join(filter(None, (self.action, self.side, self.path, self.direction)))


def _variants() -> dict[str, tuple[Act, ...]]:
    ways = [("straight", ""), ("back", ""), ("zigzag", "")]
    ways += [(path, d) for path in ("circle", "curve") for d in ("left", "right")]
    return {
        "walk": tuple(Act("walk", path=p, direction=d) for p, d in ways),
        "run": tuple(Act("run", path=p, direction=d) for p, d in ways if p != "back"),
        "march": (Act("march"),),
        "turn": tuple(Act("turn", direction=d) for d in ("left", "right")),
        "jump": tuple(Act("jump", direction=d) for d in ("up", "forward")),
        "hop": tuple(Act("hop", s) for s in ("left", "right")),
        "squat": (Act("squat"),),
        "sit": (Act("sit"),),
        "kick": tuple(Act("kick", s) for s in ("left", "right")),
        "wave": tuple(Act("wave", s) for s in SIDES),
        "raise": tuple(Act("raise", s) for s in SIDES),
        "reach": tuple(Act("reach", s, d) for d in ("forward", "down") for s in ("left", "right")),
        "punch": tuple(Act("punch", s) for s in SIDES),
        "bow": (Act("bow"),),
        "clap": (Act("clap"),),
        "dance": (Act("dance"),),
    }


VARIANTS = _variants()
ACTIONS = tuple(VARIANTS)
EVERY_ACT = tuple(act for acts in VARIANTS.values() for act in acts)

# Pairs of action and style that training never shows.
HELD_OUT = frozenset(
    {("wave", "sneaky"), ("jump", "tired"), ("bow", "happy"), ("punch", "proud"), ("turn", "zombie"), ("kick", "tired")}
)


@dataclass(frozen=True)
class Script:
    """One or two acts (one after the other), the style and speed of all of it, and the jitter."""

    acts: tuple[Act, ...]
    style: str = "neutral"
    speed: str = "normal"
    jitter: tuple[int, ...] = (0,) * JITTERS

    def but(self, **changes: Any) -> Script:
        return replace(self, **changes)

    def with_act(self, i: int, **changes: Any) -> Script:
        acts = list(self.acts)
        acts[i] = replace(acts[i], **changes)
        return replace(self, acts=tuple(acts))

    @property
    def held_out(self) -> bool:
        """Whether it holds a pair of action and style that training never shows."""
        return any((act.action, self.style) in HELD_OUT for act in self.acts)

    @property
    def attributes(self) -> dict[str, Any]:
        """What a clip of it has to show, as JSON: `acts`, `style`, `speed`."""
        return {"acts": [asdict(act) for act in self.acts], "style": self.style, "speed": self.speed}

    @property
    def canonical(self) -> str:
        """One fixed sentence: `walk circle left ; wave right ; style zombie ; speed slow`, defaults left out."""
        parts = [act.name for act in self.acts]
        parts += [f"style {self.style}"] if self.style != STYLES[0] else []
        return " ; ".join(parts + ([f"speed {self.speed}"] if self.speed != SPEEDS[0] else []))

    def to_json(self) -> dict[str, Any]:
        return {**self.attributes, "jitter": list(self.jitter)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Script:
        acts = tuple(Act(**act) for act in data["acts"])
        return cls(acts, data["style"], data["speed"], tuple(data["jitter"]))

    @property
    def split(self) -> str:
        """The split that a script belongs to, by its jitter."""
        return split_of(_Jitter(self.jitter))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the script as JSON: equal for equal clips, and for nothing else."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def draw_jitter(rng: np.random.Generator, split: str) -> tuple[int, ...]:
    """Jitter of a split: it decides alone, so an edited script stays in the split of its source."""
    while True:
        jitter = tuple(int(v) for v in rng.integers(-JITTER, JITTER + 1, JITTERS))
        if split_of(_Jitter(jitter)) == split:
            return jitter


@dataclass(frozen=True, slots=True)
class _Jitter:
    values: tuple[int, ...]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.values).encode()).hexdigest()


def draw_act(rng: np.random.Generator, actions: Sequence[str] = ACTIONS) -> Act:
    """A random act; walking is as likely as three others, since it has more ways to be done."""
    weights = np.array([{"walk": 3.0, "run": 2.0}.get(a, 1.0) for a in actions])
    options = VARIANTS[pick(rng, actions, weights / weights.sum())]
    return pick(rng, options)


def paced(acts: Sequence[Act]) -> bool:
    """Whether acts can be done slowly or fast: a single one that is no jump (gravity sets the pace of those)."""
    return len(acts) == 1 and acts[0].action != "jump"


def fits(script: Script) -> bool:
    """Whether a script makes sense: nothing follows on sitting down, a second act is another action, and only what
    can be done slowly or fast has a speed."""
    acts = script.acts
    apart = len(acts) == 1 or (acts[0].action != "sit" and acts[0].action != acts[1].action)
    return apart and (script.speed == SPEEDS[0] or paced(acts))


def draw_script(
    rng: np.random.Generator, split: str, two: float = 0.25, style: float = 0.5, speed: float = 0.4
) -> Script:
    """A random script of a split: `two`, `style`, `speed` are the chances of a second act, of a style and of a speed
    that are not the default."""
    while True:
        acts = tuple(draw_act(rng) for _ in range(2 if rng.random() < two else 1))
        looks = pick(rng, STYLES[1:]) if rng.random() < style else STYLES[0]
        pace = pick(rng, SPEEDS[1:]) if rng.random() < speed and paced(acts) else SPEEDS[0]
        script = Script(acts, looks, pace)
        if fits(script):
            return script.but(jitter=draw_jitter(rng, split))
