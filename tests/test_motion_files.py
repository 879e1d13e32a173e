"""Motion files: what is written comes back, what is damaged is refused by name, and Blender agrees."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from motion_clips import procedural
from weft.errors import WeftError
from weft.motion import (
    HUMANML3D,
    KIT,
    Motion,
    Rig,
    extract,
    from_features,
    load_part,
    mirror,
    place,
    read_motion,
    retarget,
    to_motion,
    write_motion,
)
from weft.motion.figure import SOLIDS, solids
from weft.motion.files.acclaim import read_amc
from weft.motion.files.amass import Body, amass_joints, read_body
from weft.motion.files.arrays import write_npz
from weft.motion.files.bvh import read_bvh, write_bvh
from weft.motion.files.glb import read_glb
from weft.motion.files.humanml3d import build, read_captions, records
from weft.motion.ik import rest_positions, solve
from weft.motion.render import render_frames
from weft.motion.rotation import from_axis_angle, rotate
from weft.motion.viewer import Scene, viewer_page, write_viewer
from weft.record import motion_part, read_records, write_records

BLENDER = shutil.which("blender")


@pytest.fixture(scope="module")
def clip() -> Motion:
    """A clip with one rigid body: what features give."""
    return Motion(place(retarget(procedural(24, 11, swing=0.25))))


def rigid(motion: Motion) -> Motion:
    """The nearest clip whose hips and shoulders are rigid, as a real body's are."""
    return Motion(solve(motion).positions(), motion.fps)


@pytest.mark.parametrize("suffix", [".bvh", ".glb", ".npz", ".npy"])
def test_round_trip(clip: Motion, tmp_path: Path, suffix: str) -> None:
    body = rigid(clip)
    write_motion(body, tmp_path / f"a{suffix}")
    again = read_motion(tmp_path / f"a{suffix}", fps=20)
    assert again.joints.shape == body.joints.shape and again.fps == 20
    assert np.abs(again.joints - body.joints).max() < 1e-5
    if suffix in (".bvh", ".glb"):  # bones that change length and bend at the hips: with translations
        write_motion(clip, tmp_path / f"b{suffix}", exact=True)
        assert np.abs(read_motion(tmp_path / f"b{suffix}", fps=20).joints - clip.joints).max() < 1e-5


@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize("suffix", [".bvh", ".glb", ".npz", ".npy", ".gif"])
def test_few_frames(tmp_path: Path, frames: int, suffix: str) -> None:
    motion = Motion(procedural(frames, 1))
    options = {"size": 32} if suffix == ".gif" else {}
    write_motion(motion, tmp_path / f"a{suffix}", **options)
    if suffix != ".gif":
        assert len(read_motion(tmp_path / f"a{suffix}")) == frames


def test_rest_pose_and_rates(clip: Motion, tmp_path: Path) -> None:
    pose = write_bvh(Motion(clip.joints, 30), tmp_path / "a.bvh")
    rest = np.array(pose.offsets)
    assert rest[HUMANML3D.index("left_elbow"), 0] > 0.2 and rest[HUMANML3D.index("right_wrist"), 0] < -0.2
    assert rest[HUMANML3D.index("left_knee"), 1] < -0.3
    text = (tmp_path / "a.bvh").read_text()
    assert text.count("End Site") == 5 and "nan" not in text.lower()
    assert read_bvh(tmp_path / "a.bvh").fps == 30
    resampled = read_motion(tmp_path / "a.bvh", fps=20)
    assert resampled.fps == 20 and len(resampled) == 16


def test_opposite_vectors_in_files(tmp_path: Path) -> None:
    joints = np.repeat(procedural(1, 0, swing=0.0), 4, axis=0).astype(np.float64)
    for joint in HUMANML3D.joints[1:]:  # the body on its head, every bone opposite to its rest direction
        k = HUMANML3D.index(joint)
        joints[2, k] = joints[2, HUMANML3D.parents[k]] - (joints[1, k] - joints[1, HUMANML3D.parents[k]])
    for suffix in (".bvh", ".glb"):
        write_motion(Motion(joints), tmp_path / f"a{suffix}", exact=True)
        again = read_motion(tmp_path / f"a{suffix}", fps=20)
        assert np.abs(again.joints - joints).max() < 1e-5


