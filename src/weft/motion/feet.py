"""Foot clean-up: feet that touch the ground stop sliding, the legs follow by two-bone inverse kinematics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from weft.errors import WeftError
from weft.motion.clip import Motion
from weft.motion.physics import contacts
from weft.motion.rotation import unit
from weft.motion.skeleton import HUMANML3D

_LEGS = ((1, 4, 7, 10), (2, 5, 8, 11))  # hip, knee, ankle, toe


def pin_feet(motion: Motion, *, blend: int = 4, touching: np.ndarray | None = None) -> Motion:
    """The clip with its feet held still in every contact and eased in and out over `blend` frames.

    A foot's ankle and toe stay where they are on average over a contact, the hip stays, the knee bends in its plane;
    bones keep their length. `touching` [T, 4] are the contacts (left ankle, left toe, right ankle, right toe),
    by default found from positions: slower than 0.4 m/s and within 0.08 m of its lowest place. Raises `WeftError` for
    another layout.
    """
    if motion.layout is not HUMANML3D:
        raise WeftError(f"feet are pinned on the 22 joints of humanml3d, this clip is {motion.layout.name}")
    joints = motion.joints.astype(np.float64)
    down = (
        contacts(joints, motion.fps, speed=0.4, height=0.08) if touching is None else np.asarray(touching, dtype=bool)
    )
    for leg, (hip, knee, ankle, toe) in enumerate(_LEGS):
        flat = down[:, 2 * leg] | down[:, 2 * leg + 1]
        shift = _corrections(joints[:, [ankle, toe]].mean(axis=1), flat, blend)
        goal = joints[:, ankle] + shift
        upper = np.linalg.norm(joints[:, knee] - joints[:, hip], axis=-1)
        lower = np.linalg.norm(joints[:, ankle] - joints[:, knee], axis=-1)
        foot = joints[:, toe] - joints[:, ankle]
        joints[:, knee], joints[:, ankle] = two_bones(joints[:, hip], joints[:, knee], goal, upper, lower)
        joints[:, toe] = joints[:, ankle] + foot
    return replace(motion, joints=joints)


def _corrections(foot: np.ndarray, down: np.ndarray, blend: int) -> np.ndarray:
    """How far to move a foot [T, 3] so that it stands still while `down`; fades out on both sides."""
    shift, weight = np.zeros_like(foot), np.zeros(len(foot))
    edges = np.flatnonzero(np.diff(np.concatenate([[False], down, [False]]).astype(int)))
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        if stop - start < 2:
            continue
        shift[start:stop] += foot[start:stop].mean(axis=0) - foot[start:stop]
        weight[start:stop] += 1
        for side, step in ((start, -1), (stop - 1, 1)):
            for k in range(1, blend + 1):
                frame = side + step * k
                if not 0 <= frame < len(foot) or down[frame]:
                    break
                share = 0.5 * (1 + np.cos(np.pi * k / (blend + 1)))
                shift[frame] += share * shift[side]
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
