"""HumanML3D folders: captions, splits, records; and building the dataset from AMASS as its notebooks do."""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from weft.errors import WeftError
from weft.motion.clip import Motion, mirror, mirror_text
from weft.motion.features import extract
from weft.motion.files.amass import Body, amass_joints
from weft.motion.files.arrays import load_array, read_npy
from weft.motion.recover import recover
from weft.motion.skeleton import HUMANML3D, layout_of
from weft.motion.stats import DatasetStats, dataset_stats
from weft.record import Record, Turn, file_digest, motion_part, text_part

# Seconds that the second notebook cuts from the start of some sources before the frames of the index count.
_TRIMS = {
    "Eyes_Japan_Dataset": 3.0,
    "MPI_HDM05": 3.0,
    "TotalCapture": 1.0,
    "MPI_Limits": 1.0,
    "Transitions_mocap": 0.5,
}


@dataclass(slots=True)
class Caption:
    """A line of a text file: `tokens` are (word, part of speech); `start`, `stop` in seconds, None for the clip."""

    text: str
    tokens: list[tuple[str, str]] = field(default_factory=list)
    start: float | None = None
    stop: float | None = None


def read_captions(path: str | Path) -> tuple[list[Caption], list[str]]:
    """The captions of a `caption#tok/POS ...#from#to` file, and its faults by line.

    A line that only has a caption is one for the whole clip. What the public loader drops in silence (a '#' inside
    a caption, a missing field, no tokens) is read as far as it goes and reported.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WeftError(f"{path} cannot be read ({error}): check the path, save it as UTF-8") from error
    captions, faults = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        if line.count("#") == 0:
            captions.append(Caption(line.strip()))
            continue
        pieces = line.strip().rsplit("#", 3)
        if len(pieces) < 4:
            faults.append(f"{where}: {len(pieces)} fields, expected caption#tokens#from#to: taken as a plain caption")
            captions.append(Caption(pieces[0].strip()))
            continue
        text, words, start, stop = pieces
        if "#" in text:
            faults.append(f"{where}: '#' inside the caption: read as part of it")
        tokens = [(w.rpartition("/")[0], w.rpartition("/")[2]) for w in words.split() if "/" in w]
        if not tokens:
            faults.append(f"{where}: no tokens")
        try:
            times = [float(start), float(stop)]
        except ValueError:
            faults.append(f"{where}: times '{start}' and '{stop}' are no numbers: taken as the whole clip")
            times = [0.0, 0.0]
        times = [0.0 if math.isnan(t) else t for t in times]  # as the public loader does
        whole = not any(times)
        if not whole and not 0 <= times[0] < times[1] < math.inf:
            faults.append(f"{where}: from {times[0]} to {times[1]} s is no piece: taken as the whole clip")
            whole = True
        captions.append(Caption(text.strip(), tokens, *((None, None) if whole else times)))
    return captions, faults


def read_split(path: str | Path) -> list[str]:
    """Clip ids of a split file, one a line."""
    try:
        return [s for line in Path(path).read_text().splitlines() if (s := line.strip())]
    except OSError as error:
        raise WeftError(f"{path} cannot be read ({error.strerror}): check the path") from error


@dataclass(frozen=True, slots=True)
class Piece:
    """Frames `start` to `stop` (not included) of a clip's file, read when they are needed: a medium of a record."""

    file: Path
    start: int
    stop: int

    def load(self) -> Motion:
        """The piece. Raises `WeftError` by the file's name."""
        return read_npy(self.file).crop(self.start, self.stop)

    def save(self, path: str | Path) -> None:
        """Writes it as a file of its own; see `Motion.save`."""
        self.load().save(path)

    @property
    def digest(self) -> str:
        """SHA-256 of the file's content and the cut."""
        return hashlib.sha256(f"{file_digest(self.file)} {self.start} {self.stop}".encode()).hexdigest()


def records(
    folder: str | Path, split: str = "train", *, least: int = 40, most: int = 199, limit: int | None = None
) -> list[Record]:
    """Text-to-motion records of a HumanML3D or KIT folder: one per caption of a clip, motion by its path.

    Reads `<split>.txt`, `texts/ID.txt` and `new_joint_vecs/ID.npy`. Clips and pieces outside `least` to `most` frames
    are left out as the public loader does (KIT: least 24). A caption with times goes with that piece of the clip
    (`Piece`, its frames in `meta["frames"]`), cut at 20 frames a second as there. Faults of text files stand in
    `meta["faults"]` of the clip's records. Raises `WeftError` if nothing is left, and says why.
    """
    folder = Path(folder)
    made: list[Record] = []
    skipped = {"no features": 0, "no texts": 0, "length": 0}
    for name in read_split(folder / f"{split}.txt"):
        clip, texts = folder / "new_joint_vecs" / f"{name}.npy", folder / "texts" / f"{name}.txt"
        if not clip.is_file() or not texts.is_file():
            skipped["no features" if not clip.is_file() else "no texts"] += 1
            continue
        frames = _frames_of(clip)
        captions, faults = read_captions(texts)
        for k, caption in enumerate(captions):
            meta: dict[str, Any] = {"clip": name, "caption": caption.text, "tokens": [list(t) for t in caption.tokens]}
            span, moved = frames, motion_part(f"new_joint_vecs/{name}.npy")
            if caption.start is not None and caption.stop is not None:
                first, last = int(caption.start * 20), min(int(caption.stop * 20), frames)
                meta["frames"], span = [first, last], last - first
                moved = motion_part(Piece(clip, first, last))
            if not (least <= frames <= most and least <= span <= most):
                skipped["length"] += 1
                continue
            if faults:
                meta["faults"] = faults
            turns = [Turn("user", [text_part(caption.text)]), Turn("assistant", [moved])]
            made.append(Record(f"{name}-{k}", "generate", turns, meta, root=folder))
        if limit is not None and len(made) >= limit:
            break
    if not made:
        raise WeftError(f"{folder}: no records for {split}: " + ", ".join(f"{v} {k}" for k, v in skipped.items()))
    return made[:limit]


