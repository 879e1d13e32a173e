"""The body around the joints: one table of solids that the renderer, the viewer page and GLB files share.

A solid is a tapered capsule between two anchors. An anchor lies on the line through two joints, moved along the axes
(across to the left, up, to the front) of a frame that three body parts have; all of it follows from positions alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from weft.motion.rotation import unit
from weft.motion.skeleton import HUMANML3D, KIT, Layout

COLOURS = {"left": (0.33, 0.53, 0.82), "right": (0.90, 0.50, 0.34), "middle": (0.88, 0.86, 0.82)}
FRAMES = ("hips", "chest", "head")
# left, right, below, above: across is left - right, up is above - below
_AXES = {
    "hips": ("left_hip", "right_hip", "pelvis", "spine2"),
    "chest": ("left_shoulder", "right_shoulder", "spine2", "neck"),
    "head": ("left_shoulder", "right_shoulder", "neck", "head"),
}
_KIT = {"pelvis": "root", "spine2": "spine1", "spine3": "spine2", "neck": "chest", "left_foot": "left_toe",
        "right_foot": "right_toe", "left_collar": "chest", "right_collar": "chest"}  # fmt: skip


@dataclass(frozen=True)
class Anchor:
    """(1 - share) * joint + share * other, then `offset` metres across, up and to the front in `frame`."""

    joint: str
    other: str = ""
    share: float = 0.0
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    frame: str = "hips"


@dataclass(frozen=True)
class Solid:
    """A capsule from `start` to `stop`; `bone` is the joint whose rotation carries it in a skinned file."""

    start: Anchor
    stop: Anchor
    radii: tuple[float, float]
    side: str
    bone: str


# The trunk from below: joint, towards, share, up, front, half width, radius, frame. Three columns wide.
_RINGS = (
    ("pelvis", "spine1", 0.1, 0.03, 0.000, 0.052, 0.086, "hips"),
    ("spine1", "spine2", 0.2, 0.00, 0.004, 0.042, 0.080, "hips"),
    ("spine2", "spine3", 0.3, 0.00, 0.006, 0.050, 0.086, "chest"),
    ("spine3", "neck", 0.25, 0.00, 0.010, 0.068, 0.094, "chest"),
    ("spine3", "neck", 0.62, 0.00, -0.004, 0.066, 0.072, "chest"),
)


def _torso() -> list[Solid]:
    def column(ring: tuple[str, str, float, float, float, float, float, str], sign: int) -> Anchor:
        joint, other, share, up, front, wide, _, frame = ring
        return Anchor(joint, other, share, (sign * wide, up, front), frame)

    solids = [Solid(Anchor("left_hip", offset=(0, 0.03, 0)), Anchor("right_hip", offset=(0, 0.03, 0)),
                    (0.086, 0.086), "middle", "pelvis")]  # fmt: skip
    for low, high in zip(_RINGS, _RINGS[1:], strict=False):
        for sign in (1, 0, -1):
            solids.append(Solid(column(low, sign), column(high, sign), (low[6], high[6]), "middle", low[0]))
    solids.append(Solid(Anchor("neck", offset=(0, -0.03, 0), frame="chest"), Anchor("neck", "head", 1.1),
                        (0.064, 0.056), "middle", "neck"))  # fmt: skip
    for back, front, radii in (  # skull, jaw, nose: so that one sees where it faces
        ((0, 0.085, 0.020), (0, 0.112, -0.012), (0.090, 0.096)),
        ((0, 0.020, 0.052), (0, 0.075, 0.040), (0.042, 0.070)),
        ((0, 0.058, 0.112), (0, 0.078, 0.108), (0.017, 0.011)),
    ):
        solids.append(Solid(Anchor("head", offset=back, frame="head"), Anchor("head", offset=front, frame="head"),
                            radii, "middle", "head"))  # fmt: skip
    return solids


def _limbs(side: str) -> list[Solid]:
    sign = 1 if side == "left" else -1
    hip, knee, ankle, foot = (f"{side}_{n}" for n in ("hip", "knee", "ankle", "foot"))
    collar, shoulder, elbow, wrist = (f"{side}_{n}" for n in ("collar", "shoulder", "elbow", "wrist"))

    def solid(start: Anchor, stop: Anchor, radii: tuple[float, float], bone: str, colour: str = side) -> Solid:
        return Solid(start, stop, radii, colour, bone)

    top = Anchor("neck", offset=(sign * 0.035, -0.035, 0), frame="chest")
    heel = (0.0, -0.035, 0.0)
    return [
        solid(top, Anchor(shoulder), (0.056, 0.060), collar, "middle"),
        solid(Anchor(shoulder), Anchor(shoulder, elbow, 0.45), (0.060, 0.051), shoulder),
        solid(Anchor(shoulder, elbow, 0.45), Anchor(elbow), (0.051, 0.040), shoulder),
        solid(Anchor(elbow), Anchor(elbow, wrist, 0.35), (0.040, 0.043), elbow),
        solid(Anchor(elbow, wrist, 0.35), Anchor(wrist), (0.043, 0.027), elbow),
        solid(Anchor(elbow, wrist, 1.02), Anchor(elbow, wrist, 1.22), (0.029, 0.037), elbow),
        solid(Anchor(elbow, wrist, 1.22), Anchor(elbow, wrist, 1.48), (0.037, 0.020), elbow),
        solid(Anchor(hip, offset=(sign * 0.012, 0, 0)), Anchor(hip, knee, 0.45), (0.092, 0.078), hip),
        solid(Anchor(hip, knee, 0.45), Anchor(knee), (0.078, 0.054), hip),
        solid(Anchor(knee), Anchor(knee, ankle, 0.30, (0, 0, -0.010)), (0.054, 0.057), knee),
        solid(Anchor(knee, ankle, 0.30, (0, 0, -0.010)), Anchor(ankle), (0.057, 0.036), knee),
        solid(Anchor(ankle), Anchor(foot, offset=(0, 0.012, 0)), (0.038, 0.034), ankle),
        solid(Anchor(ankle, foot, -0.22, heel), Anchor(foot), (0.033, 0.030), ankle),
        solid(Anchor(foot), Anchor(ankle, foot, 1.40, (0, 0.018, 0)), (0.034, 0.024), ankle),
    ]


SOLIDS: tuple[Solid, ...] = (*_torso(), *_limbs("left"), *_limbs("right"))
RADII = np.array([s.radii for s in SOLIDS])
SIDES = tuple(s.side for s in SOLIDS)


def _joint(layout: Layout, name: str) -> int:
    return layout.index(_KIT.get(name, name) if layout is KIT else name)


@lru_cache
def _indices(layout_name: str) -> tuple[np.ndarray, ...]:
    layout = KIT if layout_name == KIT.name else HUMANML3D
    anchors = [a for s in SOLIDS for a in (s.start, s.stop)]
    joints = np.array([_joint(layout, a.joint) for a in anchors])
    others = np.array([_joint(layout, a.other or a.joint) for a in anchors])
    axes = np.array([[_joint(layout, n) for n in _AXES[f]] for f in FRAMES])
    share, offset = np.array([a.share for a in anchors]), np.array([a.offset for a in anchors])
    return joints, others, share, offset, np.array([FRAMES.index(a.frame) for a in anchors]), axes


def table(layout: Layout) -> dict[str, Any]:
    """The same as JSON: anchors [joint, other, share, across, up, front, frame], radii, sides, frames of joints."""
    joints, others, share, offset, frame, axes = _indices(layout.name)
    anchors = np.column_stack([joints, others, share, offset, frame])
    return {"anchors": np.round(anchors, 4).tolist(), "radii": RADII.tolist(), "sides": SIDES, "frames": axes.tolist()}


def stature(joints: np.ndarray, layout: Layout) -> float:
    """Size of the body [T, J, 3] in metres relative to the reference skeleton, by its first frame's legs and trunk."""
    length = 0.0
    for side in ("left", "right"):
        names = (f"{side}_ankle", f"{side}_knee", f"{side}_hip", "pelvis", "spine3", "neck", "head")
        chain = [_joint(layout, name) for name in names]
        length += float(np.linalg.norm(np.diff(joints[0, chain], axis=0), axis=-1).sum()) / 2
    return float(np.clip(length / 1.55, 0.2, 5.0))


def solids(joints: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ends [T, S, 3] and [T, S, 3] and radii [S, 2] of the body around joints [T, J, 3], metres, y up."""
    joints = np.asarray(joints, dtype=np.float64)
    first, other, share, offset, frame, axes = _indices(layout.name)
    size = stature(joints, layout)
    up = unit(joints[:, axes[:, 3]] - joints[:, axes[:, 2]])  # [T, frames, 3]
    across = joints[:, axes[:, 0]] - joints[:, axes[:, 1]]
    across = unit(across - (across * up).sum(-1, keepdims=True) * up)
    basis = np.stack([across, up, np.cross(across, up)], axis=-2)  # [T, frames, 3 axes, 3]
    points = (1 - share)[:, None] * joints[:, first] + share[:, None] * joints[:, other]
    points += size * np.einsum("ak,takx->tax", offset, basis[:, frame])
    return points[:, 0::2], points[:, 1::2], size * RADII
