"""The oracle: measures by the program, not by a model, what a picture shows of what was asked.

Analysis by synthesis. The exact target scene is known; every thing and every global attribute of it is compared
with the same scene drawn with one attribute changed (each other shape, colour, pattern, size, or nothing there),
and the picture must be nearest to the target. Things whose place is free within their quadrant are aligned first.
What must stay is checked in the same way, and the change outside the edit mask is measured.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import binary_dilation, gaussian_filter, uniform_filter

from weft.errors import WeftError
from weft.media import to_rgb
from weft.record import Record
from weft.world.references import concept_of
from weft.world.render import coverage, render_array
from weft.world.scene import (
    BACKGROUNDS,
    CELLS,
    COLOURS,
    JITTER,
    LIGHTS,
    PATTERNS,
    SHAPES,
    SIZES,
    STYLES,
    TONES,
    Scene,
    Thing,
)

ATTRIBUTES = {"shape": SHAPES, "colour": tuple(COLOURS), "pattern": PATTERNS, "size": SIZES}
GLOBALS = {"light": LIGHTS, "style": STYLES, "tone": TONES}
# Calibrated on pictures that went through a VAE of 8x downsampling and on one-attribute-wrong pictures.
SOFT = 1.2  # blur in units on both sides of every comparison: it is about what is shown, not about sharpness
THING_RMSE = 0.15  # of a thing's window, in 0..1: more is no drawing of this thing
EMPTY_LOCAL = 0.11  # mean difference in a 5 x 5 window where nothing may lie
COLLATERAL = 0.06  # mean absolute change outside the edit mask
WORKING = 128  # pixels of the shorter side at which pictures are compared, at most: the search for a thing's place
# takes memory with its fourth power
MUCH = 0.2  # the share of the picture that must lie outside the mask for its change to be told


@dataclass(slots=True)
class Verdict:
    """What the oracle found. `requests` holds each requested change (and `keep`: all that must stay); `success`
    is all of them. `collateral` is the mean absolute change (0..1) and `psnr_outside` the PSNR in dB outside the
    edit mask, both None where too little lies outside. `seen` names what stands in its place."""

    success: bool
    requests: dict[str, bool]
    collateral: float | None = None
    psnr_outside: float | None = None
    seen: dict[str, str] = field(default_factory=dict)


def scenes(record: Record) -> tuple[Scene | None, Scene, list[dict[str, Any]]]:
    """The source scene, the target scene and the plan of a world record; WeftError for any other record."""
    world = record.meta.get("world")
    if world is None:
        raise WeftError(f"record {record.id}: the oracle judges records of the embedded world only")
    source = world["source"] and Scene.from_json(world["source"])
    return source, Scene.from_json(world["target"]), world["plan"]


def canvas(record: Record) -> tuple[int, int]:
    """(height, width) of a world record's pictures. Raises WeftError for what nobody drew: records come over the wire,
    too, and a size is memory."""
    size = record.meta["world"]["size"]
    if len(size) != 2 or not all(isinstance(side, int) and 16 <= side <= 2048 for side in size):
        raise WeftError(f"record {record.id}: the world's pictures have 16 to 2048 pixels a side, not {size}")
    return size[0], size[1]


def requested_concepts(record: Record) -> dict[str, str]:
    """Of the requests that `judge` lists, those whose value a reference picture gives: what kind of thing it gives."""
    source, target, plan = scenes(record)
    return {_request(op, source, target): concept_of(op) for op in plan if "ref" in op}


def edit_mask(record: Record, grow: int = 2) -> np.ndarray:
    """Boolean [height, width]: where the exact target differs from the source, grown by `grow` pixels. All true
    where there is no source."""
    source, target, _ = scenes(record)
    height, width = canvas(record)
    if source is None:
        return np.ones((height, width), bool)
    changed = np.abs(render_array(target, height, width) - render_array(source, height, width)).max(-1) > 3
    return binary_dilation(changed, iterations=grow) if grow else changed


def judge(record: Record, image: Image.Image) -> Verdict:
    """Judge one output. A picture of another size is resized to the record's first, one with alpha put on white."""
    source, target, plan = scenes(record)
    height, width = canvas(record)
    image = to_rgb(image)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    raw = np.asarray(image, np.float32) / 255
    if (shrink := WORKING / min(height, width)) < 1:
        image = image.resize((round(width * shrink), round(height * shrink)), Image.Resampling.BOX)
    x = _soft(np.asarray(image, np.float32) / 255)
    placed = {op["cell"] for op in plan if op["op"] == "add"} | {op["to"] for op in plan if op["op"] == "move"}
    wrong, fitted = _things(x, target, source is None, placed)
    shown, unlike = _global(x, fitted, wrong)
    if shown != fitted:  # what things are is asked again in the light, style and tone that are really there
        seen = {name: getattr(shown, name) for name in ("background", *GLOBALS)}
        wrong, _ = _things(x, target.but(**seen), source is None, placed)
    wrong |= unlike
    collateral = psnr = None
    if source is not None:
        outside = ~edit_mask(record)
        if outside.mean() > MUCH:
            change = raw[outside] - render_array(source, height, width)[outside] / 255
            collateral = float(np.abs(change).mean())
            psnr = float(-10 * np.log10(max(float((change**2).mean()), 1e-10)))
    requests = _requests(source, target, plan, set(wrong), collateral)
    return Verdict(all(requests.values()), requests, collateral, psnr, wrong)


