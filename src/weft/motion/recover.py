"""Joint positions from motion features, both ways the dataset offers: stored local positions, or stored rotations.

Source: EricGuo5513/HumanML3D motion_representation.ipynb, recover_from_ric and recover_from_rot.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from weft.errors import WeftError
from weft.motion.features import Clips
from weft.motion.skeleton import Layout, layout_of

SOURCES = ("positions", "rotations")


def recover(
    features: Clips, source: str = "positions", *, lengths: Sequence[float] | np.ndarray | None = None
) -> Clips:
    """Joints of features: [..., T, 263 or 251] -> [..., T, J, 3] float32; a list of clips gives a list.

    `source="positions"` uses the stored local joint positions (bones may change length in generated motion),
    "rotations" the stored rotations on a skeleton with `lengths` (the layout's own by default). Both place the
    root by summing the stored velocities. Raises `WeftError` for another width or NaN.
    """
    if source not in SOURCES:
        raise WeftError(f"source: '{source}' is unknown, use one of {', '.join(SOURCES)}")
    if isinstance(features, list | tuple):
        return _recover_many(list(features), source, lengths)
    features = _checked(features)
    batch, frames = features.shape[:-2], features.shape[-2]
    rows = features.reshape(-1, features.shape[-1])
    counts = np.full(len(rows) // frames if frames else 0, frames)
    layout = layout_of(features.shape[-1])
    joints = _recover(rows, counts, layout, source, lengths)
    return joints.reshape(*batch, frames, len(layout.joints), 3)


def _recover_many(
    clips: list[np.ndarray], source: str, lengths: Sequence[float] | np.ndarray | None
) -> list[np.ndarray]:
    if not clips:
        return []
    clips = [np.asarray(c) for c in clips]
    counts = np.array([len(c) for c in clips])
    if len({c.shape[-1] for c in clips}) != 1 or any(c.ndim != 2 for c in clips):
        raise WeftError("a list of clips needs [frames, 263] (or 251) each, all of one width")
    layout = layout_of(clips[0].shape[-1])
    needed = layout.blocks()[source].stop  # the later columns are not read
    out = np.empty((int(counts.sum()), len(layout.joints), 3), dtype=np.float32)
    done, k = 0, 0
    while k < len(clips):  # a block that fits the cache at a time
        size, last = 0, k
        while last < len(clips) and (last == k or size + counts[last] <= _BLOCK):
            size += int(counts[last])
            last += 1
        rows = np.concatenate([c[:, :needed] for c in clips[k:last]])
        _check_finite(rows)
        _recover(rows, counts[k:last], layout, source, lengths, out[done : done + size])
        done, k = done + size, last
    return [np.asarray(a) for a in np.split(out, np.cumsum(counts)[:-1])]


_BLOCK = 2048  # frames


def _checked(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features)
    if features.ndim < 2:
        raise WeftError(f"shape {features.shape}: features are [frames, 263] or [frames, 251]")
    layout_of(features.shape[-1])
    _check_finite(features)
    return features


def _check_finite(features: np.ndarray) -> None:
    # the sum of finite numbers is finite unless they are far beyond any movement
    if not np.isfinite(features.sum()) and not np.isfinite(features).all():
        bad = np.argwhere(~np.isfinite(features).all(axis=-1))[0]
        raise WeftError(f"NaN or infinity in frame {int(bad[-1])} of the features")


def root_path(features: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Half yaw angles [N] and root positions [3, N] (float64) of clips laid end to end, `counts` frames each."""
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(int)
    half = _sums(features[:, 0], starts, counts)
    cos, sin = np.cos(2 * half), np.sin(2 * half)
    dx, dz = features[:, 1].astype(np.float64), features[:, 2].astype(np.float64)
    # the displacement stored at t was rotated by the heading of t+1
    cos_next, sin_next = np.append(cos[1:], 1), np.append(sin[1:], 0)
    x = _sums(cos_next * dx - sin_next * dz, starts, counts)
    z = _sums(sin_next * dx + cos_next * dz, starts, counts)
    return half, np.stack([x, features[:, 3].astype(np.float64), z])


def _sums(values: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums of all values before each frame of its clip."""
    sums = np.empty(len(values) + 1)
    sums[0] = 0
    np.cumsum(values, dtype=np.float64, out=sums[1:])
    return sums[:-1] - np.repeat(sums[starts], counts)


def _recover(
    features: np.ndarray,
    counts: np.ndarray,
    layout: Layout,
    source: str,
    lengths: Sequence[float] | np.ndarray | None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    joints = np.empty((len(features), len(layout.joints), 3), dtype=np.float32) if out is None else out
    if not len(features):
        return joints
    half, root = root_path(features, counts)
    if source == "rotations":
        return _kinematics(features, half, root, layout, layout.bone_lengths(lengths), joints)
    cos, sin = np.cos(2 * half).astype(np.float32)[:, None], np.sin(2 * half).astype(np.float32)[:, None]
    local = features[:, layout.blocks()["positions"]].reshape(len(features), -1, 3)
    x, z = local[:, :, 0], local[:, :, 2]
    place = root.astype(np.float32)
    joints[:, 0] = place.T
    joints[:, 1:, 0] = cos * x - sin * z + place[0][:, None]
    joints[:, 1:, 1] = local[:, :, 1]
    joints[:, 1:, 2] = sin * x + cos * z + place[2][:, None]
    return joints


def _kinematics(
    features: np.ndarray, half: np.ndarray, root: np.ndarray, layout: Layout, lengths: np.ndarray, out: np.ndarray
) -> np.ndarray:
    frames = len(features)
    stored = features[:, layout.blocks()["rotations"]].reshape(frames, -1, 6)
    a = np.ascontiguousarray(stored.transpose(2, 1, 0), dtype=np.float32)  # [6, J-1, N]
    x, y = a[:3], a[3:]
    x /= _floor_length(x)
    z = _cross(x, y)
    z /= _floor_length(z)
    y = _cross(z, x)
    columns = (x, y, z)  # of the relative rotations, each [3, J-1, N]

    cos, sin = np.cos(2 * half).astype(np.float32), np.sin(2 * half).astype(np.float32)
    one, none = np.ones_like(cos), np.zeros_like(cos)
    # the root's matrix as three columns: rotation about y by twice the half angle
    turned: dict[int, tuple[np.ndarray, ...]] = {
        0: (np.stack([cos, none, -sin]), np.stack([none, one, none]), np.stack([sin, none, cos]))
    }
    points = np.empty((3, len(layout.joints), frames), dtype=np.float32)
    points[:, 0] = root
    carried = set(layout.turned_by[1:])
    for joint in (j for level in layout.levels for j in level):
        before = turned[layout.turned_by[joint]]
        axis = int(np.abs(layout.directions[joint]).argmax())
        reach = np.float32(layout.directions[joint, axis] * lengths[joint])
        if joint in carried:
            turned[joint] = tuple(_apply(before, column[:, joint - 1]) for column in columns)
            bone = turned[joint][axis]
        else:  # the end of a chain: only the column along its bone is needed
            bone = _apply(before, columns[axis][:, joint - 1])
        points[:, joint] = points[:, layout.parents[joint]] + reach * bone
    out[:] = points.transpose(2, 1, 0)
    return out


def _apply(columns: tuple[np.ndarray, ...], v: np.ndarray) -> np.ndarray:
    total = columns[0] * v[0]
    total += columns[1] * v[1]
    total += columns[2] * v[2]
    return total


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    c = np.empty_like(a)
    for k in range(3):
        i, j = (k + 1) % 3, (k + 2) % 3
        np.subtract(a[i] * b[j], a[j] * b[i], out=c[k])
    return c


def _floor_length(v: np.ndarray) -> np.ndarray:
    """Lengths [J-1, N], a tiny number for zero vectors: a degenerate rotation must not become NaN."""
    return np.maximum(np.sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2]), np.float32(1e-12))
