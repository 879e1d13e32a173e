"""Wrong clips on purpose: what an oracle or a judge must not accept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np

from weft.motion.clip import Motion
from weft.record import Record
from weft.rng import numpy_rng
from weft.world.motion_acts import clip_joints
from weft.world.motion_oracle import judge
from weft.world.motion_scripts import (
    ACTIONS,
    SPEEDS,
    STYLES,
    VARIANTS,
    Script,
    draw_act,
    draw_jitter,
    draw_script,
    fits,
    paced,
)
from weft.world.scene import pick


def corruptions(record: Record, rng: np.random.Generator) -> Iterator[tuple[str, Motion]]:
    """Each way of getting this record wrong by one thing, with the wrong clip: (name, clip).

    `action`, `side`, `direction`, `path`: one attribute of one act; `style`; `speed`; `extra`: another act at the
    end; `missing`: only one of two acts; `order`: the two the other way round; `copy`: the source as it was;
    `frozen`: the first pose; `other`: the clip of another script.
    """
    world = record.meta["motion"]
    target = Script.from_json(world["target"])
    split = target.split

    def made(script: Script) -> Motion:
        return Motion(clip_joints(script.but(jitter=draw_jitter(rng, split))))

    wrong: dict[str, Script] = {"style": target.but(style=pick(rng, [s for s in STYLES if s != target.style]))}
    if paced(target.acts):
        wrong["speed"] = target.but(speed=pick(rng, [s for s in SPEEDS if s != target.speed]))
    i = int(rng.integers(len(target.acts)))
    act = target.acts[i]
    for name in ("side", "direction", "path"):
        rest = [n for n in ("action", "side", "direction", "path") if n != name]
        options = [
            v
            for v in VARIANTS[act.action]
            if getattr(v, name) != getattr(act, name) and all(getattr(v, n) == getattr(act, n) for n in rest)
        ]
        if name == "path":  # curves have a direction that straight lines do not
            options = [v for v in VARIANTS[act.action] if v.path != act.path]
        if options:
            new = pick(rng, options)
            wrong[name] = target.with_act(i, side=new.side, direction=new.direction, path=new.path)
    new = draw_act(rng, [a for a in ACTIONS if a != act.action])
    wrong["action"] = target.but(acts=(*target.acts[:i], new, *target.acts[i + 1 :]))
    if len(target.acts) == 1:
        wrong["extra"] = target.but(acts=(act, draw_act(rng, [a for a in ACTIONS if a != act.action])))
    else:
        wrong["missing"] = target.but(acts=(act,))
        wrong["order"] = target.but(acts=target.acts[::-1])
    other = draw_script(rng, split)
    if other.attributes != target.attributes:
        wrong["other"] = other
    for name, script in wrong.items():
        if fits(script):
            yield name, made(script)
    if world["source"] is not None:
        yield "copy", Motion(clip_joints(Script.from_json(world["source"])))
    frames = clip_joints(target)
    yield "frozen", Motion(np.repeat(frames[:1], len(frames), axis=0))


def baselines(records: Iterable[Record], seed: int = 0) -> dict[str, dict[str, float]]:
    """What no skill reaches, by name: `exact` is the target itself, `chance` the clip of a random script, `copy` the
    source as it was (records with one), `frozen` the target's first pose. Each has `success` (share of records),
    `attributes` (mean share of attributes that are right) and `count`."""
    rows: dict[str, list[tuple[bool, float]]] = defaultdict(list)
    for record in records:
        world = record.meta["motion"]
        target = Script.from_json(world["target"])
        exact = clip_joints(target)
        other = draw_script(numpy_rng(seed, "motions/chance", record=record.id), target.split)
        tried = {"exact": exact, "chance": clip_joints(other), "frozen": np.repeat(exact[:1], len(exact), axis=0)}
        if world["source"] is not None:
            tried["copy"] = clip_joints(Script.from_json(world["source"]))
        for name, joints in tried.items():
            verdict = judge(record, Motion(joints))
            rows[name].append((verdict.success, verdict.share))
    return {
        name: {"success": float(np.mean([s for s, _ in r])), "attributes": float(np.mean([a for _, a in r])),
               "count": float(len(r))}
        for name, r in rows.items()
    }  # fmt: skip
