"""A shaded figure on a studio floor, drawn by NumPy: pictures of clips without a graphics card.

The body is the table of capsules of `weft.motion.figure`. A pixel takes the spheres on the capsules' axes that it
sees; surfaces within a few centimetres of each other are blended, so that the parts read as one body. Shadows come
from a depth map of the scene as the light sees it, the dark ground under the feet from one straight down.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, gaussian_filter1d, map_coordinates

from weft.errors import WeftError
from weft.motion.clip import Motion
from weft.motion.figure import COLOURS, SIDES, solids
from weft.motion.skeleton import KIT

_SHADES = (1.0, 0.70, 0.48, 0.85)  # of the first, second ... figure of a scene
_LIGHT = np.array([0.42, 0.80, 0.43]) / np.linalg.norm([0.42, 0.80, 0.43])
_BLEND = 70.0  # 1/m: surfaces 1/70 m apart in depth mix by 1/e
_STRAYS = 1.0  # metres from its middle beyond which a camera follows by itself


@dataclass(slots=True)
class Camera:
    """Looks at `target` from `distance` metres; `turn` and `tilt` in degrees around it and above the horizon."""

    target: tuple[float, float, float] = (0.0, 0.9, 0.0)
    distance: float = 4.5
    turn: float = 30.0
    tilt: float = 12.0
    lens: float = 2.4  # focal length in half picture heights

    def axes(self) -> tuple[np.ndarray, np.ndarray]:
        """Eye [3] and the rows right, up, back [3, 3]."""
        a, b = np.radians(self.turn), np.radians(self.tilt)
        back = np.array([np.sin(a) * np.cos(b), np.sin(b), np.cos(a) * np.cos(b)])
        right = np.array([np.cos(a), 0.0, -np.sin(a)])
        return np.array(self.target) + self.distance * back, np.stack([right, np.cross(back, right), back])


def camera_for(motions: Sequence[Motion], *, turn: float = 30.0, tilt: float = 12.0, share: float = 0.86) -> Camera:
    """A camera from whose place whole clips fit into the middle `share` of a square picture."""
    points = np.concatenate([_metres(m).reshape(-1, 3) for m in motions])
    points = np.concatenate([points, points + [0, 0.2, 0], points * [1, 0, 1]])  # the head's top, the shadow
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
    follow: bool | None = None,
) -> Iterator[Image.Image]:
    """RGB pictures of a clip, or of several in one scene (the shorter ones stay at their end), drawn one by one.

    `size` is the edge or (height, width) in pixels; `fps` resamples; `frames` picks single ones. Drawn at twice the
    size and scaled down. The camera stands still and sees the whole clip, or with `follow` goes along with the first
    clip's root (None: if that strays over a metre). Raises `WeftError` for no clip, or a size below 16 or above 2048.
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
    if follow is None:
        middle = (path.min(axis=0) + path.max(axis=0)) / 2
        follow = camera is None and len(clips) == 1 and float(np.linalg.norm(path - middle, axis=-1).max()) > _STRAYS
    if follow:  # smoothly: a camera that shakes with every step is hard to watch
        path = gaussian_filter1d(path, 0.4 * clips[0].fps, axis=0, mode="nearest")
    if camera is None:
        camera = camera_for([_on_the_spot(c, path) for c in clips] if follow else clips)
    bodies = [solids(_metres(c), c.layout) for c in clips]
    colours = [np.array([COLOURS[s] for s in SIDES]) * _SHADES[k % 4] for k in range(len(clips))]
    canvas = _Canvas(2 * height, 2 * width, camera)
    count = max(len(c) for c in clips)
    for t in range(count) if frames is None else frames:
        if follow:
            canvas.move(path[min(t, len(path) - 1)])
        at = [min(t, len(c) - 1) for c in clips]
        starts = np.concatenate([body[0][k] for body, k in zip(bodies, at, strict=True)])
        stops = np.concatenate([body[1][k] for body, k in zip(bodies, at, strict=True)])
        yield canvas.picture(starts, stops, np.concatenate([b[2] for b in bodies]), np.concatenate(colours))


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


