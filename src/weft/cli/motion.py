"""The part of `weft data convert` that turns motion files into other formats and folders of features."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from weft.cli.options import QUIET, check_folder, refuse
from weft.errors import WeftError

if TYPE_CHECKING:
    from weft.motion.convert import Converted, Reading
    from weft.motion.files.amass import Body

Number = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
Place = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
FORMATS = Literal["bvh", "glb", "npz", "npy", "gif", "mp4", "features", "humanml3d"]


@dataclass(kw_only=True)
class MotionFiles:
    """Motion files (.bvh, .amc with its .asf, .npz, .npy, .glb), one or a folder of them."""

    to: Annotated[FORMATS | None, QUIET] = None
    """What they become; features: [T-1, 263] as .npy; humanml3d: a folder in that dataset's layout; default: by the
    suffix of -o."""
    fps: Number = None
    """Resample to this rate; default: the file's own (features: 20)."""
    skeleton: str = "auto"
    """The file's skeleton: acclaim, cmu, humanml3d, iclone, mixamo, or a .json of your own: our joint to theirs."""
    unit: Annotated[Literal["m", "cm", "mm", "inch"] | None, QUIET] = None
    """The file's unit of length; default: the one in which the body is of human height."""
    up: Annotated[Literal["y", "z"] | None, QUIET] = None
    """The file's vertical axis; default: the one along which the head is above the feet."""
    heading: Literal["humanml3d", "correct"] = "humanml3d"
    """The heading of features: the dataset's own rule, or the correct one (see docs/motion.md)."""
    place: bool = False
    """On the floor, from the origin, facing +z."""
    retarget: bool = False
    """On the reference skeleton of HumanML3D (features always are)."""
    pin_feet: bool = False
    """Hold feet that touch the ground still."""
    exact: bool = False
    """BVH, GLB: translations too, for clips whose bones change length."""
    size: Annotated[int | None, tyro.conf.arg(metavar="PIXELS", help_behavior_hint="")] = None
    """GIF, MP4: the edge of the picture; default: 256, MP4 384."""
    captions: Place = None
    """humanml3d: a folder of texts or a .csv; default: .txt files beside the motion files."""
    no_mirror: bool = False
    """humanml3d: no mirrored copy of every clip."""
    bodies: Place = None
    """AMASS: an SMPL-H model.npz, or the folder with male/model.npz and female/model.npz."""
    index: Place = None
    """humanml3d from AMASS: the dataset's index.csv, which names the clips."""

    def run(self, source: Path, out: Path) -> int:
        """Convert `source` to `out`, print what was written; 1 if some files could not be read."""
        to = self._format(source, out)
        reading = self._reading()
        if to == "humanml3d":
            refuse(self, (*_COMMON, "heading", "captions", "no_mirror", "index"), "for --to humanml3d")
            check_folder(out)
            if self.index is not None:
                return self._build(source, out, reading)
            from weft.motion.captions import Captions
            from weft.motion.convert import feature_folder

            captions = Captions(self.captions)
            done = feature_folder(
                source, out, reading, captions=captions, heading=self.heading, mirror=not self.no_mirror
            )
            return _report(done, out)
        allowed = (*_COMMON, "exact", "size", *(("heading",) if to == "features" else ()))
        refuse(self, allowed, f"for --to {to}")
        check_folder(out.parent if out.suffix else out)
        from weft.motion.convert import convert_files

        done = convert_files(source, out, to, reading, heading=self.heading, exact=self.exact, size=self.size)
        return _report(done, out)

    def _format(self, source: Path, out: Path) -> str:
        suffix = out.suffix.lower().removeprefix(".")
        if source.is_dir() or not suffix:
            if suffix or self.to is None:
                raise WeftError(f"{source}: name a folder with -o and the format with --to (bvh, glb, features ...)")
            if source.is_file() and self.to != "humanml3d":
                raise WeftError(f"{out}: one file becomes one file; give -o a suffix")
            return self.to
        if self.to == "humanml3d":
            raise WeftError(f"--to humanml3d writes a folder; -o {out} has a suffix")
        if self.to == "features" and suffix != "npy":
            raise WeftError(f"features are written as .npy; -o {out} is not")
        if self.to not in (None, "features", suffix):
            raise WeftError(f"--to {self.to} and -o {out} contradict each other; leave --to out")
        return self.to or suffix

    def _reading(self) -> Reading:
        from weft.motion.convert import Reading, read_table

        return Reading(
            self.fps, read_table(self.skeleton), self.unit, self.up,
            None if self.bodies is None else _bodies(self.bodies), self.place, self.retarget, self.pin_feet,
        )  # fmt: skip

    def _build(self, source: Path, out: Path, reading: Reading) -> int:
        from weft.motion.files.humanml3d import build

        refuse(self, ("to", "heading", "captions", "bodies", "index"), "when HumanML3D is built from AMASS")
        if reading.bodies is None:
            raise WeftError("AMASS holds poses, not joints; give the SMPL-H models with --bodies")
        assert self.index is not None
        made = build(source, self.index, out, reading.bodies, texts=self.captions, heading=self.heading)
        for line in made["left out"]:
            print(f"left out: {line}", file=sys.stderr)
        print(out)
        counts = f"{made['clips']} clips, {made['with mirrors']} with mirrors, {made['texts']} texts"
        print(f"{counts}, {len(made['left out'])} left out", file=sys.stderr)
        return 1 if made["left out"] else 0


_COMMON = ("to", "fps", "skeleton", "unit", "up", "place", "retarget", "pin_feet", "bodies")


def _bodies(path: Path) -> dict[str, Body] | Body:
    from weft.motion.files.amass import read_body

    if path.is_file():
        return read_body(path)
    found = {name: path / name / "model.npz" for name in ("male", "female", "neutral")}
    found = {name: file for name, file in found.items() if file.is_file()}
    if not found:
        raise WeftError(f"{path}: no male/model.npz, female/model.npz or neutral/model.npz there")
    return {name: read_body(file) for name, file in found.items()}


def _report(done: Converted, out: Path) -> int:
    for line in done.notes:
        print(f"note: {line}", file=sys.stderr)
    for fault in done.faults:
        print(f"left out: {fault}", file=sys.stderr)
    if not done.written:
        raise WeftError(f"nothing was written to {out}; {len(done.faults)} files could not be read")
    print(out)
    print(f"{len(done.written)} files, {len(done.faults)} faults", file=sys.stderr)
    return 1 if done.faults else 0