def lines_of(clip: Motion, path: Path) -> list[str]:
    write_bvh(clip, path)
    return path.read_text().splitlines()


def test_other_writers_bvh(clip: Motion, tmp_path: Path) -> None:
    """Small key words and broken or joined lines of numbers, as other programs write and Blender reads them."""
    path = tmp_path / "a.bvh"
    write_motion(clip, path)
    wanted = read_bvh(path).positions
    head, body = path.read_text().split("MOTION\n")
    first, second, *rows = body.splitlines()
    top = f"{head}MOTION\n{first}\n{second}\n"
    small = head.replace("HIERARCHY", "Hierarchy").replace("JOINT", "Joint").replace("rotation", "ROTATION")
    for other in (
        small + f"Motion\n{body}",
        head.replace("ROOT pelvis", "ROOT MOTION_pelvis").replace("End Site", "end site") + f"MOTION\n{body}",
        top + " ".join(rows),
        top + "\n".join(" ".join(row.split()[:9]) + "\n" + " ".join(row.split()[9:]) for row in rows),
    ):
        path.write_text(other)
        assert np.array_equal(read_bvh(path).positions, wanted)


def test_damaged_bvh(clip: Motion, tmp_path: Path) -> None:
    path = tmp_path / "a.bvh"
    lines = lines_of(clip, path)
    start = lines.index("MOTION")
    cases = {
        "truncated": lines[:-3],
        "truncated: ": lines[:-1] + [lines[-1][:40]],
        "open": lines[: start - 6] + lines[start:],
        "no HIERARCHY": lines[: start - 10],
        "frame 2 has": lines[: start + 5] + [lines[start + 5] + " 1.0"] + lines[start + 6 :],
        "NaN": lines[:-1] + [lines[-1].rpartition(" ")[0] + " nan"],
        "no number": lines[:-1] + [lines[-1].rpartition(" ")[0] + " x1"],
        "Wrotation": [line.replace("Zrotation", "Wrotation") for line in lines],
        "at most once": [line.replace("Zrotation Y", "Yrotation Y") for line in lines],
        "frame time": [line.replace("Frame Time: 0.05", "Frame Time: 0.0  #") for line in lines],
        "unknown skeleton": [line.replace("JOINT ", "JOINT bone_") for line in lines],
    }
    for what, damaged in cases.items():
        path.write_text("\n".join(damaged))
        with pytest.raises(WeftError) as raised:
            read_motion(path)
        assert str(path) in str(raised.value) and "\n" not in str(raised.value), what
    path.write_bytes(b"\x00\xff" * 50)
    with pytest.raises(WeftError):
        read_motion(path)
    with pytest.raises(WeftError, match="does not exist"):
        read_motion(tmp_path / "no.bvh")
    with pytest.raises(WeftError, match="suffix"):
        read_motion(tmp_path / "a.fbx")


def test_channel_order_is_obeyed(tmp_path: Path) -> None:
    def bvh(order: str, angles: str) -> np.ndarray:
        channels = " ".join(f"{c}rotation" for c in order)
        text = (
            "HIERARCHY\nROOT a\n{\nOFFSET 0 0 0\nCHANNELS 6 Zposition Xposition Yposition "
            f"{channels}\nJOINT b\n{{\nOFFSET 1 2 3\nCHANNELS 1 Xrotation\nJOINT c\n{{\nOFFSET 0 1 0\nCHANNELS 0\n"
            "End Site\n{\nOFFSET 0 1 0\n}\n}\n}\n}\n"
            f"MOTION\nFrames: 1\nFrame Time: 0.01\n30 10 20 {angles} 90\n"
        )
        (tmp_path / "a.bvh").write_text(text)
        return read_bvh(tmp_path / "a.bvh", root="absolute").positions[0]

    still = bvh("XYZ", "0 0 0")
    assert np.allclose(still, [[10, 20, 30], [11, 22, 33], [11, 22, 34]])
    assert np.allclose(bvh("ZXY", "90 0 0")[1], [10 - 2, 20 + 1, 33])
    # ZXY is Rz Rx Ry: y first
    q = [from_axis_angle(np.radians(v)) for v in ([0, 0, 40.0], [50.0, 0, 0], [0, 60.0, 0])]
    wanted = rotate(q[0], rotate(q[1], rotate(q[2], np.array([1.0, 2, 3]))))
    assert np.allclose(bvh("ZXY", "40 50 60")[1] - [10, 20, 30], wanted)


