"""A shaded figure on a checkered floor, drawn by NumPy: pictures of clips without a graphics card.

Every bone is a tapered capsule; a pixel near it takes the sphere on the bone's axis that it sees first. Figures are
depth-tested against each other and cast a soft shadow of themselves on the floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from weft.errors import WeftError
from weft.motion.clip import Motion
from weft.motion.skeleton import HUMANML3D, KIT

_RADII = {"hip": 0.075, "knee": 0.065, "ankle": 0.045, "foot": 0.035, "spine1": 0.11, "spine2": 0.11, "spine3": 0.11,
          "neck": 0.05, "head": 0.055, "collar": 0.06, "shoulder": 0.055, "elbow": 0.042, "wrist": 0.032, "chest": 0.1,
          "heel": 0.04, "toe": 0.035, "pelvis": 0.11}  # fmt: skip
_LEFT, _RIGHT, _MIDDLE = (0.33, 0.56, 0.86), (0.90, 0.48, 0.33), (0.83, 0.80, 0.76)
_LIGHT = np.array([0.45, 0.80, 0.40]) / np.linalg.norm([0.45, 0.80, 0.40])
COLOURS = {"left": _LEFT, "right": _RIGHT, "middle": _MIDDLE}


@dataclass(slots=True)
class Camera:
    """Looks at `target` from `distance` metres; `turn` and `tilt` in degrees around it and above the horizon."""

    target: tuple[float, float, float] = (0.0, 0.9, 0.0)
    distance: float = 4.5
    turn: float = 30.0
    tilt: float = 12.0
    lens: float = 1.6  # focal length in half picture heights

    def axes(self) -> tuple[np.ndarray, np.ndarray]:
        """Eye [3] and the rows right, up, back [3, 3]."""
        a, b = np.radians(self.turn), np.radians(self.tilt)
        back = np.array([np.sin(a) * np.cos(b), np.sin(b), np.cos(a) * np.cos(b)])
        right = np.array([np.cos(a), 0.0, -np.sin(a)])
        return np.array(self.target) + self.distance * back, np.stack([right, np.cross(back, right), back])


def camera_for(motions: Sequence[Motion], *, turn: float = 30.0, tilt: float = 12.0, share: float = 0.8) -> Camera:
    """A camera from whose place whole clips fit into the middle `share` of a square picture."""
    points = np.concatenate([_metres(m).reshape(-1, 3) for m in motions])
    points = np.concatenate([points, points + [0, 0.15, 0], points * [1, 0, 1]])  # the head's top, the shadow
    centre = (points.min(axis=0) + points.max(axis=0)) / 2
    camera = Camera((float(centre[0]), float(centre[1]), float(centre[2])), 1.0, turn, tilt)
    right, up, back = ((points - centre) @ row for row in camera.axes()[1])
    camera.distance = float((back + camera.lens * np.maximum(np.abs(right), np.abs(up)) / share).max())
    return camera


def _metres(motion: Motion) -> np.ndarray:
    return motion.joints.astype(np.float64) * (0.001 if motion.layout is KIT else 1.0)


def render_frames(
    motion: Motion | Sequence[Motion],
    *,
    size: int | tuple[int, int] = 256,
    camera: Camera | None = None,
    fps: float | None = None,
    frames: Sequence[int] | None = None,
    follow: bool = False,
) -> list[Image.Image]:
    """RGB pictures of a clip, or of several in one scene (the shorter ones stay at their end).

    `size` is the edge or (height, width) in pixels; `fps` resamples; `frames` picks single ones. Drawn at twice the
    size and scaled down. The camera stands still and sees the whole clip, or with `follow` goes along with the first
    clip's root. Raises `WeftError` for no clip, or a size below 16 or above 2048.
    """
    clips = [motion] if isinstance(motion, Motion) else list(motion)
    if not clips:
        raise WeftError("nothing to draw: give a clip")
    height, width = (size, size) if isinstance(size, int) else size
    if not (16 <= height <= 2048 and 16 <= width <= 2048):
        raise WeftError(f"size {height}x{width}: use 16 to 2048 pixels")
    if fps is not None:
        clips = [c.resample(fps) for c in clips]
    path = _metres(clips[0])[:, 0] * [1, 0, 1]
    if camera is None:
        camera = camera_for([_on_the_spot(c, path) for c in clips] if follow else clips)
    shades = [1.0, 0.72, 0.5, 0.86]
    canvas = _Canvas(2 * height, 2 * width, camera)
    count = max(len(c) for c in clips)
    pictures = []
    for t in range(count) if frames is None else frames:
        if follow:
            canvas.move(path[min(t, len(path) - 1)])
        canvas.clear()
        for k, clip in enumerate(clips):
            pose = _metres(clip)[min(t, len(clip) - 1)]
            canvas.shadow(_bones(pose, clip, shades[k % 4]))
        for k, clip in enumerate(clips):
            pose = _metres(clip)[min(t, len(clip) - 1)]
            canvas.draw(_bones(pose, clip, shades[k % 4]))
        pictures.append(canvas.picture())
    return pictures


def _on_the_spot(motion: Motion, path: np.ndarray) -> Motion:
    """The clip as a camera that follows `path` [T, 3] sees it."""
    at = path[np.minimum(np.arange(len(motion)), len(path) - 1)] / (0.001 if motion.layout is KIT else 1.0)
    return Motion(motion.joints - at[:, None], motion.fps, motion.layout)


def contact_strip(motion: Motion, *, count: int = 6, size: int = 192, camera: Camera | None = None) -> Image.Image:
    """`count` moments of a clip side by side: the clip at a glance, for sheets and reports."""
    moments = np.linspace(0, len(motion) - 1, count).round().astype(int).tolist()
    pictures = render_frames(motion, size=size, camera=camera, frames=moments, follow=camera is None)
    strip = Image.new("RGB", (size * count, size))
    for k, picture in enumerate(pictures):
        strip.paste(picture, (k * size, 0))
    return strip


_Bone = tuple[np.ndarray, np.ndarray, float, float, np.ndarray]  # ends, radii, colour


def _bones(pose: np.ndarray, motion: Motion, shade: float) -> list[_Bone]:
    layout = motion.layout
    bones: list[_Bone] = []
    for k, name in enumerate(layout.joints):
        parent = layout.parents[k]
        if parent < 0:
            continue
        side, _, part = name.rpartition("_")
        colour = np.array(COLOURS.get(side, _MIDDLE)) * shade
        radius = _RADII.get(part, 0.05)
        wide = 0.8 * _RADII.get(layout.joints[parent].rpartition("_")[2], radius) + 0.2 * radius
        bones.append((pose[parent], pose[k], min(wide, 1.5 * radius), radius, colour))
    head = layout.joints.index("head")
    neck = layout.parents[head]
    top = pose[head] + 0.09 * _direction(pose[head] - pose[neck])
    bones.append((pose[head], top, 0.095, 0.085, np.array(_MIDDLE) * shade))
    if layout is HUMANML3D:
        for wrist, elbow in ((20, 18), (21, 19)):
            tip = pose[wrist] + 0.1 * _direction(pose[wrist] - pose[elbow])
            colour = np.array(_LEFT if wrist == 20 else _RIGHT) * shade
            bones.append((pose[wrist], tip, 0.035, 0.03, colour))
    return bones


def _direction(v: np.ndarray) -> np.ndarray:
    return v / max(float(np.linalg.norm(v)), 1e-9)


class _Canvas:
    def __init__(self, height: int, width: int, camera: Camera) -> None:
        self.height, self.width, self.camera = height, width, camera
        self.home, self.rows = camera.axes()
        self.focal = camera.lens * height / 2
        self.move(np.zeros(3))

    def move(self, by: np.ndarray) -> None:
        """Stand `by` away from the camera's own place."""
        self.eye, self.centre = self.home + by, np.array(self.camera.target) + by
        self.background, self.floor = self._floor()

    def _floor(self) -> tuple[np.ndarray, np.ndarray]:
        """The empty scene [H, W, 3] and where each pixel's ray meets the floor (x, z; NaN above the horizon)."""
        y, x = np.mgrid[0 : self.height, 0 : self.width].astype(np.float64)
        rays = np.stack([x - self.width / 2, self.height / 2 - y, np.full_like(x, -self.focal)], axis=-1) @ self.rows
        down = rays[..., 1] < -1e-6
        far = np.where(down, -self.eye[1] / np.where(down, rays[..., 1], 1), np.nan)
        place = self.eye + far[..., None] * rays
        floor = place[..., [0, 2]]
        tiles = np.where(down, (np.floor(np.nan_to_num(floor[..., 0])) + np.floor(np.nan_to_num(floor[..., 1]))) % 2, 0)
        away = np.linalg.norm(np.nan_to_num(floor) - self.centre[[0, 2]], axis=-1)
        fade = np.where(down, np.exp(-((away / (3.0 * self.camera.distance)) ** 2)), 0)[..., None]
        sky = np.array([0.93, 0.94, 0.96]) - 0.06 * (y / self.height)[..., None]
        ground = np.where(tiles[..., None] > 0, 0.78, 0.70) * np.array([1.0, 1.0, 0.99])
        return sky + fade * (ground - sky), floor

    def clear(self) -> None:
        self.colour = self.background.copy()
        self.depth = np.full((self.height, self.width), np.inf)

    def _project(self, point: np.ndarray) -> tuple[float, float, float]:
        """Pixel x, y and distance along the view."""
        x, y, z = self.rows @ (point - self.eye)
        far = max(-z, 0.05)
        return self.width / 2 + self.focal * x / far, self.height / 2 - self.focal * y / far, far

    def _box(self, a: tuple[float, ...], b: tuple[float, ...], r: float) -> tuple[slice, slice] | None:
        left, right = int(min(a[0], b[0]) - r), int(max(a[0], b[0]) + r) + 2
        top, bottom = int(min(a[1], b[1]) - r), int(max(a[1], b[1]) + r) + 2
        left, right = max(left, 0), min(right, self.width)
        top, bottom = max(top, 0), min(bottom, self.height)
        return (slice(top, bottom), slice(left, right)) if left < right and top < bottom else None

    def _capsule(
        self, a: tuple[float, ...], b: tuple[float, ...], ra: float, rb: float
    ) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
        """Box, share along the bone, offsets from its axis and radius, per pixel of the box."""
        box = self._box(a, b, max(ra, rb) + 1)
        if box is None:
            return None
        y, x = np.mgrid[box].astype(np.float64)
        dx, dy = b[0] - a[0], b[1] - a[1]
        square = dx * dx + dy * dy
        share = np.clip(((x - a[0]) * dx + (y - a[1]) * dy) / square, 0, 1) if square > 1e-9 else np.zeros_like(x)
        return box, share, x - a[0] - share * dx, y - a[1] - share * dy, ra + share * (rb - ra)

    def shadow(self, bones: list[_Bone]) -> None:
        """Darkens the floor under the light's projection of the bones."""
        dark = np.zeros((self.height, self.width))
        for start, stop, ra, rb, _ in bones:
            flat = [p - p[1] / _LIGHT[1] * _LIGHT for p in (start, stop)]
            a, b = (self._project(p) for p in flat)
            # a foreshortened capsule: the floor is seen at a slant
            made = self._capsule(a, b, self.focal * ra / a[2], self.focal * rb / b[2])
            if made is None:
                continue
            box, _, ox, oy, radius = made
            slant = max(float(self.rows[2][1]), 0.25)
            reach = np.sqrt(ox**2 + (oy / (0.4 + 0.6 * slant)) ** 2) / np.maximum(radius, 1e-6)
            np.maximum(dark[box], np.clip(1.25 - reach, 0, 0.5) * 2, out=dark[box])
        seen = ~np.isnan(self.floor[..., 0])
        self.colour *= 1 - 0.38 * (np.clip(dark, 0, 1) * seen)[..., None]

    def draw(self, bones: list[_Bone]) -> None:
        light = self.rows @ _LIGHT
        for start, stop, ra, rb, colour in bones:
            a, b = self._project(start), self._project(stop)
            made = self._capsule(a, b, self.focal * ra / a[2], self.focal * rb / b[2])
            if made is None:
                continue
            box, share, ox, oy, radius = made
            square = radius**2 - ox**2 - oy**2
            rise = np.sqrt(np.maximum(square, 0))
            far = a[2] + share * (b[2] - a[2]) - rise / self.focal * a[2]
            hit = (square > 0) & (far < self.depth[box])
            if not hit.any():
                continue
            normal = np.stack([ox, -oy, rise], axis=-1) / np.maximum(radius, 1e-6)[..., None]
            lit = np.clip(normal @ light, 0, 1)
            shine = np.clip(normal @ _direction(light + np.array([0, 0, 1.0])), 0, 1) ** 24
            bright = (0.42 + 0.58 * lit)[..., None] * colour + 0.16 * shine[..., None]
            self.colour[box] = np.where(hit[..., None], bright, self.colour[box])
            self.depth[box] = np.where(hit, far, self.depth[box])

    def picture(self) -> Image.Image:
        array = (np.clip(self.colour, 0, 1) * 255 + 0.5).astype(np.uint8)
        return Image.fromarray(array).reduce(2)
