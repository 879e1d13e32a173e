"""Acts of the hands and of the whole body: waving, raising, reaching, punching, clapping, bowing, dancing."""

from __future__ import annotations

import numpy as np

from weft.world.motion_body import Take
from weft.world.motion_gait import ease, pulse
from weft.world.motion_manner import Manner, begin, hold_hand, repeats, sides_of, start_of
from weft.world.motion_scripts import Act


def wave(act: Act, how: Manner) -> Take:
    rate, start = 1.35 * how.tempo, start_of(how)
    count = 2 if how.brief else 2.5 if how.tempo < 0.8 else 3 + repeats(how, 0, 2)
    up = 0.55 / how.tempo**0.5
    take, t = begin(start + 2 * up + count / rate + how.rest, how)
    share = pulse(t, start, up, count / rate - 0.1, up)
    wide = 0.17 * (1 + 0.12 * how.size)
    for side in sides_of(act):
        hand = np.stack([0.24 + wide * np.sin(2 * np.pi * rate * (t - start - up)), 0.33 + 0 * t, 0.12 + 0 * t], -1)
        hold_hand(take, side, share, hand, (1.0, -0.5, -0.1))
    return take


def raise_hand(act: Act, how: Manner) -> Take:
    up, start = 0.75 / how.tempo, start_of(how)
    hold = 0.55 + 0.15 * how.more
    take, t = begin(start + 2 * up + hold + how.rest, how)
    share = pulse(t, start, up, hold, up)
    way = np.sin(np.pi * share)  # the hand goes up in front of the body
    for side in sides_of(act):
        hand = np.stack([0.05 + 0.02 * how.size + 0 * t, 0.505 + 0 * t, 0.06 + 0.3 * way], axis=-1)
        hold_hand(take, side, share, hand, (0.6, 0.2, 0.8))
    return take


def reach(act: Act, how: Manner) -> Take:
    side = sides_of(act)[0]
    sign = -1 if side == 0 else 1  # the shoulder comes forward
    out, start = 0.75 / how.tempo, start_of(how)
    hold = 0.45 + 0.1 * how.more
    take, t = begin(start + 2 * out + hold + how.rest, how)
    share = pulse(t, start, out, hold, out)
    far = 1 + 0.06 * how.size
    if act.direction == "down":
        take.height -= 0.3 * far * share
        take.pitch += (0.95 * far - 0.6 * how.style.pitch) * share
        take.sway[:, 1] -= 0.04 * share
        hold_hand(take, side, share, (0.0, -0.5, 0.12), (0.5, 0, -1))
    else:
        take.pitch += (0.4 * far - 0.5 * how.style.pitch) * share
        take.twist += 0.45 * sign * share
        hold_hand(take, side, share, (-0.04, 0.1, 0.5), (0.6, -1, 0))
    return take


def punch(act: Act, how: Manner) -> Take:
    hit, start, raise_ = 0.26 / how.tempo, start_of(how), 0.4 / how.tempo**0.5
    sides = sides_of(act)
    least = 2 if how.brief else len(sides) + 1
    blows = least if how.tempo < 0.8 else repeats(how, least, len(sides) + 3)
    cycle = 2.6 * hit
    total = blows * cycle
    take, t = begin(start + 2 * raise_ + total + how.rest, how)
    guard = pulse(t, start, raise_, total, raise_)
    for side in (0, 1):
        hold_hand(take, side, guard, (-0.03, -0.06, 0.2), (0.5, -1, -0.1))
    for k in range(blows):
        side = sides[k % len(sides)]
        out = pulse(t, start + raise_ + k * cycle, hit, 0.1 * hit, 1.3 * hit)
        hold_hand(take, side, out, (-0.12, 0.0, 0.53), (0.6, -1, 0))
        take.twist += (-1 if side == 0 else 1) * (0.4 + 0.05 * how.size) * out
    take.pitch += 0.1 * guard
    take.height -= 0.04 * guard
    return take


def clap(act: Act, how: Manner) -> Take:
    rate, start, up = 1.7 * how.tempo, start_of(how), 0.4 / how.tempo**0.5
    count = 3 if how.brief else 4 if how.tempo < 0.8 else repeats(how, 4, 6)
    take, t = begin(start + 2 * up + count / rate + how.rest, how)
    share = pulse(t, start, up, count / rate, up)
    apart = 0.5 + 0.5 * np.cos(2 * np.pi * rate * (t - start - up))
    hand = np.stack([-0.125 + (0.18 + 0.02 * how.size) * apart, -0.1 + 0 * t, 0.33 - 0.04 * apart], axis=-1)
    for side in (0, 1):
        hold_hand(take, side, share, hand, (1.0, -0.8, -0.3))
    return take


def bow(act: Act, how: Manner) -> Take:
    down, start = 0.8 / how.tempo, start_of(how)
    hold = 0.35 + 0.1 * how.more
    take, t = begin(start + 2 * down + hold + how.rest, how)
    share = pulse(t, start, down, hold, down)
    take.pitch += (1.05 + 0.08 * how.size - 0.75 * how.style.pitch) * share
    take.head[:, 0] += 0.2 * share
    return take


def dance(act: Act, how: Manner) -> Take:
    """Side steps to a beat: out and together to one side, then to the other, with swinging arms."""
    period, start = 0.45 / how.tempo, start_of(how)
    count = 4 if how.brief or how.tempo < 0.8 else 8
    wide = 0.34 * (1 + 0.1 * how.size)
    stance = how.style.stance
    lead = how.first
    sign = 1 if lead == 0 else -1
    take, t = begin(start + (count + 0.5) * period + how.rest, how)
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
        hold_hand(take, side, moving, where, (0.8, -0.8, -0.2))
    return take
