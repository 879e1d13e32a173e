"""Rotations as arrays. Quaternions are [..., 4], w first, unit; matrices [..., 3, 3] act on columns."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from weft.errors import WeftError


def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The product a*b: first b, then a."""
    aw, ax, ay, az = np.moveaxis(a, -1, 0)
    bw, bx, by, bz = np.moveaxis(b, -1, 0)
    return np.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        axis=-1,
    )


def conjugate(q: np.ndarray) -> np.ndarray:
    """The inverse of unit quaternions."""
    return q * np.array([1, -1, -1, -1], dtype=q.dtype)


def rotate(q: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Vectors [..., 3] turned by quaternions [..., 4]."""
    w, x, y, z = np.moveaxis(q, -1, 0)
    a, b, c = np.moveaxis(v, -1, 0)
    # twice the axis x v; numpy.cross costs more than all of this on clips of usual length
    i, j, k = 2 * (y * c - z * b), 2 * (z * a - x * c), 2 * (x * b - y * a)
    return np.stack([a + w * i + y * k - z * j, b + w * j + z * i - x * k, c + w * k + x * j - y * i], axis=-1)


def unit(v: np.ndarray) -> np.ndarray:
    """Vectors scaled to length one; a zero vector stays zero."""
    length = np.linalg.norm(v, axis=-1, keepdims=True)
    return v / np.where(length > 0, length, 1)


def between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The shortest rotation from unit vectors a to unit vectors b, [..., 4], w >= 0.

    Opposite vectors, for which every half turn is shortest, get the half turn about an axis at right angles to a.
    """
    a, b = np.broadcast_arrays(a, b)
    q = np.concatenate([1 + (a * b).sum(-1, keepdims=True), np.cross(a, b)], axis=-1)
    length = np.linalg.norm(q, axis=-1, keepdims=True)
    opposite = length[..., 0] < 1e-6
    if opposite.any():
        q = np.where(opposite[..., None], half_turn(a), q)
        length = np.where(opposite[..., None], 1, length)
    return q / length


def half_turn(a: np.ndarray) -> np.ndarray:
    """A half turn about an axis perpendicular to unit vectors a, as quaternions."""
    axis = np.zeros(a.shape)
    # the coordinate axis that is farthest from a, made perpendicular
    np.put_along_axis(axis, np.abs(a).argmin(-1)[..., None], 1.0, axis=-1)
    axis = unit(axis - (axis * a).sum(-1, keepdims=True) * a)
    return np.concatenate([np.zeros((*a.shape[:-1], 1)), axis], axis=-1)


def to_matrix(q: np.ndarray) -> np.ndarray:
    return Rotation.from_quat(_rows(q, 4), scalar_first=True).as_matrix().reshape(*q.shape[:-1], 3, 3)


def from_matrix(m: np.ndarray) -> np.ndarray:
    return Rotation.from_matrix(m.reshape(-1, 3, 3)).as_quat(scalar_first=True).reshape(*m.shape[:-2], 4)


def from_axis_angle(v: np.ndarray) -> np.ndarray:
    """Quaternions of rotation vectors [..., 3] in radians."""
    return Rotation.from_rotvec(_rows(v, 3)).as_quat(scalar_first=True).reshape(*v.shape[:-1], 4)


def to_axis_angle(q: np.ndarray) -> np.ndarray:
    """Rotation vectors [..., 3] in radians, at most pi long."""
    return Rotation.from_quat(_rows(q, 4), scalar_first=True).as_rotvec().reshape(*q.shape[:-1], 3)


def from_euler(angles: np.ndarray, order: str) -> np.ndarray:
    """Quaternions of Euler angles [..., 3] in degrees.

    `order` as BVH writes it: "ZXY" means Rz @ Rx @ Ry on a column, angles in that order.
    """
    _check_order(order)
    turned = Rotation.from_euler(order.upper(), _rows(angles, 3), degrees=True)
    return turned.as_quat(scalar_first=True).reshape(*angles.shape[:-1], 4)


def to_euler(q: np.ndarray, order: str) -> np.ndarray:
    """Euler angles in degrees, in the order of `order`; see `from_euler`."""
    _check_order(order)
    turned = Rotation.from_quat(_rows(q, 4), scalar_first=True)
    return turned.as_euler(order.upper(), degrees=True, suppress_warnings=True).reshape(*q.shape[:-1], 3)


def _check_order(order: str) -> None:
    if sorted(order.upper()) != ["X", "Y", "Z"]:
        raise WeftError(f"'{order}' is not an order of axes: use XYZ, ZXY, ZYX ...")


def to_6d(q: np.ndarray) -> np.ndarray:
    """The first two columns of the matrix one after the other, [..., 6] (Zhou et al. 2019)."""
    return np.swapaxes(to_matrix(q)[..., :2], -1, -2).reshape(*q.shape[:-1], 6)


def matrix_from_6d(d: np.ndarray) -> np.ndarray:
    """Matrices of 6D rotations by Gram-Schmidt; parallel or zero columns give the nearest thing to a rotation."""
    x = unit(d[..., :3])
    z = unit(np.cross(x, d[..., 3:]))
    return np.stack([x, np.cross(z, x), z], axis=-1)


def continuous(q: np.ndarray, axis: int = 0) -> np.ndarray:
    """The same rotations with signs such that neighbours along `axis` have a positive scalar product."""
    q = np.moveaxis(q, axis, 0)
    flips = (q[1:] * q[:-1]).sum(-1) < 0
    sign = np.concatenate([np.ones((1, *q.shape[1:-1])), np.where(np.cumsum(flips, axis=0) % 2, -1.0, 1.0)])
    return np.moveaxis(q * sign[..., None], 0, axis)


def slerp(a: np.ndarray, b: np.ndarray, t: np.ndarray | float) -> np.ndarray:
    """Between unit quaternions a (t=0) and b (t=1) on the shorter way."""
    dot = (a * b).sum(-1, keepdims=True)
    b, dot = np.where(dot < 0, -b, b), np.clip(np.abs(dot), 0, 1)
    angle = np.arccos(dot)
    sine = np.where(angle > 1e-6, np.sin(angle), 1)
    t = np.asarray(t)[..., None]
    near = angle <= 1e-6
    q = np.where(near, 1 - t, np.sin((1 - t) * angle) / sine) * a + np.where(near, t, np.sin(t * angle) / sine) * b
    return q / np.linalg.norm(q, axis=-1, keepdims=True)


def _rows(a: np.ndarray, n: int) -> np.ndarray:
    return np.asarray(a, dtype=np.float64).reshape(-1, n)
