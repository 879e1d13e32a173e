"""Bad and odd motion files, generated: a clear message or the right answer, and never NaN in a file.

Truncated, mutated, in another channel order, with NaN, on unknown skeletons, of one and three frames, of ten minutes,
with bones opposite to their rest direction, collapsed or of absurd size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from motion_clips import procedural
from test_motion_files import AMC, ASF
from weft.errors import WeftError
from weft.motion import HUMANML3D, Motion, extract, from_features, place, read_motion, recover, retarget, write_motion
from weft.motion.files.acclaim import read_amc
from weft.motion.files.bvh import read_bvh, write_bvh
from weft.motion.ik import solve
from weft.motion.render import render_frames
from weft.motion.viewer import viewer_page

FILES = (".bvh", ".glb", ".npz", ".npy")


@pytest.fixture(scope="module")
def clip() -> Motion:
    return Motion(solve(Motion(place(retarget(procedural(6, 3, swing=0.3))))).positions())


def refused(path: Path, read: Callable[[Path], object] = read_motion) -> str | None:
    """The message for a file that is refused, None for one that is read. Anything else than a WeftError is a bug."""
    try:
        found = read(path)
    except WeftError as error:
        text = str(error)
        assert path.name in text or ".asf: " in text, f"no file in the message: {text}"
        assert "\n" not in text and len(text) < 600, text
        return text
    joints = found.joints if isinstance(found, Motion) else found.positions  # type: ignore[attr-defined]
    assert np.isfinite(joints).all()
    return None


def cuts(size: int, count: int, seed: int = 0) -> Iterator[int]:
    yield from (0, 1, size // 2)
    yield from np.random.default_rng(seed).integers(2, size, count).tolist()


def test_truncated_bvh(clip: Motion, tmp_path: Path) -> None:
    path = tmp_path / "a.bvh"
    write_bvh(clip, path)
    data, whole = path.read_bytes(), read_bvh(path).positions
    last = len(data.rstrip()) - len(data.rstrip().rsplit(b" ", 1)[1])  # where the very last number begins
    for at in cuts(len(data), 60):
        path.write_bytes(data[:at])
        message = refused(path)
        if message is None:  # only digits of the last number, which no reader can miss
            assert at > last
            assert np.abs(read_bvh(path).positions[:-1] - whole[:-1]).max() == 0
        elif at > data.index(b"MOTION") + 60:
            assert "truncated" in message or "numbers, the hierarchy" in message, message


def test_truncated_acclaim(tmp_path: Path) -> None:
    asf, amc = tmp_path / "1.asf", tmp_path / "1_1.amc"
    asf.write_text(ASF)
    text = AMC + "".join(f"{k}\nroot 0 {k} 0 0 {k} 0\nup {k} 0\n" for k in range(3, 9))
    amc.write_text(text)
    whole = read_amc(amc).positions
    for at in cuts(len(text), 60):
        amc.write_text(text[:at])
        if refused(amc, read_amc) is None:  # the format has no count of frames: a cut between two is a shorter clip
            found = read_amc(amc).positions
            assert np.abs(found[:-1] - whole[: len(found) - 1]).max(initial=0) == 0
    amc.write_text(text)
    for at in cuts(len(ASF), 40):
        asf.write_text(ASF[:at])
        assert refused(amc, read_amc) is not None or at >= ASF.rindex("end") + 3


@pytest.mark.parametrize("suffix", [".glb", ".npz", ".npy"])
def test_truncated_binaries(clip: Motion, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    write_motion(clip, path)
    data = path.read_bytes()
    for at in cuts(len(data), 25):
        path.write_bytes(data[:at])
        assert refused(path) is not None, at


@pytest.mark.parametrize("suffix", [*FILES, ".amc", ".asf"])
def test_mutated_files(clip: Motion, tmp_path: Path, suffix: str) -> None:
    """Bytes replaced, removed, doubled: a message, or a finite clip; no other exception."""
    path = tmp_path / f"a{suffix}"
    if suffix in (".amc", ".asf"):
        (tmp_path / "a.asf").write_text(ASF)
        (tmp_path / "a.amc").write_text(AMC)
    else:
        write_motion(clip, path)
    data, rng = path.read_bytes(), np.random.default_rng(1)
    for _ in range(60):
        at, length = int(rng.integers(0, len(data))), int(rng.integers(1, 12))
        if rng.random() < 0.5:  # in the head, where the structure is
            at = int(rng.integers(0, min(len(data), 1200)))
        piece = bytes(rng.choice(list(b"0987.-+eE{}nainf \n\xff\x00ROOTxJ"), length))
        changed = [data[:at] + piece + data[at + length :], data[:at] + data[at + length :],
                   data[: at + length] + data[at:]][int(rng.integers(3))]  # fmt: skip
        path.write_bytes(changed)
        read = read_amc if suffix in (".amc", ".asf") else read_motion
        refused(tmp_path / "a.amc" if suffix == ".asf" else path, read)


def test_channel_orders(clip: Motion, tmp_path: Path) -> None:
    for order in ("XYZ", "XZY", "YXZ", "YZX", "ZXY", "ZYX"):
        write_bvh(clip, tmp_path / "a.bvh", order=order)
        assert np.abs(read_motion(tmp_path / "a.bvh").joints - clip.joints).max() < 1e-5
    text = (tmp_path / "a.bvh").read_text()
    for wrong, why in (
        (text.replace("CHANNELS 3", "CHANNELS 2", 1), "numbers|channels|hierarchy"),
        (text.replace("Zrotation Yrotation Xrotation", "Zrotation Yrotation Yrotation", 1), "at most once"),
        (text.replace("Zrotation", "Rotation", 1), "Rotation"),
        (text.replace("CHANNELS 6", "CHANNELS 60", 1), "channels"),
    ):
        (tmp_path / "a.bvh").write_text(wrong)
        message = refused(tmp_path / "a.bvh")
        assert message and re.search(why, message), message


def test_nan_and_infinity(clip: Motion, tmp_path: Path) -> None:
    path = tmp_path / "a.bvh"
    write_bvh(clip, path)
    lines = path.read_text().splitlines()
    for word in ("nan", "NaN", "inf", "-Infinity", "1e999"):
        path.write_text("\n".join(lines[:-3] + [lines[-3].replace(lines[-3].split()[4], word, 1)] + lines[-2:]))
        assert "NaN or infinity in frame 3" in str(refused(path)), word
    for bad in (np.nan, np.inf):
        joints = clip.joints.copy()
        joints[4, 7] = bad
        np.save(tmp_path / "a.npy", joints)
        np.savez(tmp_path / "a.npz", joints=joints, fps=20.0)
        for name in ("a.npy", "a.npz"):
            assert "first is 4" in str(refused(tmp_path / name))
        features = clip.features()
        features[2, 0] = bad
        np.save(tmp_path / "a.npy", features)
        assert "frame 2" in str(refused(tmp_path / "a.npy"))
        with pytest.raises(WeftError, match="first is 4"):
            Motion(joints)
    write_motion(clip, tmp_path / "a.glb")
    data = bytearray((tmp_path / "a.glb").read_bytes())
    data[-400:-396] = np.float32(np.nan).tobytes()  # in the animation, which stands last
    (tmp_path / "a.glb").write_bytes(bytes(data))
    assert "NaN" in str(refused(tmp_path / "a.glb"))


def test_unknown_skeletons(clip: Motion, tmp_path: Path) -> None:
    write_bvh(clip, tmp_path / "a.bvh")
    text = (tmp_path / "a.bvh").read_text()
    (tmp_path / "a.bvh").write_text(re.sub(r"(ROOT|JOINT) ", r"\1 bip_", text))
    message = str(refused(tmp_path / "a.bvh"))
    assert "unknown skeleton" in message and "bip_pelvis" in message
    own = {name: f"bip_{name}" for name in HUMANML3D.joints}
    assert np.abs(read_motion(tmp_path / "a.bvh", table=own).joints - clip.joints).max() < 1e-5
    np.save(tmp_path / "a.npy", np.zeros((9, 17, 3)))
    assert "17" in str(refused(tmp_path / "a.npy"))


def odd_clips() -> dict[str, np.ndarray]:
    """Clips that no body makes and files must survive, [T, 22, 3]."""
    plain = procedural(4, 3).astype(np.float64)
    upside = plain.copy()
    for k in range(1, 22):  # every bone exactly opposite to its direction in the first frame
        parent = HUMANML3D.parents[k]
        upside[2, k] = upside[2, parent] - (plain[0, k] - plain[0, parent])
    rest = np.zeros((4, 22, 3))
    for k in range(1, 22):
        rest[:, k] = rest[:, HUMANML3D.parents[k]] + HUMANML3D.directions[k] * HUMANML3D.bone_lengths()[k]
    against = rest.copy()
    for k in range(1, 22):
        against[1::2, k] = against[1::2, HUMANML3D.parents[k]] - (rest[1::2, k] - rest[1::2, HUMANML3D.parents[k]])
    one_bone = plain.copy()
    one_bone[:, 15] = one_bone[:, 12]
    return {
        "one frame": plain[:1], "two frames": plain[:2], "three frames": plain[:3], "still": plain[[0, 0, 0, 0]],
        "opposite": upside, "opposite to the rest pose": against, "at rest": rest, "a bone of length zero": one_bone,
        "a point": np.zeros((3, 22, 3)), "far away": plain + 1e4, "huge": plain * 1e3, "tiny": plain * 1e-3,
        "on its head": plain * [1, -1, 1], "lying": plain[..., [1, 0, 2]],
    }  # fmt: skip


@pytest.mark.parametrize("name", list(odd_clips()))
def test_odd_clips_in_files(name: str, tmp_path: Path) -> None:
    motion = Motion(odd_clips()[name])
    size = max(1.0, float(np.abs(motion.joints).max()))
    for suffix in FILES:
        for exact in (False, True) if suffix in (".bvh", ".glb") else (False,):
            path = tmp_path / f"a{suffix}"
            write_motion(motion, path, **({"exact": True} if exact else {}))
            assert b"nan" not in path.read_bytes().lower() or suffix != ".bvh"
            try:
                again = read_motion(path, fps=20, unit="m", up="y") if suffix in (".bvh", ".glb") else read_motion(path)
            except WeftError as error:
                raise AssertionError(f"{name}{suffix}: our own file is refused: {error}") from error
            assert len(again) == len(motion)
            if exact or suffix in (".npz", ".npy"):
                assert np.abs(again.joints - motion.joints).max() < 1e-5 * size
    with np.load(tmp_path / "a.npz", allow_pickle=False) as data:
        assert all(np.isfinite(data[k]).all() for k in ("poses", "trans", "joints"))
    assert "NaN" not in viewer_page([motion])
    assert np.asarray(next(render_frames(motion, size=16, frames=[0]))).shape == (16, 16, 3)
    try:
        features = extract(motion.joints)
    except WeftError as error:
        assert name in ("one frame", "a bone of length zero", "a point"), error
        return
    assert np.isfinite(features).all()
    for source in ("positions", "rotations"):
        assert np.isfinite(recover(features, source)).all()
    if name.startswith(("opposite", "three", "two", "still")):
        gap = np.abs(from_features(features, source="rotations").joints - from_features(features).joints).max()
        assert gap < 1e-3


@pytest.mark.long
def test_ten_minutes_in_files(tmp_path: Path) -> None:
    motion = Motion(procedural(12_000, 1, swing=0.1))
    for suffix in FILES:
        write_motion(motion, tmp_path / f"a{suffix}", **({"exact": True} if suffix in (".bvh", ".glb") else {}))
        again = read_motion(tmp_path / f"a{suffix}", fps=20)
        assert len(again) == len(motion) and np.abs(again.joints - motion.joints).max() < 1e-3
    features = motion.features(heading="correct")
    assert len(features) == 11_999 and np.isfinite(features).all()
    assert len(list(render_frames(motion, size=32, frames=[0, 11_999]))) == 2
    assert viewer_page([motion]).count("12000") >= 1
