"""GLB: a clip as an animated, skinned figure; and reading the skeleton animation of any glTF binary."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from weft.errors import WeftError
from weft.media import atomic_write
from weft.motion.clip import Motion
from weft.motion.ik import Pose, rest_positions, solve
from weft.motion.rig import Rig
from weft.motion.rotation import from_matrix, multiply, rotate, slerp

_FLOAT, _USHORT, _UINT = 5126, 5123, 5125
_COUNTS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}
_TYPES = {5120: "i1", 5121: "u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}


def _library() -> Any:
    try:
        import pygltflib
    except ImportError as error:
        raise WeftError("GLB files need the extra 'motion': pip install 'weft[motion]'") from error
    return pygltflib


def write_glb(motion: Motion, path: str | Path, *, exact: bool = False, metadata: dict[str, Any] | None = None) -> Pose:
    """A clip of 22 joints as GLB: skeleton in a T-pose, a figure of one solid per bone, one animation.

    Metres, y up. `exact` animates the translations of all joints too, for clips whose bones change length.
    `metadata` (JSON) stands in the asset's extras. Returns what was written.
    Raises `WeftError` for another layout than humanml3d.
    """
    gltf = _library()
    pose = solve(motion, exact=exact)
    doc, data = gltf.GLTF2(), bytearray()
    doc.asset = gltf.Asset(version="2.0", generator="weft", extras={"weft": metadata} if metadata else {})
    rest = rest_positions(pose)
    count = len(pose.names)

    def accessor(array: np.ndarray, kind: str, component: int, target: int | None = None, bounds: bool = False) -> int:
        array = np.ascontiguousarray(array, dtype=_TYPES[component])
        while len(data) % 4:
            data.append(0)
        doc.bufferViews.append(gltf.BufferView(buffer=0, byteOffset=len(data), byteLength=array.nbytes, target=target))
        data.extend(array.tobytes())
        made = gltf.Accessor(bufferView=len(doc.bufferViews) - 1, componentType=component, count=len(array), type=kind)
        if bounds:
            flat = array.reshape(len(array), -1)
            made.min, made.max = flat.min(0).tolist(), flat.max(0).tolist()
        doc.accessors.append(made)
        return len(doc.accessors) - 1

    for k, name in enumerate(pose.names):
        children = [c for c, p in enumerate(pose.parents) if p == k]
        doc.nodes.append(gltf.Node(name=name, translation=pose.offsets[k].tolist(), children=children))
    inverse = np.tile(np.eye(4), (count, 1, 1))
    inverse[:, :3, 3] = -rest
    points, normals, joints, triangles = _figure(pose, rest)
    weights = np.zeros((len(points), 4))
    weights[:, 0] = 1
    mesh = gltf.Primitive(
        attributes=gltf.Attributes(
            POSITION=accessor(points, "VEC3", _FLOAT, 34962, bounds=True),
            NORMAL=accessor(normals, "VEC3", _FLOAT, 34962),
            JOINTS_0=accessor(np.stack([joints, joints * 0, joints * 0, joints * 0], 1), "VEC4", _USHORT, 34962),
            WEIGHTS_0=accessor(weights, "VEC4", _FLOAT, 34962),
        ),
        indices=accessor(triangles.reshape(-1), "SCALAR", _UINT, 34963),
        material=0,
    )
    doc.materials.append(
        gltf.Material(
            name="figure",
            pbrMetallicRoughness=gltf.PbrMetallicRoughness(
                baseColorFactor=[0.45, 0.6, 0.8, 1.0], metallicFactor=0.0, roughnessFactor=0.7
            ),
        )
    )
    doc.meshes.append(gltf.Mesh(name="figure", primitives=[mesh]))
    # glTF matrices stand column by column
    skin = gltf.Skin(
        name="skeleton",
        joints=list(range(count)),
        skeleton=0,
        inverseBindMatrices=accessor(inverse.transpose(0, 2, 1).reshape(count, 16), "MAT4", _FLOAT),
    )
    doc.skins.append(skin)
    doc.nodes.append(gltf.Node(name="figure", mesh=0, skin=0))
    doc.scenes.append(gltf.Scene(nodes=[0, count]))
    doc.scene = 0

    times = accessor(np.arange(len(motion)) / motion.fps, "SCALAR", _FLOAT, bounds=True)
    moves = gltf.Animation(name=Path(path).stem, samplers=[], channels=[])

    def channel(node: int, what: str, values: np.ndarray, kind: str) -> None:
        moves.samplers.append(
            gltf.AnimationSampler(input=times, output=accessor(values, kind, _FLOAT), interpolation="LINEAR")
        )
        target = gltf.AnimationChannelTarget(node=node, path=what)
        moves.channels.append(gltf.AnimationChannel(sampler=len(moves.samplers) - 1, target=target))

    channel(0, "translation", pose.root, "VEC3")
    for k in range(count):
        channel(k, "rotation", pose.rotations[:, k][:, [1, 2, 3, 0]], "VEC4")
        if k and pose.translations is not None:
            channel(k, "translation", pose.translations[:, k], "VEC3")
    doc.animations.append(moves)
    while len(data) % 4:
        data.append(0)
    doc.buffers.append(gltf.Buffer(byteLength=len(data)))
    doc.set_binary_blob(bytes(data))
    with atomic_write(path) as handle:
        handle.write(b"".join(doc.save_to_bytes()))
    return pose


_WIDTH = {"hip": 0.06, "knee": 0.07, "ankle": 0.05, "foot": 0.04, "spine1": 0.1, "spine2": 0.11, "spine3": 0.12,
          "neck": 0.05, "head": 0.05, "collar": 0.05, "shoulder": 0.05, "elbow": 0.045, "wrist": 0.035}  # fmt: skip


def _figure(pose: Pose, rest: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One pointed solid per bone, moved by the joint at its start: points, normals, joints, triangles."""
    points: list[np.ndarray] = []
    joints: list[int] = []
    bones = [(p, rest[p], rest[k], pose.names[k]) for k, p in enumerate(pose.parents) if p >= 0]
    bones += [(k, rest[k], rest[k] + end, pose.names[k]) for k, end in pose.ends.items()]
    for joint, start, stop, name in bones:
        along = stop - start
        length = float(np.linalg.norm(along))
        direction = along / length
        side = np.cross(direction, [0.0, 0, 1] if abs(direction[2]) < 0.9 else [0.0, 1, 0])
        side /= np.linalg.norm(side)
        other = np.cross(direction, side)
        radius = min(_WIDTH[name.rpartition("_")[2]], 0.45 * length + 0.02)
        ring = [start + 0.3 * along + radius * (np.cos(a) * side + np.sin(a) * other) for a in np.arange(6) * np.pi / 3]
        for k in range(6):
            one, two = ring[k], ring[(k + 1) % 6]
            points += [start, two, one, one, two, stop]
            joints += [joint] * 6
    corners = np.array(points).reshape(-1, 3, 3)
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    corner_count = len(points)
    return np.array(points), np.repeat(normals, 3, axis=0), np.array(joints), np.arange(corner_count)


