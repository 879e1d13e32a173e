"""The oracle of the motion world: which acts, style and speed a clip shows, measured from its joints.

Analysis by synthesis, as for pictures: the numbers that `weft.world.motion_measure` takes from a clip are compared
with those of clips made by the program for the script and for every script that differs in one attribute; the clip
must be nearest to what was asked, and near enough. Timing, stride, height and number of repeats are free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from weft.errors import WeftError
from weft.motion.clip import Motion
from weft.motion.features import place
from weft.motion.physics import mpjpe
from weft.motion.skeleton import HUMANML3D
from weft.record import Record
from weft.world.motion_acts import clip_joints
from weft.world.motion_measure import MOST, TOLERANCE, Measured, activity, mean, measure, smoothed
from weft.world.motion_scripts import EVERY_ACT, JITTERS, SPEEDS, STYLES, Act, Script, paced

NOTHING = Act("stand")  # what a clip shows in which nothing happens
# Several ways of doing the same, whose mean a clip is compared with.
_JITTERS = ((0,) * JITTERS, (2, 2, 2, 2, 2, 1), (-2, -2, -2, -2, -2, 0))
NEAREST = 5  # acts or styles that are looked at more closely
UNCLEAR = 0.95  # root mean square of tolerances: farther from every script, it is none of them
BETTER = 0.85  # two different acts are seen where they explain a clip this much better than one
MATCH = 0.1  # metres: how far start and end may be from what was given
SHORTEST = 12  # frames


@dataclass(slots=True)
class Verdict:
    """What the oracle found.

    `requests` holds each attribute that was asked for: `action`, `side`, `direction`, `path` (with 1 and 2 where there
    are two acts), `style`, `speed`, and `start` and `end` where they were given; `nothing else` is there, and false,
    where another act follows. `success` is all of them. `changed` says whether what an edit names came, `kept` whether
    the rest stayed (both None without an edit). `collateral` is the mean distance in metres of the joints (roots
    aligned, at equal shares of the time) from the exact target: how else it is done. `seen` names what the clip shows.
    """

    success: bool
    requests: dict[str, bool]
    kept: bool | None = None
    changed: bool | None = None
    collateral: float | None = None
    seen: dict[str, str] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The share of requests that are met: attribute accuracy."""
        return sum(self.requests.values()) / len(self.requests)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a clip shows: acts, style, speed; `unclear` where it is near to nothing that is known."""

    acts: tuple[Act, ...]
    style: str
    speed: str
    unclear: bool
    distance: float


@lru_cache(maxsize=4096)
def _prototype(act: Act, style: str, speed: str, brief: bool) -> Measured:
    """The mean of the measurements of clips that show one act."""
    taken = []
    for jitter in _JITTERS:
        acts = (act, act) if brief else (act,)  # an act is brief where it is not alone
        script = Script(acts, style, speed, jitter)
        joints = _standing(script) if act == NOTHING else clip_joints(script)
        taken.append(measure(smoothed(joints[: len(joints) // 2] if brief else joints)))
    return mean(taken)


def _standing(script: Script) -> np.ndarray:
    """A clip of the style's posture, without any act."""
    joints = clip_joints(script.but(acts=(Act("raise", "left"),)))
    return np.tile(joints[:2], (30, 1, 1))


def _distances(measured: Measured, options: Sequence[tuple[Act, str]], brief: bool) -> np.ndarray:
    """How far a clip is from acts in styles: root mean square of the differences, in tolerances, each capped.

    Slow and fast acts look different, too (fewer repeats, smaller swings), so the nearest ones are compared at every
    speed that they are done at.
    """

    def far(known: list[Measured]) -> np.ndarray:
        off = np.abs(np.stack([k.look for k in known]) - measured.look) / TOLERANCE
        return np.sqrt((np.minimum(off, MOST) ** 2).mean(axis=1))

    found = far([_prototype(act, style, SPEEDS[0], brief) for act, style in options])
    for k in np.argsort(found, kind="stable")[:NEAREST]:
        act, style = options[k]
        if not brief and act != NOTHING and paced((act,)):
            found[k] = min(found[k], far([_prototype(act, style, speed, brief) for speed in SPEEDS[1:]]).min())
    return found


