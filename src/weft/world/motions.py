"""Records of the embedded motion world: an endless, deterministic set of movement tasks.

Record i of a split is a function of (seed, split, i). The splits never share a clip: a script belongs to the split
that the digest of its jitter names, and a record holds scripts of its own split only. Training records hold no
held-out pair of action and style, no held-out phrasing and no edit of the held-out kind (a change of direction).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weft.errors import WeftError
from weft.record import Record, text_part
from weft.rng import numpy_rng
from weft.world.endless import Endless, named_weights
from weft.world.motion_edits import HELD_OUT_KIND
from weft.world.motion_phrases import MotionSpeaker
from weft.world.motion_scripts import Script
from weft.world.motion_tasks import TASKS, Draft, Movement, length_fits, planned
from weft.world.scene import pick

ALL_KINDS = tuple(dict.fromkeys(k for kinds, _ in TASKS.values() for k in kinds))


@dataclass(frozen=True, kw_only=True)
class MotionWorld(Endless):
    """A lazy sequence of records; see `records`."""

    tasks: tuple[tuple[str, float], ...]
    kinds: tuple[tuple[str, float], ...]
    plans: bool = False

    def _make(self, index: int) -> Record:
        rng = numpy_rng(self.seed, f"motions/{self.split}/{self.phrasing}/{self.combo}", index)
        names, weights = zip(*self.tasks, strict=True)
        task = pick(rng, names, np.array(weights) / sum(weights))
        kind = self._kind(rng, task)
        unseen = self.phrasing == "unseen" or self.phrasing == "mixed" and rng.random() < 0.5
        draft = next(filter(None, (self._draft(rng, task, kind, unseen) for _ in range(3000))), None)
        if draft is None:
            raise WeftError(f"world: no {kind} record found for combo={self.combo!r}, phrasing={self.phrasing!r}")
        target = draft.target
        return Record(
            id=f"motion-{self.split}-{self.seed}-{draft.kind}-{self.phrasing}-{self.combo}-{index:07d}",
            task=task,
            turns=draft.turns,
            meta={
                "kind": draft.kind,
                "canonical": draft.canonical,
                "attributes": target.attributes,
                "caption": target.canonical,
                "phrasing": "unseen" if unseen else "seen",
                "combo": "held_out" if target.held_out else "seen",
                "motion": {
                    "source": draft.source and draft.source.to_json(),
                    "target": target.to_json(),
                    "plan": draft.plan,
                    **draft.extra,
                },
            },
        )

    def _kind(self, rng: np.random.Generator, task: str) -> str:
        kinds: list[str] = list(TASKS[task][0])
        given = dict(self.kinds)
        if any(k in given for k in kinds):
            kinds = [k for k in kinds if k in given]
            weights = np.array([given[k] for k in kinds])
            return pick(rng, kinds, weights / weights.sum())
        return pick(rng, [k for k in kinds if k != HELD_OUT_KIND])

    def _draft(self, rng: np.random.Generator, task: str, kind: str, unseen: bool) -> Draft | None:
        speaker = MotionSpeaker(rng, unseen)
        draft = TASKS[task][1](rng, speaker, kind, self.split)
        if draft is None:
            return None
        if self.combo == "seen" and any(s.held_out for s in draft.shown):
            return None
        if self.combo == "held_out" and not draft.target.held_out:
            return None
        if not all(length_fits(s) for s in draft.shown):
            return None
        if self.plans and task != "reflect":  # there only right attempts would have one, which tells them apart
            for turn in draft.turns:
                if turn.role == "assistant" and turn.parts[0].type == "motion" and turn.parts[0].role != "rejected":
                    turn.parts.insert(0, text_part(planned(speaker, turn.parts[0].value.script)))
        return draft


def records(
    split: str = "train",
    count: int = 1000,
    *,
    seed: int = 0,
    start: int = 0,
    tasks: dict[str, float] | Sequence[str] = ("generate", "edit"),
    kinds: dict[str, float] | Sequence[str] = (),
    phrasing: str = "seen",
    combo: str = "seen",
    plans: bool = False,
) -> MotionWorld:
    """Records of the motion world as a lazy sequence.

    `tasks`: names, or weights by name, of

    - `generate`: text -> clip.
    - `describe`: clip (role `source`) and a question -> text.
    - `edit`: clip (`source`) and an instruction -> clip. Kinds: style, speed, trajectory, body_part, action, append,
      drop, two_in_one; `direction` is held out and comes only if it is named in `kinds`.
    - `chain`: two or three edits, each of what the turn before made. Kinds: two_turn, three_turn.
    - `in_context`: the action of one clip with the style, trajectory or speed of another. Both are woven into the
      text (role `reference`), or the first is the `source`. Kinds: style, trajectory, speed.
    - `between`: parts with roles `start` and `end` and a text -> the whole clip. Kinds: inbetween (8 frames each),
      inpaint (the middle third is missing).
    - `reflect`: text -> an attempt; "does it match?" -> a judgement in words and, if the attempt was wrong (role
      `rejected`), a corrected clip. Kinds: reflect_wrong, reflect_right.
    - `knowledge`: an instruction that implies a movement -> a plan in words, then the clip.

    `kinds`: names or weights that restrict the kinds of the tasks that have them. `phrasing`: "seen", "unseen" or
    "mixed". `combo`: "seen" (no held-out pair of action and style), "held_out" (one in the target) or "any".
    `plans`: every answer says what its movement will show before it comes, as those of `knowledge` do (not in
    `reflect`).

    Motion parts hold a lazy value: `part.value.load()` (or `weft.motion.load_part(part)`) gives a `Motion` of 22
    joints at 20 fps, 40 to 120 frames, metres, on the floor, from the origin, facing +z; `part.digest()` names it.
    Clips in circles turn by more than half a turn: take features with `heading="correct"`, or those of "humanml3d"
    do not recover to the clip.

    `meta`: `kind`, `canonical` (the request in one fixed wording), `caption` (the target in one), `attributes` (what
    the target shows: acts, style, speed), `phrasing`, `combo`, and `motion` with the scripts of source and target
    and the plan. Raises `WeftError` for unknown names.
    """
    return MotionWorld(
        split=split,
        length=count,
        seed=seed,
        start=start,
        tasks=named_weights(tasks, tuple(TASKS), "task"),
        kinds=named_weights(kinds, ALL_KINDS, "kind"),
        phrasing=phrasing,
        combo=combo,
        plans=plans,
    )


def script_of(record: Record) -> Script:
    """The script of a record's target. Raises `WeftError` for a record of another origin."""
    if "motion" not in record.meta:
        raise WeftError(f"record {record.id}: no record of the motion world")
    return Script.from_json(record.meta["motion"]["target"])


__all__ = ["MotionWorld", "Movement", "records", "script_of"]
