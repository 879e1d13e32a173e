"""Physical metrics of joint positions, all in one place. y is up, units metres and seconds, arrays [T, J, 3].

None of them is standard; each function names the paper or code whose definition it follows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from weft.errors import WeftError
from weft.motion.clip import Motion
from weft.motion.skeleton import HUMANML3D, Layout


def speeds(joints: np.ndarray, fps: float, *, plane: bool = False) -> np.ndarray:
    """Speed of each joint between frames, [T-1, J] in m/s; `plane` leaves the vertical out."""
    step = np.diff(joints.astype(np.float64), axis=0)
    if plane:
        step = step[..., [0, 2]]
    return np.linalg.norm(step, axis=-1) * fps


def contacts(
    joints: np.ndarray, fps: float, layout: Layout = HUMANML3D, *, speed: float = 0.15, height: float = 0.1
) -> np.ndarray:
    """Whether each foot joint (left ankle, left toe, right ankle, right toe) touches the ground, [T, 4].

    Slower than `speed` and lower than `height` above its own lowest place in the clip (an ankle is never on the
    floor): computed from positions, so that nothing that is generated can switch it off. The last frame repeats.
    """
    feet = joints[:, list(layout.feet)]
    if len(joints) < 2:
        moving = np.zeros((len(joints), 4), dtype=bool)
    else:
        fast = speeds(feet, fps) > speed
        moving = np.concatenate([fast, fast[-1:]])
    return ~moving & (feet[..., 1] - feet[..., 1].min(axis=0) < height)


def foot_skate(joints: np.ndarray, fps: float, layout: Layout = HUMANML3D, *, floor: float = 0.0) -> dict[str, float]:
    """Skating ratio and mean contact speed of the toes.

    `ratio`: of the frame pairs with a toe below 0.05 m in both frames, the share that moves faster than 0.2 m/s
    (nv-tlabs/kimodo metrics/foot_skate.py, FootSkateRatio); `speed`: the mean speed over those pairs (Kimodo's
    FootSkateFromHeight also counts those of which only the first frame is low). Both 0 where a toe never touches the
    floor. GMD's ratio (Karunratanakul et al. 2023) is another: of all frames, those in which a foot slides over the
    plane faster than 0.5 m/s, also in the mean of five.
    """
    toes = joints[:, [layout.feet[1], layout.feet[3]]]
    low = toes[..., 1] - floor < 0.05
    down = low[1:] & low[:-1]
    moved = speeds(toes, fps)[down] if len(joints) > 1 else np.zeros(0)
    return {
        "ratio": float((moved > 0.2).mean()) if moved.size else 0.0,
        "speed": float(moved.mean()) if moved.size else 0.0,
        "pairs": float(moved.size),
    }


def jitter(joints: np.ndarray, fps: float) -> float:
    """Mean norm of the third difference times fps^3, m/s^3; 0 for fewer than four frames."""
    if len(joints) < 4:
        return 0.0
    return float(np.linalg.norm(np.diff(joints.astype(np.float64), n=3, axis=0), axis=-1).mean() * fps**3)


def penetration(joints: np.ndarray, floor: float = 0.0) -> float:
    """Mean depth below the floor over joints and frames, metres."""
    return float(np.maximum(floor - joints[..., 1], 0).mean())


def floating(joints: np.ndarray, floor: float = 0.0) -> float:
    """Mean height of the lowest joint above the floor, metres: jumps count, too."""
    return float(np.maximum(joints[..., 1].min(axis=1) - floor, 0).mean())


def contact_score(joints: np.ndarray, fps: float, layout: Layout = HUMANML3D, *, floor: float = 0.0) -> float:
    """OmniMoGen's s_contact, per frame and averaged, 0..1.

    exp(-relu(|lowest foot height| - 0.05)) * exp(-relu(smallest horizontal foot speed - 0.075)); arXiv 2512.19159.
    """
    feet = joints[:, list(layout.feet)]
    lowest = np.abs(feet[..., 1].min(axis=1) - floor)
    slowest = speeds(feet, fps, plane=True).min(axis=1) if len(joints) > 1 else np.zeros(1)
    slowest = np.concatenate([slowest, slowest[-1:]])[: len(joints)]
    return float((np.exp(-np.maximum(lowest - 0.05, 0)) * np.exp(-np.maximum(slowest - 0.075, 0))).mean())


def physical_reward(
    joints: np.ndarray, fps: float, touching: np.ndarray | None = None, layout: Layout = HUMANML3D
) -> float:
    """OmniMoGen's R_phy: minus the mean over frames of the squared horizontal speed of feet in contact, <= 0.

    `touching` [T, 4] are contacts in the order of the layout's feet, recomputed from positions by default.
    """
    if len(joints) < 2:
        return 0.0
    down = contacts(joints, fps, layout) if touching is None else np.asarray(touching)
    squared = speeds(joints[:, list(layout.feet)], fps, plane=True) ** 2
    return float(-(down[:-1] * squared).sum() / len(joints))


def bone_drift(joints: np.ndarray, layout: Layout = HUMANML3D) -> float:
    """Largest standard deviation over time of a bone's length, metres."""
    parents = list(layout.parents[1:])
    return float(np.linalg.norm(joints[:, 1:].astype(np.float64) - joints[:, parents], axis=-1).std(axis=0).max())


def mpjpe(a: np.ndarray, b: np.ndarray, *, aligned: bool = True) -> float:
    """Mean joint distance of clips of one shape, in their unit; `aligned` moves the roots together in every frame."""
    if a.shape != b.shape:
        raise WeftError(f"clips of shapes {a.shape} and {b.shape}: crop or resample to equal ones")
    if aligned:
        a, b = a - a[:, :1], b - b[:, :1]
    return float(np.linalg.norm(a.astype(np.float64) - b, axis=-1).mean())


def measure(motion: Motion, *, floor: float = 0.0) -> dict[str, float]:
    """All single-clip metrics by name."""
    joints, fps, layout = motion.joints, motion.fps, motion.layout
    skate = foot_skate(joints, fps, layout, floor=floor)
    return {
        "skate_ratio": skate["ratio"],
        "skate_speed": skate["speed"],
        "jitter": jitter(joints, fps),
        "penetration": penetration(joints, floor),
        "floating": floating(joints, floor),
        "contact_score": contact_score(joints, fps, layout, floor=floor),
        "physical_reward": physical_reward(joints, fps, None, layout),
        "bone_drift": bone_drift(joints, layout),
    }


def average(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of `measure` over clips. Raises `WeftError` for none."""
    if not rows:
        raise WeftError("no clips: measure at least one")
    return {k: float(np.mean([r[k] for r in rows])) for k in rows[0]}