def _act_of(measured: Measured, style: str, brief: bool) -> tuple[Act, float]:
    options = (*EVERY_ACT, NOTHING)
    far = _distances(measured, [(act, style) for act in options], brief)
    return options[int(far.argmin())], float(far.min())


def _style_of(parts: list[Measured], acts: list[Act], brief: bool) -> tuple[str, float]:
    far = np.zeros(len(STYLES))
    for measured, act in zip(parts, acts, strict=True):
        far += _distances(measured, [(act, style) for style in STYLES], brief)
    return STYLES[int(far.argmin())], float(far.min() / len(parts))


def _speed_of(parts: list[Measured], acts: list[Act], style: str, brief: bool) -> str:
    """The speed whose clips move as fast as this one, over the signals that this act moves."""
    total = np.zeros(len(SPEEDS))
    for measured, act in zip(parts, acts, strict=True):
        for k, speed in enumerate(SPEEDS):
            known = _prototype(act, style, speed, brief)
            weight = np.minimum(known.weight, measured.weight)
            off = np.minimum(np.abs(measured.tempo - known.tempo), 0.7)
            total[k] += (weight * off).sum() / max(weight.sum(), 1e-6)
    return SPEEDS[int(total.argmin())]


def _recognise(parts: list[Measured], style: str) -> Seen:
    """Acts given the style, the style given the acts, and both once more."""
    brief = len(parts) > 1
    acts: list[Act] = []
    far = 0.0
    for _ in range(2):
        found = [_act_of(m, style, brief) for m in parts]
        acts = [a for a, _ in found]
        far = max(d for _, d in found)
        style, _ = _style_of(parts, acts, brief)
    found = [_act_of(m, style, brief) for m in parts]
    acts, far = [a for a, _ in found], max(d for _, d in found)
    return Seen(tuple(acts), style, _speed_of(parts, acts, style, brief), far > UNCLEAR, far)


def see(motion: Motion, acts: int = 1, style: str = STYLES[0]) -> Seen:
    """What a clip shows: `acts` of them, or two where one is asked and two explain it much better. `style` is where
    the search begins.

    Raises `WeftError` for another skeleton than HumanML3D's. Clips that are too short show nothing clearly.
    """
    joints = _prepared(motion)
    if len(joints) < SHORTEST * acts:
        return Seen((NOTHING,) * acts, style, SPEEDS[0], True, float("inf"))
    one = _recognise([measure(joints)], style) if acts == 1 else None
    if one is not None and len(joints) < 4 * SHORTEST:
        return one
    halves = [
        _recognise([measure(joints[:k]), measure(joints[k:])], one.style if one else style)
        for k in _cuts(joints, 2 + acts)
    ]
    # a cut after both acts explains the rest by standing still: only where it fits much better
    two = min(halves, key=lambda s: s.distance / BETTER if NOTHING in s.acts else s.distance)
    if one is None:
        return two
    apart = two.acts[0].action != two.acts[1].action and NOTHING not in two.acts
    return two if apart and two.distance < BETTER * one.distance else one


def _prepared(motion: Motion) -> np.ndarray:
    if motion.layout is not HUMANML3D:
        raise WeftError(f"the oracle sees the 22 joints of humanml3d, this clip is {motion.layout.name}")
    joints = motion.resample(20.0).joints
    return smoothed(np.asarray(place(joints)))


