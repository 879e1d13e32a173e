"""From what a body does to where its 22 joints are.

A `Take` says over time where the root goes, how the torso leans, where the hands and toes are. `joints_of` puts the
skeleton of HumanML3D into it: the spine by forward kinematics, arms and legs by two-bone inverse kinematics, so bones
keep their length and a toe that stands still in the take stands still in the clip.

Metres and radians; y up; a body at yaw 0 faces +z and has its left at +x. Positive yaw turns left, positive pitch
leans forward, positive roll leans to the right, positive twist turns the chest left.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from scipy.ndimage import gaussian_filter1d

from weft.motion.feet import two_bones
from weft.motion.skeleton import HUMANML3D

_LENGTHS = HUMANML3D.bone_lengths()
STAND = 0.945  # height of the pelvis of a body that stands
REACH = 0.995 * (_LENGTHS[4] + _LENGTHS[7])  # of a leg
_FOOT = np.array([0.0, -0.062, 0.129]) / np.hypot(0.062, 0.129) * _LENGTHS[10]  # from ankle to toe, flat on the floor
TOE_Z = 0.11  # a toe stands this far before the root
HIP_X, HIP_Y = 0.06, 0.085


@dataclass
class Take:
    """T frames of a body; sides are 0 left and 1 right, and a hand's x is its distance outwards.

    `hands` are relative to the shoulders and `elbows` point to where they bend, both in the frame of the root.
    """

    root: np.ndarray  # [T, 2] x, z
    yaw: np.ndarray  # [T]
    height: np.ndarray  # [T] of the pelvis above STAND
    sway: np.ndarray  # [T, 2] of the pelvis from the root, in its own frame (left, forward)
    pitch: np.ndarray  # [T]
    roll: np.ndarray
    twist: np.ndarray
    head: np.ndarray  # [T, 2] pitch and roll on top of the torso's
    hands: np.ndarray  # [T, 2, 3]
    elbows: np.ndarray  # [T, 2, 3]
    toes: np.ndarray  # [T, 2, 3] in the world
    feet: np.ndarray  # [T, 2, 2] yaw and pitch (heel up) of the feet

    def __len__(self) -> int:
        return len(self.yaw)


def stand(frames: int, stance: float = 0.2) -> Take:
    """A body that stands at the origin with its arms down."""
    zero = np.zeros(frames)
    take = Take(
        *(np.zeros((frames, 2)), zero.copy(), zero.copy(), np.zeros((frames, 2)), zero.copy(), zero.copy()),
        *(zero.copy(), np.zeros((frames, 2)), np.zeros((frames, 2, 3)), np.zeros((frames, 2, 3))),
        *(np.zeros((frames, 2, 3)), np.zeros((frames, 2, 2))),
    )
    take.hands[:] = (0.06, -0.5, 0.05)
    take.elbows[:] = (0.5, -0.2, -1.0)
    take.toes[:, 0] = (stance / 2, 0, TOE_Z)
    take.toes[:, 1] = (-stance / 2, 0, TOE_Z)
    return take


def turned(v: np.ndarray, yaw: np.ndarray) -> np.ndarray:
    """Vectors [..., 3] turned about y."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    return np.stack([cos * v[..., 0] + sin * v[..., 2], v[..., 1], cos * v[..., 2] - sin * v[..., 0]], axis=-1)


def join(takes: list[Take]) -> Take:
    """Takes one after the other, each from where the one before ended."""
    done = takes[0]
    for take in takes[1:]:
        yaw, place = done.yaw[-1], np.array([done.root[-1, 0], 0.0, done.root[-1, 1]])
        root = np.stack([take.root[:, 0], np.zeros(len(take)), take.root[:, 1]], axis=-1)
        take.root = (turned(root, yaw) + place)[:, [0, 2]]
        take.yaw = take.yaw + yaw
        take.toes = turned(take.toes, yaw) + place
        take.feet[..., 0] += yaw
        done = Take(*(np.concatenate([getattr(done, f.name), getattr(take, f.name)]) for f in fields(Take)))
    return done