ASF = """# test
:version 1.10
:units
  mass 1.0
  length 0.45
  angle deg
:root
   order TX TY TZ RX RY RZ
   axis XYZ
   position 0 0 0
:bonedata
  begin
     name up
     direction 0 1 0
     length 2
     axis 0 0 90 XYZ
    dof rx rz
  end
  begin
     name tip
     direction 1 0 0
     length 1
     axis 0 0 0 XYZ
  end
:hierarchy
  begin
    root up
    up tip
  end
"""
AMC = "#!OML\n:FULLY-SPECIFIED\n:DEGREES\n1\nroot 1 2 3 0 0 0\nup 0 0\n2\nroot 0 0 0 0 90 0\nup 90 0\n"


def test_acclaim(tmp_path: Path) -> None:
    (tmp_path / "01.asf").write_text(ASF.replace("\n", "\r\n"))
    (tmp_path / "01_01.amc").write_text(AMC.replace("\n", "\r\n"))
    rig = read_amc(tmp_path / "01_01.amc")
    assert rig.names == ["root", "up", "tip"] and rig.fps == 120 and rig.parents == [-1, 0, 1]
    metres = 0.0254 / 0.45
    assert np.allclose(rig.positions[0] / metres, [[1, 2, 3], [1, 4, 3], [2, 4, 3]])
    # about the bone's own x, which its axis has turned to +y: a quarter turn about y, twice with the root
    assert np.allclose(rig.positions[1] / metres, [[0, 0, 0], [0, 2, 0], [-1, 2, 0]], atol=1e-9)
    for what, text in {
        "truncated": AMC[:-9],
        "skeleton 2 freedoms": AMC.replace("up 90 0", "up 90"),
        "not in the skeleton": AMC.replace("up 90", "leg 90"),
        "NaN": AMC.replace("up 90 0", "up nan 0"),
        "no frames": ":DEGREES\n",
        "before the first": "root 1\n",
    }.items():
        (tmp_path / "01_01.amc").write_text(text)
        with pytest.raises(WeftError, match=what):
            read_amc(tmp_path / "01_01.amc")
    (tmp_path / "01_01.amc").write_text(AMC)
    damaged = {"cut off": ASF[: ASF.index(":hier")], "no end": ASF[:-7], "bone data": ASF.replace("length 2", "length")}
    for what, text in damaged.items():
        (tmp_path / "01.asf").write_text(text)
        with pytest.raises(WeftError, match=what):
            read_amc(tmp_path / "01_01.amc")
    with pytest.raises(WeftError, match="unknown skeleton"):
        to_motion(rig)


def test_acclaim_root_offset_and_radians(tmp_path: Path) -> None:
    def joints(asf: str, amc: str) -> np.ndarray:
        (tmp_path / "1.asf").write_text(asf)
        (tmp_path / "1_1.amc").write_text(amc)
        return read_amc(tmp_path / "1_1.amc").positions / (0.0254 / 0.45)

    plain = joints(ASF, AMC)
    # the definition: position and orientation say where the skeleton stands, and all motion is relative to them;
    # the angles act in the order of axis, about fixed axes
    for axis, matrices in (("XYZ", "ZYX"), ("zyx", "XYZ"), ("YZX", "XZY")):
        asf = ASF.replace("axis XYZ\n   position 0 0 0", f"axis {axis}\n   position 3 -1 2\n   orientation 90 30 -20")
        turns = {"X": [90.0, 0, 0], "Y": [0, 30.0, 0], "Z": [0, 0, -20.0]}
        a, b, c = (from_axis_angle(np.radians(turns[name])) for name in matrices)
        wanted = rotate(a, rotate(b, rotate(c, plain))) + [3, -1, 2]
        assert np.allclose(joints(asf, AMC), wanted, atol=1e-9), axis
    # 90 degrees about x take +y to +z
    asf = ASF.replace("position 0 0 0", "position 0 0 0\n   orientation 90 0 0")
    assert np.allclose(joints(asf, AMC)[0], [[1, -3, 2], [1, -3, 4], [2, -3, 4]], atol=1e-9)

    half = str(np.pi / 2)
    radians = AMC.replace("DEGREES", "RADIANS").replace("0 90 0", f"0 {half} 0").replace("up 90", f"up {half}")
    assert np.allclose(joints(ASF, radians), plain, atol=1e-9)
    skeleton = ASF.replace("angle deg", "angle rad").replace("axis 0 0 90", f"axis 0 0 {half}")
    assert np.allclose(joints(skeleton, AMC), plain, atol=1e-9), "the motion's own word counts"
    assert np.allclose(joints(skeleton, radians.replace(":RADIANS\n", "")), plain, atol=1e-9), "else the skeleton's"
    turned = skeleton.replace("position 0 0 0", f"position 0 0 0\n   orientation {half} 0 0")
    assert np.allclose(joints(turned, radians), joints(asf, AMC), atol=1e-9)
    for bad in ("orientation 90 0", "orientation 90 0 nan", "position 1 2 x", "axis XYY"):
        with pytest.raises(WeftError, match=r"1\.asf"):
            joints(ASF.replace("axis XYZ\n   position 0 0 0", bad), AMC)