def compare(record: Record, scene: Scene) -> Verdict:
    """What `judge` would say of an exact picture of `scene`, without drawing it: for data in large numbers."""
    source, target, plan = scenes(record)
    wrong: dict[str, str] = {}
    for cell in range(4):
        wanted, found = target.at(cell), scene.at(cell)
        if (wanted and wanted.look) != (found and found.look):
            wrong[CELLS[cell]] = "nothing" if found is None else " ".join(found.look)
    for name in GLOBALS:
        if getattr(scene, name) != getattr(target, name):
            wrong[name] = getattr(scene, name)
    if scene.background != target.background:
        wrong["background"] = " ".join(map(str, scene.background))
    requests = _requests(source, target, plan, set(wrong), None)
    return Verdict(all(requests.values()), requests, seen=wrong)


def _soft(picture: np.ndarray) -> np.ndarray:
    sigma = SOFT * min(picture.shape[:2]) / 64
    return gaussian_filter(picture, (sigma, sigma, 0), mode="nearest")


def _synth(scene: Scene, height: int, width: int) -> np.ndarray:
    """A scene as the oracle compares it: drawn, soft, in 0..1."""
    return _soft(render_array(scene, height, width) / 255)


def _requests(
    source: Scene | None, target: Scene, plan: list[dict[str, Any]], wrong: set[str], collateral: float | None
) -> dict[str, bool]:
    """Which request failed, given the places and the global attributes that are wrong."""
    requests: dict[str, bool] = {}
    named: set[str] = set()
    if source is None:
        for thing in target.things:
            requests[_request({"cell": thing.cell}, source, target)] = CELLS[thing.cell] not in wrong
            named.add(CELLS[thing.cell])
        for name in ("background", *(k for k in GLOBALS if getattr(target, k) != GLOBALS[k][0])):
            requests[name] = name not in wrong
            named.add(name)
    else:
        for op in plan:
            places = {CELLS[op[k]] for k in ("cell", "to") if k in op} or {op["op"]}
            requests[_request(op, source, target)] = not places & wrong
            named |= places
    requests["keep"] = not (wrong - named) and (collateral is None or collateral <= COLLATERAL)
    return requests


def _request(op: dict[str, Any], source: Scene | None, target: Scene) -> str:
    """What a request is called: the change and its place, in a new picture the thing and its place."""
    if "cell" not in op:
        return str(op["op"])
    thing = target.at(op["cell"]) if source is None else None
    return f"{thing.shape if thing else op['op']} {CELLS[op['cell']]}"


def _alternatives(thing: Thing) -> Iterator[tuple[str, Thing]]:
    for name, values in ATTRIBUTES.items():
        for value in values:
            if value != getattr(thing, name):
                yield value, thing.but(**{name: value})