_Hit = tuple[tuple[slice, slice], np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _capsule(a: np.ndarray, b: np.ndarray, ra: float, rb: float, height: int, width: int) -> _Hit | None:
    """A capsule on a raster, ends (x, y) and radii in pixels: box, share along it, offsets from its axis [h, w] in
    radii, how far the surface rises towards the eye in radii (0 outside), and how far beyond its ends one is, in
    radii. None if it is not on the raster."""
    reach = max(ra, rb) + 1
    left, right = max(int(min(a[0], b[0]) - reach), 0), min(int(max(a[0], b[0]) + reach) + 2, width)
    top, bottom = max(int(min(a[1], b[1]) - reach), 0), min(int(max(a[1], b[1]) + reach) + 2, height)
    if left >= right or top >= bottom:
        return None
    x = np.arange(left, right, dtype=np.float32)[None] - np.float32(a[0])
    y = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(a[1])
    dx, dy = np.float32(b[0] - a[0]), np.float32(b[1] - a[1])
    square = dx * dx + dy * dy
    whole = (x * dx + y * dy) / square if square > 1e-9 else np.full((bottom - top, right - left), 0.5, "f4")
    share = np.clip(whole, 0, 1)
    radius = np.maximum(ra + share * (rb - ra), 1e-6).astype(np.float32)
    ox, oy = (x - share * dx) / radius, (y - share * dy) / radius
    rise = np.sqrt(np.maximum(1 - ox * ox - oy * oy, 0))
    beyond = np.abs(whole - share) * np.float32(np.sqrt(square)) / radius
    return (slice(top, bottom), slice(left, right)), share, ox, oy, rise, beyond


class _Map:
    """The figures as parallel rays along `towards` (to the light) see them: height towards it, -inf where none is."""

    def __init__(self, towards: np.ndarray, cell: float, soft: float) -> None:
        side = np.cross([0.0, 0.0, 1.0], towards)
        side /= np.linalg.norm(side)
        self.rows, self.cell, self.soft = np.stack([side, np.cross(towards, side), towards]), cell, soft

    def draw(self, starts: np.ndarray, stops: np.ndarray, radii: np.ndarray) -> None:
        a, b = starts @ self.rows.T, stops @ self.rows.T
        self.low = np.minimum(a, b)[:, :2].min(axis=0) - radii.max() - 0.3
        high = np.maximum(a, b)[:, :2].max(axis=0) + radii.max() + 0.3
        shape = np.minimum(np.ceil((high - self.low)[::-1] / self.cell).astype(int) + 1, 1024)
        self.height = np.full(shape, -np.inf, dtype=np.float32)
        for one, two, (ra, rb) in zip(a, b, radii, strict=True):
            p, q = (one[:2] - self.low) / self.cell, (two[:2] - self.low) / self.cell
            made = _capsule(p, q, ra / self.cell, rb / self.cell, *shape)
            if made is None:
                continue
            box, share, _, _, rise, _ = made
            top = one[2] + share * (two[2] - one[2]) + rise * (ra + share * (rb - ra))
            np.maximum(self.height[box], np.where(rise > 0, top, -np.inf), out=self.height[box])
        self.cover = gaussian_filter((self.height > -1e9).astype(np.float32), self.soft / self.cell)

    def _at(self, points: np.ndarray) -> np.ndarray:
        return ((points @ self.rows[:2].T - self.low) / self.cell)[..., ::-1].T  # [2, N]: row, column

    def covered(self, points: np.ndarray) -> np.ndarray:
        """How much of points [N, 3] on the floor lies below a figure, soft, 0..1."""
        return map_coordinates(self.cover, self._at(points), order=1, cval=0.0)

    def hidden(self, points: np.ndarray, bias: float = 0.02) -> np.ndarray:
        """Share of the light that figures take from points [N, 3] on themselves, 0..1."""
        away = points @ self.rows[2] + bias
        rows, columns = self._at(points)
        total = np.zeros(len(points), dtype=np.float32)
        shifts = [(0.0, 0.0), (1.6, 0.7), (-1.6, -0.7), (0.7, -1.6), (-0.7, 1.6)]
        for dy, dx in shifts:
            y = np.clip((rows + dy).round().astype(int), 0, self.height.shape[0] - 1)
            x = np.clip((columns + dx).round().astype(int), 0, self.height.shape[1] - 1)
            total += np.clip((self.height[y, x] - away) / 0.03, 0, 1)
        return total / len(shifts)


class _Canvas:
    def __init__(self, height: int, width: int, camera: Camera) -> None:
        self.height, self.width, self.camera = height, width, camera
        self.home, self.rows = camera.axes()
        self.focal = camera.lens * height / 2
        y, x = np.mgrid[0:height, 0:width].astype(np.float32)
        rays = np.stack([x - width / 2, height / 2 - y, np.full_like(x, -self.focal)], axis=-1)
        self.rays = rays @ self.rows.astype(np.float32)  # length `focal` along the view
        self.sky = np.array([0.945, 0.950, 0.960]) - np.linspace(0.09, 0.0, height)[:, None, None]
        self.light, self.below = _Map(_LIGHT, 0.012, 0.022), _Map(np.array([0.0, 1.0, 0.0]), 0.02, 0.07)
        self.move(np.zeros(3))

    def move(self, by: np.ndarray) -> None:
        """Stand `by` away from the camera's own place."""
        self.eye, self.centre = self.home + by, np.array(self.camera.target) + by
        self._floor()

    def _floor(self) -> None:
        """The empty scene [H, W, 3], and which pixels see the floor at which place."""
        down = self.rays[..., 1] < -1e-3 * self.focal
        far = np.where(down, -self.eye[1] / np.where(down, self.rays[..., 1], 1), 0).astype(np.float32)
        place = self.eye[[0, 2]].astype(np.float32) + far[..., None] * self.rays[..., [0, 2]]
        tiles = (np.floor(place[..., 0]) + np.floor(place[..., 1])) % 2
        pixel = far * 1.4  # metres that a pixel covers there: lines never get thinner than that
        line = np.abs(place - np.round(place)).min(axis=-1) < np.maximum(0.006, 0.5 * pixel / 2)
        away = np.linalg.norm(place - self.centre[[0, 2]].astype(np.float32), axis=-1)
        fade = np.where(down, np.exp(-((away / (1.1 * self.camera.distance)) ** 2)), 0)[..., None]
        grey = np.where(line, 0.66, np.where(tiles > 0, 0.80, 0.765)) - 0.05 * np.clip(away / 6, 0, 1)
        ground = grey[..., None] * np.array([0.995, 1.0, 1.01])
        self.background = (self.sky + fade * (ground - self.sky)).astype(np.float32)
        self.down, self.place = down, place

    def picture(self, starts: np.ndarray, stops: np.ndarray, radii: np.ndarray, colours: np.ndarray) -> Image.Image:
        """Capsules [S, 3], [S, 3], [S, 2] in colours [S, 3] on the floor."""
        self.light.draw(starts, stops, radii)
        self.below.draw(starts, stops, radii)
        colour = self.background.copy()
        self._shade_floor(colour, np.concatenate([starts, stops]), float(radii.max()) + 0.3)
        self._draw(colour, starts, stops, radii, colours)
        return Image.fromarray((np.clip(colour, 0, 1) * 255 + 0.5).astype(np.uint8)).reduce(2)

    def _shade_floor(self, colour: np.ndarray, points: np.ndarray, margin: float) -> None:
        """Shadows of figures with ends `points` [2S, 3], which reach `margin` metres further."""
        fallen = points - points[:, 1:2] / _LIGHT[1] * _LIGHT
        both = np.concatenate([points, fallen])[:, [0, 2]]
        low, high = (both.min(axis=0) - margin).astype("f4"), (both.max(axis=0) + margin).astype("f4")
        x, z = self.place[..., 0], self.place[..., 1]
        near = self.down & (x > low[0]) & (x < high[0]) & (z > low[1]) & (z < high[1])
        points = np.zeros((int(near.sum()), 3))
        points[:, [0, 2]] = self.place[near]
        shadow, ground = self.light.covered(points), self.below.covered(points)
        colour[near] *= ((1 - 0.42 * shadow) * (1 - 0.20 * ground))[:, None]

    def _draw(
        self, colour: np.ndarray, starts: np.ndarray, stops: np.ndarray, radii: np.ndarray, colours: np.ndarray
    ) -> None:
        nearest = np.full((self.height, self.width), np.inf, dtype=np.float32)
        hits = []
        a, b = (starts - self.eye) @ self.rows.T, (stops - self.eye) @ self.rows.T
        for one, two, (ra, rb), paint in zip(a, b, radii, colours, strict=True):
            fa, fb = max(-one[2], 0.05), max(-two[2], 0.05)
            p = np.array([self.width / 2 + self.focal * one[0] / fa, self.height / 2 - self.focal * one[1] / fa])
            q = np.array([self.width / 2 + self.focal * two[0] / fb, self.height / 2 - self.focal * two[1] / fb])
            made = _capsule(p, q, self.focal * ra / fa, self.focal * rb / fb, self.height, self.width)
            if made is None:
                continue
            box, share, ox, oy, rise, beyond = made
            far = np.where(rise > 0, fa + share * (fb - fa) - rise * (ra + share * (rb - ra)), np.inf)
            np.minimum(nearest[box], far, out=nearest[box])
            # a cap counts for little: inside the next capsule of a limb it would look like a bead
            hits.append((box, far, ox, oy, rise, np.exp(-9 * beyond) + 0.01, paint))
        seen = np.isfinite(nearest)
        if not seen.any():
            return
        total = np.zeros((self.height, self.width), dtype=np.float32)
        mixed = np.zeros((6, self.height, self.width), dtype=np.float32)  # normal, colour
        for box, far, ox, oy, rise, counts, paint in hits:
            near = np.where(np.isfinite(far), nearest[box], 0)
            weight = np.where(np.isfinite(far), counts * np.exp(-_BLEND * np.minimum(far - near, 1)), 0)
            total[box] += weight
            for k, part in enumerate((ox, -oy, rise, *paint)):
                mixed[k][box] += weight * part
        found = (mixed[:, seen] / total[seen]).T
        normal = found[:, :3] / np.maximum(np.linalg.norm(found[:, :3], axis=-1, keepdims=True), 1e-6)
        points = self.eye + self.rays[seen] * (nearest[seen] / self.focal)[:, None]
        colour[seen] = self._shaded(normal, found[:, 3:], points)

    def _shaded(self, normal: np.ndarray, paint: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Key light with shadows, sky and floor light by the normal, a gloss and a bright rim."""
        light = self.rows @ _LIGHT
        clear = 1 - self.light.hidden(points + 0.03 * normal @ self.rows)  # off the surface: it must not shadow itself
        key = np.clip(normal @ light, 0, 1) * clear
        up = normal @ self.rows[:, 1]
        low = np.clip(points[:, 1] / 0.5, 0.35, 1)  # near the floor less of the sky is seen
        half = light + [0, 0, 1]
        gloss = np.clip(normal @ (half / np.linalg.norm(half)), 0, 1) ** 28 * clear
        rim = (1 - np.clip(normal[:, 2], 0, 1)) ** 3 * np.clip(up + 0.3, 0, 1)
        ambient = (0.40 + 0.12 * up) * (0.75 + 0.25 * low)
        bright = (ambient + 0.56 * key)[:, None] * paint * np.array([1.02, 1.0, 0.98])
        return bright + 0.13 * gloss[:, None] + 0.08 * rim[:, None]