def foreign(table: dict, clip: Motion, unit: float, prefix: str = "") -> Rig:
    """The clip under another rig's names, z up."""
    names = [prefix + (p if isinstance(p, str) else p[0]) for p in table.values()]
    joints = clip.joints[:, [HUMANML3D.index(k) for k in table]] * unit
    z_up = np.stack([joints[..., 0], -joints[..., 2], joints[..., 1]], axis=-1)
    return Rig(names, [-1] * len(names), z_up, 20.0)


def test_tables_units_and_axes(clip: Motion) -> None:
    from weft.motion.rig import TABLES

    prefixes = ("mixamorig:", "mixamorig", "mixamorig1:", "mixamorig12_", "Armature|mixamorig:", "")
    for name, prefix in (*(("mixamo", p) for p in prefixes), ("iclone", ""), ("humanml3d", "")):
        for unit in (1.0, 100.0, 1000.0, 1 / 0.0254):
            found = to_motion(foreign(TABLES[name], clip, unit, prefix))
            assert found.meta["table"] == name and np.abs(found.joints - clip.joints).max() < 1e-4
    rig = foreign(TABLES["mixamo"], clip, 1.0)
    own = {k: v for k, v in zip(HUMANML3D.joints, [TABLES["mixamo"][k] for k in HUMANML3D.joints], strict=True)}
    assert np.abs(to_motion(rig, own, unit="cm").joints * 100 - clip.joints).max() < 1e-4
    for bad in ({"pelvis": "Hips"}, own | {"head": "Skull"}, "poser"):
        with pytest.raises(WeftError, match="table"):
            to_motion(rig, bad)
    with pytest.raises(WeftError, match="human height"):
        to_motion(foreign(TABLES["mixamo"], clip, 1e-4))
    rig.positions[3, 4] = np.nan
    with pytest.raises(WeftError, match="first"):
        to_motion(rig)


@pytest.mark.parametrize("features", [np.zeros((4, 7)), np.full((5, 263), np.nan), np.zeros((5, 263), np.int64)])
def test_features_beside_joints_must_be_theirs(tmp_path: Path, features: np.ndarray) -> None:
    np.savez(tmp_path / "clip.npz", joints=np.zeros((5, 22, 3)), features=features)
    with pytest.raises(WeftError, match=r"clip.npz: features \[\d, \d+\] must be finite floats \[5, 263\]"):
        read_motion(tmp_path / "clip.npz")


