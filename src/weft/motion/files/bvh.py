"""BVH: reading any hierarchy, writing a clip with a T-pose at rest."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from weft.errors import WeftError
from weft.media import atomic_write
from weft.motion.clip import Motion
from weft.motion.ik import Pose, solve
from weft.motion.rig import Rig
from weft.motion.rotation import from_euler, multiply, rotate, to_euler

_CHANNELS = ("Xposition", "Yposition", "Zposition", "Xrotation", "Yrotation", "Zrotation")


@dataclass(slots=True)
class _Joint:
    name: str
    parent: int
    offset: np.ndarray
    channels: list[str] = field(default_factory=list)


def read_bvh(path: str | Path, *, root: str = "auto") -> Rig:
    """All joints of a BVH file with end sites left out: positions in the file's unit, by forward kinematics.

    Channels may stand in any order and number; rotations are applied in the order in which they stand. Key words may
    be written small, and lines of numbers be broken. Position channels replace the offset of a joint. For the root,
    programs disagree: `root="absolute"` replaces (Blender), "relative" adds (the format's first description), "auto"
    takes what brings the clip's lowest point nearer to the ground; they differ by a constant. Raises `WeftError` for a
    file that is cut off, unknown channels, frames of the wrong width, or values that are no numbers.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise WeftError(f"{path} cannot be read ({error.strerror}): check the path") from error
    parts = re.split(r"^[ \t]*MOTION[ \t]*$", text, maxsplit=1, flags=re.MULTILINE | re.IGNORECASE)
    head, body = parts[0], parts[-1]
    if len(parts) < 2 or "HIERARCHY" not in head.upper():
        raise WeftError(f"{path}: no HIERARCHY or no MOTION part: it is cut off or not a BVH file")
    joints = _hierarchy(head.split(), path)
    fps, values = _frames(body, joints, path)
    if root not in ("auto", "absolute", "relative"):
        raise WeftError(f"root: '{root}' is unknown, use auto, absolute or relative")
    positions = _kinematics(joints, values)
    offset = joints[0].offset
    axis = int(np.abs(offset).argmax())
    low = positions[..., axis].min()
    if root == "relative" or (root == "auto" and abs(low + offset[axis]) < abs(low)):
        positions += offset * any(c.endswith("position") for c in joints[0].channels)
    return Rig([j.name for j in joints], [j.parent for j in joints], positions, fps, meta={"file": path.name})


def _hierarchy(words: list[str], path: Path) -> list[_Joint]:
    joints: list[_Joint] = []
    stack: list[int] = []
    site = -1  # an end site counts as a level of the hierarchy, but not as a joint
    k = 1
    try:
        while k < len(words):
            word = words[k].upper()
            if word in ("ROOT", "JOINT"):
                end = words.index("{", k)
                joints.append(_Joint(" ".join(words[k + 1 : end]), stack[-1] if stack else -1, np.zeros(3)))
                stack.append(len(joints) - 1)
                k = end + 1
            elif word == "END":
                k = words.index("{", k) + 1
                stack.append(site)
            elif word == "OFFSET":
                offset = [float(w) for w in words[k + 1 : k + 4]]
                if len(offset) < 3:
                    raise IndexError
                if stack[-1] != site:
                    joints[stack[-1]].offset = np.array(offset)
                k += 4
            elif word == "CHANNELS":
                count = int(words[k + 1])
                names = [name.capitalize() for name in words[k + 2 : k + 2 + count]]
                unknown = [n for n in names if n not in _CHANNELS]
                if unknown or len(set(names)) != count:
                    wrong = unknown[0] if unknown else " ".join(names)
                    raise WeftError(
                        f"{path}: joint {joints[stack[-1]].name}: channels '{wrong}' of {count}: use each of "
                        f"{', '.join(_CHANNELS)} at most once and give their right number"
                    )
                joints[stack[-1]].channels = names
                k += 2 + count
            elif word == "}":
                stack.pop()
                k += 1
            else:
                found = words[k][:40]
                raise WeftError(f"{path}: '{found}' in the hierarchy: expected JOINT, OFFSET, CHANNELS or End Site")
    except (IndexError, ValueError) as error:
        if isinstance(error, WeftError):
            raise
        raise WeftError(
            f"{path}: the hierarchy is damaged after joint {joints[-1].name if joints else '(none)'}"
        ) from error
    if stack or not joints:
        raise WeftError(f"{path}: {len(stack)} braces of the hierarchy are open: it is cut off")
    return joints


def _frames(body: str, joints: list[_Joint], path: Path) -> tuple[float, np.ndarray]:
    lines = body.strip().splitlines()
    try:
        declared = int(lines[0].split(":")[1])
        seconds = float(lines[1].split(":")[1])
    except (IndexError, ValueError) as error:
        raise WeftError(f"{path}: no 'Frames:' and 'Frame Time:' after MOTION: it is cut off") from error
    if not (np.isfinite(seconds) and seconds > 0):
        raise WeftError(f"{path}: a frame time of {seconds} s: write 1 / frames a second")
    width = sum(len(j.channels) for j in joints)
    rows = [line for line in lines[2:] if line.strip()]
    try:
        values = np.array(" ".join(rows).split(), dtype=np.float64)
    except ValueError as error:
        raise WeftError(f"{path}: the frames hold something that is no number ({error}): repair the file") from error
    if values.size != declared * width or not width:
        full = values.size // width if width else 0
        wrong = next((k for k, row in enumerate(rows) if len(row.split()) != width), None)
        if wrong is not None and (len(rows) == declared or wrong < len(rows) - 1):
            raise WeftError(
                f"{path}: frame {wrong} has {len(rows[wrong].split())} numbers, the hierarchy {width} channels"
            )
        if len(rows) > declared and values.size == len(rows) * width:
            raise WeftError(f"{path}: {len(rows)} frames where {declared} are declared: correct the number")
        raise WeftError(f"{path}: {full} of {declared} frames: it is truncated, get the whole file")
    if declared < 1:
        raise WeftError(f"{path}: no frames")
    if not np.isfinite(values).all():
        bad = int(np.argwhere(~np.isfinite(values))[0][0]) // width
        raise WeftError(f"{path}: NaN or infinity in frame {bad}: repair or cut it")
    fps = 1 / seconds
    # 0.0166667 means 60: a rate within a thousandth of a whole number is that number
    return (float(round(fps)) if abs(fps - round(fps)) < 1e-3 * fps else fps), values.reshape(declared, width)


def _kinematics(joints: list[_Joint], values: np.ndarray) -> np.ndarray:
    """Global positions [T, J, 3]."""
    frames = len(values)
    positions, turned = np.empty((frames, len(joints), 3)), np.empty((frames, len(joints), 4))
    column = 0
    carries = {joint.parent for joint in joints}
    for k, joint in enumerate(joints):
        step = np.tile(joint.offset, (frames, 1))
        spins: list[int] = []
        for c, channel in enumerate(joint.channels):
            if channel.endswith("position"):
                step[:, "XYZ".index(channel[0])] = values[:, column + c]
            else:
                spins.append(c)
        local = np.tile([1.0, 0, 0, 0], (frames, 1))
        if spins and k in carries:
            order = "".join(joint.channels[c][0] for c in spins)
            angles = values[:, [column + c for c in spins]]
            if len(spins) < 3:  # the axes that are not there do not turn
                rest = [a for a in "XYZ" if a not in order]
                order, angles = order + "".join(rest), np.pad(angles, ((0, 0), (0, len(rest))))
            local = from_euler(angles, order)
        column += len(joint.channels)
        if joint.parent < 0:
            positions[:, k], turned[:, k] = step, local
        else:
            positions[:, k] = positions[:, joint.parent] + rotate(turned[:, joint.parent], step)
            turned[:, k] = multiply(turned[:, joint.parent], local)
    return positions


def write_bvh(motion: Motion, path: str | Path, *, exact: bool = False, order: str = "ZYX") -> Pose:
    """A clip as BVH in metres, y up, resting in a T-pose; returns what was written.

    Rotations only, but for the root; `exact` gives every joint position channels too, for clips whose bones change
    length (Blender reads them). Six decimals: a millionth of a metre, a millionth of a degree.
    Raises `WeftError` for another layout than humanml3d.
    """
    pose = solve(motion, exact=exact)
    if sorted(order.upper()) != ["X", "Y", "Z"]:
        raise WeftError(f"order: '{order}' is not an order of axes: use ZYX, ZXY, XYZ ...")
    turn = [f"{a}rotation" for a in order.upper()]
    move = [f"{a}position" for a in "XYZ"]
    angles = np.unwrap(to_euler(pose.rotations, order), axis=0, period=360)
    blocks, lines = [], ["HIERARCHY"]

    def joint(k: int, depth: int) -> None:
        pad = "  " * depth
        offset = pose.offsets[k]  # zero for the root: see `read_bvh` on what programs make of another one
        channels = move + turn if k == 0 or exact else turn
        lines.append(f"{pad}{'ROOT' if k == 0 else 'JOINT'} {pose.names[k]}")
        lines.append(pad + "{")
        lines.append(f"{pad}  OFFSET {_numbers(offset)}")
        lines.append(f"{pad}  CHANNELS {len(channels)} {' '.join(channels)}")
        if len(channels) == 6:
            blocks.append(pose.root if k == 0 or pose.translations is None else pose.translations[:, k])
        blocks.append(angles[:, k])
        for child in (c for c, p in enumerate(pose.parents) if p == k):
            joint(child, depth + 1)
        if k in pose.ends:
            lines.extend([f"{pad}  End Site", pad + "  {", f"{pad}    OFFSET {_numbers(pose.ends[k])}", pad + "  }"])
        lines.append(pad + "}")

    joint(0, 0)
    values = np.concatenate(blocks, axis=1)
    lines += ["MOTION", f"Frames: {len(values)}", f"Frame Time: {1 / pose.fps:.9f}"]
    lines += [_numbers(row) for row in values]
    with atomic_write(path) as handle:
        handle.write(("\n".join(lines) + "\n").encode())
    return pose


def _numbers(row: np.ndarray) -> str:
    return " ".join(f"{v + 0.0:.6f}" for v in row)
