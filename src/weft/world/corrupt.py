"""Wrong results on purpose: what an oracle or a judge must not accept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from weft.record import Record
from weft.world.oracle import ATTRIBUTES, GLOBALS, scenes
from weft.world.scene import Scene, draw_background, draw_thing, pick


def corruptions(record: Record, rng: np.random.Generator) -> Iterator[tuple[str, Scene]]:
    """Each way of getting this record wrong by one thing, with the wrong scene: (name, scene).

    `attribute`: one attribute of one thing; `object`: another thing in its place; `missing`: a thing is not there;
    `extra`: a thing that nobody asked for; `place`: a thing in another quadrant; `global`: light, style or tone;
    `background`; `copy`: the source as it was.
    """
    source, target, _ = scenes(record)
    if target.things:
        i = int(rng.integers(len(target.things)))
        thing = target.things[i]
        name = pick(rng, ATTRIBUTES)
        value = pick(rng, [v for v in ATTRIBUTES[name] if v != getattr(thing, name)])
        yield "attribute", target.with_thing(i, **{name: value})
        other = draw_thing(rng, thing.cell)
        if other.shape != thing.shape and other.colour != thing.colour:
            yield "object", target.with_thing(i, shape=other.shape, colour=other.colour, pattern=other.pattern)
        yield "missing", target.without(i)
    if target.free:
        cell = pick(rng, target.free)
        yield "extra", target.plus(draw_thing(rng, cell))
        if target.things:
            yield "place", target.with_thing(int(rng.integers(len(target.things))), cell=cell)
    key = pick(rng, GLOBALS)
    yield "global", target.but(**{key: pick(rng, [v for v in GLOBALS[key] if v != getattr(target, key)])})
    background = draw_background(rng)
    if background != target.background:
        yield "background", replace(target, background=background)
    if source is not None:
        yield "copy", source