def read_glb(path: str | Path, *, fps: float = 20.0) -> Rig:
    """The nodes of a glTF binary's first animation, sampled at `fps`: metres, y up, as the format says.

    Raises `WeftError` for a damaged file, no animation, or buffers outside the file.
    """
    gltf = _library()
    path = Path(path)
    if not path.is_file():
        raise WeftError(f"{path} does not exist: check the path")
    head = path.open("rb").read(12)
    if len(head) < 12 or head[:4] != b"glTF" or struct.unpack("<I", head[8:])[0] > path.stat().st_size:
        raise WeftError(f"{path}: truncated, or not a glTF binary: get the whole file")
    try:
        doc = gltf.GLTF2.load_binary(str(path))
        blob = doc.binary_blob() or b""
        if not doc.animations:
            raise WeftError(f"{path}: no animation: export it with one")
        return _sample(doc, blob, path, fps)
    except WeftError:
        raise
    except Exception as error:  # a damaged JSON or an index out of range
        raise WeftError(f"{path}: damaged ({error}): export it again") from error


def _sample(doc: Any, blob: bytes, path: Path, fps: float) -> Rig:
    def values(k: int) -> np.ndarray:
        made = doc.accessors[k]
        view = doc.bufferViews[made.bufferView]
        size, kind = _COUNTS[made.type], np.dtype(_TYPES[made.componentType])
        start = (view.byteOffset or 0) + (made.byteOffset or 0)
        stride = view.byteStride or size * kind.itemsize
        rows = np.ndarray((made.count, size), kind, blob, start, (stride, kind.itemsize))
        scale = float(np.iinfo(kind).max) if made.normalized else 1.0
        return rows.astype(np.float64) / scale

    animation = doc.animations[0]
    tracks = {}
    for channel in animation.channels:
        sampler = animation.samplers[channel.sampler]
        times, track = values(sampler.input)[:, 0], values(sampler.output)
        if sampler.interpolation == "CUBICSPLINE":
            track = track[1::3]
        tracks[channel.target.node, channel.target.path] = times, track, sampler.interpolation == "STEP"
    end = max(t[-1] for t, _, _ in tracks.values())
    at = np.arange(int(end * fps + 1e-4) + 1) / fps

    parents = [-1] * len(doc.nodes)
    for k, node in enumerate(doc.nodes):
        for child in node.children or []:
            parents[child] = k
    order: list[int] = []
    waiting = [k for k, p in enumerate(parents) if p < 0]
    while waiting:
        order.append(waiting.pop())
        waiting += doc.nodes[order[-1]].children or []
    positions, turned = np.zeros((len(at), len(doc.nodes), 3)), np.zeros((len(at), len(doc.nodes), 4))
    sizes = np.ones((len(at), len(doc.nodes), 3))
    for k in order:
        move, turn, size = _at(tracks, k, doc.nodes[k], at)
        parent = parents[k]
        if parent < 0:
            positions[:, k], turned[:, k], sizes[:, k] = move, turn, size
            continue
        positions[:, k] = positions[:, parent] + rotate(turned[:, parent], sizes[:, parent] * move)
        turned[:, k], sizes[:, k] = multiply(turned[:, parent], turn), sizes[:, parent] * size
    keep = sorted({j for s in doc.skins for j in s.joints}) or list(range(len(doc.nodes)))
    index = {k: n for n, k in enumerate(keep)}
    extras = doc.asset.extras if isinstance(doc.asset.extras, dict) else {}
    meta = {"file": path.name} | ({"weft": extras["weft"]} if "weft" in extras else {})
    names = [doc.nodes[k].name or f"node{k}" for k in keep]
    return Rig(names, [index.get(parents[k], -1) for k in keep], positions[:, keep], fps, "m", "y", meta)