def test_arrays(clip: Motion, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    features = clip.features(heading="correct")
    np.save(path, features)
    read = read_motion(path)
    assert np.abs(read.joints - from_features(features).joints).max() == 0
    assert read.stored is not None and np.array_equal(read.stored, features) and read.digest != clip.digest
    assert np.array_equal(read.features(), features) and read.features(heading="correct").shape == (len(read) - 1, 263)
    cut = read.crop(3, 9).stored
    assert cut is not None and np.array_equal(cut, features[3:9])
    assert all(m.stored is None for m in (read.mirror(), read.placed(), read.resample(30), clip))
    np.save(path, clip.joints.reshape(len(clip), 66))
    assert np.array_equal(read_motion(path).joints, clip.joints)
    np.save(path, np.pad(clip.joints, ((0, 0), (0, 30), (0, 0))))  # SMPL-H's 52
    assert np.array_equal(read_motion(path).joints, clip.joints)
    for bad in (np.zeros((5, 7)), np.full((5, 263), np.nan), np.array(["a"]), np.zeros(3)):
        np.save(path, bad)
        with pytest.raises(WeftError, match="a.npy"):
            read_motion(path)
    np.save(path, clip.joints)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(WeftError, match="truncated"):
        read_motion(path)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(WeftError, match="pickled"):
        read_motion(path)


def body_file(path: Path) -> Path:
    """A body model of 22 joints: one vertex a joint, betas that stretch it."""
    rest = np.cumsum(np.ones((22, 3)) * 0.01, axis=0)
    for k, parent in enumerate(HUMANML3D.parents):
        if parent >= 0:
            rest[k] = rest[parent] + HUMANML3D.directions[k] * HUMANML3D.bone_lengths()[k]
    shapes = np.zeros((22, 3, 16))
    shapes[..., 0] = rest * 0.1
    tree = np.array([[4294967295, *HUMANML3D.parents[1:]], range(22)])
    np.savez(path, v_template=rest, shapedirs=shapes, J_regressor=np.eye(22), kintree_table=tree)
    return path


def test_smpl_poses_that_we_write_stand_as_the_clip_does(clip: Motion, tmp_path: Path) -> None:
    """On a body of our own bones, the poses (z up, as AMASS's) give the clip's joints back by AMASS's reading."""
    pose = write_npz(clip, tmp_path / "a.npz")
    data = np.load(tmp_path / "a.npz")
    body = Body(rest_positions(pose), np.zeros((22, 3, 10)), pose.parents)
    joints, fps = amass_joints({k: data[k] for k in data.files}, body)
    assert fps == clip.fps and np.abs(joints - clip.joints).max() < pose.error + 1e-4
    assert np.allclose(data["trans"][:, 2], clip.joints[:, 0, 1], atol=1e-6)


def test_cubic_splines_and_odd_accessors_of_glb(clip: Motion, tmp_path: Path) -> None:
    """A Hermite spline with a cubic's own tangents is the cubic; what stands elsewhere is refused, not misread."""
    import pygltflib

    path = tmp_path / "a.glb"
    write_motion(clip, path)
    times = np.array([0.0, 0.5, 2.0])
    keys = np.stack([3 * times**2, times**3 + 1, 3 * times**2], axis=1)[..., None].repeat(3, -1).reshape(9, 3)
    doc = pygltflib.GLTF2.load_binary(str(path))
    data = bytearray(doc.binary_blob())
    for values, kind in ((times, "SCALAR"), (keys, "VEC3")):
        doc.bufferViews.append(pygltflib.BufferView(buffer=0, byteOffset=len(data), byteLength=4 * values.size))
        data += values.astype("<f4").tobytes()
        doc.accessors.append(
            pygltflib.Accessor(bufferView=len(doc.bufferViews) - 1, componentType=5126, count=len(values), type=kind)
        )
    sampler = doc.animations[0].samplers[doc.animations[0].channels[0].sampler]  # the root's place
    sampler.input, sampler.output = len(doc.accessors) - 2, len(doc.accessors) - 1
    sampler.interpolation = "CUBICSPLINE"
    doc.buffers[0].byteLength = len(data)
    doc.set_binary_blob(bytes(data))
    doc.save_binary(str(path))
    rig = read_glb(path, fps=20)
    at = np.arange(len(rig.positions)) / 20
    assert np.allclose(rig.positions[:, 0], (np.minimum(at, 2) ** 3 + 1)[:, None], atol=1e-5)
    doc.accessors[-1].sparse = pygltflib.Sparse(count=1)
    doc.save_binary(str(path))
    with pytest.raises(WeftError, match="sparse"):
        read_glb(path)


def test_amass_and_building_the_dataset(tmp_path: Path) -> None:
    body = read_body(body_file(tmp_path / "model.npz"))
    rng = np.random.default_rng(0)
    frames = 130
    poses = np.cumsum(rng.normal(size=(frames, 66)) * 0.01, axis=0)
    trans = np.cumsum(rng.normal(size=(frames, 3)) * 0.01, axis=0)
    data = {"poses": poses, "trans": trans, "betas": np.array([1.0] + [0.0] * 15), "mocap_framerate": 59.0}
    joints, fps = amass_joints(data, body)
    assert fps == 59 and np.allclose(joints[:, 0, 1], trans[:, 2] + body.rest[0, 2] * 1.1)
    lengths = np.linalg.norm(joints[:, 1:] - joints[:, list(HUMANML3D.parents[1:])], axis=-1)
    assert np.allclose(lengths, HUMANML3D.bone_lengths()[1:] * 1.1)
    with pytest.raises(WeftError, match="female body"):
        amass_joints(data | {"gender": "female"}, {"male": body})
    assert np.array_equal(amass_joints(data, {"male": body, "neutral": body})[0], joints)
    raw, _ = amass_joints(data, body, raw=True, stride_fps=20)
    assert len(raw) == 65 and np.allclose(raw * [-1, 1, 1], joints[::2])

    source = tmp_path / "TotalCapture" / "MPI_Limits" / "1"  # where it lies cuts nothing, the source in the index does
    source.mkdir(parents=True)
    np.savez(source / "a_poses.npz", gender=np.array("male"), dmpls=np.zeros((frames, 8)), **data)
    with pytest.raises(WeftError, match="body model"):
        read_motion(source / "a_poses.npz")
    assert len(read_motion(source / "a_poses.npz", bodies=body)) == frames
    index = "source_path,start_frame,end_frame,new_name\n"
    index += "./pose_data/MPI_Limits/1/a_poses.npy,0,40,000001.npy\n./pose_data/no/b.npy,0,9,000002.npy\n"
    (tmp_path / "index.csv").write_text(index)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "000001.txt").write_text("a man lifts his left arm#a/DET man/NOUN#0.0#0.0\n")
    out = tmp_path / "out"
    made = build(tmp_path / "TotalCapture", tmp_path / "index.csv", out, {"male": body}, texts=tmp_path / "texts")
    assert made["clips"] == 1 and made["with mirrors"] == 2 and made["texts"] == 2
    assert len(made["left out"]) == 1 and "000002" in made["left out"][0]
    vectors = np.load(out / "new_joint_vecs" / "000001.npy")
    # 65 frames less the second cut from MPI_Limits and none from a folder above it, frames 0 to 40, less one
    assert vectors.shape == (39, 263)
    assert np.array_equal(vectors, extract((raw[20:60] * [-1, 1, 1]).astype(np.float32)))
    assert "right arm" in (out / "texts" / "M000001.txt").read_text()
    (out / "train.txt").write_text("000001\nM000001\n000009\n")
    found = records(out, least=20)
    assert [r.id for r in found] == ["000001-0", "M000001-0"] and found[1].instruction == "a man lifts his right arm"
    assert found[0].target is not None and len(load_part(found[0].target, found[0].root)) == 39
    with pytest.raises(WeftError, match="2 length"):
        records(out)


