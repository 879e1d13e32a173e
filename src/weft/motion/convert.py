"""Motion files to other formats, to folders of features, and to records: whatever can be read, one file or many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from weft.errors import WeftError
from weft.motion.captions import QUESTION, Captions
from weft.motion.clip import Motion
from weft.motion.feet import pin_feet
from weft.motion.files import READS, check_options, read_motion, write_motion
from weft.motion.files.arrays import write_array
from weft.motion.files.humanml3d import Caption
from weft.motion.recover import recover
from weft.motion.rig import TABLES, Table
from weft.motion.skeleton import HUMANML3D
from weft.motion.stats import dataset_stats
from weft.record import Record, Turn, motion_part, text_part
from weft.settings import read_yaml

if TYPE_CHECKING:
    from weft.motion.files.amass import Body

WINDOW = 9.8
"""Seconds: HumanML3D's longest clip, and the longest movement that models here make in one go (49 steps of 0.2 s)."""
FORMATS = ("bvh", "glb", "npz", "npy", "gif", "mp4", "features")


@dataclass(slots=True)
class Reading:
    """How files are read (`weft.motion.read_motion`) and what is done to every clip.

    `fps` resamples, `table` maps a foreign skeleton, `place` puts clips on the floor at the origin facing +z,
    `retarget` on the reference skeleton, `pin` holds feet in contact still (`weft.motion.feet.pin_feet`).
    """

    fps: float | None = None
    table: str | Table = "auto"
    unit: str | None = None
    up: str | None = None
    bodies: dict[str, Body] | Body | None = None
    place: bool = False
    retarget: bool = False
    pin: bool = False

    def read(self, path: Path) -> Motion:
        """The clip of a file. Raises `WeftError` by the file's name."""
        motion = read_motion(path, fps=self.fps, table=self.table, unit=self.unit, up=self.up, bodies=self.bodies)
        try:
            if self.retarget:
                motion = motion.retargeted()
            if self.place:
                motion = motion.placed()
            return pin_feet(motion) if self.pin else motion
        except WeftError as error:
            raise WeftError(f"{path}: {error}") from error


@dataclass(slots=True)
class Converted:
    """Files written, and by name what could not be read (`faults`) and what one should know (`notes`)."""

    written: list[Path] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, motion: Motion, file: Path) -> None:
        if "note" in motion.meta:
            self.notes.append(f"{file} {motion.meta['note']}")


def motion_files(source: str | Path) -> list[Path]:
    """The motion files of a path: itself, or those below a folder. Raises `WeftError` if there is none."""
    source = Path(source)
    if source.is_file():
        return [source]
    found = sorted(p for p in source.rglob("*") if p.suffix.lower() in READS and p.is_file())
    if not found:
        raise WeftError(f"{source}: no motion file ({', '.join(READS)}) there: check the path")
    return found


def read_table(text: str) -> str | Table:
    """A skeleton by name, or the table of a .json or .yaml file: our joint to theirs, or to [one, other, share].

    Raises `WeftError` for another name, or a file that is no such table.
    """
    if text == "auto" or text in TABLES:
        return text
    path = Path(text)
    if not path.is_file():
        raise WeftError(f"skeleton '{text}' is unknown: use auto, {', '.join(TABLES)}, or a .json file of your own")
    try:
        found = read_yaml(path)  # JSON is YAML
        return {str(ours): place if isinstance(place, str) else (str(place[0]), str(place[1]), float(place[2]))
                for ours, place in found.items()}  # fmt: skip
    except Exception as error:
        raise WeftError(
            f'{path}: no table ({error}): write {{"pelvis": "Hips", "neck": ["Chest", "Head", 0.5]}}'
        ) from error


