"""Bad and odd motion files through the commands that users type: a right answer or one clear line, and never NaN in a
file. What the readers themselves do with damaged files is in test_motion_corpus."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from motion_clips import procedural
from test_cli import Run
from test_cli import weft as weft_run  # noqa: F401  (a fixture)
from test_motion_corpus import cuts, odd_clips
from test_motion_files import AMC, ASF
from weft.motion import Motion, load_part, place, read_motion, retarget, write_motion
from weft.record import make_record, read_records, write_records

READS = (".bvh", ".glb", ".npz", ".npy")


@pytest.fixture
def run(weft_run: Run) -> Run:  # noqa: F811
    return weft_run


@pytest.fixture(scope="module")
def clip() -> Motion:
    return Motion(place(retarget(procedural(12, 3, swing=0.2))))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real code with random weights."""
    from tiny_motion import tiny_motion_folder

    return tiny_motion_folder(tmp_path_factory.mktemp("model") / "m", "flat")


def numbers(path: Path) -> Iterator[np.ndarray]:
    """All numbers that a written file holds."""
    suffix, data = path.suffix, path.read_bytes()
    if suffix == ".bvh":
        for word in data.decode().split():
            if word[0].isdigit() or word[0] in "-+." or word.lower().strip("+-") in ("nan", "inf"):
                yield np.array(float(word))
    elif suffix == ".npy":
        yield np.load(path, allow_pickle=False)
    elif suffix == ".npz":
        with np.load(path, allow_pickle=False) as found:
            yield from (found[key] for key in found.files if found[key].dtype.kind == "f")
    elif suffix == ".glb":
        from pygltflib import GLTF2

        doc, size = GLTF2.load_binary(str(path)), struct.unpack("<I", data[12:16])[0]
        assert b"NaN" not in data[: 20 + size] and b"Infinity" not in data[: 20 + size]
        for made in doc.accessors:
            if made.componentType == 5126:
                yield np.array((made.min or []) + (made.max or []), dtype=float)
                start = (doc.bufferViews[made.bufferView].byteOffset or 0) + (made.byteOffset or 0)
                yield np.frombuffer(doc.binary_blob(), "<f4", made.count, start)
    elif suffix in (".gif", ".html", ".jsonl", ".json"):
        if suffix == ".gif":
            with Image.open(path) as picture:
                assert picture.n_frames >= 1
        else:
            assert b"NaN" not in data and b"Infinity" not in data


