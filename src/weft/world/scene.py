"""Scene graphs of the embedded world: what a picture shows, as data.

A scene holds one to four things, each in its own quadrant of the canvas, before a background, under one light,
in one drawing style and one colour tone. Everything that a text leaves open has the default value: a *medium*,
*solid* thing, *even* light, *flat* style, *neutral* tone. So a complete caption determines its scene up to the
small displacement of each thing inside its quadrant.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "moon")
COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 135, 20),
    "yellow": (245, 215, 40),
    "green": (40, 160, 60),
    "teal": (20, 180, 180),
    "blue": (45, 80, 220),
    "purple": (135, 50, 180),
    "pink": (245, 120, 180),
    "brown": (150, 95, 50),
    "black": (30, 30, 35),
}
PATTERNS = ("solid", "striped", "checkered", "dotted", "split", "glossy")
SIZES = ("small", "medium", "large")
LIGHTS = ("even", "left", "right", "top", "bottom")
STYLES = ("flat", "outlined", "pastel", "neon")
TONES = ("neutral", "warm", "cold", "dim")
BACKGROUNDS = {
    "white": (245, 245, 245),
    "grey": (165, 168, 172),
    "sand": (228, 208, 165),
    "mint": (190, 232, 205),
    "sky": (185, 215, 245),
    "lavender": (212, 195, 238),
}
CELLS = ("top left", "top right", "bottom left", "bottom right", "centre")
JITTER = 2  # a thing lies within this many units (1/64 of the shorter side) of its quadrant's centre

# Attribute pairs that no training scene shows: they measure composition (see `weft.world.records`).
HELD_OUT_COLOURS = frozenset({("heart", "green"), ("star", "purple"), ("circle", "brown"), ("moon", "teal")})
HELD_OUT_PATTERNS = frozenset({("cross", "dotted"), ("square", "glossy"), ("ring", "split")})


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: its attributes, the quadrant it lies in and its displacement there in units."""

    shape: str
    colour: str
    pattern: str = "solid"
    size: str = "medium"
    cell: int = 0
    dx: int = 0
    dy: int = 0

    @property
    def held_out(self) -> bool:
        return (self.shape, self.colour) in HELD_OUT_COLOURS or (self.shape, self.pattern) in HELD_OUT_PATTERNS

    def but(self, **changes: Any) -> Thing:
        """The same thing with some attributes changed."""
        return replace(self, **changes)

    @property
    def look(self) -> tuple[str, str, str, str]:
        return self.shape, self.colour, self.pattern, self.size


@dataclass(frozen=True, slots=True)
class Scene:
    """A whole picture. `background` is ("plain", name), ("gradient", upper, lower) or ("photo", name, x, y)."""

    things: tuple[Thing, ...]
    background: tuple[Any, ...] = ("plain", "white")
    light: str = "even"
    style: str = "flat"
    tone: str = "neutral"

    def but(self, **changes: Any) -> Scene:
        """The same scene with some attributes changed."""
        return replace(self, **changes)

    @property
    def held_out(self) -> bool:
        return any(t.held_out for t in self.things)

    def at(self, cell: int) -> Thing | None:
        """The thing in a quadrant, if there is one."""
        return next((t for t in self.things if t.cell == cell), None)

    def index(self, cell: int) -> int:
        return next(i for i, t in enumerate(self.things) if t.cell == cell)

    @property
    def free(self) -> list[int]:
        return [c for c in range(4) if self.at(c) is None]

    def with_thing(self, i: int, **changes: Any) -> Scene:
        things = list(self.things)
        things[i] = replace(things[i], **changes)
        return replace(self, things=tuple(things))

    def without(self, i: int) -> Scene:
        return replace(self, things=self.things[:i] + self.things[i + 1 :])

    def plus(self, thing: Thing) -> Scene:
        return replace(self, things=(*self.things, thing))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "things": [asdict(t) for t in self.things], "background": list(self.background)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Scene:
        return cls(
            things=tuple(Thing(**t) for t in data["things"]),
            background=tuple(data["background"]),
            light=data["light"],
            style=data["style"],
            tone=data["tone"],
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the scene as JSON, its things in their order: scenes of one digest are one picture."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Prior:
    """How scenes are drawn: the chance of each background kind, of a global attribute that is not the default,
    and of a tone. Photographs need the extra `weft[photos]`."""

    photo: float = 0.0
    gradient: float = 0.35
    style: float = 0.35
    light: float = 0.4
    tone: float = 0.0
    counts: tuple[float, float, float, float] = (0.25, 0.35, 0.25, 0.15)


def pick(rng: np.random.Generator, options: Any, p: Any = None) -> Any:
    """One of a sequence (NumPy's own `choice` would turn it into an array)."""
    options = list(options)
    return options[int(rng.choice(len(options), p=p))]


def draw_thing(rng: np.random.Generator, cell: int, jitter: bool = True, size: str | None = None) -> Thing:
    """A random thing in a quadrant."""
    return Thing(
        shape=pick(rng, SHAPES),
        colour=pick(rng, COLOURS),
        pattern=pick(rng, PATTERNS, (0.45, 0.11, 0.11, 0.11, 0.11, 0.11)),
        size=size or pick(rng, SIZES, (0.3, 0.4, 0.3)),
        cell=cell,
        dx=int(rng.integers(-JITTER, JITTER + 1)) if jitter else 0,
        dy=int(rng.integers(-JITTER, JITTER + 1)) if jitter else 0,
    )


def draw_background(rng: np.random.Generator, prior: Prior = Prior()) -> tuple[Any, ...]:
    """A random background."""
    u = rng.random()
    if u < prior.photo:
        from weft.world.photos import PHOTOS

        return ("photo", pick(rng, PHOTOS), round(float(rng.random()), 3), round(float(rng.random()), 3))
    names = list(BACKGROUNDS)
    if u < prior.photo + prior.gradient:
        upper, lower = rng.permutation(len(names))[:2]
        return ("gradient", names[int(upper)], names[int(lower)])
    return ("plain", pick(rng, names))


def draw_scene(rng: np.random.Generator, prior: Prior = Prior(), count: int | None = None) -> Scene:
    """A random scene of `count` things (by default one to four), at least half of the time with a distractor
    that shares the first thing's shape or colour."""
    n = count or 1 + int(rng.choice(4, p=prior.counts))
    cells = [int(c) for c in rng.permutation(4)[:n]]
    things = [draw_thing(rng, c) for c in cells]
    if n > 1 and rng.random() < 0.5:
        shared = pick(rng, ("shape", "colour"))
        things[1] = things[1].but(**{shared: getattr(things[0], shared)})
    return Scene(
        things=tuple(things),
        background=draw_background(rng, prior),
        light=pick(rng, LIGHTS[1:]) if rng.random() < prior.light else "even",
        style=pick(rng, STYLES[1:]) if rng.random() < prior.style else "flat",
        tone=pick(rng, TONES[1:]) if rng.random() < prior.tone else "neutral",
    )
