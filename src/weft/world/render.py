"""Drawing a scene: analytic shapes with anti-aliased edges, at any canvas size, in NumPy.

All lengths are in units of 1/64 of the shorter side, so a scene looks the same at every resolution. Masks and
patterns depend on few parameters and are cached; drawing is a handful of blends.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from weft.world.scene import BACKGROUNDS, COLOURS, Scene, Thing

RADIUS = {"small": 7.5, "medium": 10.5, "large": 13.5}
RENDERER = 2  # part of every picture's digest: raise it when the drawing changes
TOWARDS = {"even": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
GAIN = {"neutral": (1, 1, 1), "warm": (1.1, 0.96, 0.66), "cold": (0.7, 0.93, 1.12), "dim": (0.55, 0.55, 0.55)}
CACHED = 2**16  # pixels of a canvas whose backdrop is remembered, at most: 256 large ones are gigabytes
INK = np.array((20, 20, 25), np.float32)


def _polygon(points: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance of (x, y) to a closed polygon [n, 2] (negative inside)."""
    best = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, 0), strict=True):
        ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
        t = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        best = np.minimum(best, (wx - ex * t) ** 2 + (wy - ey * t) ** 2)
        crosses = (ay > y) != (by > y)
        inside ^= crosses & (x < ex * (y - ay) / (by - ay if by != ay else 1e-9) + ax)
    return np.where(inside, -1, 1) * np.sqrt(best)


def _distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to a shape of unit radius, y pointing down."""
    r = np.hypot(x, y)
    if shape == "circle":
        return r - 0.92
    if shape == "ring":
        return np.abs(r - 0.71) - 0.26
    if shape == "moon":
        return np.maximum(r - 1.0, 0.75 - np.hypot(x - 0.55, y + 0.12))
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.82
    if shape == "cross":
        bar = np.maximum(np.abs(x) - 0.98, np.abs(y) - 0.38)
        return np.minimum(bar, np.maximum(np.abs(y) - 0.98, np.abs(x) - 0.38))
    if shape == "triangle":
        return _polygon(np.array([(0, -0.98), (1.0, 0.8), (-1.0, 0.8)]), x, y)
    if shape == "star":
        angle = -np.pi / 2 + np.arange(10) * np.pi / 5
        reach = np.where(np.arange(10) % 2 == 0, 1.08, 0.47)
        return _polygon(np.stack([reach * np.cos(angle), reach * np.sin(angle) + 0.06], 1), x, y)
    if shape == "heart":
        t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        hx = 16 * np.sin(t) ** 3
        hy = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return _polygon(np.stack([hx / 16.5, -(hy + 2) / 15.5], 1), x, y)
    raise KeyError(shape)


@lru_cache(maxsize=512)
def _grid(shape: str, size: str, unit: float, fx: float, fy: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signed distance in units, and the coordinates x, y in units, on a square patch around the centre.

    `fx`, `fy` are the centre's fractions of a pixel."""
    half = int(np.ceil((RADIUS["large"] + 10) * unit))
    axis = np.arange(-half, half) + 0.5
    y, x = np.meshgrid((axis - fy) / unit, (axis - fx) / unit, indexing="ij")
    r = RADIUS[size]
    return (_distance(shape, x / r, y / r) * r).astype(np.float32), x.astype(np.float32), y.astype(np.float32)


@lru_cache(maxsize=512)
def _accent(pattern: str, size: str, unit: float, fx: float, fy: float) -> tuple[np.ndarray, np.ndarray]:
    """How much of the light and of the dark accent colour a pattern mixes in, each in [0, 1]."""
    _, x, y = _grid("circle", size, unit, fx, fy)
    r = RADIUS[size]
    soft = lambda d: np.clip(0.5 - d * unit, 0, 1)  # noqa: E731  coverage of a signed distance in units
    none = np.zeros_like(x)
    if pattern == "striped":
        gap = (0.8 if size == "small" else 0.6) * r
        return soft(np.abs((y + gap / 2) % gap - gap / 2) - gap / 4), none
    if pattern == "checkered":
        cell = (0.62 if size == "small" else 0.52) * r
        a, b = np.sin(np.pi * x / cell), np.sin(np.pi * y / cell)
        return soft(-np.sign(a * b) * np.minimum(np.abs(a), np.abs(b)) * cell / np.pi), none
    if pattern == "dotted":
        gap = 0.85 * r if size == "small" else 0.7 * r
        dx, dy = x % gap - gap / 2, y % gap - gap / 2
        return none, soft(np.hypot(dx, dy) - 0.34 * gap)
    if pattern == "split":
        return none, soft(-(x + y) * 0.7071)
    if pattern == "glossy":
        spot = np.exp(-(((x + 0.25 * r) ** 2 + (y + 0.3 * r) ** 2) / (0.42 * r) ** 2))
        return spot, 0.75 * np.clip((np.hypot(x, y) / r - 0.45) / 0.5, 0, 1)
    return none, none


def _mix(a: np.ndarray, b: np.ndarray | np.floating[Any], w: np.ndarray | float) -> np.ndarray:
    return a + (b - a) * w


