"""Tasks whose values come from reference pictures: one to four of them, concrete things, local attributes
(colour, pattern, shape) and global ones (style, light, tone)."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np

from weft.world.edits import Op, apply
from weft.world.phrases import Speaker, canonical_thing, look_of
from weft.world.scene import (
    COLOURS,
    LIGHTS,
    PATTERNS,
    SHAPES,
    STYLES,
    TONES,
    Scene,
    Thing,
    draw_background,
    draw_scene,
    draw_thing,
    pick,
)

Rng = np.random.Generator
GLOBAL = {"style": STYLES, "light": LIGHTS, "tone": TONES}
LOCAL = {"recolour": ("colour", COLOURS), "repattern": ("pattern", PATTERNS), "reshape": ("shape", SHAPES)}
DEFAULT = {"style": "flat", "light": "even", "tone": "neutral"}
CONCEPTS = ("concrete", "local", "global")


def concept_of(op: Op) -> str:
    """What a reference gives: a concrete thing, a local attribute of one, or a global one of the picture."""
    return "global" if op["op"] in GLOBAL else "local" if op["op"] in LOCAL else "concrete"


def solo(rng: Rng, thing: Thing) -> Scene:
    """A reference picture of one thing: alone, in the centre, on some background."""
    return Scene((replace(thing, cell=4, dx=0, dy=0),), background=draw_background(rng))


def _global_reference(rng: Rng, kind: str, value: str) -> Scene:
    scene = draw_scene(rng, count=pick(rng, (2, 3, 4)))
    return scene.but(**(DEFAULT | {kind: value}))


def multi_edit(rng: Rng, speaker: Speaker, scene: Scene, count: int) -> Any:
    """An edit with `count` values given by references: (target, plan, references, text, canonical), or None
    where the scene has no place for it."""
    cells = [t.cell for t in scene.things] + scene.free[:1]
    globals_ = [k for k in GLOBAL if rng.random() < 0.4]
    spots: list[Any] = [*(int(c) for c in rng.permutation(cells)), *globals_]
    if len(spots) < count:
        return None
    plan: list[Op] = []
    references: list[Scene] = []
    for k, spot in enumerate(pick_some(rng, spots, count), start=1):
        if isinstance(spot, str):
            value = pick(rng, [v for v in GLOBAL[spot] if v not in (DEFAULT[spot], getattr(scene, spot))])
            references.append(_global_reference(rng, spot, value))
            plan.append({"op": spot, "value": value, "ref": k})
            continue
        thing = scene.at(spot)
        kind = "add" if thing is None else pick(rng, ("replace", *LOCAL))
        if kind in ("add", "replace"):
            new = draw_thing(rng, spot, jitter=False, size=thing.size if thing else None)
            if thing and new.shape == thing.shape:
                return None
            references.append(solo(rng, new))
            plan.append({"op": kind, "cell": spot, "ref": k, **look_of(new)})
        else:
            name, values = LOCAL[kind]
            value = pick(rng, [v for v in values if v != getattr(thing, name)])
            carrier = draw_thing(rng, 4, jitter=False, size="large").but(**{name: value})
            references.append(solo(rng, carrier))
            plan.append({"op": kind, "cell": spot, "value": value, "ref": k})
    text, canonical = speaker.edit(scene, plan)
    return apply(scene, plan), plan, references, text, canonical


def multi_generate(rng: Rng, speaker: Speaker, scene: Scene, count: int) -> Any:
    """A new picture from `count` references: (target, plan, references, text, canonical). The plan lists what each
    reference gives."""
    scene = scene.but(**DEFAULT)
    if len(scene.things) < count - 1:
        scene = draw_scene(rng, count=min(4, max(count - 1, 2)))
        scene = scene.but(**DEFAULT)
    plan: list[Op] = []
    references: list[Scene] = []
    names: dict[int, tuple[str, str]] = {}
    last_is_global = len(scene.things) < count or rng.random() < 0.3
    things = [scene.things[int(i)] for i in rng.permutation(len(scene.things))]
    for k in range(1, count + 1):
        if k == count and last_is_global:
            kind = pick(rng, GLOBAL)
            value = pick(rng, [v for v in GLOBAL[kind] if v != DEFAULT[kind]])
            scene = scene.but(**{kind: value})
            references.append(_global_reference(rng, kind, value))
            plan.append({"op": kind, "value": value, "ref": k})
            continue
        thing = things[k - 1]
        kind = pick(rng, ("object", "object", *LOCAL))
        if kind == "object":
            references.append(solo(rng, thing))
            names[thing.cell] = (f"the object of <{k}>", f"object <{k}>")
            plan.append({"op": "add", "cell": thing.cell, "ref": k, **look_of(thing)})
        else:
            name = LOCAL[kind][0]
            carrier = draw_thing(rng, 4, jitter=False, size="large").but(**{name: getattr(thing, name)})
            references.append(solo(rng, carrier))
            left = " ".join(getattr(thing, a) for a in ("size", "colour", "pattern", "shape") if a != name)
            left = left if name != "shape" else f"{left} thing"
            names[thing.cell] = (f"a {left} with the {name} of <{k}>", f"{canonical_without(thing, name)} {name} <{k}>")
            plan.append({"op": kind, "cell": thing.cell, "value": getattr(thing, name), "ref": k})
    spoken = scene.but(**DEFAULT)
    text, canonical = speaker.caption(spoken, names)
    for op in plan:
        if op["op"] in GLOBAL:
            noun = {"style": "style", "light": "light", "tone": "colour tone"}[op["op"]]
            text += f", with the {noun} of <{op['ref']}>"
            canonical += f" ; {op['op']} of <{op['ref']}>"
    # references are numbered in the order in which the text names them
    order = [int(k) for k in re.findall(r"<(\d)>", text)]
    number = {old: new for new, old in enumerate(order, start=1)}
    for op in plan:
        op["ref"] = number[op["ref"]]
    text = re.sub(r"<(\d)>", lambda m: f"<{number[int(m[1])]}>", text)
    canonical = re.sub(r"<(\d)>", lambda m: str(number[int(m[1])]), canonical)
    return scene, plan, [references[k - 1] for k in order], text, canonical


def canonical_without(thing: Thing, name: str) -> str:
    return canonical_thing({**look_of(thing), name: "some"})


def pick_some(rng: Rng, options: list[Any], count: int) -> list[Any]:
    return [options[int(i)] for i in rng.permutation(len(options))[:count]]