def _frames_of(path: Path) -> int:
    """Frames of a feature file, without reading it whole. Raises `WeftError` for another width."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # as in load_array
        raise WeftError(f"{path} is damaged or truncated ({error}): make it again") from error
    layout_of(array.shape[-1])
    return int(array.shape[0])


def build(
    amass: str | Path,
    index: str | Path,
    out: str | Path,
    bodies: dict[str, Body] | Body,
    *,
    texts: str | Path | None = None,
    lengths: Sequence[float] | np.ndarray | None = None,
    heading: str = "humanml3d",
) -> dict[str, Any]:
    """Builds HumanML3D from AMASS: joints, clips and their mirrors, features, recovered joints, Mean and Std.

    `amass` holds the datasets as AMASS unpacks them, `index` is the dataset's index.csv (source_path, start_frame,
    end_frame, new_name), `bodies` SMPL-H models by gender, `texts` a folder of captions to copy and mirror.
    Returns counts and the reasons of what was left out. Raises `WeftError` if no clip could be made.
    """
    amass, out = Path(amass), Path(out)
    done, left = 0, []
    names: list[str] = []
    for row in _index(index):
        source = Path(*Path(row["source_path"]).parts[1:]) if row["source_path"].startswith("./") else None
        source = source or Path(row["source_path"])
        parts = source.parts[1:] if source.parts[:1] == ("pose_data",) else source.parts
        path = amass.joinpath(*parts)
        try:
            clip = _clip(path, row, bodies)
            for prefix, joints in (("", clip), ("M", mirror(clip))):
                name = f"{prefix}{Path(row['new_name']).stem}"
                features = extract(joints.astype(np.float32), lengths=lengths, heading=heading)
                for folder, array in (("new_joint_vecs", features), ("new_joints", recover(features))):
                    (out / folder).mkdir(parents=True, exist_ok=True)
                    np.save(out / folder / f"{name}.npy", array, allow_pickle=False)
                names.append(name)
            done += 1
        except WeftError as error:
            left.append(f"{row['new_name']}: {error}")
    if not done:
        raise WeftError(f"no clip of {index} could be made; the first: {left[0] if left else 'the index is empty'}")
    stats: DatasetStats = dataset_stats(load_array(out / "new_joint_vecs" / f"{n}.npy") for n in names)
    np.save(out / "Mean.npy", stats.mean)
    np.save(out / "Std.npy", stats.std)
    copied = 0 if texts is None else _copy_texts(Path(texts), out / "texts", names)
    return {"clips": done, "with mirrors": len(names), "texts": copied, "left out": left}


def _index(path: str | Path) -> Iterator[dict[str, str]]:
    try:
        with open(path, newline="", encoding="utf-8") as handle:
            rows = list(csv.DictReader(handle))
    except OSError as error:
        raise WeftError(f"{path} cannot be read ({error.strerror}): check the path") from error
    missing = {"source_path", "start_frame", "end_frame", "new_name"} - set(rows[0] if rows else ())
    if missing:
        raise WeftError(f"{path}: no column {', '.join(sorted(missing))}: expected HumanML3D's index.csv")
    yield from rows


def _clip(path: Path, row: dict[str, str], bodies: dict[str, Body] | Body) -> np.ndarray:
    """Joints [T, 22, 3] of one row of the index, before any feature rule."""
    start, stop = int(row["start_frame"]), int(row["end_frame"])
    if path.suffix == ".npy" and path.is_file():  # already joints, as humanact12's and the first notebook's are
        joints = load_array(path)
    else:
        source = path.with_suffix(".npz")
        data = load_array(source)
        joints, _ = amass_joints(
            {k: data[k] for k in data.files if k in ("poses", "trans", "betas", "gender", "mocap_framerate")},
            bodies,
            raw=True,
            stride_fps=20,
        )
    if "humanact12" not in row["source_path"]:
        for name, seconds in _TRIMS.items():
            if name in row["source_path"]:
                joints = joints[int(seconds * 20) :]
        joints = joints[start:stop] * np.array([-1.0, 1.0, 1.0])
    return np.asarray(joints)[:, : len(HUMANML3D.joints)]


def _copy_texts(source: Path, out: Path, names: list[str]) -> int:
    """Captions beside the clips; those of mirrored clips are mirrored unless the folder has its own."""
    out.mkdir(parents=True, exist_ok=True)
    copied = 0
    for name in names:
        own, plain = source / f"{name}.txt", source / f"{name[1:]}.txt"
        if own.is_file():
            text = own.read_text(encoding="utf-8")
        elif name.startswith("M") and plain.is_file():
            text = mirror_text(plain.read_text(encoding="utf-8"))
        else:
            continue
        (out / f"{name}.txt").write_text(text, encoding="utf-8")
        copied += 1
    return copied
