"""NumPy files: features or joints in .npy, SMPL-style poses in .npz. Nothing here is ever unpickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from weft.errors import WeftError
from weft.media import atomic_write
from weft.motion.clip import Motion, from_features
from weft.motion.files.amass import Body, amass_joints
from weft.motion.ik import Pose, solve
from weft.motion.rotation import from_matrix, multiply, to_axis_angle
from weft.motion.skeleton import HUMANML3D, LAYOUTS, layout_of

# y up to z up and back: a half turn, by which `amass_joints` reads
_Z_UP = np.array([[-1.0, 0, 0], [0, 0, 1], [0, 1, 0]])


def load_array(path: str | Path) -> Any:
    """What `numpy.load` gives without pickles. Raises `WeftError` for a file that is none, cut off or pickled."""
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise WeftError(f"{path} does not exist: check the path") from error
    except Exception as error:  # a damaged zip or header raises many kinds
        raise WeftError(
            f"{path} is damaged, truncated or holds pickled objects ({error}): save plain arrays"
        ) from error


def read_npy(path: str | Path, *, fps: float | None = None) -> Motion:
    """Features [T, 263 or 251] or joints [T, 22 or 21, 3] (also [T, 66], and more joints, hands, after the 22).

    `fps` is the layout's by default; features that were read at it stay with the clip (`Motion.stored`). Raises
    `WeftError` for another shape or NaN.
    """
    array = load_array(path)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise WeftError(f"{path}: not an array of numbers: save features or joints with numpy.save")
    try:
        if array.ndim == 3 and array.shape[0] == 1 and array.shape[2] in (263, 251):
            array = array[0]
        if array.ndim == 2 and array.shape[1] in (263, 251):
            motion = from_features(array, meta={"file": Path(path).name})
            if fps is not None and fps != motion.fps:
                return Motion(motion.joints, fps, motion.layout, motion.meta)
            motion.stored = array
            return motion
        if array.ndim == 2 and array.shape[1] in (66, 63):
            array = array.reshape(len(array), -1, 3)
        if array.ndim == 3 and array.shape[2] == 3 and array.shape[1] >= 22:
            array = array[:, :22]  # SMPL-H has hands after the body
        if array.ndim != 3 or array.shape[2] != 3:
            raise WeftError(f"shape {array.shape}: expected [T, 263], [T, 251], [T, 22, 3] or [T, 21, 3]")
        layout = layout_of(array.shape[1])
        return Motion(array, fps or layout.fps, layout, {"file": Path(path).name})
    except WeftError as error:
        raise WeftError(f"{path}: {error}") from error


def write_npy(motion: Motion, path: str | Path) -> None:
    """Joints [T, J, 3]."""
    write_array(motion.joints, path)


def write_array(array: np.ndarray, path: str | Path) -> None:
    """One .npy, atomically."""
    with atomic_write(path) as handle:
        np.save(handle, array, allow_pickle=False)


def read_npz(path: str | Path, *, bodies: dict[str, Body] | Body | None = None) -> Motion:
    """An .npz with `joints` (and `fps`), or with SMPL(-H) poses as AMASS has them, through a body model.

    Raises `WeftError` for poses without a body model: joints depend on the body, whose files cannot be shipped.
    """
    data = load_array(path)
    if isinstance(data, np.ndarray):
        raise WeftError(f"{path}: one plain array: rename it to .npy")
    keys = set(data.files)
    try:
        if "joints" in keys:
            layout = LAYOUTS[str(data["layout"])] if "layout" in keys else HUMANML3D
            fps = next(
                (float(data[k]) for k in ("fps", "mocap_framerate", "mocap_frame_rate") if k in keys), layout.fps
            )
            facts = {"weft": json.loads(str(data["weft"]))} if "weft" in keys else {}
            motion = Motion(data["joints"][:, : len(layout.joints)], fps, layout, {"file": Path(path).name} | facts)
            if "features" in keys:
                own, shape = data["features"], (len(motion), layout.width)
                if own.shape != shape or own.dtype.kind != "f" or not np.isfinite(own).all():
                    raise WeftError(f"features {list(own.shape)} must be finite floats {list(shape)}: take them out")
                motion.stored = own
            return motion
        if not {"poses", "trans"} <= keys:
            raise WeftError(f"holds {', '.join(sorted(keys)) or 'nothing'}: expected joints, or poses and trans")
        if bodies is None:
            raise WeftError(
                "SMPL poses have no joints of their own: give a body model (SMPL-H model.npz from MANO's site)"
            )
        joints, fps = amass_joints({k: data[k] for k in data.files if data[k].dtype.kind != "O"}, bodies)
        return Motion(joints[:, :22], fps, HUMANML3D, {"file": Path(path).name})
    except WeftError as error:
        raise WeftError(f"{path}: {error}") from error
    except Exception as error:  # members of a cut zip fail when they are read
        raise WeftError(f"{path} is damaged or holds pickled objects ({error}): save plain arrays") from error


def write_npz(motion: Motion, path: str | Path, *, metadata: dict[str, Any] | None = None) -> Pose:
    """SMPL-style: `poses` [T, 66] and `trans` in AMASS's z-up axes, zero `betas`, and our `joints` beside them.

    Rotations are fitted to a T-pose skeleton with the clip's own bone lengths, not to SMPL's surface; on a SMPL body
    the pose is the same and the joints differ as the bodies do. `read_npz` takes `joints`, so nothing is lost; `stored`
    features stand beside them. `metadata` (JSON) stands under `weft`.
    """
    pose = solve(motion)
    turn = from_matrix(_Z_UP[None])[0]
    rotations = pose.rotations.copy()
    rotations[:, 0] = multiply(np.broadcast_to(turn, rotations[:, 0].shape), rotations[:, 0])
    facts = {"weft": np.array(json.dumps(metadata))} if metadata else {}
    if motion.stored is not None:
        facts["features"] = motion.stored
    with atomic_write(path) as handle:
        np.savez(
            handle,
            allow_pickle=False,
            poses=to_axis_angle(rotations).reshape(len(rotations), -1).astype(np.float32),
            trans=(pose.root @ _Z_UP).astype(np.float32),
            betas=np.zeros(10, dtype=np.float32),
            gender=np.array("neutral"),
            mocap_framerate=np.array(motion.fps),
            joints=motion.joints,
            fps=np.array(motion.fps),
            layout=np.array(motion.layout.name),
            **facts,
        )
    return pose