def centre(thing: Thing, height: int, width: int) -> tuple[float, float]:
    """The (y, x) of a thing's centre in pixels."""
    unit = min(height, width) / 64
    if thing.cell == 4:
        cy, cx = height / 2, width / 2
    else:
        cy, cx = (thing.cell // 2 + 0.5) * height / 2, (thing.cell % 2 + 0.5) * width / 2
    return cy + thing.dy * unit, cx + thing.dx * unit


def _background(background: tuple[Any, ...], height: int, width: int) -> np.ndarray:
    kind = background[0]
    if kind == "plain":
        return np.broadcast_to(np.array(BACKGROUNDS[background[1]], np.float32), (height, width, 3))
    if kind == "gradient":
        upper, lower = (np.array(BACKGROUNDS[n], np.float32) for n in background[1:])
        t = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
        return np.broadcast_to(_mix(upper, lower, t), (height, width, 3))
    from weft.world.photos import photo

    return photo(background[1], float(background[2]), float(background[3]), height, width)


@lru_cache(maxsize=256)
def _backdrop(background: tuple[Any, ...], style: str, light: str, height: int, width: int) -> np.ndarray:
    canvas = _background(background, height, width).astype(np.float32).copy()
    if style == "outlined":
        canvas = _mix(canvas, np.float32(255), 0.5)
    elif style == "pastel":
        canvas = _mix(canvas, np.float32(255), 0.25)
    elif style == "neon":
        canvas *= 0.35
    lx, ly = TOWARDS[light]
    if lx or ly:
        y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
        canvas *= (1 + 0.13 * (x * lx + y * ly))[..., None].astype(np.float32)
    canvas.setflags(write=False)
    return canvas


def _window(mask: np.ndarray, top: int, left: int, height: int, width: int) -> tuple[tuple[slice, slice], ...]:
    """The patch's place on the canvas and the part of the patch that lies on it."""
    t, b = max(top, 0), min(top + mask.shape[0], height)
    s, e = max(left, 0), min(left + mask.shape[1], width)
    return (slice(t, b), slice(s, e)), (slice(t - top, b - top), slice(s - left, e - left))


def _patch(thing: Thing, height: int, width: int) -> tuple[Any, ...]:
    unit = min(height, width) / 64
    cy, cx = centre(thing, height, width)
    iy, ix = int(np.floor(cy)), int(np.floor(cx))
    key = (unit, round(cx - ix, 4), round(cy - iy, 4))
    distance, x, y = _grid(thing.shape, thing.size, *key)
    half = distance.shape[0] // 2
    return key, distance, x, y, iy - half, ix - half


def render_array(scene: Scene, height: int = 64, width: int = 64) -> np.ndarray:
    """The picture of a scene as float32 [height, width, 3] in 0..255."""
    backdrop = _backdrop if height * width <= CACHED else _backdrop.__wrapped__
    canvas = backdrop(scene.background, scene.style, scene.light, height, width).copy()
    unit = min(height, width) / 64
    lx, ly = TOWARDS[scene.light]
    if lx or ly:  # the shadow falls away from the light
        for thing in scene.things:
            _, distance, _, _, top, left = _patch(thing, height, width)
            place, part = _window(distance, top - round(4 * ly * unit), left - round(4 * lx * unit), height, width)
            canvas[place] *= 1 - 0.45 * np.clip(0.5 - distance[part] * unit / 1.5, 0, 1)[..., None]
    for thing in scene.things:
        _draw(canvas, thing, scene)
    return np.clip(canvas * np.array(GAIN[scene.tone], np.float32), 0, 255)


def _draw(canvas: np.ndarray, thing: Thing, scene: Scene) -> None:
    height, width = canvas.shape[:2]
    key, distance, x, y, top, left = _patch(thing, height, width)
    unit = key[0]
    place, part = _window(distance, top, left, height, width)
    d = distance[part][..., None]
    base = np.array(COLOURS[thing.colour], np.float32)
    light = _mix(base, np.float32(255), 0.85)
    dark = _mix(base, np.float32(255), 0.5) if thing.colour == "black" else base * 0.25
    to_light, to_dark = (a[part][..., None] for a in _accent(thing.pattern, thing.size, *key))
    fill = _mix(_mix(base, dark, to_dark), light, to_light)
    lx, ly = TOWARDS[scene.light]
    if lx or ly:
        fill = fill * (1 + 0.4 * np.clip((x[part] * lx + y[part] * ly) / RADIUS[thing.size], -1, 1))[..., None]
    cover = np.clip(0.5 - d * unit, 0, 1)
    if scene.style == "outlined":
        fill = _mix(fill, INK, np.clip(0.5 - (np.abs(d + 0.7) - 0.7) * unit, 0, 1))
    elif scene.style == "pastel":
        fill = _mix(fill, np.float32(255), 0.4)
        cover = np.clip(0.5 - d * unit / 2.5, 0, 1)
    elif scene.style == "neon":
        glow = 0.75 * np.exp(-np.maximum(d, 0) / 2.5)
        canvas[place] = _mix(canvas[place], np.minimum(base * 1.15 + 30, 255), glow)
    canvas[place] = _mix(canvas[place], fill, cover)


def render(scene: Scene, height: int = 64, width: int = 64) -> Image.Image:
    """The picture of a scene, RGB."""
    return Image.fromarray(np.round(render_array(scene, height, width)).astype(np.uint8))


def coverage(scene: Scene, things: tuple[Thing, ...], height: int = 64, width: int = 64, grow: float = 0) -> np.ndarray:
    """Boolean [height, width]: where the given things lie, grown by `grow` units."""
    mask = np.zeros((height, width), bool)
    for thing in things:
        _, distance, _, _, top, left = _patch(thing, height, width)
        place, part = _window(distance, top, left, height, width)
        mask[place] |= distance[part] < grow
    return mask