def _quadrant(cell: int, height: int, width: int) -> tuple[slice, slice]:
    rows, cols = (slice(k * n // 2, (k + 1) * n // 2) for k, n in ((cell // 2, height), (cell % 2, width)))
    return rows, cols


def _things(x: np.ndarray, scene: Scene, free: bool, placed: set[int]) -> tuple[dict[str, str], Scene]:
    """What stands in a quadrant where something else, or nothing, should; and the scene with its things where they are
    found. `free`: they may lie anywhere within their quadrant; those of the quadrants `placed` were put there."""
    fitted, wrong = scene, {}
    for i, thing in enumerate(scene.things):
        slack = JITTER + 2 if free else 2 if thing.cell in placed else 1
        found, dx, dy = _identify(x, scene, i, slack, free)
        if found is not None:
            wrong[CELLS[thing.cell]] = found
        fitted = fitted.with_thing(i, dx=thing.dx * (not free) + dx, dy=thing.dy * (not free) + dy)
    return wrong | _empty_cells(x, fitted), fitted


def _identify(x: np.ndarray, scene: Scene, i: int, slack: int, free: bool) -> tuple[str | None, int, int]:
    """What thing i really is (None: as it should be), and its displacement in units."""
    height, width = x.shape[:2]
    unit = min(height, width) / 64
    thing = replace(scene.things[i], dx=0, dy=0) if free else scene.things[i]
    # The window is the thing's own quadrant: shifting it must not bring in a neighbour.
    place = _quadrant(thing.cell, height, width)
    window = x[place]
    h, w = window.shape[:2]
    others = replace(scene, things=scene.things[:i] + scene.things[i + 1 :])
    candidates = [("", thing), *_alternatives(thing)]
    drawn = [_synth(others.plus(t), height, width)[place].ravel() for _, t in candidates]
    drawn.append(_synth(others, height, width)[place].ravel())
    synth = np.stack(drawn)  # [A, n]
    reach = round(slack * unit)
    padded = np.pad(window, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    shifts = [(dy, dx) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1)]
    moved = np.stack([padded[reach + dy :, reach + dx :][:h, :w].ravel() for dy, dx in shifts])  # [O, n]
    error = (moved**2).sum(1)[:, None] - 2 * moved @ synth.T + (synth**2).sum(1)[None]  # [O, A]
    best = error.min(0)
    a = int(best.argmin())
    dy, dx = shifts[int(error[:, 0].argmin())]
    where = round(dx / unit), round(dy / unit)
    if a == len(candidates):
        return "nothing", *where
    if a:
        return candidates[a][0], *where
    rmse = float(np.sqrt(max(best[0], 0) / synth.shape[1]))
    return ("unclear" if rmse > THING_RMSE else None), *where


def _empty_cells(x: np.ndarray, scene: Scene) -> dict[str, str]:
    """Quadrants that should be empty and are not."""
    height, width = x.shape[:2]
    unit = min(height, width) / 64
    difference = np.abs(x - _synth(scene, height, width)).mean(-1)
    local = uniform_filter(difference, round(5 * unit))
    local[coverage(scene, scene.things, height, width, grow=6)] = 0  # edges of the things that should be there
    found = {}
    for cell in scene.free:
        if local[_quadrant(cell, height, width)].max() > EMPTY_LOCAL:
            found[CELLS[cell]] = "something"
    return found


def _global(x: np.ndarray, scene: Scene, wrong: Collection[str]) -> tuple[Scene, dict[str, str]]:
    """The scene with the background, light, style and tone that the picture shows (where they explain half of what is
    wrong), and which of them are not as they should be. The change that explains most is taken first, and further ones
    as long as each explains half of what is left.

    Quadrants that are `wrong` do not count, where others are left: a thing that is missing makes its place paler, and
    one too many is no part of the background."""
    height, width = x.shape[:2]
    told = np.ones((height, width), bool)
    for cell in range(4):
        told[_quadrant(cell, height, width)] = CELLS[cell] not in wrong
    told |= not told.any()
    free = told & ~coverage(scene, scene.things, height, width, grow=7)
    free = free if free.any() else told

    def errors(s: Scene) -> tuple[float, float]:
        square = (x - _synth(s, height, width)) ** 2
        return float(square[told].mean()), float(square[free].mean())

    whole, behind = errors(scene)
    shown, changed, enough, explained = scene, set[str](), np.inf, True
    while explained:
        best, better, which, rest = enough, shown, "", behind
        for name in ["background", *(k for k in GLOBALS if k not in changed)]:
            for value in _other_backgrounds(shown.background) if name == "background" else GLOBALS[name]:
                other = shown.but(**{name: value})
                error = errors(other)
                if (error[1] < behind if name == "background" else error[0] < whole) and error[0] < best:
                    best, better, which, rest = error[0], other, name, error[1]
        if better is shown:
            break
        explained = best < whole / 2
        shown, whole, behind, enough = better, best, rest, best / 2
        changed.add(which)
    found = {name: getattr(shown, name) for name in GLOBALS if getattr(shown, name) != getattr(scene, name)}
    if shown.background != scene.background:
        found["background"] = " ".join(map(str, shown.background))
    if behind > THING_RMSE**2:
        found.setdefault("background", "unclear")
    return (shown if explained else scene), found


def _other_backgrounds(background: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    names = list(BACKGROUNDS)
    if background[0] == "photo":
        yield from (("plain", n) for n in names)
        return
    upper, lower = (background[1], background[1]) if background[0] == "plain" else background[1:]
    pairs = [pair for n in names for pair in ((n, lower), (upper, n), (n, n))]  # in a fixed order, unlike a set's
    for a, b in dict.fromkeys([*pairs, (lower, upper)]):
        if (a, b) != (upper, lower):
            yield ("plain", a) if a == b else ("gradient", a, b)
