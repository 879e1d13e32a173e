"""Foreign skeletons: an animated rig as a file has it, and named tables that map it to the 22 joints."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from weft.errors import WeftError
from weft.motion.clip import Motion, resample
from weft.motion.skeleton import HUMANML3D

# What a table may say of a joint: a name, or (one, other, share): the point that share of the way to the other.
Place = str | tuple[str, str, float]
Table = Mapping[str, Place]

_SHARES = {"m": 1.0, "cm": 0.01, "mm": 0.001, "inch": 0.0254, "acclaim": 0.0254 / 0.45}
_STATURE = 1.47  # metres from ankle to head joint along the bones of the reference skeleton


@dataclass(slots=True)
class Rig:
    """Joints of any skeleton: `positions` [T, J, 3] in the file's unit and axes.

    `parents` has -1 for roots. `unit` is a key of metres (m, cm, mm, inch, acclaim) or None where the file does not
    say; `up` likewise "y", "z" or None.
    """

    names: list[str]
    parents: list[int]
    positions: np.ndarray
    fps: float
    unit: str | None = None
    up: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


def _sides(table: dict[str, Place], left: str, right: str) -> dict[str, Place]:
    """Adds the right side of a table of left names."""

    def other(place: Place) -> Place:
        if isinstance(place, str):
            return place.replace(left, right, 1)
        return (place[0].replace(left, right, 1), place[1].replace(left, right, 1), place[2])

    return table | {k.replace("left", "right"): other(v) for k, v in table.items() if k.startswith("left_")}


# The collar of SMPL lies a third of the way from the upper spine to the shoulder where a rig has no such joint.
TABLES: dict[str, dict[str, Place]] = {
    "humanml3d": {name: name for name in HUMANML3D.joints},
    "acclaim": _sides(
        {
            "pelvis": "root",
            "left_hip": "lhipjoint",
            "left_knee": "lfemur",
            "left_ankle": "ltibia",
            "left_foot": "lfoot",
            "spine1": "lowerback",
            "spine2": "upperback",
            "spine3": "thorax",
            "neck": "lowerneck",
            "head": "upperneck",
            "left_collar": ("thorax", "lclavicle", 0.4),
            "left_shoulder": "lclavicle",
            "left_elbow": "lhumerus",
            "left_wrist": "lradius",
        },
        "l",
        "r",
    ),
    "cmu": _sides(
        {
            "pelvis": "Hips",
            "left_hip": "LeftUpLeg",
            "left_knee": "LeftLeg",
            "left_ankle": "LeftFoot",
            "left_foot": "LeftToeBase",
            "spine1": "Spine",
            "spine2": "Spine1",
            "spine3": ("Spine1", "Neck", 0.35),
            "neck": "Neck1",
            "head": "Head",
            "left_collar": ("LeftShoulder", "LeftArm", 0.4),
            "left_shoulder": "LeftArm",
            "left_elbow": "LeftForeArm",
            "left_wrist": "LeftHand",
        },
        "Left",
        "Right",
    ),
    "mixamo": _sides(
        {
            "pelvis": "Hips",
            "left_hip": "LeftUpLeg",
            "left_knee": "LeftLeg",
            "left_ankle": "LeftFoot",
            "left_foot": "LeftToeBase",
            "spine1": "Spine",
            "spine2": "Spine1",
            "spine3": "Spine2",
            "neck": "Neck",
            "head": "Head",
            "left_collar": "LeftShoulder",
            "left_shoulder": "LeftArm",
            "left_elbow": "LeftForeArm",
            "left_wrist": "LeftHand",
        },
        "Left",
        "Right",
    ),
    "iclone": _sides(
        {
            "pelvis": "CC_Base_Hip",
            "left_hip": "CC_Base_L_Thigh",
            "left_knee": "CC_Base_L_Calf",
            "left_ankle": "CC_Base_L_Foot",
            "left_foot": "CC_Base_L_ToeBase",
            "spine1": "CC_Base_Waist",
            "spine2": "CC_Base_Spine01",
            "spine3": "CC_Base_Spine02",
            "neck": "CC_Base_NeckTwist01",
            "head": "CC_Base_Head",
            "left_collar": "CC_Base_L_Clavicle",
            "left_shoulder": "CC_Base_L_Upperarm",
            "left_elbow": "CC_Base_L_Forearm",
            "left_wrist": "CC_Base_L_Hand",
        },
        "_L_",
        "_R_",
    ),
}
_TABLE_KEYS = {
    name: {p for v in t.values() for p in ((v,) if isinstance(v, str) else v[:2])} for name, t in TABLES.items()
}


def find_table(names: Sequence[str]) -> str:
    """The named table whose joints all occur in `names`. Raises `WeftError` with what is nearest."""
    have = {plain(n) for n in names}
    # cmu before mixamo: its names contain those of mixamo but for the spine
    fits = [t for t in ("humanml3d", "acclaim", "iclone", "mixamo", "cmu") if _TABLE_KEYS[t] <= have]
    if fits:
        return fits[0]
    nearest = max(TABLES, key=lambda t: len(_TABLE_KEYS[t] & have) / len(_TABLE_KEYS[t]))
    missing = sorted(_TABLE_KEYS[nearest] - have)
    raise WeftError(
        f"unknown skeleton of {len(names)} joints ({', '.join(list(names)[:4])}, ...): none of {', '.join(TABLES)} "
        f"fits; {nearest} is nearest and lacks {', '.join(missing[:4])}{'...' if len(missing) > 4 else ''}: "
        f"give your own table from {len(HUMANML3D.joints)} joint names to this file's"
    )


def plain(name: str) -> str:
    """A joint name without the namespace that exporters prefix (mixamorig:Hips, mixamorig1Hips, Armature|Hips)."""
    return re.sub(r"^mixamorig\d*_?", "", name.replace("|", ":").rsplit(":", 1)[-1])


def to_motion(
    rig: Rig,
    table: str | Table = "auto",
    *,
    fps: float | None = None,
    unit: str | None = None,
    up: str | None = None,
) -> Motion:
    """The 22 joints of a rig, metres, y up, at `fps` (that of the file by default).

    `table` is "auto", one of `TABLES`, or your own {our joint: their joint, or (one, other, share)}. `unit` and `up`
    override what the file says; where it says nothing, the unit is the one in which the body is of human height,
    the vertical the axis along which the head is above the feet. A T-pose in the first frame alone, from which the
    clip jumps, is left out, and `meta["note"]` says so. Raises `WeftError` for an unknown skeleton, a table
    with a joint that the file lacks, or a body of no human height in any unit.
    """
    name = find_table(rig.names) if isinstance(table, str) and table == "auto" else table
    if isinstance(name, str):
        if name not in TABLES:
            raise WeftError(f"table: '{name}' is unknown, use auto, {', '.join(TABLES)} or a mapping")
        chosen: Table = TABLES[name]
    else:
        chosen = name
    joints = _mapped(rig, chosen)
    bad = np.flatnonzero(~np.isfinite(joints).all(axis=(1, 2)))
    if len(bad):
        raise WeftError(
            f"NaN or infinity in {len(bad)} of {len(joints)} frames, the first is {bad[0]}: cut or fill them"
        )
    joints = joints * _metres(joints, unit or rig.unit)
    if (up or rig.up or _vertical(joints)) == "z":
        joints = np.stack([joints[..., 0], joints[..., 2], -joints[..., 1]], axis=-1)
    meta = dict(rig.meta) | {"table": name if isinstance(name, str) else "custom"}
    if _begins_elsewhere(joints):
        joints, meta["note"] = joints[1:], "begins with a T-pose that is not part of the movement: left out"
    if fps is not None and fps != rig.fps:
        joints = resample(joints, rig.fps, fps)
    return Motion(joints, fps or rig.fps, HUMANML3D, meta)


def _mapped(rig: Rig, table: Table) -> np.ndarray:
    index: dict[str, int] = {}
    for k, name in enumerate(rig.names):
        index.setdefault(plain(name), k)
        index[name] = k
    missing = [j for j in HUMANML3D.joints if j not in table]
    if missing:
        raise WeftError(f"table: no entry for {', '.join(missing)}: map all {len(HUMANML3D.joints)} joints")

    def at(name: str) -> np.ndarray:
        if name not in index:
            raise WeftError(f"table: this file has no joint '{name}', it has {', '.join(rig.names[:6])}, ...")
        return rig.positions[:, index[name]]

    columns = []
    for joint in HUMANML3D.joints:
        place = table[joint]
        if isinstance(place, str):
            columns.append(at(place))
        else:
            one, other, share = place
            columns.append((1 - share) * at(one) + share * at(other))
    return np.stack(columns, axis=1).astype(np.float64)


def _metres(joints: np.ndarray, unit: str | None) -> float:
    """The factor to metres."""
    if unit is not None:
        if unit not in _SHARES:
            raise WeftError(f"unit: '{unit}' is unknown, use one of {', '.join(_SHARES)}")
        return _SHARES[unit]
    path = [7, 4, 1], [0, 3, 6, 9, 12, 15]  # ankle to hip, pelvis to head
    lengths = [np.linalg.norm(np.diff(joints[0, list(p)], axis=0), axis=-1).sum() for p in path]
    stature = float(sum(lengths))
    fits = {u: abs(np.log(stature * f / _STATURE)) for u, f in _SHARES.items() if stature > 0}
    best = min(fits, key=lambda u: fits[u]) if fits else None
    if best is None or fits[best] > np.log(1.6):
        raise WeftError(
            f"the body is {stature:.3g} long from ankle to head, of human height in none of {', '.join(_SHARES)}: "
            "say unit="
        )
    return _SHARES[best]


def _vertical(joints: np.ndarray) -> str:
    """y or z, whichever the head is above the ankles along, over the clip."""
    rise = (joints[:, 15] - joints[:, [7, 8]].mean(axis=1)).mean(axis=0)
    return "z" if abs(rise[2]) > abs(rise[1]) else "y"


def _begins_elsewhere(joints: np.ndarray) -> bool:
    """Whether the first frame is the T-pose that some programs put before a clip: arms level, legs straight down, and
    a jump to the second frame four times as far as the next step."""
    if len(joints) < 3:
        return False
    limbs = joints[0, [20, 21, 7, 8]] - joints[0, [16, 17, 1, 2]]
    left, right, *legs = limbs / np.maximum(np.linalg.norm(limbs, axis=-1, keepdims=True), 1e-9)
    if max(abs(left[1]), abs(right[1])) > 0.2 or left @ right > -0.9 or max(leg[1] for leg in legs) > -0.95:
        return False
    about = joints[:3] - joints[:3, :1]
    first, second = np.linalg.norm(np.diff(about, axis=0), axis=-1).max(axis=-1)
    return bool(first > 0.3 and first > 4 * second)
