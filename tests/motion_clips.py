"""Procedural clips for the motion tests: any skeleton swinging its limbs along a curve."""

from __future__ import annotations

import numpy as np

from weft.motion.rotation import from_axis_angle, multiply, rotate
from weft.motion.skeleton import HUMANML3D, KIT, Layout

KIT_LENGTHS = np.array([0.0] + [100.0 + 10 * k for k in range(20)])


def procedural(
    frames: int, seed: int, *, layout: Layout = HUMANML3D, scale: float = 1.0, spin: float = 0.6, swing: float = 0.35
) -> np.ndarray:
    """[frames, J, 3] float32 in the layout's unit, rigid bones (within ten per cent of the reference lengths)."""
    rng = np.random.default_rng(seed)
    t = np.arange(frames) / layout.fps
    unit = 1000.0 if layout is KIT else 1.0
    lengths = KIT_LENGTHS if layout is KIT else layout.bone_lengths()
    lengths = lengths * scale * rng.uniform(0.9, 1.1, len(lengths))
    positions, turned = np.zeros((frames, len(lengths), 3)), np.zeros((frames, len(lengths), 4))
    yaw = spin * t * rng.uniform(0.5, 1) + rng.uniform(-1, 1)
    for k, parent in enumerate(layout.parents):
        waves = [rng.normal(size=3) * np.sin(t[:, None] * rng.uniform(1, 5) + rng.uniform(0, 6)) for _ in range(2)]
        angle = swing * sum(waves)
        if parent < 0:
            heading = from_axis_angle(np.stack([0 * yaw, yaw, 0 * yaw], axis=-1))
            turned[:, k] = multiply(heading, from_axis_angle(0.2 * angle))
            positions[:, k] = scale * unit * np.stack([0.9 * t, 0.95 + 0.03 * np.sin(7 * t), 0.4 * np.sin(t)], axis=-1)
            continue
        step = np.broadcast_to(layout.directions[k] * lengths[k], (frames, 3))
        positions[:, k] = positions[:, parent] + rotate(turned[:, parent], step)
        turned[:, k] = multiply(turned[:, parent], from_axis_angle(angle))
    return positions.astype(np.float32)
