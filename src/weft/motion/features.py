"""Motion features of HumanML3D (263 numbers a frame) and KIT (251), from joint positions.

The rules are the dataset's own (EricGuo5513/HumanML3D motion_representation.ipynb, momask-codes
utils/motion_process.py), including those it would rather not have; `heading="correct"` mends the two that matter.

Work is done on clips of mixed length laid end to end, component by component ([3, J, frames], every NumPy call on
one long contiguous row), a block of clips that fits the cache at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from scipy import fft

from weft.errors import WeftError
from weft.motion.skeleton import HUMANML3D, Layout

HEADINGS = ("humanml3d", "correct")
_SIGMA = 20  # frames, of the Gaussian that smooths the heading
_REACH = 4 * _SIGMA
_BLOCK = 2048  # frames worked on at a time: the arrays of a block stay in the second-level cache

Clips = TypeVar("Clips", np.ndarray, list[np.ndarray])  # one clip, or several of mixed length


def extract(
    clips: Clips,
    *,
    layout: Layout = HUMANML3D,
    heading: str = "humanml3d",
    lengths: Sequence[float] | np.ndarray | str | None = None,
    contact: float | None = None,
) -> Clips:
    """Features of joint positions: [T, J, 3] -> [T-1, 263 or 251] float32; a list of clips gives a list.

    Units are the layout's (metres and 20 fps for HumanML3D, whatever the clip was recorded at: resample before).
    `lengths` are the bone lengths to retarget to: those of the layout by default, "own" for no retargeting.
    `heading="humanml3d"` is bug-compatible (hips swapped in the smoothed heading, wrong sign of the yaw velocity
    when the heading passes half a turn); "correct" is not. `contact` overrides the layout's squared threshold.
    Raises `WeftError` for another shape, fewer than two frames, NaN, or a bone of length zero.
    """
    if heading not in HEADINGS:
        raise WeftError(f"heading: '{heading}' is unknown, use one of {', '.join(HEADINGS)}")
    many = _checked(clips, layout, least=2)
    target = None if isinstance(lengths, str) else layout.bone_lengths(lengths)
    if isinstance(lengths, str) and lengths != "own":
        raise WeftError(f"lengths: '{lengths}' is unknown, use 'own' or {len(layout.joints) - 1} numbers")
    threshold = layout.contact if contact is None else contact
    total = sum(len(c) for c in many)
    out = np.empty((total, layout.width), dtype=np.float32)
    views: list[np.ndarray] = []
    start, k = 0, 0
    while k < len(many):
        block, frames = [many[k]], len(many[k])
        while k + len(block) < len(many) and frames + len(many[k + len(block)]) <= _BLOCK:
            block.append(many[k + len(block)])
            frames += len(block[-1])
        _extract_block(block, layout, heading, target, threshold, out[start : start + frames], k)
        for clip in block:
            views.append(out[start : start + len(clip) - 1])  # the last row of a clip has no next frame
            start += len(clip)
        k += len(block)
    return _like(clips, views)


def retarget(clips: Clips, *, layout: Layout = HUMANML3D, lengths: Sequence[float] | np.ndarray | None = None) -> Clips:
    """The same bone directions on a skeleton with `lengths`, the root path scaled by the ratio of leg lengths.

    This is the dataset's uniform_skeleton: its inverse and forward kinematics share every rotation, so they reduce
    to directions times lengths. [T, J, 3] -> [T, J, 3] float32. Raises `WeftError` as `extract`.
    """
    target = layout.bone_lengths(lengths)
    done = []
    for k, clip in enumerate(_checked(clips, layout)):
        points = _components(clip)
        directions, own = _directions(points, layout, np.array([0]), k)
        _retarget(points, directions, own[:, 0], np.array([len(clip)]), layout, target)
        done.append(np.ascontiguousarray(points.transpose(2, 1, 0)))
    return _like(clips, done)


def place(clips: Clips, *, layout: Layout = HUMANML3D) -> Clips:
    """Lowest point of the clip on the floor, first root above the origin, first pose facing +z: [T, J, 3] float32."""
    done = []
    for clip in _checked(clips, layout):
        points = _components(clip)
        _place(points, None, np.array([0]), np.array([len(clip)]), layout)
        done.append(np.ascontiguousarray(points.transpose(2, 1, 0)))
    return _like(clips, done)


def _checked(clips: Clips, layout: Layout, least: int = 1) -> list[np.ndarray]:
    if not isinstance(clips, list | tuple):
        _check_clip(clips, layout, "", least)
        return [clips]
    for k, clip in enumerate(clips):
        _check_clip(clip, layout, f"clip {k}: ", least)
    return list(clips)


def _like(clips: Clips, done: list[np.ndarray]) -> Clips:
    return done if isinstance(clips, list | tuple) else done[0]


def _check_clip(clip: np.ndarray, layout: Layout, name: str, least: int) -> None:
    joints = len(layout.joints)
    if getattr(clip, "ndim", 0) != 3 or clip.shape[1:] != (joints, 3):
        shape = getattr(clip, "shape", type(clip).__name__)
        raise WeftError(f"{name}shape {shape}: {layout.name} needs [frames, {joints}, 3]")
    if len(clip) < least:
        raise WeftError(f"{name}{len(clip)} frame(s): features are differences and need at least {least}")
    if not np.isfinite(clip.sum()) and not np.isfinite(clip).all():  # a sum of good values can only overflow
        bad = np.flatnonzero(~np.isfinite(clip).all(axis=(1, 2)))
        raise WeftError(f"{name}NaN or infinity in {len(bad)} frame(s), the first is {bad[0]}: cut or fill them")


def _components(clip: np.ndarray) -> np.ndarray:
    """[T, J, 3] -> contiguous float32 [3, J, T]."""
    return np.ascontiguousarray(clip.transpose(2, 1, 0), dtype=np.float32)


def _extract_block(
    block: list[np.ndarray],
    layout: Layout,
    heading: str,
    target: np.ndarray | None,
    threshold: float,
    out: np.ndarray,
    first: int,
) -> None:
    frames = len(out)
    counts = np.array([len(c) for c in block])
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    points = np.empty((3, len(layout.joints), frames), dtype=np.float32)
    for start, clip in zip(starts, block, strict=True):
        points[:, :, start : start + len(clip)] = clip.transpose(2, 1, 0)
    directions, own = _directions(points, layout, starts, first)
    if target is not None:
        _retarget(points, directions, own, counts, layout, target)
    _place(points, directions, starts, counts, layout)

    half = _half_angles(points, layout, heading, starts, counts)  # [N] float64
    step = np.empty(frames)
    step[:-1] = half[1:] - half[:-1]
    step[-1] = 0
    if heading == "humanml3d":
        out[:, 0] = np.arcsin(np.sin(step))
    else:
        out[:, 0] = step - np.pi * np.round(step / np.pi)
    turn = _Yaw(half)

    _rotations(directions, half, layout, out[:, layout.blocks()["rotations"]])

    moved = np.empty_like(points)  # to the next frame
    np.subtract(points[:, :, 1:], points[:, :, :-1], out=moved[:, :, :-1])
    moved[:, :, -1] = 0
    following = _Yaw(np.concatenate([half[1:], half[-1:]]))
    out[:, 1], out[:, 2] = following.apply(moved[0, 0], moved[2, 0])
    out[:, 3] = points[1, 0]

    feet = list(layout.feet)
    squared = moved[0, feet] ** 2 + moved[1, feet] ** 2 + moved[2, feet] ** 2
    out[:, layout.blocks()["contacts"]] = (squared < threshold).T

    velocities = out[:, layout.blocks()["velocities"]].reshape(frames, -1, 3)
    x, z = turn.apply(moved[0], moved[2])
    velocities[:, :, 0], velocities[:, :, 1], velocities[:, :, 2] = x.T, moved[1].T, z.T
    local = out[:, layout.blocks()["positions"]].reshape(frames, -1, 3)
    x, z = turn.apply(points[0, 1:] - points[0, :1], points[2, 1:] - points[2, :1])
    local[:, :, 0], local[:, :, 1], local[:, :, 2] = x.T, points[1, 1:].T, z.T


class _Yaw:
    """Turns about y by twice the half angle, frame by frame."""

    def __init__(self, half: np.ndarray) -> None:
        self.cos, self.sin = np.cos(2 * half).astype(np.float32), np.sin(2 * half).astype(np.float32)

    def apply(self, x: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.cos * x + self.sin * z, self.cos * z - self.sin * x


def _directions(points: np.ndarray, layout: Layout, starts: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit bone directions [3, J-1, N] and the bone lengths at the first frame of every clip [J-1, clips]."""
    directions = points[:, 1:] - points[:, list(layout.parents[1:])]
    length = np.sqrt(directions[0] ** 2 + directions[1] ** 2 + directions[2] ** 2)
    if not length.min() > 1e-7:
        joint, frame = np.argwhere(~(length > 1e-7))[0]
        clip = int(np.searchsorted(starts, frame, side="right")) - 1
        where = f"clip {first + clip}, frame {frame - starts[clip]}"
        raise WeftError(f"{where}: {layout.joints[joint + 1]} lies on its parent, so its bone has no direction")
    directions /= length
    return directions, length[:, starts]


