"""Joint rotations from joint positions, on a skeleton that rests in a T-pose.

Positions do not determine the twist of a bone; each bone turns by the shortest rotation from its parent's frame.
Where several bones leave one joint (pelvis, upper spine), its rotation is the best rigid fit (Wahba's problem).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from weft.errors import WeftError
from weft.motion.clip import Motion
from weft.motion.rotation import between, conjugate, continuous, from_matrix, multiply, rotate, unit
from weft.motion.skeleton import HUMANML3D

# Directions of the bones at rest, x to the body's left, y up, z to the front.
_T_POSE: dict[str, tuple[float, float, float]] = {
    "hip": (0.6, -0.8, 0), "knee": (0, -1, 0), "ankle": (0, -1, 0), "foot": (0, -0.45, 0.9),
    "spine1": (0, 1, 0), "spine2": (0, 1, 0), "spine3": (0, 1, 0), "neck": (0, 1, 0), "head": (0, 1, 0),
    "collar": (0.6, 0.8, 0), "shoulder": (1, 0, 0), "elbow": (1, 0, 0), "wrist": (1, 0, 0),
}  # fmt: skip
_ENDS = {"left_foot": (0, 0, 0.06), "right_foot": (0, 0, 0.06), "head": (0, 0.16, 0),
         "left_wrist": (0.09, 0, 0), "right_wrist": (-0.09, 0, 0)}  # fmt: skip


@dataclass(slots=True)
class Pose:
    """A skeleton at rest and its rotations over time: what BVH, GLB and SMPL files hold.

    `offsets` [J, 3] from the parent at rest, `rotations` [T, J, 4] relative to the parent (w first), `root` [T, 3],
    `translations` [T, J, 3] relative to the parent where bones may change length, else None; `error` is the largest
    distance in metres between a joint here and in the clip.
    """

    names: list[str]
    parents: list[int]
    offsets: np.ndarray
    rotations: np.ndarray
    root: np.ndarray
    fps: float
    translations: np.ndarray | None = None
    error: float = 0.0

    def positions(self) -> np.ndarray:
        """Forward kinematics: [T, J, 3]."""
        return kinematics(self)[0]

    @property
    def ends(self) -> dict[int, np.ndarray]:
        """Where bones without a child joint end, for files that want to know."""
        return {k: np.array(_ENDS[n]) for k, n in enumerate(self.names) if n in _ENDS}


def rest_positions(pose: Pose) -> np.ndarray:
    """Joints at rest, the root at its offset: [J, 3]."""
    rest = pose.offsets.copy()
    for k, parent in enumerate(pose.parents):
        if parent >= 0:
            rest[k] += rest[parent]
    return rest


def kinematics(pose: Pose) -> tuple[np.ndarray, np.ndarray]:
    """Global positions [T, J, 3] and rotations [T, J, 4]."""
    frames = len(pose.rotations)
    positions, turned = np.empty((frames, len(pose.names), 3)), np.empty((frames, len(pose.names), 4))
    for k, parent in enumerate(pose.parents):
        if parent < 0:
            positions[:, k], turned[:, k] = pose.root, pose.rotations[:, k]
            continue
        step = pose.offsets[k] if pose.translations is None else pose.translations[:, k]
        positions[:, k] = positions[:, parent] + rotate(turned[:, parent], np.broadcast_to(step, (frames, 3)))
        turned[:, k] = multiply(turned[:, parent], pose.rotations[:, k])
    return positions, turned


def solve(motion: Motion, *, exact: bool = False) -> Pose:
    """The rotations of a clip of 22 joints.

    Without `exact`, bones have one length (the median over the clip) and the pose fits as well as such bones can:
    to fractions of a millimetre for clips on a rigid skeleton; `Pose.error` says how well. With `exact`, every
    joint also gets a translation, and the joints are those of the clip whatever its bones do.
    Raises `WeftError` for another layout.
    """
    if motion.layout is not HUMANML3D:
        raise WeftError(f"rotations are solved for the 22 joints of humanml3d, this clip is {motion.layout.name}")
    parents = list(HUMANML3D.parents)
    joints = motion.joints.astype(np.float64)
    frames, count = joints.shape[:2]
    children = [[c for c, p in enumerate(parents) if p == k] for k in range(count)]
    offsets = _rest_offsets(joints, parents)

    placed = joints.copy()  # where the joints come to lie: each bone aims from there, so errors do not add up
    turned = np.zeros((frames, count, 4))
    for k in range(count):
        before = turned[:, parents[k]] if k else np.tile([1.0, 0, 0, 0], (frames, 1))
        wanted = joints[:, children[k]] - placed[:, k : k + 1]
        if len(children[k]) > 1:
            turned[:, k], fitted = _rigid(offsets[children[k]], wanted)
            offsets[children[k]] = fitted
        elif children[k]:
            rest = unit(rotate(before, np.broadcast_to(offsets[children[k][0]], (frames, 3))))
            aim = unit(wanted[:, 0])
            aim = np.where((aim == 0).all(-1, keepdims=True), rest, aim)
            turned[:, k] = multiply(between(rest, aim), before)
        else:
            turned[:, k] = before
        if not exact:
            for c in children[k]:
                placed[:, c] = placed[:, k] + rotate(turned[:, k], np.broadcast_to(offsets[c], (frames, 3)))
    local = turned.copy()
    local[:, 1:] = multiply(conjugate(turned[:, parents[1:]]), turned[:, 1:])
    translations = None
    if exact:
        translations = np.zeros((frames, count, 3))
        translations[:, 1:] = rotate(conjugate(turned[:, parents[1:]]), joints[:, 1:] - joints[:, parents[1:]])
    pose = Pose(
        list(HUMANML3D.joints), parents, offsets, continuous(local), joints[:, 0].copy(), motion.fps, translations
    )
    pose.error = float(np.linalg.norm(pose.positions() - joints, axis=-1).max())
    return pose


def _rest_offsets(joints: np.ndarray, parents: list[int]) -> np.ndarray:
    lengths = np.median(np.linalg.norm(joints[:, 1:] - joints[:, parents[1:]], axis=-1), axis=0)
    offsets = np.zeros((len(parents), 3))
    for k, name in enumerate(HUMANML3D.joints[1:], start=1):
        side, _, part = name.rpartition("_")
        direction = np.array(_T_POSE[part], dtype=np.float64)
        if side == "right":
            direction[0] *= -1
        offsets[k] = lengths[k - 1] * direction / np.linalg.norm(direction)
    return offsets


def _rigid(rest: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotations [T, 4] that best take `rest` [n, 3] to `wanted` [T, n, 3], and `rest` in the shape it has there.

    The shape is found in turns with the rotations, since the angles between a body's bones are its own.
    """
    fitted = rest
    for _ in range(4):
        u, _, vt = np.linalg.svd(np.einsum("tni,nj->tij", wanted, fitted))
        sign = np.ones((len(wanted), 3))
        sign[:, 2] = np.sign(np.linalg.det(u) * np.linalg.det(vt))
        matrix = (u * sign[:, None]) @ vt
        seen = np.einsum("tji,tnj->tni", matrix, wanted).mean(axis=0)
        length = np.linalg.norm(rest, axis=-1, keepdims=True)
        fitted = np.where((seen == 0).all(-1, keepdims=True), fitted, unit(seen) * length)
    return from_matrix(matrix), fitted
