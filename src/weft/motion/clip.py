"""A clip of movement: joint positions at a frame rate, on a known skeleton. What every reader returns."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from weft.errors import WeftError
from weft.motion.features import extract, place, retarget
from weft.motion.recover import recover
from weft.motion.skeleton import HUMANML3D, Layout, layout_of

FARTHEST = 1e6  # in the layout's unit, of a joint from the origin: float32 is down to centimetres there
LONGEST = 5_000_000  # frames: almost three days at 20 a second; a file that asks for more is damaged


@dataclass(slots=True)
class Motion:
    """Joints [T, J, 3] float32, y up, in the unit of `layout` (metres for HumanML3D), `fps` frames a second.

    It can be the value of a motion part of a record (it has `load()` and `digest`). `meta` says where it came from,
    `stored` are the features [T, 263 or 251] of the file that it was read from, if it was one: joints do not hold all
    that is in them. `crop` keeps them; whatever else makes another clip leaves them out. Set them to None if you change
    `joints` in place.
    Raises `WeftError` for another shape, no frame, NaN, a joint beyond `FARTHEST`, or a frame rate that is not
    positive.
    """

    joints: np.ndarray
    fps: float = 20.0
    layout: Layout = HUMANML3D
    meta: dict[str, Any] = field(default_factory=dict)
    stored: np.ndarray | None = field(default=None, init=False, repr=False)  # so `replace` does not carry it over
    kind: ClassVar[str] = "motion"  # of the record's part that it makes

    def __post_init__(self) -> None:
        self.joints = np.asarray(self.joints, dtype=np.float32)
        self.fps = float(self.fps)
        count = len(self.layout.joints)
        if self.joints.ndim != 3 or self.joints.shape[1:] != (count, 3):
            raise WeftError(f"joints of shape {self.joints.shape}: {self.layout.name} needs [frames, {count}, 3]")
        if not len(self.joints):
            raise WeftError("a clip without frames: give at least one")
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise WeftError(f"{self.fps} frames a second: give a positive frame rate")
        if not np.isfinite(self.joints).all():
            bad = np.flatnonzero(~np.isfinite(self.joints).all(axis=(1, 2)))
            raise WeftError(f"NaN or infinity in {len(bad)} of {len(self.joints)} frames, the first is {bad[0]}")
        far = float(np.abs(self.joints).max())
        if far > FARTHEST:
            raise WeftError(
                f"a joint is {far:.3g} {self.layout.unit} from the origin (the limit: {FARTHEST:g}): is the unit right?"
            )

    def __len__(self) -> int:
        return len(self.joints)

    @property
    def seconds(self) -> float:
        return len(self.joints) / self.fps

    @property
    def digest(self) -> str:
        """SHA-256 of positions, frame rate, skeleton, and stored features."""
        head = f"{self.layout.name} {self.fps!r} {self.joints.shape}\n".encode()
        found = hashlib.sha256(head + np.ascontiguousarray(self.joints).tobytes())
        if self.stored is not None:
            found.update(np.ascontiguousarray(self.stored).tobytes())
        return found.hexdigest()

    def load(self) -> Motion:
        """Itself: in-memory media of records have this method."""
        return self

    def save(self, path: str | Path) -> None:
        """Writes a file by its suffix; `weft.motion.write_motion` has the options."""
        from weft.motion.files import write_motion

        write_motion(self, path)

    def features(self, *, heading: str = "humanml3d") -> np.ndarray:
        """[T-1, 263 or 251] at the layout's frame rate (`weft.motion.features.extract`), or those of `stored_by`."""
        if (stored := self.stored_by(heading)) is not None:
            return stored.astype(np.float32)
        return extract(self.resample(self.layout.fps).joints, layout=self.layout, heading=heading)

    def stored_by(self, heading: str) -> np.ndarray | None:
        """The stored features [T, 263 or 251], if `heading` is the dataset's own: by that rule files are taken to be
        made. Made again from joints they would differ where the heading passes half a turn."""
        return self.stored if heading == "humanml3d" else None

    def resample(self, fps: float) -> Motion:
        """The same movement at another frame rate; see `resample`."""
        if fps == self.fps:
            return self
        return replace(self, joints=resample(self.joints, self.fps, fps), fps=fps)

    def mirror(self) -> Motion:
        """Left and right exchanged."""
        return replace(self, joints=mirror(self.joints, self.layout))

    def crop(self, start: int = 0, stop: int | None = None) -> Motion:
        """Frames `start` to `stop` (not included). Raises `WeftError` if none is left."""
        cut = replace(self, joints=self.joints[start:stop])
        cut.stored = None if self.stored is None else self.stored[start:stop]
        return cut

    def placed(self) -> Motion:
        """On the floor, from the origin, facing +z at first."""
        return replace(self, joints=place(self.joints, layout=self.layout))

    def retargeted(self) -> Motion:
        """On the layout's reference skeleton; see `weft.motion.features.retarget`."""
        return replace(self, joints=retarget(self.joints, layout=self.layout))