def _retarget(
    points: np.ndarray,
    directions: np.ndarray,
    own: np.ndarray,
    counts: np.ndarray,
    layout: Layout,
    target: np.ndarray,
) -> None:
    """In place. `own` are the lengths at the clips' first frames, [J-1] or [J-1, clips]."""
    legs = [j - 1 for j in layout.legs]
    scale = target[list(layout.legs)].sum() / own.reshape(len(own), -1)[legs].sum(axis=0)
    points[:, 0] *= np.repeat(scale, counts).astype(np.float32)
    goal = target.astype(np.float32)
    for joint in (j for level in layout.levels for j in level):
        np.multiply(directions[:, joint - 1], goal[joint], out=points[:, joint])
        points[:, joint] += points[:, layout.parents[joint]]


def _place(
    points: np.ndarray, directions: np.ndarray | None, starts: np.ndarray, counts: np.ndarray, layout: Layout
) -> None:
    """Floor, origin and first heading of every clip, in place."""
    floor = np.minimum.reduceat(points[1].min(axis=0), starts)
    points[1] -= np.repeat(floor, counts)
    points[0] -= np.repeat(points[0, 0, starts], counts)
    points[2] -= np.repeat(points[2, 0, starts], counts)
    forward = _forward(points[:, :, starts].astype(np.float64), layout.face)
    half = np.repeat(_half_of(forward, np.zeros(len(starts), dtype=int)), counts)
    turn = _Yaw(half)
    points[0], points[2] = turn.apply(points[0], points[2])
    if directions is not None:
        directions[0], directions[2] = turn.apply(directions[0], directions[2])


