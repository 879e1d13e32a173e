"""What the joints of a clip show, as numbers: postures, swings, steps, the path and the tempo.

Everything is measured from positions, after a light low-pass, so that centimetres of noise and a slow drift of the
root change little. Lengths in metres, angles in radians, in the body's own frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.signal import find_peaks

FPS = 20.0
SMOOTH = 1.0  # frames, of the low-pass on all joints
_SIDES = ((16, 20), (17, 21))  # shoulder, wrist

# Signals [T]: name -> tolerance of its extremes, within which two clips show the same.
SIGNALS = {
    "left hand out": 0.09, "left hand up": 0.09, "left hand ahead": 0.09,
    "right hand out": 0.09, "right hand up": 0.09, "right hand ahead": 0.09,
    "pitch": 0.12, "roll": 0.12, "head pitch": 0.3, "head roll": 0.25, "pelvis": 0.05,
    "left toe up": 0.06, "right toe up": 0.06, "left toe ahead": 0.12, "right toe ahead": 0.12,
    "hands apart": 0.12, "aside": 0.08,
}  # fmt: skip
SWINGS = {  # signals whose swings are counted, with the size at which a swing counts half
    "left hand out": 0.06, "right hand out": 0.06, "left hand ahead": 0.09, "right hand ahead": 0.09,
    "hands apart": 0.08, "pelvis": 0.06, "left toe up": 0.045, "right toe up": 0.045, "aside": 0.08,
}  # fmt: skip
TEMPO = ("left hand out", "left hand up", "left hand ahead", "right hand out", "right hand up", "right hand ahead",
         "pitch", "pelvis", "left toe ahead", "right toe ahead", "left toe up", "right toe up", "hands apart", "turn",
         "aside", "twist")  # fmt: skip
STEADY = 0.1  # of a logarithm of tempo: a spread at which it tells half
# The least range at which a signal tells about tempo, by default 0.12.
_FLOORS = {"pitch": 0.15, "turn": 0.6, "twist": 0.15}


@dataclass(frozen=True, slots=True)
class Measured:
    """`look` [D] are the numbers that tell acts and styles apart. `tempo` [K] are how fast each signal of TEMPO moves
    (top speed over range), how soon it comes back to the middle of its range, and how often each of SWINGS swings, as
    logarithms; `weight` [K] how much it tells: 0 for a signal that hardly moves, does not come back or swings less
    than three times."""

    look: np.ndarray
    tempo: np.ndarray
    weight: np.ndarray


def mean(measured: list[Measured]) -> Measured:
    """The mean of several measurements that show the same; tempo counts by its weight, and what of it differs between
    them tells less."""
    weight = np.stack([m.weight for m in measured])
    tempos = np.stack([m.tempo for m in measured])
    total = np.maximum(weight.sum(axis=0), 1e-9)
    tempo = (weight * tempos).sum(axis=0) / total
    spread = (weight * (tempos - tempo) ** 2).sum(axis=0) / total
    told = weight.mean(axis=0) / (1 + spread / STEADY**2)
    return Measured(np.mean([m.look for m in measured], axis=0), tempo, told)


def smoothed(joints: np.ndarray) -> np.ndarray:
    """Joints [T, 22, 3] as float64 after the low-pass."""
    return gaussian_filter1d(joints.astype(np.float64), SMOOTH, axis=0, mode="nearest")


def heading(joints: np.ndarray) -> np.ndarray:
    """The direction in which hips and shoulders face, unwrapped, [T]; a body at 0 faces +z and turns left upwards."""
    across = joints[:, 1] - joints[:, 2] + joints[:, 16] - joints[:, 17]
    return gaussian_filter1d(np.unwrap(np.arctan2(-across[:, 2], across[:, 0])), 1.0, mode="nearest")


def activity(joints: np.ndarray) -> np.ndarray:
    """Mean speed of the joints, m/s, smoothed, [T]: low where a body rests."""
    calm = gaussian_filter1d(joints, 2.0, axis=0, mode="nearest")
    step = np.linalg.norm(np.diff(calm, axis=0), axis=-1).mean(axis=-1) * FPS
    return gaussian_filter1d(np.concatenate([step, step[-1:]]), 1.5, mode="nearest")


def signals(joints: np.ndarray) -> dict[str, np.ndarray]:
    """The signals of SIGNALS, `turn`, and `twist` of the shoulders against the hips, from smoothed joints."""
    yaw = heading(joints)
    cos, sin = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
    local = joints - joints[:, :1] * [1, 0, 1]
    x, z = cos * local[..., 0] - sin * local[..., 2], sin * local[..., 0] + cos * local[..., 2]
    local = np.stack([x, local[..., 1], z], axis=-1)
    found: dict[str, np.ndarray] = {}
    for name, sign, (shoulder, wrist) in zip(("left", "right"), (1, -1), _SIDES, strict=True):
        hand = local[:, wrist] - local[:, shoulder]
        found[f"{name} hand out"], found[f"{name} hand up"] = sign * hand[:, 0], hand[:, 1]
        found[f"{name} hand ahead"] = hand[:, 2]
    torso = local[:, 12] - local[:, 0]
    head = local[:, 15] - local[:, 12]
    found["pitch"] = np.arctan2(torso[:, 2], torso[:, 1])
    found["roll"] = np.arctan2(-torso[:, 0], torso[:, 1])
    found["head pitch"] = np.arctan2(head[:, 2], head[:, 1]) - found["pitch"]
    found["head roll"] = np.arctan2(-head[:, 0], np.hypot(head[:, 1], head[:, 2]))
    floor = np.quantile(local[:, [10, 11], 1], 0.05)
    found["pelvis"] = local[:, 0, 1] - floor
    for name, toe in (("left", 10), ("right", 11)):
        found[f"{name} toe up"] = local[:, toe, 1] - floor
        found[f"{name} toe ahead"] = local[:, toe, 2]
    found["hands apart"] = np.linalg.norm(local[:, 20] - local[:, 21], axis=-1)
    found["turn"] = yaw - yaw[:3].mean()
    hips, shoulders = local[:, 1] - local[:, 2], local[:, 16] - local[:, 17]  # both face ahead, by the frame's making
    found["twist"] = np.arctan2(-shoulders[:, 2], shoulders[:, 0]) - np.arctan2(-hips[:, 2], hips[:, 0])
    middle = gaussian_filter1d(joints[:, 0][:, [0, 2]], 2.0, axis=0, mode="nearest")
    step = np.diff(middle, axis=0, prepend=middle[:1])
    aside = np.cumsum(step[:, 0] * cos[:, 0] - step[:, 1] * sin[:, 0])
    found["aside"] = aside - np.linspace(0, aside[-1], len(aside))  # whoever goes in circles drifts outwards
    return found


def measure(joints: np.ndarray) -> Measured:
    """Measures joints [T, 22, 3] at 20 fps, smoothed already."""
    s = signals(joints)
    rows = np.stack([s[n] for n in SIGNALS])
    low, middle, high = _quantiles(rows, (0.04, 0.5, 0.96))
    swings = [_swings(s[n], size) for n, size in SWINGS.items()]
    counts = [count for count, _ in swings]
    lowest = np.minimum(s["left toe up"], s["right toe up"])
    air = np.sort(lowest)[-max(len(lowest) // 25, 2) :].mean()
    steps = counts[list(SWINGS).index("left toe up")] + counts[list(SWINGS).index("right toe up")]
    path = _path(joints, s["turn"], steps)
    look = np.concatenate([low, middle, high, np.log1p(counts), [air], path])
    moved = np.stack([s[n] for n in TEMPO])
    least, most = _quantiles(moved, (0.02, 0.98))
    extent = most - least
    speed = _quantiles(np.abs(np.diff(moved, axis=1)), (0.95,))[0] * FPS
    floors = np.array([_FLOORS.get(n, 0.12) for n in TEMPO])
    weight = np.minimum(extent / floors, 3.0) * (extent > floors)
    tempo = np.log(np.maximum(speed, 1e-3) / np.maximum(extent, 1e-3))
    gaps = np.array([_gap(row) for row in (moved - ((least + most) / 2)[:, None]) / np.maximum(extent, 1e-6)[:, None]])
    soon = np.where(gaps > 0, -np.log(np.maximum(gaps, 1e-3)), 0.0)
    back = weight * (gaps > 0)
    rates = np.array([rate for _, rate in swings])
    often = np.where(rates > 0, np.log(np.maximum(rates, 1e-3)), 0.0)
    tempo = np.concatenate([tempo, soon, often])
    regular = 4.0 * np.clip((np.array(counts) - 1) / 1.5, 0, 1) * (rates > 0)
    return Measured(look, tempo, np.concatenate([weight, back, regular]))


def _swings(signal: np.ndarray, size: float) -> tuple[float, float]:
    """How many peaks stand out by `size` (fading in around it, so that a little noise changes little), and how many a
    second there are: 0 for less than three."""
    peaks, facts = find_peaks(signal, prominence=0.7 * size)
    count = float(np.clip((facts["prominences"] / size - 0.7) / 0.6, 0, 1).sum())
    if len(peaks) < 3:
        return count, 0.0
    gaps = np.diff(peaks)
    usual = gaps[gaps < 1.6 * np.median(gaps)]  # a peak that was missed makes a long one
    return count, FPS / usual.mean()


def _gap(share: np.ndarray) -> float:
    """Mean seconds between two crossings of the middle of a signal's range, given as shares of it from -.5 to .5; 0 for
    less than two. A low-pass moves them hardly, while it lowers the top speed."""
    clear = np.flatnonzero(np.abs(share) > 0.15)
    over = share[clear] > 0
    turns = np.flatnonzero(over[1:] != over[:-1])
    if len(turns) < 2:
        return 0.0
    before, after = clear[turns[[0, -1]]], clear[turns[[0, -1]] + 1]
    first, last = before + share[before] / (share[before] - share[after]) * (after - before)
    return float((last - first) / (len(turns) - 1) / FPS)


def _quantiles(rows: np.ndarray, shares: tuple[float, ...]) -> np.ndarray:
    """Those of each row, [shares, rows]: as numpy's, several times faster on short rows."""
    at = np.array(shares) * (rows.shape[1] - 1)
    low = at.astype(int)
    high = np.minimum(low + 1, rows.shape[1] - 1)
    ranked = np.sort(rows, axis=1)
    return (ranked[:, low] + (at - low) * (ranked[:, high] - ranked[:, low])).T