def convert_files(
    source: str | Path,
    out: str | Path,
    to: str,
    reading: Reading,
    *,
    heading: str = "humanml3d",
    exact: bool = False,
    size: int | None = None,
) -> Converted:
    """Every motion file below `source` as `to` (`FORMATS`), in the same folders below `out`; one file to one file.

    "features" are [T-1, 263] as .npy with `heading`; `exact` gives BVH and GLB translations for bones that change
    length; `size` is the edge of pictures. Files that cannot be read are faults and do not stop the others.
    Raises `WeftError` for an unknown format, an option that does nothing there, or two files of one name.
    """
    source, out = Path(source), Path(out)
    if to not in FORMATS:
        raise WeftError(f"to: '{to}' is unknown, use one of {', '.join(FORMATS)}")
    check_options(f".{to}", exact=exact, size=size)
    fps = reading.fps if to in ("gif", "mp4") else None
    files = motion_files(source)
    suffix = ".npy" if to == "features" else f".{to}"
    single = source.is_file()
    places = [out if single else (out / f.relative_to(source)).with_suffix(suffix) for f in files]
    if len(set(places)) != len(places):
        twice = next(p for p in places if places.count(p) > 1)
        raise WeftError(f"two files would be written as {twice}: convert their folders one by one")
    done = Converted()
    for file, place in zip(files, places, strict=True):
        try:
            motion = reading.read(file)
            done.note(motion, file)
            if to == "features":
                write_array(_features(motion, heading, file), place)
            else:
                write_motion(motion, place, exact=exact, size=size, fps=fps)
            done.written.append(place)
        except WeftError as error:
            if single:
                raise
            done.faults.append(_named(error, file))
    return done