def joints_of(take: Take) -> np.ndarray:
    """Joints [T, 22, 3] float32; legs that would be too short pull the pelvis down."""
    frames = len(take)
    soft = _softened(take)
    joints = np.empty((frames, 22, 3))
    tilt = _frames(soft, (0.15, 0.5, 0.8, 1.0))
    pelvis, low, mid, chest = tilt
    side = np.array([1.0, -1.0])
    hips = np.stack([_bone(pelvis, (s * 0.57, -0.80, -0.15), 1 + i) for i, s in enumerate(side)], axis=1)

    shift = np.stack([soft.sway[:, 0], np.zeros(frames), soft.sway[:, 1] - 0.12 * np.sin(soft.pitch)], axis=-1)
    base = turned(shift, soft.yaw)
    base[:, [0, 2]] += soft.root
    base[:, 1] = STAND + soft.height
    foot = _feet(soft)
    ankles = soft.toes - foot
    flat = np.linalg.norm((ankles - hips - base[:, None])[..., [0, 2]], axis=-1)
    room = np.sqrt(np.maximum(REACH**2 - np.minimum(flat, 0.9 * REACH) ** 2, 0)) + ankles[..., 1] - hips[..., 1]
    most = room.min(axis=1)
    base[:, 1] -= gaussian_filter1d(np.maximum(base[:, 1] - most, 0), 1.0)
    base[:, 1] = np.minimum(base[:, 1], most)

    joints[:, 0] = base
    joints[:, 1], joints[:, 2] = base + hips[:, 0], base + hips[:, 1]
    joints[:, 3] = base + _bone(low, (0.0, 0.97, -0.2), 3)
    joints[:, 6] = joints[:, 3] + _bone(mid, (0.0, 1.0, 0.04), 6)
    joints[:, 9] = joints[:, 6] + _bone(chest, (0.0, 0.93, 0.3), 9)
    joints[:, 12] = joints[:, 9] + _bone(chest, (0.0, 0.98, -0.18), 12)
    joints[:, 15] = joints[:, 12] + _bone(_tilted(soft, 1.0, head=True), (0.0, 0.88, 0.47), 15)
    for i, s in enumerate(side):
        joints[:, 13 + i] = joints[:, 9] + _bone(chest, (s * 0.55, 0.82, -0.15), 13 + i)
        joints[:, 16 + i] = joints[:, 13 + i] + _bone(chest, (s * 0.96, 0.22, -0.1), 16 + i)

    mirror = np.array([[1.0, 1, 1], [-1, 1, 1]])
    facing = (soft.yaw + 0.7 * soft.twist)[:, None]
    shoulders = joints[:, 16:18]
    elbows, wrists = _limbs(
        shoulders,
        shoulders + turned(soft.elbows * mirror, facing),
        shoulders + turned(soft.hands * mirror, facing),
        _LENGTHS[18:20],
        _LENGTHS[20:22],
    )
    joints[:, 18:20], joints[:, 20:22] = elbows, wrists
    ahead = turned(np.array([[[0.12, 0, 1.0], [-0.12, 0, 1.0]]]) + np.zeros((frames, 2, 1)), soft.feet[..., 0])
    knees, ends = _limbs(joints[:, 1:3], joints[:, 1:3] + ahead, ankles, _LENGTHS[4:6], _LENGTHS[7:9])
    joints[:, 4:6], joints[:, 7:9] = knees, ends
    joints[:, 10:12] = ends + foot
    return joints.astype(np.float32)


def _softened(take: Take) -> Take:
    """The seams between poses taken off everything but the feet and the path."""
    soft = {n: gaussian_filter1d(getattr(take, n), 1.2, axis=0, mode="nearest") for n in ("height", "sway", "hands")}
    soft |= {n: gaussian_filter1d(getattr(take, n), 1.5, axis=0, mode="nearest") for n in ("pitch", "roll", "twist")}
    soft |= {n: gaussian_filter1d(getattr(take, n), 1.5, axis=0, mode="nearest") for n in ("head", "elbows")}
    return Take(**{f.name: soft.get(f.name, getattr(take, f.name)) for f in fields(Take)})


def _matrix(yaw: np.ndarray, pitch: np.ndarray, roll: np.ndarray) -> np.ndarray:
    """Ry(yaw) Rx(pitch) Rz(roll): [..., 3, 3]."""
    cy, sy, cp, sp, cr, sr = (f(a) for a in (yaw, pitch, roll) for f in (np.cos, np.sin))
    rows = [
        *(cy * cr - sy * sp * -sr, -cy * sr + sy * sp * cr, sy * cp),
        *(cp * sr, cp * cr, -sp),
        *(-sy * cr + cy * sp * sr, sy * sr + cy * sp * cr, cy * cp),
    ]
    return np.stack(rows, axis=-1).reshape(*yaw.shape, 3, 3)


def _frames(take: Take, shares: tuple[float, ...]) -> np.ndarray:
    """The frames of the torso from the pelvis upwards: [share, T, 3, 3]."""
    s = np.array(shares)[:, None]
    return _matrix(take.yaw + s * take.twist, s * take.pitch, s * take.roll)


def _tilted(take: Take, share: float, head: bool) -> np.ndarray:
    return _matrix(take.yaw + share * take.twist, take.pitch + take.head[:, 0], take.roll + take.head[:, 1])


def _bone(frame: np.ndarray, direction: tuple[float, float, float], joint: int) -> np.ndarray:
    v = np.array(direction)
    return frame @ (v / np.linalg.norm(v) * _LENGTHS[joint])


def _feet(take: Take) -> np.ndarray:
    """From ankle to toe, [T, 2, 3]."""
    yaw, pitch = take.feet[..., 0], take.feet[..., 1]
    y = _FOOT[1] * np.cos(pitch) - _FOOT[2] * np.sin(pitch)
    z = _FOOT[2] * np.cos(pitch) + _FOOT[1] * np.sin(pitch)
    return np.stack([z * np.sin(yaw), y, z * np.cos(yaw)], axis=-1) * (_LENGTHS[10:12] / _LENGTHS[10])[:, None]


def _limbs(
    start: np.ndarray, middle: np.ndarray, goal: np.ndarray, upper: np.ndarray, lower: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`two_bones` for both sides: [T, 2, 3] each."""
    start, middle, goal = (v.reshape(-1, 3) for v in (start, middle, goal))
    many = len(start) // 2
    a, b = two_bones(start, middle, goal, np.tile(upper, many), np.tile(lower, many))
    return a.reshape(-1, 2, 3), b.reshape(-1, 2, 3)