def test_a_caption_with_times_goes_with_its_piece(tmp_path: Path) -> None:
    clip = Motion(procedural(101, 3))
    (tmp_path / "new_joint_vecs").mkdir()
    (tmp_path / "texts").mkdir()
    np.save(tmp_path / "new_joint_vecs" / "a.npy", clip.features())
    (tmp_path / "texts" / "a.txt").write_text("walks#walk/VERB#0.0#0.0\nturns left#turn/VERB left/ADJ#1.0#4.0\n")
    (tmp_path / "train.txt").write_text("a\n")
    whole, piece = records(tmp_path)
    assert piece.instruction == "turns left" and piece.meta["frames"] == [20, 80]
    assert whole.target and piece.target
    both = [load_part(r.target, r.root) for r in (whole, piece) if r.target]
    assert [len(c) for c in both] == [100, 60] and np.array_equal(both[0].joints[20:80], both[1].joints)
    assert piece.target.digest(piece.root) != whole.target.digest(whole.root)
    write_records(tmp_path / "out" / "r.jsonl", [piece])
    (again,) = read_records(tmp_path / "out" / "r.jsonl")
    assert again.target
    copied = load_part(again.target, again.root)
    assert np.array_equal(copied.joints, both[1].joints)
    assert copied.stored is not None and np.array_equal(copied.stored, clip.features()[20:80])
    (tmp_path / "new_joint_vecs" / "a.npy").write_bytes(b"x")
    with pytest.raises(WeftError, match="a.npy"):
        piece.target.value.load()