def _at(tracks: dict, k: int, node: Any, at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Translation, rotation (w first) and scale of a node at times `at`."""
    still = {"translation": node.translation or [0, 0, 0], "rotation": node.rotation or [0, 0, 0, 1],
             "scale": node.scale or [1, 1, 1]}  # fmt: skip
    if node.matrix is not None and node.matrix != list(np.eye(4).reshape(-1)):
        matrix = np.array(node.matrix, dtype=np.float64).reshape(4, 4).T
        scale = np.linalg.norm(matrix[:3, :3], axis=0)
        w, x, y, z = from_matrix((matrix[:3, :3] / scale)[None])[0]
        still = {"translation": matrix[:3, 3], "rotation": [x, y, z, w], "scale": scale}
    found = {}
    for what, value in still.items():
        if (k, what) not in tracks:
            found[what] = np.tile(np.asarray(value, dtype=np.float64), (len(at), 1))
            continue
        times, track, held = tracks[k, what]
        low = np.clip(np.searchsorted(times, at, side="right") - 1, 0, len(times) - 1)
        high = np.minimum(low + 1, len(times) - 1)
        span = np.where(high > low, times[high] - times[low], 1)
        part = np.zeros(len(at)) if held else np.clip((at - times[low]) / span, 0, 1)
        if what == "rotation":
            found[what] = slerp(track[low], track[high], part)
        else:
            found[what] = track[low] + part[:, None] * (track[high] - track[low])
    return found["translation"], found["rotation"][:, [3, 0, 1, 2]], found["scale"]
