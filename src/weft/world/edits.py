"""Edits of a scene: every kind is a plan of operations, each with an exact result.

An operation is a dict: `op` names what is done, `cell` the quadrant of the thing that it is done to (in the scene
before the plan), the rest are its values. Values can be given by a reference picture instead of words; then
`ref` says which property of the reference is meant. `apply` turns a plan into the target scene.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from weft.world.scene import (
    COLOURS,
    LIGHTS,
    PATTERNS,
    SHAPES,
    SIZES,
    STYLES,
    TONES,
    Prior,
    Scene,
    Thing,
    draw_background,
    draw_thing,
    pick,
)

Op = dict[str, Any]
Rng = np.random.Generator

KINDS = (
    "add",
    "remove",
    "replace",
    "recolour",
    "repattern",
    "resize",
    "move",
    "background",
    "light",
    "style",
    "two_in_one",
    "tone",
)
HELD_OUT_KIND = "tone"  # no training record of tiny-kontext asks for it
LOCAL = ("add", "remove", "replace", "recolour", "repattern", "resize", "move")


def _other(rng: Rng, options: Any, *used: str) -> str:
    return pick(rng, [o for o in options if o not in used])


def _new_thing(rng: Rng, cell: int) -> dict[str, str]:
    thing = draw_thing(rng, cell, jitter=False)
    return {"shape": thing.shape, "colour": thing.colour, "pattern": thing.pattern, "size": thing.size}


def propose(rng: Rng, scene: Scene, kind: str) -> list[Op] | None:
    """A random plan of this kind for a scene, or None where the scene has no place for it."""
    if kind == "two_in_one":
        return _two(rng, scene)
    if kind == "background":
        return [{"op": kind, "value": list(_other_background(rng, scene))}]
    if kind == "light":
        return [{"op": kind, "value": _other(rng, LIGHTS[1:], scene.light)}]
    if kind == "style":
        return [{"op": kind, "value": _other(rng, STYLES, scene.style)}]
    if kind == "tone":
        return [{"op": kind, "value": _other(rng, TONES[1:], scene.tone)}]
    if kind == "add":
        if not scene.free:
            return None
        cell = pick(rng, scene.free)
        return [{"op": kind, "cell": cell, **_new_thing(rng, cell)}]
    if kind == "remove" and len(scene.things) == 1 and rng.random() < 0.8:
        return None  # an empty picture is a valid result, but a rare one
    thing = pick(rng, scene.things)
    if kind == "remove":
        return [{"op": kind, "cell": thing.cell}]
    if kind == "replace":
        new = _new_thing(rng, thing.cell) | {"size": thing.size}
        new["shape"] = _other(rng, SHAPES, thing.shape)
        return [{"op": kind, "cell": thing.cell, **new}]
    if kind == "recolour":
        return [{"op": kind, "cell": thing.cell, "value": _other(rng, COLOURS, thing.colour)}]
    if kind == "repattern":
        return [{"op": kind, "cell": thing.cell, "value": _other(rng, PATTERNS, thing.pattern)}]
    if kind == "resize":
        return [{"op": kind, "cell": thing.cell, "value": _other(rng, SIZES, thing.size)}]
    if kind == "move":
        return [{"op": kind, "cell": thing.cell, "to": pick(rng, scene.free)}] if scene.free else None
    raise KeyError(kind)


def _other_background(rng: Rng, scene: Scene) -> tuple[Any, ...]:
    while (new := draw_background(rng, Prior())) == scene.background:
        pass
    return new


def _two(rng: Rng, scene: Scene) -> list[Op] | None:
    first_kind = pick(rng, LOCAL)
    second_kind = pick(rng, [k for k in (*LOCAL, "background", "background") if k != first_kind])
    first, second = propose(rng, scene, first_kind), propose(rng, scene, second_kind)
    if not first or not second:
        return None
    touched = [
        {op["cell"] for op in plan if "cell" in op} | {op["to"] for op in plan if "to" in op}
        for plan in (first, second)
    ]
    if touched[0] & touched[1] or {first_kind, second_kind} == {"remove", "move"} and len(scene.things) < 2:
        return None
    return first + second


def apply(scene: Scene, plan: list[Op]) -> Scene:
    """The exact target of a plan: what no operation names stays as it is, to the pixel."""
    result = scene
    for op in plan:
        result = _APPLY[op["op"]](result, op)
    return result


def _replace_thing(s: Scene, op: Op) -> Scene:
    return s.with_thing(s.index(op["cell"]), **{k: op[k] for k in ("shape", "colour", "pattern")})


def _attribute(name: str) -> Callable[[Scene, Op], Scene]:
    return lambda s, op: s.with_thing(s.index(op["cell"]), **{name: op["value"]})


_APPLY: dict[str, Callable[[Scene, Op], Scene]] = {
    "add": lambda s, op: s.plus(Thing(op["shape"], op["colour"], op["pattern"], op["size"], op["cell"])),
    "remove": lambda s, op: s.without(s.index(op["cell"])),
    "replace": _replace_thing,
    "recolour": _attribute("colour"),
    "repattern": _attribute("pattern"),
    "reshape": _attribute("shape"),
    "resize": _attribute("size"),
    "move": lambda s, op: s.with_thing(s.index(op["cell"]), cell=op["to"], dx=0, dy=0),
    "background": lambda s, op: replace(s, background=tuple(op["value"])),
    "light": lambda s, op: replace(s, light=op["value"]),
    "style": lambda s, op: replace(s, style=op["value"]),
    "tone": lambda s, op: replace(s, tone=op["value"]),
}
