"""Acts of the feet: walking, running, marching, turning, jumping, hopping, squatting, sitting down, kicking."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from weft.world.motion_body import Take
from weft.world.motion_gait import ease, pulse, stepping, stride, travel, walking
from weft.world.motion_manner import Manner, begin, hold_hand, repeats, sides_of, start_of
from weft.world.motion_scripts import Act
from weft.world.motion_styles import pose


def _heading(act: Act, how: Manner) -> Callable[[np.ndarray], np.ndarray]:
    sign = -1.0 if act.direction == "right" else 1.0
    if act.path == "circle":
        return lambda u: sign * np.radians(335 + 20 * how.length) * u
    if act.path == "curve":
        return lambda u: sign * np.radians(95 + 12 * how.length) * ease(u)
    if act.path == "zigzag":
        return lambda u: np.radians(48) * np.tanh(2.2 * np.sin(3.5 * np.pi * u + 0.25 * np.pi)) * ease(6 * u)
    return lambda u: 0 * u


def going(act: Act, how: Manner) -> Take:
    run = act.action == "run"
    style = how.style
    long = act.path in ("circle", "zigzag")
    if run:
        period = 1 / (2.7 * how.tempo**0.75)
        length = (0.95 if long else 1.0) * style.stride**0.5 * how.tempo**0.25 * (1 + 0.08 * how.size)
        count = (7 if how.brief else 8 if how.tempo < 0.8 else 11) if long else (5 if how.brief else repeats(how, 7, 9))
    else:
        period = 1 / (1.85 * how.tempo**0.9)
        length = 0.62 * style.stride * how.tempo**0.1 * (1 + 0.08 * how.size) * (0.8 if act.path == "back" else 1)
        count = (
            (6 if how.brief else 5 if how.tempo < 0.8 else 8)
            if long
            else (4 if how.brief else repeats(how, 5, 7) - (how.tempo < 0.8))
        )
    start = start_of(how)
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

    take, t = walking(start + (count + 0.4) * period + how.rest, root_at, style.stance)
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
                hold_hand(take, side, moving, np.array(style.hand) * 0.3 + np.array([0.06, -0.26, 0.16]) * 0.7)
    else:
        take.height -= moving * 0.022 * np.cos(phase) ** 2
        take.sway[:, 0] += moving * 0.02 * np.sin(phase) * (1 if how.first else -1)
    ahead = np.clip(stride(take), -0.8, 0.8)
    for side, sign in ((0, -1), (1, 1)):
        take.hands[:, side, 2] += sign * style.swing * (0.3 if run else 0.36) * ahead
        take.hands[:, side, 1] += style.swing * 0.12 * np.maximum(sign * ahead, 0)
    take.twist += 0.18 * -ahead * (0.4 + 0.6 * style.swing)
    return take


def march(act: Act, how: Manner) -> Take:
    period = 0.52 / how.tempo
    count, start = (5 if how.brief or how.tempo < 0.8 else repeats(how, 6, 8)), start_of(how)
    take, t = begin(start + (count + 0.3) * period + how.rest, how)

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


def turn(act: Act, how: Manner) -> Take:
    sign = -1 if act.direction == "right" else 1
    angle = np.radians(115 + 14 * how.size) * sign
    count, period, start = 5, 0.36 / how.tempo, start_of(how)
    span = (count - 0.6) * period

    def root_at(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((len(at), 2)), angle * ease((at - start) / span)

    take, t = begin(start + (count + 0.2) * period + how.rest, how)
    take.yaw = root_at(t)[1]
    first = 0 if act.direction != "right" else 1
    stepping(take, t, root_at, count, period, start=start, duty=1.15, lift=0.09 * max(how.style.lift, 0.8), kick=0.3,
             stance=how.style.stance, first=first)  # fmt: skip
    take.twist += 0.25 * sign * pulse(t, start - 0.2, 0.3, max(span - 0.5, 0.05), 0.4)
    return take


def jump(act: Act, how: Manner) -> Take:
    count = 1 if how.brief else repeats(how, 1, 2)
    down, up, fly, land, rise = 0.45 / how.tempo, 0.2, 0.44 + 0.03 * how.size, 0.16, 0.45 / how.tempo
    start, cycle = start_of(how), down + up + fly + land + rise + 0.15
    take, t = begin(start + count * cycle + how.rest, how)
    reach = (0.68 + 0.1 * how.length) if act.direction == "forward" else 0.0
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
            hold_hand(take, side, 0.9 * low, (0.1, -0.4, -0.3))
            hold_hand(take, side, pulse(t, at + down * 0.8, up + 0.1, fly * 0.5, 0.35), (0.12, 0.3, 0.38))
    return take


def hop(act: Act, how: Manner) -> Take:
    side = sides_of(act)[0]
    other, sign = 1 - side, 1 if side == 0 else -1
    count = 3 if how.brief or how.tempo < 0.8 else repeats(how, 4, 5)
    period, start = 0.62 / how.tempo**0.7, start_of(how) + 0.35
    fly = min(0.3 + 0.02 * how.size, 0.62 * period)
    take, t = begin(start + count * period + 0.45 + how.rest, how)
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
        hold_hand(take, hand, free * lifted, (0.3, -0.3, 0.1))
    return take


def squat(act: Act, how: Manner) -> Take:
    down, count, start = 0.7 / how.tempo, (1 if how.brief or how.tempo < 0.8 else repeats(how, 1, 2)), start_of(how)
    cycle = 2.3 * down
    take, t = begin(start + count * cycle + how.rest, how)
    low = np.sum([pulse(t, start + k * cycle, down, 0.2 * down, down) for k in range(count)], axis=0)
    take.height -= (0.42 + 0.04 * how.size) * low
    take.pitch += (0.45 - 0.5 * how.style.pitch) * low
    take.sway[:, 1] -= 0.1 * low
    for side in (0, 1):
        hold_hand(take, side, low, (0.0, -0.02, 0.48), (0.6, -1, 0))
    return take


def sit(act: Act, how: Manner) -> Take:
    down, start = 1.0 / how.tempo, start_of(how)
    take, t = begin(start + down + 1.1 + 0.25 * how.more, how)
    low = ease((t - start) / down)
    lean = pulse(t, start - 0.1, 0.55 * down, 0.0, 0.6 * down)
    take.height -= (0.44 + 0.02 * how.size - 0.5 * how.style.drop) * low
    take.sway[:, 1] -= 0.34 * low
    take.pitch += 0.45 * lean
    for side in (0, 1):
        if how.style.hand[2] < 0.4:
            hold_hand(take, side, low * 0.85, (-0.02, -0.36, 0.3), (0.6, -0.4, -0.6))
    return take


def kick(act: Act, how: Manner) -> Take:
    side = sides_of(act)[0]
    sign = 1 if side == 0 else -1
    swing, count, start = 0.3 / how.tempo, 1 if how.brief or how.tempo < 0.8 else repeats(how, 1, 2), start_of(how)
    cycle = 4.6 * swing + 0.25
    take, t = begin(start + count * cycle + how.rest, how)
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