def from_features(
    features: np.ndarray,
    *,
    source: str = "positions",
    lengths: Sequence[float] | np.ndarray | None = None,
    meta: dict[str, Any] | None = None,
) -> Motion:
    """A clip from features [T, 263 or 251]; see `weft.motion.recover.recover`."""
    if np.ndim(features) != 2:
        raise WeftError(f"features of shape {np.shape(features)}: one clip is [frames, 263] or [frames, 251]")
    layout = layout_of(np.shape(features)[-1])
    return Motion(recover(features, source, lengths=lengths), layout.fps, layout, dict(meta or {}))


def mirror(joints: np.ndarray, layout: Layout = HUMANML3D) -> np.ndarray:
    """Left and right exchanged: x negated, sides swapped (HumanML3D raw_pose_processing.ipynb). [..., J, 3]."""
    flipped = joints[..., list(layout.mirrored), :].copy()
    flipped[..., 0] *= -1
    return flipped


_SIDES = {"left": "right", "right": "left", "clockwise": "counterclockwise", "counterclockwise": "clockwise",
          "anticlockwise": "clockwise"}  # fmt: skip


def mirror_text(text: str) -> str:
    """A caption of the mirrored clip: left and right, clockwise and counterclockwise exchanged, case kept."""
    import re

    def swap(match: re.Match[str]) -> str:
        word = match.group(0)
        other = _SIDES[re.sub("[- ]", "", word.lower())]
        return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other

    return re.sub(r"\b(left|right|(?:counter[- ]?|anti[- ]?)?clockwise)\b", swap, text, flags=re.IGNORECASE)


def resample(joints: np.ndarray, fps: float, to: float, *, method: str = "linear") -> np.ndarray:
    """Positions [T, ...] at another frame rate: "linear" in time, or "stride" (every int(fps/to)-th frame).

    Linear keeps the clip's duration; bones that turn fast between two frames come out shorter by the chord of
    their arc. "stride" is the rule by which HumanML3D was made (120 fps: 6; 59 fps: 2, which is not 20 fps).
    Raises `WeftError` for a rate that is not positive or another method.
    """
    if not (math.isfinite(fps) and math.isfinite(to) and fps > 0 and to > 0):
        raise WeftError(f"from {fps} to {to} frames a second: both must be positive")
    if method == "stride":
        return joints[:: max(int(fps / to), 1)].copy()
    if method != "linear":
        raise WeftError(f"method: '{method}' is unknown, use linear or stride")
    if not (len(joints) - 1) * to / fps < LONGEST:
        raise WeftError(
            f"{(len(joints) - 1) / fps:g} s at {to:g} frames a second: the longest clip is {LONGEST} frames; is the "
            "frame rate right?"
        )
    count = int((len(joints) - 1) * to / fps + 1e-6) + 1
    at = np.minimum(np.arange(count) * (fps / to), len(joints) - 1)
    low = np.minimum(at.astype(int), max(len(joints) - 2, 0))
    high = np.minimum(low + 1, len(joints) - 1)
    part = (at - low).reshape(-1, *([1] * (joints.ndim - 1)))
    return ((1 - part) * joints[low] + part * joints[high]).astype(joints.dtype)
