"""GLB: a clip as an animated, skinned figure; and reading the skeleton animation of any glTF binary."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from weft.errors import WeftError
from weft.media import atomic_write
from weft.motion.clip import LONGEST, Motion
from weft.motion.figure import COLOURS, SOLIDS, solids
from weft.motion.ik import Pose, rest_positions, solve
from weft.motion.rig import Rig
from weft.motion.rotation import from_matrix, multiply, rotate, slerp, unit
from weft.motion.skeleton import HUMANML3D

_FLOAT, _UBYTE, _UINT = 5126, 5121, 5125
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

    def accessor(
        array: np.ndarray,
        kind: str,
        component: int,
        target: int | None = None,
        *,
        bounds: bool = False,
        share: bool = False,
    ) -> int:
        array = np.ascontiguousarray(array, dtype=_TYPES[component])
        while len(data) % 4:
            data.append(0)
        doc.bufferViews.append(gltf.BufferView(buffer=0, byteOffset=len(data), byteLength=array.nbytes, target=target))
        data.extend(array.tobytes())
        made = gltf.Accessor(bufferView=len(doc.bufferViews) - 1, componentType=component, count=len(array), type=kind)
        made.normalized = share  # whole numbers stand for 0 to 1
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
    points, normals, joints, colours, triangles = _figure(pose, rest)
    weights = np.zeros((len(points), 4))
    weights[:, 0] = 255
    mesh = gltf.Primitive(
        attributes=gltf.Attributes(
            POSITION=accessor(points, "VEC3", _FLOAT, 34962, bounds=True),
            NORMAL=accessor(normals, "VEC3", _FLOAT, 34962),
            COLOR_0=accessor(colours, "VEC4", _UBYTE, 34962, share=True),
            JOINTS_0=accessor(np.stack([joints, joints * 0, joints * 0, joints * 0], 1), "VEC4", _UBYTE, 34962),
            WEIGHTS_0=accessor(weights, "VEC4", _UBYTE, 34962, share=True),
        ),
        indices=accessor(triangles.reshape(-1), "SCALAR", _UINT, 34963),
        material=0,
    )
    doc.materials.append(
        gltf.Material(
            name="figure",
            pbrMetallicRoughness=gltf.PbrMetallicRoughness(
                baseColorFactor=[1.0, 1.0, 1.0, 1.0], metallicFactor=0.0, roughnessFactor=0.7
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


_AROUND = 8  # corners around a capsule


def _figure(pose: Pose, rest: np.ndarray) -> tuple[np.ndarray, ...]:
    """The body at rest as capsules: corners [N, 3], normals, the joint that carries each, colours [N, 4], triangles."""
    starts, stops, radii = solids(rest[None], HUMANML3D)
    turns = np.arange(_AROUND) * 2 * np.pi / _AROUND
    rise = np.radians([-90, -50, 0, 0, 50, 90])  # rings of both caps
    points: list[np.ndarray] = []
    normals, joints, colours, triangles = [], [], [], []
    for k, solid in enumerate(SOLIDS):
        along = unit(stops[0, k] - starts[0, k])
        along = along if along.any() else np.array([0.0, 1.0, 0.0])
        side = unit(np.cross(along, [0.0, 0, 1] if abs(along[2]) < 0.9 else [0.0, 1, 0]))
        round_ = np.cos(turns)[:, None] * side + np.sin(turns)[:, None] * np.cross(along, side)
        normal = np.cos(rise)[:, None, None] * round_ + np.sin(rise)[:, None, None] * along  # [rings, around, 3]
        centre, radius = np.repeat([starts[0, k], stops[0, k]], 3, axis=0), np.repeat(radii[k], 3)
        first = sum(len(p) for p in points)
        points.append((centre[:, None] + radius[:, None, None] * normal).reshape(-1, 3))
        normals.append(normal.reshape(-1, 3))
        joints.append(np.full(len(points[-1]), pose.names.index(solid.bone)))
        linear = np.array([*COLOURS[solid.side]]) ** 2.2  # colours of corners are linear light
        colours.append(np.tile(np.append(linear, 1.0) * 255, (len(points[-1]), 1)).round())
        ring, step = np.divmod(np.arange((len(rise) - 1) * _AROUND), _AROUND)
        a, b = ring * _AROUND + step, ring * _AROUND + (step + 1) % _AROUND
        corners = np.stack([a, b, b + _AROUND, a, b + _AROUND, a + _AROUND], axis=-1)
        triangles.append(first + corners.reshape(-1, 3))
    return tuple(np.concatenate(part) for part in (points, normals, joints, colours, triangles))


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
        if made.sparse or made.bufferView is None or doc.bufferViews[made.bufferView].buffer:
            raise WeftError(f"{path}: accessor {k} is sparse or outside the file: export it again with plain ones")
        view = doc.bufferViews[made.bufferView]
        size, kind = _COUNTS[made.type], np.dtype(_TYPES[made.componentType])
        start = (view.byteOffset or 0) + (made.byteOffset or 0)
        stride = view.byteStride or size * kind.itemsize
        rows = np.ndarray((made.count, size), kind, blob, start, (stride, kind.itemsize))
        if kind.kind == "f" and not np.isfinite(rows).all():
            raise WeftError(f"{path}: NaN or infinity in accessor {k}: export it again")
        if made.normalized:
            return np.maximum(rows / float(np.iinfo(kind).max), -1.0)  # the least of a signed type is -1, too
        return rows.astype(np.float64)

    animation = doc.animations[0]
    tracks = {}
    for channel in animation.channels:
        sampler = animation.samplers[channel.sampler]
        track = values(sampler.input)[:, 0], values(sampler.output), sampler.interpolation
        tracks[channel.target.node, channel.target.path] = track
    end = max(t[-1] for t, _, _ in tracks.values())
    if not end * fps < LONGEST:
        raise WeftError(f"{path}: {end:g} s of movement at {fps:g} frames a second: the longest is {LONGEST} frames")
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
        times, track, kind = tracks[k, what]
        low = np.clip(np.searchsorted(times, at, side="right") - 1, 0, len(times) - 1)
        high = np.minimum(low + 1, len(times) - 1)
        span = np.where(high > low, times[high] - times[low], 1)
        part = np.where((high > low) & (kind != "STEP"), np.clip((at - times[low]) / span, 0, 1), 0.0)
        if kind == "CUBICSPLINE":
            mixed = _cubic(track, low, high, part[:, None], span[:, None])
            found[what] = unit(mixed) if what == "rotation" else mixed
        elif what == "rotation":
            found[what] = slerp(track[low], track[high], part)
        else:
            found[what] = track[low] + part[:, None] * (track[high] - track[low])
    return found["translation"], found["rotation"][:, [3, 0, 1, 2]], found["scale"]


def _cubic(track: np.ndarray, low: np.ndarray, high: np.ndarray, t: np.ndarray, span: np.ndarray) -> np.ndarray:
    """Hermite splines between keys (glTF 2.0, appendix C.5): each key has an in-tangent, a value and an out-tangent."""
    arrive, value, leave = track[0::3], track[1::3], track[2::3]
    kept = 2 * t**3 - 3 * t**2 + 1
    curve = kept * value[low] + (1 - kept) * value[high]
    return curve + span * ((t**3 - 2 * t**2 + t) * leave[low] + (t**3 - t**2) * arrive[high])
