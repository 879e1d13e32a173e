"""Foot clean-up: feet that touch the ground stop sliding, the legs follow by two-bone inverse kinematics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.ndimage import gaussian_filter1d, maximum_filter1d

from weft.errors import WeftError
from weft.motion.clip import Motion
from weft.motion.physics import contacts
from weft.motion.rotation import unit
from weft.motion.skeleton import HUMANML3D

_LEGS = ((1, 4, 7, 10), (2, 5, 8, 11))  # hip, knee, ankle, toe


def pin_feet(motion: Motion, *, blend: int = 4, touching: np.ndarray | None = None, drop: float = 0.05) -> Motion:
    """The clip with its feet held in place on the ground in every contact, eased in and out over `blend` frames.

    While the toe touches, it stays where it is on average (over the ground; its height is its own), and the ankle may
    turn about it as it does when the heel leaves the ground; while only the ankle touches, that stays. The hips come
    down by up to `drop` metres where a leg would not reach. Knees bend in their plane; bones keep their length.
    `touching` [T, 4] are the contacts (left ankle, left toe, right ankle, right toe), by default found from positions:
    slower than 0.4 m/s and within 0.08 m of its lowest place. Raises `WeftError` for another layout.
    """
    if motion.layout is not HUMANML3D:
        raise WeftError(f"feet are pinned on the 22 joints of humanml3d, this clip is {motion.layout.name}")
    joints = motion.joints.astype(np.float64)
    down = (
        contacts(joints, motion.fps, speed=0.4, height=0.08) if touching is None else np.asarray(touching, dtype=bool)
    )
    if down.shape != (len(joints), 4):
        raise WeftError(f"touching of shape {down.shape}: needs [{len(joints)}, 4]")
    goals, lacking = [], np.zeros(len(joints))
    for leg, (hip, knee, ankle, toe) in enumerate(_LEGS):
        shift = _corrections(joints[:, ankle], joints[:, toe], down[:, 2 * leg], down[:, 2 * leg + 1], blend)
        goals.append(joints[:, ankle] + shift)
        reach = 0.9995 * _length(joints, hip, knee) + 0.9995 * _length(joints, knee, ankle)
        away = goals[-1] - joints[:, hip]
        height = np.sqrt(np.maximum(reach**2 - away[:, 0] ** 2 - away[:, 2] ** 2, 0))
        # only where the correction asks for it: a leg that is straight by itself stays so
        lacking = np.maximum(lacking, np.where(np.abs(shift).max(axis=-1) > 1e-6, -away[:, 1] - height, 0))
    lowered = np.clip(lacking, 0, drop)
    if lowered.any():  # as a slow sway: the widest need nearby, then smooth, so that it is never less than needed
        lowered = gaussian_filter1d(maximum_filter1d(lowered, 2 * blend + 1), blend / 2, mode="nearest", truncate=2)
    joints_before = joints.copy()
    joints[..., 1] -= lowered[:, None]
    for (hip, knee, ankle, toe), goal in zip(_LEGS, goals, strict=True):
        upper, lower = _length(joints_before, hip, knee), _length(joints_before, knee, ankle)
        foot = joints_before[:, toe] - joints_before[:, ankle]
        joints[:, knee], joints[:, ankle] = two_bones(joints[:, hip], joints[:, knee], goal, upper, lower)
        joints[:, toe] = joints[:, ankle] + foot
    return replace(motion, joints=joints)


def _length(joints: np.ndarray, one: int, other: int) -> np.ndarray:
    return np.linalg.norm(joints[:, other] - joints[:, one], axis=-1)


def _corrections(
    ankle: np.ndarray, toe: np.ndarray, ankle_down: np.ndarray, toe_down: np.ndarray, blend: int
) -> np.ndarray:
    """How far to move a foot [T, 3] over the ground so that what touches it stands still; fades out on both sides.

    A stance is a run of frames in which either touches. Holding the middle of the foot instead would drag the toe
    whenever the heel lifts.
    """
    shift, weight = np.zeros_like(ankle), np.zeros(len(ankle))
    down = ankle_down | toe_down
    edges = np.flatnonzero(np.diff(np.concatenate([[False], down, [False]]).astype(int)))
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        if stop - start < 2:
            continue
        rows = np.arange(start, stop)
        tips = rows[toe_down[rows]]
        made = np.zeros((stop - start, 3))
        if len(tips):
            first, last = tips[0], tips[-1]
            hold = toe[tips].mean(axis=0)
            made[first - start : last + 1 - start] = hold - toe[first : last + 1]
            # before and after, on the heel alone: it stays where the toe's stance finds it
            made[: first - start] = ankle[first] + made[first - start] - ankle[start:first]
            made[last + 1 - start :] = ankle[last] + made[last - start] - ankle[last + 1 : stop]
        else:
            made[:] = ankle[rows].mean(axis=0) - ankle[rows]
        made[:, 1] = 0
        shift[rows] += made
        weight[rows] += 1
        for side, step in ((start, -1), (stop - 1, 1)):
            for k in range(1, blend + 1):
                frame = side + step * k
                if not 0 <= frame < len(ankle) or down[frame]:
                    break
                share = 0.5 * (1 + np.cos(np.pi * k / (blend + 1)))
                shift[frame] += share * made[side - start]
                weight[frame] += share
    return shift / np.maximum(weight, 1)[:, None]


def two_bones(
    start: np.ndarray, middle: np.ndarray, goal: np.ndarray, upper: np.ndarray, lower: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Middle and end of a two-bone chain [T, 3] that reaches for `goal` and bends to where `middle` was.

    A goal out of reach is reached for as far as the bones go, with the chain all but straight.
    """
    along = goal - start
    far = np.linalg.norm(along, axis=-1)
    reach = np.clip(far, np.abs(upper - lower) + 1e-6, (upper + lower) * (1 - 1e-6))
    direction = unit(along)
    bend = middle - start
    bend = bend - (bend * direction).sum(-1, keepdims=True) * direction
    straight = np.linalg.norm(bend, axis=-1) < 1e-6
    if straight.any():  # no plane to bend in: to the front
        front = np.array([0.0, 0.0, 1.0]) - direction * direction[:, 2:]
        bend = np.where(straight[:, None], front, bend)
    bend = unit(bend)
    forth = (upper**2 - lower**2 + reach**2) / (2 * np.where(reach > 0, reach, 1))
    side = np.sqrt(np.maximum(upper**2 - forth**2, 0))
    return start + forth[:, None] * direction + side[:, None] * bend, start + reach[:, None] * direction
