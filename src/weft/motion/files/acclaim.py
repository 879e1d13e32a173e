"""Acclaim skeletons (.asf) and motions (.amc), as the CMU database has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from weft.errors import WeftError
from weft.motion.rig import Rig
from weft.motion.rotation import conjugate, from_euler, multiply, rotate

_DEGREES = ("rx", "ry", "rz")


@dataclass(slots=True)
class _Bone:
    name: str
    direction: np.ndarray = field(default_factory=lambda: np.zeros(3))
    length: float = 0.0
    axis: np.ndarray = field(default_factory=lambda: np.zeros(3))
    order: str = "XYZ"
    freedoms: list[str] = field(default_factory=list)
    parent: int = -1


@dataclass(slots=True)
class Skeleton:
    """Bones in hierarchical order, the root first; `scale` is metres per unit of length, `degrees` the unit of angles.

    `position` [3] and `turn` (a quaternion) say where the skeleton stands: all motion is relative to them.
    """

    bones: list[_Bone]
    root_order: list[str]
    scale: float
    degrees: bool
    position: np.ndarray
    turn: np.ndarray


def read_amc(path: str | Path, skeleton: str | Path | None = None, *, fps: float = 120.0) -> Rig:
    """The joints of an AMC motion on its ASF skeleton: one joint at the end of every bone, metres, y up.

    `skeleton` is the .asf file; by default the one in the same folder (of the subject's name before the "_" if
    there are several). Angles are in degrees or radians as the motion says (`:DEGREES`, `:RADIANS`), else as its
    skeleton does. The format holds no frame rate: CMU's is 120. Raises `WeftError` for a file that is cut off,
    bones the skeleton lacks, or values that are no numbers.
    """
    path = Path(path)
    bones = read_asf(_skeleton_beside(path) if skeleton is None else skeleton)
    values, degrees = _read_frames(path, bones)
    positions = _kinematics(bones, values, degrees) * bones.scale
    names, parents = [b.name for b in bones.bones], [b.parent for b in bones.bones]
    return Rig(names, parents, positions, fps, unit="m", up="y", meta={"file": path.name})


def _skeleton_beside(path: Path) -> Path:
    found = sorted(path.parent.glob("*.asf")) + sorted(path.parent.glob("*.ASF"))
    named = [f for f in found if f.stem == path.stem.split("_")[0]]
    if not named and len(found) != 1:
        raise WeftError(f"{path}: {len(found)} .asf files beside it and none of its subject: say skeleton=")
    return (named or found)[0]


def read_asf(path: str | Path) -> Skeleton:
    """An Acclaim skeleton (Acclaim Skeleton File Definition V1.10, 1995).

    Raises `WeftError` for one that is cut off or whose hierarchy has holes.
    """
    path = Path(path)
    sections: dict[str, list[list[str]]] = {}
    current = ""
    for line in _lines(path):
        if line.startswith(":"):
            current, _, rest = line[1:].partition(" ")
            sections[current] = [[rest]] if rest else []
        else:
            sections.setdefault(current, []).append(line.split())
    for need in ("root", "bonedata", "hierarchy"):
        if need not in sections:
            raise WeftError(f"{path}: no :{need} section: it is cut off or not an Acclaim skeleton")
    units = {row[0]: row[1] for row in sections.get("units", []) if len(row) > 1}
    degrees = units.get("angle", "deg").startswith("deg")
    root = {row[0].lower(): row[1:] for row in sections["root"]}
    root_order = [w.lower() for w in root.get("order", [])]
    if sorted(root_order) != ["rx", "ry", "rz", "tx", "ty", "tz"]:
        raise WeftError(f"{path}: root order '{' '.join(root_order)}': expected TX TY TZ RX RY RZ in some order")
    try:
        position, turn = _base(root, degrees)
        bones = _bones(sections["bonedata"], degrees)
        scale = 0.0254 / float(units.get("length", 1.0))
        ordered = _hierarchy(sections["hierarchy"], bones, path)
    except (IndexError, ValueError) as error:
        if isinstance(error, WeftError):
            raise
        raise WeftError(f"{path}: bone data that cannot be read ({error}): it is damaged") from error
    return Skeleton(ordered, root_order, scale, degrees, position, turn)


def _base(root: dict[str, list[str]], degrees: bool) -> tuple[np.ndarray, np.ndarray]:
    """Where the root section puts the skeleton: `position`, and the quaternion of `orientation`."""

    def three(name: str) -> np.ndarray:
        given = np.array([float(v) for v in root.get(name, ("0", "0", "0"))])
        if given.shape != (3,) or not np.isfinite(given).all():
            raise ValueError(f"the root's {name} '{' '.join(root[name])}' is not three numbers")
        return given

    order = root.get("axis", ["XYZ"])[0].upper()
    if sorted(order) != ["X", "Y", "Z"]:
        raise ValueError(f"axis order '{root['axis'][0]}' of the root")
    return three("position"), _offset(three("orientation") * (1 if degrees else 180 / np.pi), order)


def _bones(rows: list[list[str]], degrees: bool) -> dict[str, _Bone]:
    bones: dict[str, _Bone] = {}
    bone = _Bone("")
    for row in rows:
        match row[0]:
            case "begin":
                bone = _Bone("")
            case "name":
                bone.name = row[1]
            case "direction":
                bone.direction = np.array([float(v) for v in row[1:4]])
            case "length":
                bone.length = float(row[1])
            case "axis":
                bone.axis = np.array([float(v) for v in row[1:4]]) * (1 if degrees else 180 / np.pi)
                bone.order = row[4].upper()
                if sorted(bone.order) != ["X", "Y", "Z"]:
                    raise ValueError(f"axis order '{row[4]}' of {bone.name}")
            case "dof":
                bone.freedoms = [v.lower() for v in row[1:]]
            case "end":
                bones[bone.name] = bone
    return bones


def _hierarchy(rows: list[list[str]], bones: dict[str, _Bone], path: Path) -> list[_Bone]:
    ordered = [_Bone("root")]
    index = {"root": 0}
    if not rows or rows[-1] != ["end"]:
        raise WeftError(f"{path}: the hierarchy has no end: it is cut off")
    for row in rows:
        if row in (["begin"], ["end"]):
            continue
        if row[0] not in index:
            raise WeftError(f"{path}: the hierarchy names '{row[0]}' before its parent: it is damaged")
        for name in row[1:]:
            if name not in bones:
                raise WeftError(f"{path}: the hierarchy names '{name}', of which there are no bone data")
            bones[name].parent = index[row[0]]
            index[name] = len(ordered)
            ordered.append(bones[name])
    return ordered


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise WeftError(f"{path} cannot be read ({error.strerror}): check the path") from error
    return [s for line in text.splitlines() if (s := line.strip()) and not s.startswith("#")]


def _read_frames(path: Path, skeleton: Skeleton) -> tuple[np.ndarray, bool]:
    """[T, channels]: the root's six, then the freedoms of every bone in the order of the skeleton; and whether angles
    are in degrees."""
    degrees = skeleton.degrees
    sizes = {"root": 6} | {bone.name: len(bone.freedoms) for bone in skeleton.bones[1:] if bone.freedoms}
    frames: list[list[float]] = []
    frame: dict[str, list[str]] = {}
    seen = ""

    def close() -> None:
        missing = next((name for name in sizes if name not in frame), None)
        if missing is not None:
            raise WeftError(f"{path}: frame {seen} has no values for {missing}: the file is truncated")
        try:
            frames.append([float(v) for name in sizes for v in frame[name]])
        except ValueError as error:
            raise WeftError(f"{path}: frame {seen}: {error}") from error

    for line in _lines(path):
        name, *values = line.split()
        if line.startswith(":"):
            if line.lower() in (":degrees", ":radians"):
                degrees = line.lower() == ":degrees"
        elif not values and name.isdigit():
            if seen:
                close()
            frame, seen = {}, name
        elif not seen:
            raise WeftError(f"{path}: '{line[:40]}' before the first frame number: it is not an AMC file")
        elif len(values) != sizes.get(name, -1):
            if name not in sizes:
                raise WeftError(f"{path}: frame {seen}: bone '{name}' is not in the skeleton: use its own .asf")
            raise WeftError(
                f"{path}: frame {seen}: {name} has {len(values)} values, the skeleton {sizes[name]} freedoms: "
                "the file is truncated, or belongs to another .asf"
            )
        else:
            frame[name] = values
    if not seen:
        raise WeftError(f"{path}: no frames: it is cut off or not an AMC file")
    close()
    stacked = np.array(frames)
    if not np.isfinite(stacked).all():
        raise WeftError(f"{path}: NaN or infinity in frame {int(np.argwhere(~np.isfinite(stacked))[0][0]) + 1}")
    return stacked, degrees


def _kinematics(skeleton: Skeleton, values: np.ndarray, degrees: bool) -> np.ndarray:
    """Positions [T, bones, 3] of the bones' ends, in the file's unit. The angles of X, Y, Z act in that order."""
    frames = len(values)
    positions = np.empty((frames, len(skeleton.bones), 3))
    turned = np.empty((frames, len(skeleton.bones), 4))
    order = skeleton.root_order
    moved = values[:, [order.index(c) for c in ("tx", "ty", "tz")]]
    positions[:, 0] = skeleton.position + rotate(skeleton.turn[None], moved)
    spins = [c for c in order if c in _DEGREES]
    angles = values[:, [order.index(c) for c in spins]]
    unit = 1 if degrees else 180 / np.pi
    turned[:, 0] = multiply(skeleton.turn[None], _turn(angles * unit, "".join(c[1] for c in spins).upper()))
    column = 6
    for k, bone in enumerate(skeleton.bones[1:], start=1):
        angles = np.zeros((frames, 3))
        for c, name in enumerate(bone.freedoms):
            if name in _DEGREES:
                angles[:, _DEGREES.index(name)] = values[:, column + c] * unit
        column += len(bone.freedoms)
        axis = _offset(bone.axis, bone.order)[None]  # the frame in which the bone's freedoms are given
        local = multiply(multiply(axis, _turn(angles, "XYZ")), conjugate(axis))
        turned[:, k] = multiply(turned[:, bone.parent], local)
        step = np.broadcast_to(bone.direction * bone.length, (frames, 3))
        positions[:, k] = positions[:, bone.parent] + rotate(turned[:, k], step)
    return positions


def _offset(angles: np.ndarray, order: str) -> np.ndarray:
    """The quaternion of a skeleton's own angles about x, y and z, applied in `order`."""
    return _turn(angles[["XYZ".index(name) for name in order]], order)


def _turn(angles: np.ndarray, order: str) -> np.ndarray:
    """Quaternions of angles applied in the order in which they stand, about fixed axes: XYZ is Rz Ry Rx."""
    return from_euler(angles[..., ::-1], order[::-1])
