"""What each act of the motion world does with the body: takes, from standing to standing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from weft.world.motion_body import Take, join, joints_of, stand
from weft.world.motion_gait import ease, pulse, stepping, stride, times, travel, walking
from weft.world.motion_scripts import JITTER, Act, Script
from weft.world.motion_styles import STYLE, Style, pose

TEMPO = {"slow": 0.62, "normal": 1.0, "fast": 1.55}
REST = 0.4  # seconds of standing before and after an act


@dataclass(frozen=True, slots=True)
class Manner:
    """How an act is done: `tempo` 1 is normal; `size`, `length`, `more` and `late` are the script's jitter in -1..1;
    `brief` acts are part of a longer clip."""

    style: Style
    tempo: float
    size: float
    length: float
    more: float
    late: float
    first: int
    brief: bool


def clip_joints(script: Script) -> np.ndarray:
    """The joints of a script, [T, 22, 3] float32 at 20 fps, metres: on the floor, from the origin, facing +z."""
    j = [v / JITTER for v in script.jitter]
    manner = Manner(
        style=STYLE[script.style],
        tempo=TEMPO[script.speed] * (1 + 0.07 * j[0]),
        size=j[1],
        length=j[2],
        more=j[3],
        late=j[4],
        first=int(script.jitter[5] % 2),
        brief=len(script.acts) > 1,
    )
    joints = joints_of(join([take_of(act, manner) for act in script.acts]))
    joints[..., 1] -= joints[..., 1].min()
    return joints


def take_of(act: Act, how: Manner) -> Take:
    """One act from standing to standing (or sitting)."""
    if act.action in ("walk", "run"):
        return _travel(act, how)
    return {
        "march": _march, "turn": _turn, "jump": _jump, "hop": _hop, "squat": _squat, "sit": _sit, "kick": _kick,
        "wave": _wave, "raise": _raise, "reach": _reach, "punch": _punch, "bow": _bow, "clap": _clap, "dance": _dance,
    }[act.action](act, how)  # fmt: skip


def _begin(seconds: float, how: Manner, strength: float = 1.0) -> tuple[Take, np.ndarray]:
    """A styled, standing take; the act begins at `_start(how)`."""
    t = times(seconds)
    take = stand(len(t), how.style.stance)
    pose(take, how.style, t, strength)
    return take, t


def _start(how: Manner) -> float:
    return REST + 0.1 * how.late


def _sides(act: Act) -> tuple[int, ...]:
    return {"left": (0,), "right": (1,)}.get(act.side, (0, 1))


def _hold(take: Take, side: int, share: np.ndarray, hand: object, elbow: object = None) -> None:
    """Brings a hand to `hand` ([3] or [T, 3]) by `share` [T]."""
    s = share[:, None]
    take.hands[:, side] = (1 - s) * take.hands[:, side] + s * np.asarray(hand)
    if elbow is not None:
        take.elbows[:, side] = (1 - s) * take.elbows[:, side] + s * np.asarray(elbow)


def _count(how: Manner, least: int, most: int) -> int:
    """A number of repeats between two by the jitter; the least in brief acts."""
    return least if how.brief else int(round(least + (most - least) * (how.more + 1) / 2))


# --- on foot ------------------------------------------------------------------------------------------------------


def _heading(act: Act, how: Manner) -> Callable[[np.ndarray], np.ndarray]:
    sign = -1.0 if act.direction == "right" else 1.0
    if act.path == "circle":
        return lambda u: sign * np.radians(335 + 20 * how.length) * u
    if act.path == "curve":
        return lambda u: sign * np.radians(95 + 12 * how.length) * ease(u)
    if act.path == "zigzag":
        return lambda u: np.radians(48) * np.tanh(2.2 * np.sin(3.5 * np.pi * u + 0.25 * np.pi)) * ease(6 * u)
    return lambda u: 0 * u


def _travel(act: Act, how: Manner) -> Take:
    run = act.action == "run"
    style = how.style
    long = act.path in ("circle", "zigzag")
    if run:
        period = 1 / (2.7 * how.tempo**0.65)
        length = (0.95 if long else 1.0) * style.stride**0.5 * how.tempo**0.35 * (1 + 0.08 * how.size)
        count = (7 if how.brief else 11) if long else (5 if how.brief else _count(how, 7, 9))
    else:
        period = 1 / (1.85 * how.tempo**0.8)
        length = 0.62 * style.stride * how.tempo**0.2 * (1 + 0.08 * how.size) * (0.8 if act.path == "back" else 1)
        count = (6 if how.brief else 8) if long else (4 if how.brief else _count(how, 5, 7))
    start = _start(how)
    span = (count - 0.5) * period
    total = length * (count - 1)
    heading = _heading(act, how)
    soft = 1.2 * period  # gathering speed and slowing down

    def progress(t: np.ndarray) -> np.ndarray:
        u = np.clip(t - start - 0.3 * period, 0, span - 0.3 * period)
        end = span - 0.3 * period
        gather, slow = np.minimum(u, soft), np.maximum(u - (end - soft), 0)
        gone = gather**2 / (2 * soft) + np.clip(u - soft, 0, end - 2 * soft) + slow - slow**2 / (2 * soft)
        return gone / (end - soft)

    def root_at(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return travel(progress(t), total, heading, act.path == "back")

    take, t = walking(start + (count + 0.4) * period + REST, root_at, style.stance)
    pose(take, style, t)
    lift = 0.1 * max(style.lift, 0.6)
    stepping(
        take, t, root_at, count, period,
        start=start,
        duty=0.72 if run else 1.15,
        lift=lift + 0.22 if run else lift,
        kick=1.1 if run else 0.25 + 0.35 * min(style.lift, 1.0),
        back=0.25 if run else 0.0,
        stance=style.stance * (0.7 if run else 0.9),
        first=how.first,
    )  # fmt: skip
    moving = pulse(t, start, 1.0 * period, (count - 2.2) * period, 1.0 * period)
    phase = np.pi * (t - start) / period
    if run:
        take.pitch += 0.16 * moving
        take.height += moving * (0.06 * np.sin(phase + 0.2) ** 2 - 0.05)
        for side in (0, 1):
            if style.swing > 0.5:
                _hold(take, side, moving, np.array(style.hand) * 0.3 + np.array([0.06, -0.26, 0.16]) * 0.7)
    else:
        take.height -= moving * 0.022 * np.cos(phase) ** 2
        take.sway[:, 0] += moving * 0.02 * np.sin(phase) * (1 if how.first else -1)
    ahead = np.clip(stride(take), -0.8, 0.8)
    for side, sign in ((0, -1), (1, 1)):
        take.hands[:, side, 2] += sign * style.swing * (0.3 if run else 0.36) * ahead
        take.hands[:, side, 1] += style.swing * 0.12 * np.maximum(sign * ahead, 0)
    take.twist += 0.18 * -ahead * (0.4 + 0.6 * style.swing)
    return take


def _march(act: Act, how: Manner) -> Take:
    period = 0.52 / how.tempo
    count, start = (5 if how.brief else _count(how, 6, 8)), _start(how)
    take, t = _begin(start + (count + 0.3) * period + REST, how)

    def root_at(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((len(at), 2)), np.zeros(len(at))

    lift = 0.3 * (1 + 0.1 * how.size)
    stepping(take, t, root_at, count, period, start=start, duty=1.1, lift=lift, kick=0.5, stance=how.style.stance,
             first=how.first)  # fmt: skip
    up = take.toes[:, :, 1] / lift
    take.toes[:, :, 2] += 0.14 * up
    take.feet[:, :, 1] = np.maximum(take.feet[:, :, 1] * 0.4, 0.35 * up)
    swing = 0.3 * (up[:, 0] - up[:, 1])
    for side, sign in ((0, -1), (1, 1)):
        take.hands[:, side, 2] += sign * swing * max(how.style.swing, 0.2)
        take.hands[:, side, 1] += max(how.style.swing, 0.2) * 0.16 * np.maximum(sign * swing / 0.3, 0)
    return take


def _turn(act: Act, how: Manner) -> Take:
    sign = -1 if act.direction == "right" else 1
    angle = np.radians(115 + 14 * how.size) * sign
    count, period, start = 5, 0.36 / how.tempo, _start(how)
    span = (count - 0.6) * period

    def root_at(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((len(at), 2)), angle * ease((at - start) / span)

    take, t = _begin(start + (count + 0.2) * period + REST, how)
    take.yaw = root_at(t)[1]
    first = 0 if act.direction != "right" else 1
    stepping(take, t, root_at, count, period, start=start, duty=1.15, lift=0.09 * max(how.style.lift, 0.6), kick=0.3,
             stance=how.style.stance, first=first)  # fmt: skip
    take.twist += 0.25 * sign * pulse(t, start - 0.2, 0.3, max(span - 0.5, 0.05), 0.4)
    return take


# --- legs ---------------------------------------------------------------------------------------------------------


def _jump(act: Act, how: Manner) -> Take:
    count = 1 if how.brief else _count(how, 1, 2)
    down, up, fly, land, rise = 0.45 / how.tempo, 0.2, 0.44 + 0.03 * how.size, 0.16, 0.45 / how.tempo
    start, cycle = _start(how), down + up + fly + land + rise + 0.15
    take, t = _begin(start + count * cycle + REST, how)
    reach = (0.55 + 0.1 * how.length) if act.direction == "forward" else 0.0
    for k in range(count):
        at = start + k * cycle
        low = pulse(t, at, down, 0.0, up)  # crouch, then stretch
        off = at + down + up
        u = np.clip((t - off) / fly, 0, 1)
        air = 4 * u * (1 - u) * 9.81 * fly**2 / 8
        soft = pulse(t, off + fly - 0.06, land, 0.02, rise)
        take.height += -0.24 * low + air - 0.2 * soft
        take.pitch += 0.5 * low + 0.35 * soft
        take.root[:, 1] += reach * ease((t - at - down - 0.5 * up) / (up * 0.5 + fly))
        take.toes[..., 2] += (reach * ease((t - off) / fly))[:, None]
        take.toes[..., 1] += (air * (1 + 0.3 * np.sin(np.pi * u)))[:, None]
        take.feet[..., 1] += (0.7 * pulse(t, at + down, up, 0.02, fly * 0.7))[:, None]
        for side in (0, 1):
            _hold(take, side, 0.9 * low, (0.1, -0.4, -0.3))
            _hold(take, side, pulse(t, at + down * 0.8, up + 0.1, fly * 0.5, 0.35), (0.12, 0.3, 0.38))
    return take


def _hop(act: Act, how: Manner) -> Take:
    side = _sides(act)[0]
    other, sign = 1 - side, 1 if side == 0 else -1
    period, count, start = 0.62 / how.tempo**0.7, (3 if how.brief else _count(how, 4, 5)), _start(how) + 0.35
    fly = min(0.3 + 0.02 * how.size, 0.62 * period)
    take, t = _begin(start + count * period + 0.45 + REST, how)
    lifted = pulse(t, start - 0.4, 0.35, count * period + 0.05, 0.35)
    reach, stance = 0.22 * (1 + 0.15 * how.length), how.style.stance / 2
    for k in range(count):
        off = start + k * period + 0.5 * (period - fly)
        u = np.clip((t - off) / fly, 0, 1)
        air = 4 * u * (1 - u) * (9.81 * fly**2 / 8 + 0.03)
        take.height += air - 0.07 * (pulse(t, off - 0.2, 0.12, 0.0, 0.08) + pulse(t, off + fly - 0.03, 0.1, 0, 0.15))
        take.root[:, 1] += reach * ease((t - off + 0.1) / (fly + 0.1))
        take.toes[:, side, 2] += reach * ease((t - off) / fly)
        take.toes[:, side, 1] += air
        take.feet[:, side, 1] += 0.5 * pulse(t, off - 0.1, 0.1, 0.05, fly * 0.7)
    take.sway[:, 0] += sign * 0.7 * stance * lifted
    take.toes[:, other, 2] += take.root[:, 1] - 0.3 * lifted
    take.toes[:, other, 1] += 0.3 * lifted
    take.feet[:, other, 1] += 0.9 * lifted
    free = 0.6 if how.style.swing > 0.5 else 0.25
    for hand in (0, 1):
        _hold(take, hand, free * lifted, (0.3, -0.3, 0.1))
    return take


def _squat(act: Act, how: Manner) -> Take:
    down, count, start = 0.7 / how.tempo, (1 if how.brief or how.tempo < 0.8 else _count(how, 1, 2)), _start(how)
    cycle = 2.3 * down
    take, t = _begin(start + count * cycle + REST, how)
    low = np.sum([pulse(t, start + k * cycle, down, 0.2 * down, down) for k in range(count)], axis=0)
    take.height -= (0.42 + 0.04 * how.size) * low
    take.pitch += (0.45 - 0.5 * how.style.pitch) * low
    take.sway[:, 1] -= 0.1 * low
    for side in (0, 1):
        _hold(take, side, low, (0.0, -0.02, 0.48), (0.6, -1, 0))
    return take


def _sit(act: Act, how: Manner) -> Take:
    down, start = 1.0 / how.tempo, _start(how)
    take, t = _begin(start + down + 1.1 + 0.25 * how.more, how)
    low = ease((t - start) / down)
    lean = pulse(t, start - 0.1, 0.55 * down, 0.0, 0.6 * down)
    take.height -= (0.44 + 0.02 * how.size - 0.5 * how.style.drop) * low
    take.sway[:, 1] -= 0.34 * low
    take.pitch += 0.45 * lean
    for side in (0, 1):
        if how.style.hand[2] < 0.4:
            _hold(take, side, low * 0.85, (-0.02, -0.36, 0.3), (0.6, -0.4, -0.6))
    return take


def _kick(act: Act, how: Manner) -> Take:
    side = _sides(act)[0]
    sign = 1 if side == 0 else -1
    swing, count, start = 0.3 / how.tempo, 1 if how.brief else _count(how, 1, 2), _start(how)
    cycle = 4.6 * swing + 0.25
    take, t = _begin(start + count * cycle + REST, how)
    height = 0.6 * (1 + 0.15 * how.size)
    for k in range(count):
        at = start + k * cycle
        behind = pulse(t, at, 1.2 * swing, 0.0, 0.8 * swing)
        out = pulse(t, at + 1.2 * swing, swing, 0.1, 1.6 * swing)
        take.toes[:, side, 1] += 0.16 * behind + height * out
        take.toes[:, side, 2] += -0.32 * behind + (0.62 + 0.03 * how.length) * out
        take.feet[:, side, 1] += 0.9 * behind - 0.5 * out
        take.sway[:, 0] -= sign * 0.05 * np.maximum(behind, out)
        take.pitch -= 0.16 * out
        take.twist += sign * 0.25 * (behind - out)
    return take


# --- arms ---------------------------------------------------------------------------------------------------------


def _wave(act: Act, how: Manner) -> Take:
    rate, start = 1.35 * how.tempo, _start(how)
    count = (2.5 if how.brief else 3 + _count(how, 0, 2)) if how.tempo > 0.8 else 2.5
    up = 0.55 / how.tempo**0.5
    take, t = _begin(start + 2 * up + count / rate + REST, how)
    share = pulse(t, start, up, count / rate - 0.1, up)
    wide = 0.17 * (1 + 0.12 * how.size)
    for side in _sides(act):
        hand = np.stack([0.24 + wide * np.sin(2 * np.pi * rate * (t - start - up)), 0.33 + 0 * t, 0.12 + 0 * t], -1)
        _hold(take, side, share, hand, (1.0, -0.5, -0.1))
    return take


def _raise(act: Act, how: Manner) -> Take:
    up, start = 0.75 / how.tempo, _start(how)
    hold = 0.55 + 0.15 * how.more
    take, t = _begin(start + 2 * up + hold + REST, how)
    share = pulse(t, start, up, hold, up)
    way = np.sin(np.pi * share)  # the hand goes up in front of the body
    for side in _sides(act):
        hand = np.stack([0.05 + 0.02 * how.size + 0 * t, 0.505 + 0 * t, 0.06 + 0.3 * way], axis=-1)
        _hold(take, side, share, hand, (0.6, 0.2, 0.8))
    return take


def _reach(act: Act, how: Manner) -> Take:
    side = _sides(act)[0]
    sign = -1 if side == 0 else 1  # the shoulder comes forward
    out, start = 0.75 / how.tempo, _start(how)
    hold = 0.45 + 0.1 * how.more
    take, t = _begin(start + 2 * out + hold + REST, how)
    share = pulse(t, start, out, hold, out)
    far = 1 + 0.06 * how.size
    if act.direction == "down":
        take.height -= 0.3 * far * share
        take.pitch += (0.95 * far - 0.6 * how.style.pitch) * share
        take.sway[:, 1] -= 0.04 * share
        _hold(take, side, share, (0.0, -0.5, 0.12), (0.5, 0, -1))
    else:
        take.pitch += (0.4 * far - 0.5 * how.style.pitch) * share
        take.twist += 0.45 * sign * share
        _hold(take, side, share, (-0.04, 0.1, 0.5), (0.6, -1, 0))
    return take


def _punch(act: Act, how: Manner) -> Take:
    hit, start = 0.2 / how.tempo, _start(how)
    count, raise_ = (2 if how.brief or how.tempo < 0.8 else _count(how, 2, 4)), 0.4 / how.tempo**0.5
    cycle = 2.6 * hit
    sides = _sides(act)
    total = count * cycle * (2 if len(sides) > 1 and not how.brief else 1)
    take, t = _begin(start + 2 * raise_ + total + REST, how)
    guard = pulse(t, start, raise_, total, raise_)
    for side in (0, 1):
        _hold(take, side, guard, (-0.03, -0.06, 0.2), (0.5, -1, -0.1))
    blows = round(total / cycle)
    for k in range(blows):
        side = sides[k % len(sides)]
        out = pulse(t, start + raise_ + k * cycle, hit, 0.1 * hit, 1.3 * hit)
        _hold(take, side, out, (-0.12, 0.0, 0.53), (0.6, -1, 0))
        take.twist += (-1 if side == 0 else 1) * (0.4 + 0.05 * how.size) * out
    take.pitch += 0.1 * guard
    take.height -= 0.04 * guard
    return take


def _clap(act: Act, how: Manner) -> Take:
    rate, start, up = 1.7 * how.tempo, _start(how), 0.4 / how.tempo**0.5
    count = 4 if how.brief or how.tempo < 0.8 else _count(how, 4, 7)
    take, t = _begin(start + 2 * up + count / rate + REST, how)
    share = pulse(t, start, up, count / rate, up)
    apart = 0.5 + 0.5 * np.cos(2 * np.pi * rate * (t - start - up))
    hand = np.stack([-0.125 + (0.18 + 0.02 * how.size) * apart, -0.1 + 0 * t, 0.33 - 0.04 * apart], axis=-1)
    for side in (0, 1):
        _hold(take, side, share, hand, (1.0, -0.8, -0.3))
    return take


# --- the whole body -----------------------------------------------------------------------------------------------


def _bow(act: Act, how: Manner) -> Take:
    down, start = 0.8 / how.tempo, _start(how)
    hold = 0.35 + 0.1 * how.more
    take, t = _begin(start + 2 * down + hold + REST, how)
    share = pulse(t, start, down, hold, down)
    take.pitch += (1.05 + 0.08 * how.size - 0.75 * how.style.pitch) * share
    take.head[:, 0] += 0.2 * share
    return take


def _dance(act: Act, how: Manner) -> Take:
    """Side steps to a beat: out and together to one side, then to the other, with swinging arms."""
    period, start = 0.45 / how.tempo, _start(how)
    count = 4 if how.brief or how.tempo < 0.8 else 8
    wide = 0.34 * (1 + 0.1 * how.size)
    stance = how.style.stance
    lead = how.first
    sign = 1 if lead == 0 else -1
    take, t = _begin(start + (count + 0.5) * period + REST, how)
    order = [lead, 1 - lead, 1 - lead, lead]
    place = {0: stance / 2, 1: -stance / 2}
    x = {side: np.full(len(t), place[side]) for side in (0, 1)}
    y = {side: np.zeros(len(t)) for side in (0, 1)}
    for k in range(count):
        foot = order[k % 4]
        shift = sign * wide * (1 if k % 4 < 2 else -1)
        u = (t - start - k * period - 0.1 * period) / (0.8 * period)
        x[foot] += shift * ease(u)
        y[foot] += 0.08 * np.sin(np.pi * np.clip(u, 0, 1)) ** 2
    for side in (0, 1):
        take.toes[:, side, 0], take.toes[:, side, 1] = x[side], y[side]
    take.root[:, 0] = (x[0] + x[1]) / 2
    moving = pulse(t, start, period, (count - 1.5) * period, period)
    beat = np.pi * (t - start) / period
    take.height -= moving * 0.06 * np.sin(beat) ** 2
    take.roll += moving * 0.16 * np.sin(beat / 2) * sign
    for side, hand in ((0, 1), (1, -1)):
        swing = np.sin(beat / 2 + 0.3) * sign
        where = np.stack([0.12 + 0.22 * hand * swing, -0.12 + 0.12 * np.sin(beat), 0.3 + 0 * t], axis=-1)
        _hold(take, side, moving, where, (0.8, -0.8, -0.2))
    return take
