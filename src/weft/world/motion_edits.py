"""Edits of a script: every kind is a plan of operations with an exact result, as `weft.world.edits` does for scenes.

An operation is a dict: `op` names what is done, `value` what it becomes, `act` which act it is done to.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from weft.world.motion_scripts import (
    ACTIONS,
    ARMS,
    LEGS,
    SPEEDS,
    STYLES,
    TRAVELS,
    VARIANTS,
    Act,
    Script,
    draw_act,
    fits,
    paced,
)
from weft.world.scene import pick

Op = dict[str, Any]
Rng = np.random.Generator

KINDS = ("style", "speed", "trajectory", "body_part", "action", "append", "drop", "two_in_one", "direction")
HELD_OUT_KIND = "direction"  # no training record asks for it


def propose(rng: Rng, script: Script, kind: str) -> list[Op] | None:
    """A random plan of this kind for a script, or None where there is none or its target would make no sense."""
    plan = _propose(rng, script, kind)
    return plan if plan and fits(apply(script, plan)) else None


def _propose(rng: Rng, script: Script, kind: str) -> list[Op] | None:
    if kind == "two_in_one":
        return _two(rng, script)
    if kind == "style":
        return [{"op": kind, "value": pick(rng, [s for s in STYLES if s != script.style])}]
    if kind == "speed":
        if not paced(script.acts):
            return None
        return [{"op": kind, "value": pick(rng, [s for s in SPEEDS if s != script.speed])}]
    if kind == "drop":
        return [{"op": kind}] if len(script.acts) > 1 else None
    if kind == "append":
        return [{"op": kind, "value": _json(draw_act(rng))}] if len(script.acts) == 1 else None
    i = int(rng.integers(len(script.acts)))
    act = script.acts[i]
    if kind == "trajectory":
        if act.action not in TRAVELS:
            return None
        new = pick(rng, [a for a in VARIANTS[act.action] if a != act])
        return [{"op": kind, "act": i, "value": new.path, "direction": new.direction}]
    if kind == "body_part":
        others = [a for a in VARIANTS[act.action] if a.side != act.side and a.direction == act.direction]
        if act.action not in ARMS + LEGS or len(script.acts) > 1:
            return None
        return [{"op": kind, "act": i, "value": pick(rng, others).side}]
    if kind == "direction":
        if act.direction not in ("left", "right") or len(script.acts) > 1:
            return None
        return [{"op": kind, "act": i, "value": "right" if act.direction == "left" else "left"}]
    if kind == "action":
        new = draw_act(rng, [a for a in ACTIONS if a != act.action])
        return [{"op": kind, "act": i, "value": _json(new)}]
    raise KeyError(kind)


def _json(act: Act) -> dict[str, str]:
    return {"action": act.action, "side": act.side, "direction": act.direction, "path": act.path}


def _two(rng: Rng, script: Script) -> list[Op] | None:
    first, second = (str(k) for k in rng.permutation(["style", "speed", "trajectory", "body_part", "action"])[:2])
    if {first, second} in ({"trajectory", "action"}, {"body_part", "action"}):
        return None
    a, b = propose(rng, script, first), propose(rng, script, second)
    return a + b if a and b else None


def apply(script: Script, plan: list[Op]) -> Script:
    """The exact target of a plan; the jitter stays, so what is not named stays as it was done."""
    for op in plan:
        kind, value = op["op"], op.get("value")
        if kind in ("style", "speed"):
            script = script.but(**{kind: value})
        elif kind == "trajectory":
            script = script.with_act(op["act"], path=value, direction=op["direction"])
        elif kind in ("body_part", "direction"):
            script = script.with_act(op["act"], **{"side" if kind == "body_part" else "direction": value})
        elif kind == "action":
            acts = list(script.acts)
            acts[op["act"]] = Act(**op["value"])
            script = script.but(acts=tuple(acts))
        elif kind == "append":
            script = script.but(acts=(*script.acts, Act(**op["value"])))
        elif kind == "drop":
            script = script.but(acts=script.acts[:1])
        else:
            raise KeyError(kind)
    return script