def test_the_public_loader_takes_the_same_clips_and_pieces(tmp_path: Path) -> None:
    """What momask-codes' Text2MotionDataset (data/t2m_dataset.py) makes of these lengths and times."""
    lengths = {"a": 39, "b": 40, "c": 199, "d": 200, "e": 260, "f": 100, "g": 120}
    (tmp_path / "new_joint_vecs").mkdir()
    (tmp_path / "texts").mkdir()
    for name, count in lengths.items():
        np.save(tmp_path / "new_joint_vecs" / f"{name}.npy", np.zeros((count, 263)))
        (tmp_path / "texts" / f"{name}.txt").write_text("walks#walk/VERB#0.0#0.0\n")
    (tmp_path / "texts" / "e.txt").write_text("walks#walk/VERB#1.0#5.0\n")  # too long a clip, though not its piece
    times = ("0.0#0.0", "nan#nan", "nan#3.0", "1.0#4.5", "1.0#2.0", "4.0#9.0")
    (tmp_path / "texts" / "f.txt").write_text("".join(f"walks#walk/VERB#{t}\n" for t in times))
    (tmp_path / "texts" / "g.txt").write_text("walks#walk/VERB#2.0#9.0\n")
    (tmp_path / "train.txt").write_text("\n".join(lengths))
    found = [(r.meta["clip"], r.meta.get("frames")) for r in records(tmp_path)]
    assert found[:4] == [("b", None), ("c", None), ("f", None), ("f", None)]
    assert found[4:] == [("f", [0, 60]), ("f", [20, 90]), ("g", [40, 120])]


def test_captions(tmp_path: Path) -> None:
    lines = [
        "a person walks.#a/DET person/NOUN walk/VERB#0.0#0.0",
        "turns#turn/VERB#2.0#4.5",
        "goes #1 fast#go/VERB#nan#nan",
        "sits##0.0#0.0",
        "only text",
        "bad#x/X#a#b",
        "two#fields",
        "runs#run/VERB#nan#3.0",
        "hops#hop/VERB#4.0#nan",
        "skips#skip/VERB#-1.0#2.0",
        "stays#stay/VERB#1.0#inf",
    ]
    (tmp_path / "1.txt").write_text("\n".join(lines))
    captions, faults = read_captions(tmp_path / "1.txt")
    texts = ["a person walks.", "turns", "goes #1 fast", "sits", "only text", "bad", "two"]
    assert [c.text for c in captions] == [*texts, "runs", "hops", "skips", "stays"]
    assert [(c.start, c.stop) for c in captions[7:]] == [(0.0, 3.0), (None, None), (None, None), (None, None)]
    assert (captions[1].start, captions[1].stop, captions[0].start) == (2.0, 4.5, None)
    assert captions[0].tokens[2] == ("walk", "VERB")
    assert [f.split(":")[1] for f in faults] == ["3", "4", "6", "7", "9", "10", "11"]


def test_motion_parts(clip: Motion, tmp_path: Path) -> None:
    write_motion(clip, tmp_path / "a.bvh", exact=True)
    part = motion_part("a.bvh", "source")
    assert np.abs(load_part(part, tmp_path).joints - clip.joints).max() < 1e-5
    held = motion_part(clip)
    assert load_part(held) is clip and held.digest() == clip.digest
    with pytest.raises(WeftError, match="not a movement"):
        from weft.record import text_part

        load_part(text_part("x"))
    from weft.record import make_record

    record = make_record("walk slower", motion_part("a.bvh"), root=tmp_path)
    write_records(tmp_path / "r.jsonl", [record])
    again = next(iter(read_records(tmp_path / "r.jsonl")))
    assert again.source is not None and len(load_part(again.source, again.root)) == len(clip)


def test_pictures(clip: Motion, tmp_path: Path) -> None:
    frames = list(render_frames(clip, size=(48, 64), frames=[0, 20]))
    assert [f.size for f in frames] == [(64, 48)] * 2 and np.asarray(frames[0]).std() > 10
    assert np.abs(np.asarray(frames[0]).astype(int) - np.asarray(frames[1])).max() > 50
    blue = np.asarray(next(render_frames(clip, size=64, frames=[0]))).astype(int)
    assert ((blue[..., 2] - blue[..., 0]) > 60).any() and ((blue[..., 0] - blue[..., 2]) > 60).any()
    write_motion(clip, tmp_path / "a.gif", size=32)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == len(clip) and gif.info["duration"] == 50
    write_motion(clip, tmp_path / "a.mp4", size=64)
    assert (tmp_path / "a.mp4").read_bytes()[4:8] == b"ftyp"
    for bad in (8, 4096):
        with pytest.raises(WeftError, match="pixels"):
            next(render_frames(clip, size=bad))


