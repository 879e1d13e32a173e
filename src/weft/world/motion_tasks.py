"""The tasks of the motion world: each draws scripts and says them as the turns of a record."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from weft.motion.clip import Motion
from weft.record import Part, Turn, motion_part, text_part
from weft.world.motion_acts import clip_joints
from weft.world.motion_concepts import draw_concept
from weft.world.motion_edits import HELD_OUT_KIND, KINDS, Op, apply, propose
from weft.world.motion_phrases import MotionSpeaker
from weft.world.motion_scripts import TRAVELS, VARIANTS, Script, draw_act, draw_jitter, draw_script, fits
from weft.world.motion_words import (
    AGAIN,
    BETWEEN,
    BY_REFERENCE,
    CHECKS,
    IN_CONTEXT,
    PLANS,
    QUESTIONS,
    RIGHT,
    WRONG,
)
from weft.world.scene import pick

RENDERER = 1  # part of every digest: a change of the clips changes it
FRAMES = (40, 120)  # shortest and longest clip
Rng = np.random.Generator


@lru_cache(maxsize=256)
def joints(script: Script) -> np.ndarray:
    made = clip_joints(script)
    made.setflags(write=False)
    return made


@dataclass(frozen=True, slots=True)
class Movement:
    """A script as lazily made medium of a record part: frames `start` to `stop` of its clip (all by default)."""

    script: Script
    start: int = 0
    stop: int | None = None

    def load(self) -> Motion:
        meta = {"canonical": self.script.canonical}
        return Motion(joints(self.script)[self.start : self.stop].copy(), meta=meta)

    def save(self, path: str | Path) -> None:
        """Writes the clip as a file; see `Motion.save`."""
        self.load().save(path)

    @property
    def digest(self) -> str:
        """SHA-256 of the script, the cut and the version of the program that makes clips."""
        name = f"{self.script.digest} {self.start} {self.stop} {RENDERER}"
        return hashlib.sha256(name.encode()).hexdigest()


@dataclass(slots=True)
class Draft:
    """A record before it has a name. `shown` are all scripts in it."""

    turns: list[Turn]
    target: Script
    shown: list[Script]
    kind: str
    canonical: str
    source: Script | None = None
    plan: list[Op] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


Maker = Callable[[Rng, MotionSpeaker, str, str], Draft | None]  # of (generator, speaker, kind, split)


def user(*parts: Part) -> Turn:
    return Turn("user", list(parts))


def answer(*parts: Part) -> Turn:
    return Turn("assistant", list(parts))


def planned(speaker: MotionSpeaker, script: Script) -> str:
    """What a movement will show, said before it comes."""
    return speaker.frame(PLANS).format(speaker.statement(script))


def clip(script: Script, role: str | None = None) -> Part:
    return motion_part(Movement(script), role)


def generate(rng: Rng, speaker: MotionSpeaker, kind: str, split: str) -> Draft | None:
    """Text to motion."""
    script = draw_script(rng, split)
    text, canonical = speaker.caption(script)
    return Draft([user(text_part(text)), answer(clip(script))], script, [script], "generate", canonical)


def describe(rng: Rng, speaker: MotionSpeaker, kind: str, split: str) -> Draft | None:
    """Motion to text."""
    script = draw_script(rng, split)
    text, canonical = speaker.caption(script, answer=True)
    question = text_part(speaker.frame(QUESTIONS))
    turns = [user(clip(script, "source"), question), answer(text_part(text))]
    return Draft(turns, script, [script], "describe", canonical)


def edit(rng: Rng, speaker: MotionSpeaker, kind: str, split: str) -> Draft | None:
    """One edit of a clip (or two in one instruction)."""
    source = _source_for(rng, kind, split)
    plan = propose(rng, source, kind)
    if not plan:
        return None
    target = apply(source, plan)
    text, canonical = speaker.edit(source, plan)
    turns = [user(clip(source, "source"), text_part(text)), answer(clip(target))]
    return Draft(turns, target, [source, target], kind, canonical, source, plan)


def _source_for(rng: Rng, kind: str, split: str) -> Script:
    """A script that has a place for an edit of this kind more often than not."""
    two = {"drop": 1.0, "speed": 0.0, "append": 0.0, "body_part": 0.0, "direction": 0.0}.get(kind, 0.15)
    script = draw_script(rng, split, two)
    if kind == "trajectory" and script.acts[0].action not in TRAVELS:
        script = script.but(acts=(draw_act(rng, TRAVELS), *script.acts[1:]))
    return script


def chain(rng: Rng, speaker: MotionSpeaker, kind: str, split: str) -> Draft | None:
    """Two or three edits, one a turn; each edits what the turn before has made."""
    count = 2 if kind == "two_turn" else 3
    options = [k for k in KINDS if k not in (HELD_OUT_KIND, "two_in_one")]
    kinds = [options[int(i)] for i in rng.permutation(len(options))[:count]]
    now = _source_for(rng, kinds[0], split)
    scripts, turns, plans, said = [now], [], [], []
    for k, name in enumerate(kinds):
        plan = propose(rng, now, name)
        if not plan:
            return None
        text, canonical = speaker.edit(now, plan)
        before, now = now, apply(now, plan)
        first = [clip(before, "source")] if k == 0 else []
        turns += [user(*first, text_part(text)), answer(clip(now))]
        scripts.append(now)
        plans.append(plan)
        said.append(canonical)
    if len({s.digest for s in scripts}) < len(scripts):
        return None  # an edit that undoes another
    extra = {"steps": [s.to_json() for s in scripts], "plans": plans}
    return Draft(turns, now, scripts, kind, " | ".join(said), scripts[-2], plans[-1], extra)


def in_context(rng: Rng, speaker: MotionSpeaker, kind: str, split: str) -> Draft | None:
    """The action of one clip with the style, path or speed of another; half of them as an edit of the first."""
    action = draw_script(rng, split, two=0.0, style=0.3, speed=0.3)
    other = draw_script(
        rng, split, two=0.0, style=1.0 if kind == "style" else 0.3, speed=1.0 if kind == "speed" else 0.3
    )
    if kind == "trajectory":
        action = action.but(acts=(draw_act(rng, TRAVELS),))
        other = other.but(acts=(draw_act(rng, TRAVELS),))
        a, b = action.acts[0], other.acts[0]
        if (a.path, a.direction) == (b.path, b.direction) or all(
            (v.path, v.direction) != (b.path, b.direction) for v in VARIANTS[a.action]
        ):
            return None
        op = {"op": "trajectory", "act": 0, "value": b.path, "direction": b.direction}
    elif getattr(action, kind) == getattr(other, kind) or action.acts == other.acts:
        return None
    else:
        op = {"op": kind, "value": getattr(other, kind)}
    target = apply(action, [op])
    if not fits(target):
        return None
    as_edit = bool(rng.random() < 0.5)
    canonical = f"{kind} of 2" if as_edit else f"action of 1 ; {kind} of 2"
    frame = speaker.frame((BY_REFERENCE if as_edit else IN_CONTEXT)[kind])
    parts = [clip(action, "source")] if as_edit else []
    parts += _woven(frame, {"a": action, "b": other})
    turns = [user(*parts), answer(clip(target))]
    extra = {"references": [other.to_json()] if as_edit else [action.to_json(), other.to_json()]}
    name = f"context_{kind}"
    return Draft(turns, target, [action, target, other], name, canonical, action if as_edit else None, [op], extra)


def _woven(frame: str, clips: dict[str, Script]) -> list[Part]:
    """A frame as text with `{a}` and `{b}` as clips."""
    parts: list[Part] = []
    for k, piece in enumerate(frame.replace("}", "{").split("{")):
        if k % 2:
            parts.append(clip(clips[piece], "reference"))
        elif piece:
            parts.append(text_part(piece))
    return parts


def between(rng: Rng, speaker: MotionSpeaker, kind: str, split: str) -> Draft | None:
    """A start, an end and a text; `inbetween` gives a few frames of each, `inpaint` all but the middle."""
    script = draw_script(rng, split, two=0.15)
    frames = len(joints(script))
    cut = 8 if kind == "inbetween" else int(frames * rng.uniform(0.28, 0.4)) // 4 * 4
    caption = speaker.caption(script)
    text = speaker.frame(BETWEEN).format(caption[0])
    start, end = Movement(script, 0, cut), Movement(script, frames - cut, frames)
    turns = [user(motion_part(start, "start"), motion_part(end, "end"), text_part(text)), answer(clip(script))]
    return Draft(turns, script, [script], kind, f"{kind} ; {caption[1]}", extra={"cut": cut})


def reflect(rng: Rng, speaker: MotionSpeaker, kind: str, split: str) -> Draft | None:
    """A first attempt, a judgement in words and, where the attempt was wrong, a corrected clip."""
    wanted = draw_script(rng, split, two=0.15)
    text, canonical = speaker.caption(wanted)
    check = user(text_part(speaker.frame(CHECKS)))
    if kind == "reflect_right":
        turns = [user(text_part(text)), answer(clip(wanted)), check, answer(text_part(speaker.frame(RIGHT)))]
        return Draft(turns, wanted, [wanted], kind, canonical)
    flaw = pick(rng, ("style", "speed", "trajectory", "body_part", "action"))
    plan = propose(rng, wanted, flaw)
    if not plan:
        return None
    tried = apply(wanted, plan).but(jitter=draw_jitter(rng, split))
    judged = speaker.frame(WRONG).replace("{is}", speaker.statement(tried))
    judged = judged.replace("{should}", speaker.statement(wanted))
    judged = f"{judged} {pick(rng, AGAIN)}"
    turns = [user(text_part(text)), answer(clip(tried, "rejected")), check, answer(text_part(judged), clip(wanted))]
    return Draft(turns, wanted, [wanted, tried], kind, canonical, extra={"tried": tried.to_json(), "flaw": flaw})


def knowledge(rng: Rng, speaker: MotionSpeaker, kind: str, split: str) -> Draft | None:
    """An instruction that only implies an action; a plan in words, then the clip."""
    concept, text, script = draw_concept(rng, speaker, split)
    turns = [user(text_part(text)), answer(text_part(planned(speaker, script)), clip(script))]
    return Draft(turns, script, [script], kind, script.canonical, extra={"concept": concept})


# By task: the kinds of it, and what makes them.
TASKS: dict[str, tuple[tuple[str, ...], Maker]] = {
    "generate": (("generate",), generate),
    "describe": (("describe",), describe),
    "edit": (KINDS, edit),
    "chain": (("two_turn", "three_turn"), chain),
    "in_context": (("style", "trajectory", "speed"), in_context),
    "between": (("inbetween", "inpaint"), between),
    "reflect": (("reflect_wrong", "reflect_wrong", "reflect_right"), reflect),
    "knowledge": (("knowledge",), knowledge),
}


def length_fits(script: Script) -> bool:
    """Whether a script's clip has an allowed length."""
    return FRAMES[0] <= len(joints(script)) <= FRAMES[1]
