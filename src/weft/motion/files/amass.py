"""AMASS: joints of SMPL(-H) poses through body models that the user supplies, by HumanML3D's rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weft.errors import WeftError
from weft.motion.rotation import from_axis_angle, multiply, rotate


@dataclass(slots=True)
class Body:
    """What of an SMPL-H model joints depend on: joints = `rest` + `shape` @ betas, [J, 3] and [J, 3, betas]."""

    rest: np.ndarray
    shape: np.ndarray
    parents: list[int]


def read_body(path: str | Path, *, betas: int = 10) -> Body:
    """A body model as SMPL-H's `model.npz` (v_template, shapedirs, J_regressor, kintree_table).

    Raises `WeftError` for a file that lacks one of them or is pickled (.pkl models: convert them with the tools of
    their publisher).
    """
    from weft.motion.files.arrays import load_array

    data = load_array(path)
    need = ("v_template", "shapedirs", "J_regressor", "kintree_table")
    missing = [k for k in need if k not in getattr(data, "files", ())]
    if missing:
        raise WeftError(f"{path}: no {', '.join(missing)}: expected SMPL-H's model.npz")
    try:
        template, directions, regressor, tree = (np.asarray(data[k]) for k in need)
    except ValueError as error:
        raise WeftError(f"{path}: holds pickled objects ({error}): use the .npz with plain arrays") from error
    parents = [int(p) for p in tree[0]]
    parents[0] = -1
    regressor = regressor.astype(np.float64)
    return Body(
        regressor @ template, np.einsum("jv,vcb->jcb", regressor, directions[..., :betas].astype(np.float64)), parents
    )


def smpl_joints(body: Body, poses: np.ndarray, trans: np.ndarray, betas: np.ndarray) -> np.ndarray:
    """Joints [T, J, 3] of poses [T, 3*J] (axis-angle) and root translations [T, 3], in the poses' own axes."""
    joints = len(body.parents)
    used = min(len(betas), body.shape.shape[-1])
    rest = body.rest + body.shape[..., :used] @ betas[:used]
    if poses.shape[1] < 3 * joints:  # body-only poses: hands at rest
        poses = np.pad(poses, ((0, 0), (0, 3 * joints - poses.shape[1])))
    local = from_axis_angle(poses[:, : 3 * joints].reshape(len(poses), joints, 3))
    positions, turned = np.empty((len(poses), joints, 3)), np.empty((len(poses), joints, 4))
    for k, parent in enumerate(body.parents):
        if parent < 0:
            positions[:, k], turned[:, k] = rest[k] + trans, local[:, k]
            continue
        step = np.broadcast_to(rest[k] - rest[parent], (len(poses), 3))
        positions[:, k] = positions[:, parent] + rotate(turned[:, parent], step)
        turned[:, k] = multiply(turned[:, parent], local[:, k])
    return positions


def amass_joints(
    data: Mapping[str, Any], bodies: dict[str, Body] | Body, *, raw: bool = False, stride_fps: float | None = None
) -> tuple[np.ndarray, float]:
    """Joints [T, J, 3] and frame rate of the arrays of an AMASS file.

    `bodies` is one body or one per gender ("male" for male, else "female" as HumanML3D does, "neutral" for what is not
    there). The result is y up and
    right-handed. `raw=True` leaves it as HumanML3D's first notebook stores it: y and z exchanged, a reflection.
    `stride_fps=20` takes every int(fps/20)-th frame, as the notebook does.
    Raises `WeftError` for missing fields, NaN, or a gender without a body.
    """
    fps = next((float(data[k]) for k in ("mocap_framerate", "mocap_frame_rate") if k in data), None)
    if fps is None or not fps > 0:
        raise WeftError("no mocap_framerate: not a motion of AMASS")
    poses, trans = np.asarray(data["poses"], dtype=np.float64), np.asarray(data["trans"], dtype=np.float64)
    betas = np.asarray(data["betas"], dtype=np.float64).reshape(-1)[:10] if "betas" in data else np.zeros(0)
    if poses.ndim != 2 or trans.shape != (len(poses), 3):
        raise WeftError(f"poses {poses.shape} and trans {trans.shape}: expected [T, 3 per joint] and [T, 3]")
    if not (np.isfinite(poses).all() and np.isfinite(trans).all() and np.isfinite(betas).all()):
        raise WeftError("NaN or infinity in the poses: cut or fill them")
    gender = str(data["gender"]) if "gender" in data else "neutral"
    if isinstance(bodies, dict):
        wanted = "male" if gender.strip("b'\"") == "male" else "female"
        found = bodies.get(wanted) or bodies.get("neutral")
        if found is None:
            raise WeftError(f"a {wanted} body is needed (gender: {gender}), given: {', '.join(bodies)}; add its model")
        body = found
    else:
        body = bodies
    step = max(int(fps / stride_fps), 1) if stride_fps else 1
    joints = smpl_joints(body, poses[::step], trans[::step], betas)
    swapped = joints[..., [0, 2, 1]]
    if not raw:
        swapped = swapped * np.array([-1.0, 1.0, 1.0])  # the exchange is a reflection; so is this
    return swapped, fps / step