def test_viewer(clip: Motion) -> None:
    page = viewer_page([clip, clip.mirror()], names=["</script><b>", "mirrored"], title="<walk>")
    assert "&lt;walk&gt;" in page and "</script><b>" not in page and "http" not in page
    data = json.loads(page.split('id="clips">')[1].split("</script>")[0])
    (scene,) = data["scenes"]
    assert [c["frames"] for c in scene["clips"]] == [len(clip)] * 2
    assert {name: body["joints"] for name, body in data["bodies"].items()} == {"humanml3d": 22, "kit": 21}
    assert (
        len(json.loads(viewer_page([Scene([clip])] * 3).split('id="clips">')[1].split("</script>")[0])["scenes"]) == 3
    )
    for bad in ([], [Scene([])], [clip] * 5, [clip, Scene([clip])]):
        with pytest.raises(WeftError):
            viewer_page(bad)


def test_the_body_is_one_table_for_every_skeleton() -> None:
    for layout, unit in ((HUMANML3D, 1.0), (KIT, 0.001)):
        joints = procedural(3, 2, layout=layout, swing=0.1) * unit
        starts, stops, radii = solids(joints, layout)
        assert starts.shape == stops.shape == (3, len(SOLIDS), 3) and radii.shape == (len(SOLIDS), 2)
        near = np.linalg.norm(starts[:, :, None] - joints[:, None], axis=-1).min(axis=-1)
        assert np.isfinite(stops).all() and near.max() < 0.45 and (radii > 0).all()
    joints = procedural(3, 2, swing=0.1)
    mirrored = np.concatenate(solids(mirror(joints), HUMANML3D)[:2], axis=1) * [-1, 1, 1]
    plain = np.concatenate(solids(joints, HUMANML3D)[:2], axis=1)
    assert np.abs(np.sort(mirrored, axis=1) - np.sort(plain, axis=1)).max() < 1e-5
    twice = solids(2 * joints, HUMANML3D)
    assert np.allclose(twice[0], 2 * solids(joints, HUMANML3D)[0], atol=1e-4)


@pytest.mark.long
@pytest.mark.skipif(BLENDER is None, reason="Blender is not installed")
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("suffix", [".bvh", ".glb"])
def test_blender_has_the_same_joints(clip: Motion, tmp_path: Path, suffix: str, exact: bool) -> None:
    motion = clip if exact else rigid(clip)
    path, out = tmp_path / f"a{suffix}", tmp_path / "joints.json"
    write_motion(motion, path, exact=exact)
    script = Path(__file__).with_name("blender_joints.py")
    command = [str(BLENDER), "-b", "--factory-startup", "-P", str(script), "--", str(path), "20", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert out.is_file(), done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert len(found["frames"]) == len(motion)
    joints = np.array([[frame[name] for name in HUMANML3D.joints] for frame in found["frames"]])
    assert np.abs(joints - motion.joints).max() < 1e-3


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_viewer_draws_in_a_browser(clip: Motion, tmp_path: Path) -> None:
    """Two scenes, the second opened at a moment by its address: both clips in their colours, no script error."""
    page, shot = tmp_path / "v.html", tmp_path / "v.png"
    scenes = [Scene([clip], title="one"), Scene([clip, clip.mirror()], ["a", "b"], "two", "an instruction")]
    write_viewer(scenes, page, title="test")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=900,500", "--virtual-time-budget=2000",
        "--enable-logging=stderr", f"--screenshot={shot}", f"{page.as_uri()}#scene=2&time=0.5",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert shot.is_file(), done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    left, right = pixels[60:440, 245:570], pixels[60:440, 575:]

    def share(part: np.ndarray, high: int, low: int) -> float:
        return float(((part[..., high] - part[..., low]) > 60).mean())

    assert share(left, 2, 0) > 0.003 and share(left, 0, 2) > 0.003  # blue and orange limbs
    assert share(right, 1, 0) > 0.003  # the second clip's green ones
    assert share(right, 0, 2) < share(left, 0, 2)