def _forward(points: np.ndarray, face: tuple[int, int, int, int], swapped: bool = False) -> np.ndarray:
    """The heading y x across as (x, z), [2, N]; shorter than one where the shoulders lean."""
    right_hip, left_hip, right_shoulder, left_shoulder = face
    hips = points[:, right_hip] - points[:, left_hip]
    across = (-hips if swapped else hips) + points[:, right_shoulder] - points[:, left_shoulder]
    length = np.sqrt((across * across).sum(axis=0))
    return np.stack([across[2], -across[0]]) / np.where(length > 0, length, 1)


def _half_of(forward: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Half the angle of the shortest rotation of (x, z) to +z: within a quarter turn, so w = cos >= 0.

    Where there is no heading (a body across the vertical) the last one holds; none at all is +z.
    """
    lost = (forward * forward).sum(axis=0) < 1e-16
    if lost.any():
        last = np.where(lost, -1, np.arange(len(lost)))
        last = np.maximum.accumulate(last)
        first = np.maximum.accumulate(np.where(np.isin(np.arange(len(lost)), starts), np.arange(len(lost)), 0))
        held = np.where((last >= first)[None], forward[:, last], np.array([[0.0], [1.0]]))
        forward = np.where(lost[None], held, forward)
    return -0.5 * np.arctan2(forward[0], forward[1])


def _half_angles(
    points: np.ndarray, layout: Layout, heading: str, starts: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Half the yaw of every frame's smoothed heading; zero in a clip's first frame."""
    joints = list(layout.face)
    forward = _forward(points[:, joints].astype(np.float64), (0, 1, 2, 3), swapped=heading == "humanml3d")
    half = _half_of(_smoothed(forward, starts, counts), starts)
    half[starts] = 0
    return half


def _smoothed(rows: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Gaussian over time, sigma 20 frames, cut at four sigma, ends held: every clip on its own. [2, N] -> [2, N]."""
    x = np.arange(-_REACH, _REACH + 1)
    kernel = np.exp(-0.5 * (x / _SIGMA) ** 2)
    kernel /= kernel.sum()
    # one long row: every clip with its held ends on both sides
    index = np.arange(len(counts)).repeat(counts + 2 * _REACH)
    offset = np.arange(len(index)) - (starts + 2 * _REACH * np.arange(len(counts)))[index] - _REACH
    inside = (offset >= 0) & (offset < counts[index])
    padded = rows[:, starts[index] + np.clip(offset, 0, counts[index] - 1)]
    size = fft.next_fast_len(padded.shape[1] + 2 * _REACH, real=True)
    mixed = fft.irfft(fft.rfft(padded, size) * fft.rfft(kernel, size), size)
    return mixed[:, _REACH : _REACH + padded.shape[1]][:, inside]


def _rotations(directions: np.ndarray, half: np.ndarray, layout: Layout, out: np.ndarray) -> None:
    """Writes each joint's rotation relative to the one before it, as 6D, into `out` [N, (J-1)*6]."""
    frames = len(half)
    absolute = np.empty((4, len(layout.joints), frames), dtype=np.float32)
    absolute[0, 0], absolute[2, 0] = np.cos(half), np.sin(half)
    absolute[1, 0] = absolute[3, 0] = 0
    _between_rest(layout.directions[1:].astype(np.float32), directions, absolute[:, 1:])
    before = absolute[:, list(layout.turned_by[1:])]
    aw, ax, ay, az = before
    bw, bx, by, bz = absolute[:, 1:]
    # conj(a) * b
    w = aw * bw + ax * bx + ay * by + az * bz
    x = aw * bx - ax * bw - ay * bz + az * by
    y = aw * by + ax * bz - ay * bw - az * bx
    z = aw * bz - ax * by + ay * bx - az * bw
    columns = out.reshape(frames, -1, 6)
    zz = z * z
    columns[:, :, 0] = (1 - 2 * (y * y + zz)).T
    columns[:, :, 1] = (2 * (x * y + z * w)).T
    columns[:, :, 2] = (2 * (x * z - y * w)).T
    columns[:, :, 3] = (2 * (x * y - z * w)).T
    columns[:, :, 4] = (1 - 2 * (x * x + zz)).T
    columns[:, :, 5] = (2 * (y * z + x * w)).T


def _between_rest(rest: np.ndarray, v: np.ndarray, q: np.ndarray) -> None:
    """Shortest rotations from constant axes `rest` [J-1, 3] to unit vectors v [3, J-1, N], into q [4, J-1, N]."""
    q[:] = 0
    for axis in range(3):
        for sign in (1.0, -1.0):
            rows = np.flatnonzero(rest[:, axis] == sign)
            if not len(rows):
                continue
            one, two = (axis + 1) % 3, (axis + 2) % 3
            # e x v for a coordinate axis e: two components, one with a sign
            q[0, rows] = 1 + sign * v[axis, rows]
            q[1 + one, rows] = -sign * v[two, rows]
            q[1 + two, rows] = sign * v[one, rows]
    length = np.sqrt(q[0] ** 2 + q[1] ** 2 + q[2] ** 2 + q[3] ** 2)
    if length.min() < 1e-6:  # exactly opposite: a half turn about the next axis
        for joint, frame in np.argwhere(length < 1e-6):
            q[:, joint, frame] = 0
            q[1 + (int(np.abs(rest[joint]).argmax()) + 1) % 3, joint, frame] = 1
            length[joint, frame] = 1
    q /= length