PATH = {"length": 0.15, "ahead": 0.15, "left": 0.15, "turn": 0.25, "wander": 0.3, "facing": 0.4, "step": 0.12}


def _path(joints: np.ndarray, turn: np.ndarray, steps: float) -> list[float]:
    """Length of the path and how far it goes ahead and to the left of the body (saturating beyond two metres), net
    turn (in quarter turns, compressed) and superfluous turn, whether the body faces where it goes, and the length of a
    step (fading where there is hardly a path). Ways add up in the body's own frame: one wrong turn does not change
    what comes after it."""
    middle = gaussian_filter1d(joints[:, 0][:, [0, 2]], 3.0, axis=0, mode="nearest")
    step = np.diff(middle, axis=0)
    length = np.linalg.norm(step, axis=1)
    total = length.sum()
    yaw = gaussian_filter1d(turn, 2.0, mode="nearest")
    quarter = yaw / (np.pi / 2)
    facing = heading(joints)[1:]
    ahead = float((step[:, 0] * np.sin(facing) + step[:, 1] * np.cos(facing)).sum())
    left = float((step[:, 0] * np.cos(facing) - step[:, 1] * np.sin(facing)).sum())
    forth = np.tanh(4 * ahead / max(total, 0.3))
    wander = np.abs(np.diff(quarter)).sum() - abs(quarter[-1] - quarter[0])
    sat = [float(2 * np.tanh(v / 2)) for v in (total, ahead, left)]
    return [
        *sat,
        float(np.arcsinh(quarter[-1])),
        float(min(wander, 3.0)),
        float(forth),
        float(min(total, 1.0) * min(total / max(steps, 1), 1.5)),
    ]


TOLERANCE = np.concatenate([np.tile(list(SIGNALS.values()), 3), np.full(len(SWINGS), 0.4), [0.03], list(PATH.values())])
# Tolerances beyond which a number counts no more: counts of swings near their threshold jump, paths tell much.
MOST = np.concatenate([np.full(3 * len(SIGNALS), 4.0), np.full(len(SWINGS), 2.5), [4.0], np.full(len(PATH), 6.0)])
NAMES = (
    [f"{n} {k}" for k in ("low", "middle", "high") for n in SIGNALS]
    + [f"swings of {n}" for n in SWINGS]
    + ["air"]
    + [f"path {n}" for n in PATH]
)