def feature_folder(
    source: str | Path,
    out: str | Path,
    reading: Reading,
    *,
    captions: Captions | None = None,
    heading: str = "humanml3d",
    mirror: bool = True,
) -> Converted:
    """Any motion files as a folder in HumanML3D's layout, which this and the public loaders read.

    new_joint_vecs/ID.npy (features), new_joints/ID.npy, Mean.npy, Std.npy, all.txt, and texts/ID.txt for clips with
    captions. The id is the file's path with "_" between folders; `mirror` adds M + id, captions mirrored. Captions
    keep their times and tokens; where they have none, every word is one with the tag OTHER: the public loaders need
    one, and the parts of speech are spaCy's.
    Raises `WeftError` if no clip could be made.
    """
    from weft.motion.clip import mirror_text

    source, out = Path(source), Path(out)
    texts = captions or Captions()
    done, names = Converted(), []
    for file in motion_files(source):
        plain = "_".join((file.relative_to(source) if source.is_dir() else Path(file.name)).with_suffix("").parts)
        try:
            motion = reading.read(file).resample(HUMANML3D.fps)
            done.note(motion, file)
            said, faults = texts.of(file)
            done.faults += [f"{file}: {fault}" for fault in faults]
            for name, clip in ((plain, motion), (f"M{plain}", motion.mirror()))[: 2 if mirror else 1]:
                features = _features(clip, heading, file)
                for folder, array in (("new_joint_vecs", features), ("new_joints", recover(features))):
                    write_array(array, out / folder / f"{name}.npy")
                if said:
                    (out / "texts").mkdir(parents=True, exist_ok=True)
                    lines = "".join(map(_line, said))
                    lines = lines if name == plain else mirror_text(lines)
                    (out / "texts" / f"{name}.txt").write_text(lines, encoding="utf-8")
                names.append(name)
                done.written.append(out / "new_joint_vecs" / f"{name}.npy")
        except WeftError as error:
            done.faults.append(_named(error, file))
    if not names:
        raise WeftError(f"{source}: no clip could be made; the first: {done.faults[0]}")
    stats = dataset_stats(np.load(path, allow_pickle=False) for path in done.written)
    write_array(stats.mean, out / "Mean.npy")
    write_array(stats.std, out / "Std.npy")
    (out / "all.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return done


def _line(caption: Caption) -> str:
    plain = caption.text.replace("#", " ")
    words = "".join(c if c.isalpha() else " " for c in plain.lower()).split() or ["unk"]
    tokens = caption.tokens or [(word, "OTHER") for word in words]
    times = caption.start or 0.0, caption.stop or 0.0
    return f"{plain}#{' '.join(f'{word}/{tag}' for word, tag in tokens)}#{times[0]}#{times[1]}\n"


def _features(motion: Motion, heading: str, file: Path) -> np.ndarray:
    try:
        return motion.features(heading=heading)
    except WeftError as error:
        raise WeftError(f"{file}: {error}") from error


def motion_records(
    source: str | Path,
    reading: Reading,
    done: Converted,
    *,
    captions: Captions | None = None,
    tasks: Sequence[str] = ("generate",),
    window: float | None = WINDOW,
    hop: float | None = None,
    least: float = 1.0,
) -> Iterator[Record]:
    """Records of motion files with captions, one per task, caption and window; the clips are in memory.

    `tasks`: "generate" (the caption, then the clip) and "describe" (the clip and a question, then the caption).
    Clips longer than `window` seconds (None: any length) are cut into equal pieces that are not, or into pieces of
    that length every `hop` seconds: models make movements of a limited length in one go. The caption of a long take
    stands at each of its pieces, though it may hold for some only; a caption with times has its own piece.
    `meta["clip"]` names the take. Pieces shorter than `least` seconds, files that cannot be read, and those
    without a caption are left out: they are faults of `done`; what was cut is in its notes. Raises `WeftError` for an
    unknown task.
    """
    if unknown := [task for task in tasks if task not in TASKS]:
        raise WeftError(f"tasks: '{unknown[0]}' is unknown, use {' and '.join(TASKS)}")
    texts = captions or Captions()
    root, cut = Path(source), 0
    for file in motion_files(root):
        name = "_".join((file.relative_to(root) if root.is_dir() else Path(file.name)).with_suffix("").parts)
        try:
            motion = reading.read(file)
            said, wrong = texts.of(file)
        except WeftError as error:
            done.faults.append(_named(error, file))
            continue
        done.note(motion, file)
        done.faults += [f"{file}: {line}" for line in wrong]
        if not said:
            done.faults.append(f"{file}: no caption: give captions=FOLDER or FILE.csv, or a .txt beside it")
        for k, caption in enumerate(said):
            span = (
                0 if caption.start is None else int(caption.start * motion.fps),
                len(motion) if caption.stop is None else min(int(caption.stop * motion.fps), len(motion)),
            )
            pieces = [p for p in _pieces(*span, motion.fps, window, hop) if p[1] - p[0] >= max(2, least * motion.fps)]
            cut += len(pieces) > 1
            if not pieces:
                done.faults.append(f"{file}: '{caption.text[:40]}' holds for less than {least:g} s")
            for start, stop in pieces:
                clip = replace(motion.crop(start, stop), meta={"file": file.name, "frames": [start, stop]})
                meta = {"clip": name, "caption": caption.text, "frames": [start, stop], "fps": clip.fps}
                for task in tasks:
                    yield Record(f"{name}-{k}-{start}-{task}", task, TASKS[task](clip, caption.text), dict(meta))
    if cut:
        done.notes.append(f"{cut} takes are longer than {window:g} s: cut, their caption stands at every piece")


def _generate(clip: Motion, caption: str) -> list[Turn]:
    return [Turn("user", [text_part(caption)]), Turn("assistant", [motion_part(clip)])]


def _describe(clip: Motion, caption: str) -> list[Turn]:
    return [
        Turn("user", [motion_part(clip, "source"), text_part(QUESTION)]),
        Turn("assistant", [text_part(caption)]),
    ]


TASKS: dict[str, Callable[[Motion, str], list[Turn]]] = {"generate": _generate, "describe": _describe}


def _pieces(start: int, stop: int, fps: float, window: float | None, hop: float | None) -> list[tuple[int, int]]:
    """Frames (first, last + 1) of the pieces of a span; nothing of it is lost unless `hop` leaves gaps."""
    size = stop - start if window is None else max(2, round(window * fps))
    if stop - start <= size:
        return [(start, stop)]
    if hop is None:
        edges = np.linspace(start, stop, math.ceil((stop - start) / size) + 1).round().astype(int).tolist()
        return list(zip(edges[:-1], edges[1:], strict=True))
    firsts = list(range(start, stop - size + 1, max(1, round(hop * fps))))
    return [(first, first + size) for first in firsts] + ([(stop - size, stop)] if firsts[-1] + size < stop else [])


def _named(error: WeftError, file: Path) -> str:
    return str(error) if str(file) in str(error) else f"{file}: {error}"