def clean(folder: Path) -> list[Path]:
    """The files below a folder, every number in them finite, none half-written."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    for path in files:
        assert not path.name.endswith((".tmp", ".part")), path
        for found in numbers(path):
            assert np.isfinite(found).all(), path
    return files


def answered(result: tuple[int, str, str], out: Path) -> str | None:
    """None if a command did what it was asked (and left only clean files), else its message, and no file at all."""
    status, text, err = result
    assert "Traceback" not in err
    if status == 0:
        assert clean(out)
        return None
    assert status == 2 and err.startswith("weft: ") and err.count("\n") == 1 and len(err) < 700, (status, err)
    assert not clean(out), f"{err} left {clean(out)}"
    return err


def commands(run: Run, path: Path, out: Path, model: Path | None) -> dict[str, str | None]:
    """Every command that reads one motion file, each into its own folder: what it answered."""
    words: dict[str, list[object]] = {
        suffix: ["data", "convert", path, "-o", out / suffix / f"x{suffix}", *(["--size", 16] * (suffix == ".gif"))]
        for suffix in (".bvh", ".glb", ".npz", ".npy", ".gif")
    }
    words["exact"] = ["data", "convert", path, "-o", out / "exact" / "x.glb", "--exact"]
    words["place"] = ["data", "convert", path, "-o", out / "place" / "x.bvh", "--place", "--retarget", "--pin-feet"]
    words["features"] = ["data", "convert", path, "-o", out / "features" / "x.npy", "--to", "features"]
    words["show"] = ["data", "show", path, "-o", out / "show" / "x.html"]
    if model is not None:
        words["edit"] = [
            "edit",
            path,
            "a person walks",
            "-o",
            out / "edit" / "x.bvh",
            "--seconds",
            0.6,
            "--model",
            model,
        ]
        words["describe"] = ["describe", path, "--model", model]
    found = {}
    for name, line in words.items():
        (out / name).mkdir(parents=True)
        if name == "describe":
            status, text, err = run(*line)
            assert (status == 0 and text.strip()) or (status == 2 and err.count("\n") == 1), (status, err)
            found[name] = None if status == 0 or "wrote nothing" in err else err
        else:
            found[name] = answered(run(*line), out / name)
    return found


def as_records(run: Run, clips: Path, out: Path) -> tuple[int, str, str]:
    """A folder of clips as records, looked at."""
    (clips / "c.csv").write_text("name,caption\n" + "".join(f"{p.stem},walk\n" for p in clips.iterdir()))
    words = (
        "data",
        "convert",
        clips,
        "-o",
        out / "r.jsonl",
        "--kind",
        "motion",
        "--option",
        f"captions={clips / 'c.csv'}",
    )
    return run(*words, "--option", "max_faults=1", "--option", "least=0.05")


# ---------------------------------------------------------------- odd, but whole


@pytest.mark.parametrize("name", [*odd_clips(), "at the limit", "absurd", "beyond float"])
def test_odd_clips(run: Run, clip: Motion, model: Path, tmp_path: Path, name: str) -> None:
    """One frame to upside down: every command answers, and what it refuses it refuses for a reason."""
    factor = {"at the limit": 4e5, "absurd": 1e15, "beyond float": 3e37}.get(name)
    joints = odd_clips()[name] if factor is None else clip.joints * np.float32(factor)
    np.save(tmp_path / "a.npy", joints.astype(np.float32))
    found = commands(run, tmp_path / "a.npy", tmp_path / "out", model)
    said = {key: why for key, why in found.items() if why is not None}
    pointed = ("a bone of length zero", "a point")
    if name == "one frame":
        assert set(said) == {"features"} and "at least 2" in str(said["features"])
    elif name in pointed:
        assert {"features", "edit", "describe"} <= set(said) and all("lies on its parent" in w for w in said.values())
    elif factor is None:
        assert not said
    elif name == "at the limit":
        assert all("from the origin" in why for why in said.values()) and len(said) < 3, said
    else:
        assert set(said) == set(found) and all("is the unit right?" in why for why in said.values()), said


def test_few_frames_as_records(run: Run, clip: Motion, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for count in (1, 2, 3):
        write_motion(clip.crop(0, count), tmp_path / "in" / f"{count}.npz")
    status, _, err = as_records(run, tmp_path / "in", tmp_path)
    assert status == 0 and "1.npz: 'walk' holds for less than" in err
    assert [len(load_part(r.target, r.root)) for r in read_records(tmp_path / "r.jsonl") if r.target] == [2, 3]
    status, out, _ = run("data", "check", tmp_path / "r.jsonl")
    assert status == 0 and "movements: 2" in out


@pytest.mark.long
def test_ten_minutes(run: Run, model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", procedural(12_000, 1, swing=0.1))
    for suffix in (".bvh", ".glb", ".npz", ".npy"):
        (tmp_path / suffix).mkdir()
        words = ("data", "convert", tmp_path / "a.npy", "-o", tmp_path / suffix / f"x{suffix}")
        assert answered(run(*words), tmp_path / suffix) is None
        assert len(read_motion(tmp_path / suffix / f"x{suffix}", fps=20)) == 12_000
    (tmp_path / "in").mkdir()
    (tmp_path / "a.npy").rename(tmp_path / "in" / "a.npy")
    status, _, err = as_records(run, tmp_path / "in", tmp_path)
    assert status == 0 and "1 takes are longer than 9.8 s" in err
    lengths = [len(load_part(r.target, r.root)) for r in read_records(tmp_path / "r.jsonl") if r.target]
    assert sum(lengths) == 12_000 and max(lengths) <= 196
    edit = ("edit", tmp_path / "in" / "a.npy", "slower", "-o", tmp_path / "x.bvh", "--model", model)
    status, out, err = run(*edit)
    assert status == 2 and "tokens, the model reads 512" in err and not (tmp_path / "x.bvh").exists()


# ---------------------------------------------------------------- damaged


def damaged(path: Path, seed: int, count: int) -> Iterator[bytes]:
    """Versions of a file: cut, bytes replaced, removed, doubled."""
    data, rng = path.read_bytes(), np.random.default_rng(seed)
    yield from (data[:at] for at in cuts(len(data), count, seed))
    for _ in range(count):
        at, length = int(rng.integers(0, len(data))), int(rng.integers(1, 12))
        if rng.random() < 0.5:
            at = int(rng.integers(0, min(len(data), 1200)))
        piece = bytes(rng.choice(list(b"0987.-+eE{}nainf \n\xff\x00ROOTxJ"), length))
        yield data[:at] + piece + data[at + length :]
        yield data[:at] + data[at + length :]
        yield data[: at + length] + data[at:]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [*READS, ".amc"])
def test_damaged_files(run: Run, clip: Motion, tmp_path: Path, suffix: str) -> None:
    """Through convert, one by one, and as a folder of them through records, check and show."""
    path = tmp_path / f"a{suffix}"
    table: tuple[object, ...] = ()
    if suffix == ".amc":
        (tmp_path / "a.asf").write_text(ASF)
        path.write_text(AMC)
        (tmp_path / "t.json").write_text(json.dumps(dict.fromkeys(clip.layout.joints, "up")))
        table = ("--skeleton", tmp_path / "t.json", "--unit", "m", "--up", "y")
    else:
        write_motion(clip, path)
    (tmp_path / "in").mkdir()
    whole, refused = path.read_bytes(), 0
    for k, data in enumerate(damaged(path, 7, 6)):
        path.write_bytes(data)
        if suffix != ".amc":
            (tmp_path / "in" / f"{k}{suffix}").write_bytes(data)
        out = tmp_path / f"out{k}"
        out.mkdir()
        why = answered(run("data", "convert", path, "-o", out / "x.npz", *table), out)
        assert why is None or path.name in why or ".asf" in why, why
        refused += why is not None
    assert refused > 6
    path.write_bytes(whole)
    if suffix == ".amc":
        return
    (tmp_path / "in" / f"whole{suffix}").write_bytes(whole)
    status, _, err = as_records(run, tmp_path / "in", tmp_path / "set")
    assert status == 0 and err.count("left out: ") >= refused and "Traceback" not in err
    clean(tmp_path / "set")
    records = list(read_records(tmp_path / "set" / "r.jsonl"))
    assert any(r.meta["clip"] == "whole" for r in records)
    assert run("data", "check", tmp_path / "set" / "r.jsonl")[0] == 0
    assert run("data", "show", tmp_path / "set" / "r.jsonl")[0] == 0
    status, _, err = run("data", "convert", tmp_path / "in", "-o", tmp_path / "all", "--to", "bvh", "--pin-feet")
    assert status == 1 and "left out: " in err
    assert any(p.name == "whole.bvh" for p in clean(tmp_path / "all"))


def test_records_of_damaged_files_are_named(run: Run, clip: Motion, model: Path, tmp_path: Path) -> None:
    """A record whose movement broke later: check names it, a batch of edits stops with its name."""
    write_records(tmp_path / "r.jsonl", [make_record("walk", clip, id="a"), make_record("run", clip.mirror(), id="b")])
    (media, *_) = sorted((tmp_path / "media").iterdir())
    media.write_bytes(media.read_bytes()[:-200])
    status, out, _ = run("data", "check", tmp_path / "r.jsonl")
    assert status == 1 and media.name in out and "1 used, 1 skipped" in out
    words = ("edit", "--records", tmp_path / "r.jsonl", "-o", tmp_path / "o", "--format", "npz", "--model", model)
    status, _, err = run(*words)
    assert status == 2 and media.name in err and not clean(tmp_path / "o")
    is_json = run("data", "show", tmp_path / "r.jsonl")
    assert is_json[0] == 2 and media.name in is_json[2]


# ---------------------------------------------------------------- wrong in a way that has a name


def spoil(make: Callable[[np.ndarray], np.ndarray], clip: Motion, path: Path) -> Path:
    """The clip with other numbers: .bvh by its text, the others as arrays."""
    if path.suffix == ".bvh":
        write_motion(clip, path)
        lines = path.read_text().splitlines()
        first = next(k for k, line in enumerate(lines) if line.startswith("Frame Time")) + 1
        rows = make(np.array([line.split() for line in lines[first:]], dtype=float))
        path.write_text("\n".join([*lines[:first], *(" ".join(f"{v:g}" for v in row) for row in rows)]) + "\n")
    elif path.suffix == ".npz":
        np.savez(path, joints=make(clip.joints.astype(np.float64)), fps=20.0)
    else:
        np.save(path, make(clip.joints.astype(np.float64)))
    return path


@pytest.mark.parametrize("suffix", [".bvh", ".npz", ".npy"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_frames_that_are_no_numbers(
    run: Run, clip: Motion, model: Path, tmp_path: Path, suffix: str, value: float
) -> None:
    def one(rows: np.ndarray) -> np.ndarray:
        rows[4].flat[5] = value
        return rows

    path = spoil(one, clip, tmp_path / f"a{suffix}")
    found = commands(run, path, tmp_path / "out", model if value != value else None)
    for name, why in found.items():
        assert why is not None and "NaN or infinity" in why and " 4" in why and path.name in why, (name, why)


@pytest.mark.slow
def test_wrong_channel_orders(run: Run, clip: Motion, model: Path, tmp_path: Path) -> None:
    """Angles that belong to other channels make a wrong movement of a right body, or one line; nothing else."""
    rng = np.random.default_rng(3)

    def mixed(rows: np.ndarray) -> np.ndarray:
        return rows[:, rng.permutation(rows.shape[1])] * rng.choice([1, 30], rows.shape[1])

    for k in range(2):
        path = spoil(mixed, clip, tmp_path / f"{k}.bvh")
        found = commands(run, path, tmp_path / f"out{k}", model if k == 0 else None)
        assert all(why is None for why in found.values()), found
    path = tmp_path / "x.bvh"
    write_motion(clip, path)
    text = path.read_text()
    for wrong, why in (("CHANNELS 6 ", "channels"), ("Zrotation Yrotation Xrotation", "at most once")):
        path.write_text(
            text.replace(wrong, {"CHANNELS 6 ": "CHANNELS 5 "}.get(wrong, "Zrotation Zrotation Xrotation"), 1)
        )
        for name, said in commands(run, path, tmp_path / f"out-{why}", None).items():
            assert said is not None and "x.bvh" in said, name


def test_unknown_skeletons(run: Run, clip: Motion, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.bvh"
    write_motion(clip, path)
    path.write_text(path.read_text().replace("JOINT ", "JOINT bip_").replace("ROOT ", "ROOT bip_"))
    for name, why in commands(run, path, tmp_path / "out", model).items():
        assert why is not None and "unknown skeleton" in why and "bip_pelvis" in why, name
    np.save(tmp_path / "b.npy", np.zeros((9, 17, 3)))
    for name, why in commands(run, tmp_path / "b.npy", tmp_path / "out2", None).items():
        assert why is not None and "(9, 17, 3)" in why or "17" in str(why), name