def _cuts(joints: np.ndarray, most: int) -> list[int]:
    """Where two acts may meet: the calmest frames of the middle of the clip, at least half a second apart."""
    quiet = activity(joints)
    edge = max(len(joints) // 5, SHORTEST)
    options = np.arange(edge, len(joints) - edge)
    cuts: list[int] = []
    for k in options[np.argsort(quiet[options], kind="stable")]:
        if all(abs(k - c) >= 8 for c in cuts):
            cuts.append(int(k))
        if len(cuts) == most:
            break
    return cuts or [len(joints) // 2]


# --- verdicts -----------------------------------------------------------------------------------------------------


def judge(record: Record, motion: Motion) -> Verdict:
    """Judge a clip that answers a record of the motion world. Raises `WeftError` for any other record."""
    world = record.meta.get("motion")
    if world is None:
        raise WeftError(f"record {record.id}: the oracle judges records of the motion world only")
    source = world["source"] and Script.from_json(world["source"])
    return judge_script(Script.from_json(world["target"]), motion, source, world.get("cut"))


def judge_turns(record: Record, motions: Sequence[Motion]) -> list[Verdict]:
    """Judge the clip of every turn of a chain against what the turns so far ask for."""
    steps = [Script.from_json(s) for s in record.meta.get("motion", {}).get("steps", [])]
    if len(motions) != len(steps) - 1:
        raise WeftError(f"record {record.id}: {len(motions)} clips for {max(len(steps) - 1, 0)} turns of a chain")
    return [judge_script(b, m, a) for a, b, m in zip(steps, steps[1:], motions, strict=False)]


def judge_script(target: Script, motion: Motion, source: Script | None = None, cut: int | None = None) -> Verdict:
    """Judge a clip by the script that it should show. With the `source` of an edit, the verdict tells what changed
    and what was kept; with `cut`, the first and last `cut` frames were given."""
    seen = see(motion, len(target.acts), target.style)
    requests = {name: ok and not seen.unclear for name, ok in compare(target, seen).items()}
    exact = Motion(clip_joints(target))
    if cut is not None:
        requests |= _ends(motion, exact, cut)
    verdict = Verdict(all(requests.values()), requests, collateral=_away(motion, exact), seen=_said(seen))
    if source is not None:
        named = _named(source, target)
        verdict.changed = all(ok for name, ok in requests.items() if name in named)
        verdict.kept = all(ok for name, ok in requests.items() if name not in named)
    return verdict


def compare(script: Script, seen: Seen) -> dict[str, bool]:
    """Which attributes of a script a clip shows."""
    requests: dict[str, bool] = {}
    if len(seen.acts) > len(script.acts):
        requests["nothing else"] = False
    for k, (asked, found) in enumerate(zip(script.acts, seen.acts, strict=False)):
        number = f" {k + 1}" if len(script.acts) > 1 else ""
        requests[f"action{number}"] = asked.action == found.action
        for name in ("side", "direction", "path"):
            if getattr(asked, name):
                same = getattr(asked, name) == getattr(found, name)
                requests[name + number] = same and asked.action == found.action
    requests["style"] = script.style == seen.style
    if paced(script.acts):
        requests["speed"] = script.speed == seen.speed
    return requests


def _said(seen: Seen) -> dict[str, str]:
    acts = {f"act {k + 1}": act.name for k, act in enumerate(seen.acts)}
    return {**acts, "style": seen.style, "speed": seen.speed, "clear": "no" if seen.unclear else "yes"}


def _named(source: Script, target: Script) -> set[str]:
    """The requests that an edit changes."""
    named = {n for n in ("style", "speed") if getattr(source, n) != getattr(target, n)}
    if len(source.acts) != len(target.acts):
        k = len(target.acts)
        return named | ({f"{n} {k}" for n in ("action", "side", "direction", "path")} if k > 1 else {"action"})
    for k, (a, b) in enumerate(zip(source.acts, target.acts, strict=True)):
        number = f" {k + 1}" if len(target.acts) > 1 else ""
        names = ("action", "side", "direction", "path")
        named |= {n + number for n in names if getattr(a, n) != getattr(b, n)}
    return named


def _ends(motion: Motion, exact: Motion, cut: int) -> dict[str, bool]:
    """Whether a clip begins and ends as it was given."""
    given = np.asarray(place(exact.joints))
    made = np.asarray(place(motion.resample(20.0).joints))
    count = min(4, cut, len(made))
    pairs = {"start": (made[:count], given[:count]), "end": (made[-count:], given[-count:])}
    return {name: _pose_distance(a, b) <= MATCH for name, (a, b) in pairs.items()}


def _pose_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean joint distance of two segments, each from its own origin and heading, metres."""
    return mpjpe(np.asarray(place(a)), np.asarray(place(b)))


def _away(motion: Motion, exact: Motion) -> float:
    at = np.linspace(0, 1, 40)
    a, b = (np.asarray(place(m.resample(20.0).joints)) for m in (motion, exact))
    a, b = (x[np.round(at * (len(x) - 1)).astype(int)] for x in (a, b))
    return mpjpe(a, b)
