"""The styles of the motion world: how a body holds itself while it does something, as numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from weft.world.motion_body import Take

Hand = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Style:
    """Angles in radians, lengths in metres. `hand` is where a free hand is held relative to its shoulder (outwards,
    up, forward), `elbow` where the elbow points; `swing` scales the arms' swing, `stride` the steps' length, `lift`
    their height; `bounce` and `rock` are the amplitudes of a beat of `beat` Hz in the knees and of the torso's roll."""

    pitch: float = 0.02
    head: float = 0.0
    tilt: float = 0.0
    drop: float = 0.01
    hand: Hand = (0.06, -0.5, 0.05)
    elbow: Hand = (0.4, -0.2, -1.0)
    swing: float = 1.0
    stride: float = 1.0
    lift: float = 1.0
    stance: float = 0.2
    bounce: float = 0.0
    rock: float = 0.0
    beat: float = 1.0


STYLE = {
    "neutral": Style(),
    "zombie": Style(
        pitch=0.12, head=0.1, tilt=0.35, drop=0.02, hand=(0.0, -0.03, 0.5), elbow=(0.6, -1, 0), swing=0.15, stride=0.75,
        lift=0.3, stance=0.26, rock=0.1, beat=0.8,
    ),
    "happy": Style(
        pitch=-0.03, head=-0.2, drop=0.05, hand=(0.34, -0.27, 0.12), elbow=(0.5, -1, -0.6), swing=0.9, lift=1.5,
        bounce=0.045, rock=0.12, beat=1.4,
    ),
    "tired": Style(
        pitch=0.5, head=0.45, drop=0.06, hand=(0.0, -0.49, 0.14), elbow=(0.3, 0, -1), swing=0.25, stride=0.8, lift=0.5
    ),
    "proud": Style(
        pitch=-0.14, head=-0.15, drop=0.0, hand=(0.06, -0.4, 0.04), elbow=(1, 0, -0.25), swing=0.0, stride=1.05,
        lift=1.2,
    ),
    "sneaky": Style(
        pitch=0.5, head=-0.45, drop=0.19, hand=(-0.05, -0.16, 0.27), elbow=(0.5, -1, -0.2), swing=0.2, stride=0.8,
        lift=1.9, stance=0.24,
    ),
}  # fmt: skip


def pose(take: Take, style: Style, t: np.ndarray, strength: float = 1.0) -> None:
    """Puts a standing take into a style, from its first frame to its last."""
    beat = 2 * np.pi * style.beat * t
    take.pitch += style.pitch * strength
    take.head += np.array([style.head, style.tilt]) * strength
    take.height -= style.drop + style.bounce * (0.5 - 0.5 * np.cos(2 * beat))
    take.roll += style.rock * np.sin(beat)
    take.hands[:] = style.hand
    take.elbows[:] = style.elbow
    if style.bounce:
        take.hands[..., 1] += 0.05 * np.sin(beat)[:, None]
