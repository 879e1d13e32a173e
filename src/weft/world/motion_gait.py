"""Steps: where feet stand, when they leave and land, and the body above them.

Every foot has a list of steps. Between two of them its toe does not move, so nothing skates; the root's path is given
beforehand and the feet are put down where the body will be in the middle of their stance.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from weft.world.motion_body import TOE_Z, Take, stand, turned

FPS = 20.0


def ease(u: np.ndarray) -> np.ndarray:
    """From 0 to 1 with no speed and no acceleration at the ends (minimum jerk); constant outside of 0..1."""
    u = np.clip(u, 0, 1)
    return u * u * u * (10 - 15 * u + 6 * u * u)


def pulse(t: np.ndarray, start: float, up: float, hold: float, down: float) -> np.ndarray:
    """Eases from 0 to 1, stays, and eases back."""
    return ease((t - start) / up) - ease((t - start - up - hold) / down)


def times(seconds: float) -> np.ndarray:
    return np.arange(max(round(seconds * FPS), 2)) / FPS


def travel(
    progress: np.ndarray, length: float, turn: Callable[[np.ndarray], np.ndarray], back: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Root [T, 2] and yaw [T] on a path of `length` metres whose heading at share u of the way is `turn(u)`."""
    u = np.linspace(0, 1, 257)
    heading = turn(u)
    step = length / 256 * (-1 if back else 1)
    mid = (heading[1:] + heading[:-1]) / 2
    x = np.concatenate([[0], np.cumsum(np.sin(mid))]) * step
    z = np.concatenate([[0], np.cumsum(np.cos(mid))]) * step
    return np.stack([np.interp(progress, u, x), np.interp(progress, u, z)], axis=-1), np.interp(progress, u, heading)


def stepping(
    take: Take,
    t: np.ndarray,
    root_at: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    count: int,
    period: float,
    *,
    start: float = 0.0,
    duty: float = 1.15,
    lift: float = 0.09,
    kick: float = 0.6,
    back: float = 0.0,
    stance: float = 0.2,
    first: int = 1,
) -> None:
    """Writes `count` alternating steps into a take.

    Step k lands at `start` + (k + 1) `period` and stands for `duty` periods. `lift` is the height of the toe in
    metres, `kick` how far the heel comes up when the foot leaves (radians), `back` how far the toe is drawn behind
    a straight swing. `first` is the side of the first step.
    """
    for side in (0, 1):
        steps = np.arange(0 if side == first else 1, count, 2)
        lands = start + (steps + 1) * period
        leaves = np.maximum(lands - (2 - duty) * period, start + 0.1 * period * (steps > 0))
        where, yaw = root_at(np.concatenate([[-1.0], lands + duty * period / 2]))
        out = stance / 2 * (1 if side == 0 else -1)
        feet = turned(np.stack([np.full(len(yaw), out), 0 * yaw, np.full(len(yaw), TOE_Z)], axis=-1), yaw)
        feet[:, [0, 2]] += where
        k = np.searchsorted(leaves, t, side="right")  # steps begun
        now = np.maximum(k - 1, 0)
        u = np.where(k > 0, np.clip((t - leaves[now]) / (lands[now] - leaves[now]), 0, 1), 0.0)
        share = ease((u - 0.1) / 0.8)[:, None]  # up first, then forward
        a, b = feet[np.where(k > 0, now, 0)], feet[np.where(k > 0, now + 1, 0)]
        toe = a + share * (b - a)
        bump = np.sin(np.pi * u)
        early = np.sin(np.pi * u**0.75)
        toe[:, 1] = lift * (early if back else bump)
        facing = yaw[np.where(k > 0, now, 0)] * (1 - share[:, 0]) + yaw[np.where(k > 0, now + 1, 0)] * share[:, 0]
        if back:
            toe -= back * early[:, None] * np.stack([np.sin(facing), 0 * facing, np.cos(facing)], axis=-1)
        # the heel comes up before the toe leaves and goes down on the way
        ready = np.minimum(0.3 * duty * period, 0.25)
        following = np.append(leaves, np.inf)[k]
        pushing = ease((t - following + ready) / ready)
        falling = np.where(k > 0, (1 - ease(u * 1.15)), 0.0)
        take.toes[:, side] = toe
        take.feet[:, side, 0] = facing
        take.feet[:, side, 1] = kick * np.maximum(pushing, falling * (k > 0)) - 0.12 * bump**2 * (u > 0.5) * (
            kick > 0.3
        )


def walking(
    seconds: float,
    root_at: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    stance: float,
) -> tuple[Take, np.ndarray]:
    """A take whose root follows `root_at`, and its times."""
    t = times(seconds)
    take = stand(len(t), stance)
    take.root, take.yaw = root_at(t)
    return take, t


def stride(take: Take) -> np.ndarray:
    """How far the left foot is before the right one, in the body's frame, [T] metres: what the arms swing to."""
    return turned(take.toes[:, 0] - take.toes[:, 1], -take.yaw)[:, 2]
