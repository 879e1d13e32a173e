"""Motion files by suffix: one function reads, one writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import WeftError
from weft.motion.clip import Motion

if TYPE_CHECKING:
    from weft.motion.files.amass import Body
    from weft.motion.rig import Table
    from weft.parts import Part

READS = (".bvh", ".amc", ".npz", ".npy", ".glb")
WRITES = (".bvh", ".glb", ".npz", ".npy", ".gif", ".mp4")
DEFAULT_SIZE = {".gif": 256, ".mp4": 384}  # pixels


def read_motion(
    path: str | Path,
    *,
    fps: float | None = None,
    table: str | Table = "auto",
    bodies: dict[str, Body] | Body | None = None,
    unit: str | None = None,
    up: str | None = None,
) -> Motion:
    """The clip of a .bvh, .amc (its .asf beside it), .npy, .npz or .glb file on our 22 joints, y up, metres.

    `fps` resamples (that of the file by default); `table`, `unit` and `up` as `weft.motion.rig.to_motion`; `bodies`
    as `read_npz`. Raises `WeftError` for whatever is wrong with the file, by its name.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in READS:
        raise WeftError(f"{path}: unknown suffix '{path.suffix}' for a movement, use one of {', '.join(READS)}")
    if not path.is_file():
        raise WeftError(f"{path} does not exist: check the path")
    if suffix in (".npy", ".npz"):
        from weft.motion.files.arrays import read_npy, read_npz

        motion = read_npy(path) if suffix == ".npy" else read_npz(path, bodies=bodies)
        return motion if fps is None else motion.resample(fps)
    from weft.motion.files.acclaim import read_amc
    from weft.motion.files.bvh import read_bvh
    from weft.motion.files.glb import read_glb
    from weft.motion.rig import to_motion

    if suffix == ".glb":
        rig = read_glb(path, fps=fps or 20.0)
    else:
        rig = read_bvh(path) if suffix == ".bvh" else read_amc(path)
    try:
        return to_motion(rig, table, fps=fps, unit=unit, up=up)
    except WeftError as error:
        raise WeftError(f"{path}: {error}") from error


def write_motion(
    motion: Motion,
    path: str | Path,
    *,
    metadata: dict[str, Any] | None = None,
    exact: bool = False,
    size: int | tuple[int, int] | None = None,
    fps: float | None = None,
) -> None:
    """Writes .bvh, .glb, .npz, .npy, .gif or .mp4 by the suffix; the writers of a format have more options.

    `exact` gives BVH and GLB translations for bones that change length; `size` (pixels, an edge or (height, width))
    and `fps` are those of pictures. `metadata` (JSON) goes into the file; BVH and npy have no place for it, so it goes
    beside them as NAME.json. Raises `WeftError` for another suffix, or an option that does nothing for it.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in WRITES:
        raise WeftError(f"{path}: cannot write the suffix '{Path(path).suffix}', use one of {', '.join(WRITES)}")
    check_options(suffix, exact=exact, size=size, fps=fps)
    if suffix == ".bvh":
        from weft.motion.files.bvh import write_bvh

        write_bvh(motion, path, exact=exact)
    elif suffix == ".glb":
        from weft.motion.files.glb import write_glb

        write_glb(motion, path, exact=exact, metadata=metadata)
    elif suffix in (".npy", ".npz"):
        from weft.motion.files import arrays

        if suffix == ".npy":
            arrays.write_npy(motion, path)
        else:
            arrays.write_npz(motion, path, metadata=metadata)
    else:
        from weft.motion.files.video import write_gif, write_mp4

        write = write_gif if suffix == ".gif" else write_mp4
        write(motion, path, size=size or DEFAULT_SIZE[suffix], fps=fps or 20.0, metadata=metadata)
    if metadata and suffix in (".bvh", ".npy"):
        from weft.media import atomic_write

        with atomic_write(Path(path).with_suffix(".json")) as handle:
            handle.write(json.dumps(metadata, indent=1).encode() + b"\n")


def check_options(
    to: str, *, exact: bool = False, size: int | tuple[int, int] | None = None, fps: float | None = None
) -> None:
    """Raise `WeftError` for an option of `write_motion` that does nothing for the format `to` (a suffix)."""
    given = {"exact": exact, "size": size is not None, "fps": fps is not None}
    for name, is_given in given.items():
        if is_given and to not in ((".bvh", ".glb") if name == "exact" else (".gif", ".mp4")):
            raise WeftError(f"{name} does nothing for {to.removeprefix('.')}: leave it out")


def load_part(part: Part, root: Path | None = None, *, fps: float | None = 20.0) -> Motion:
    """The movement of a record's motion part, from its value in memory or its file below `root`.

    Raises `WeftError` for a part of another type.
    """
    if part.type != "motion":
        raise WeftError(f"a {part.type} part is not a movement: only motion parts can be loaded as one")
    if part.value is None:
        return read_motion(part.file(root), fps=fps)
    motion = part.value.load() if hasattr(part.value, "load") else part.value
    if not isinstance(motion, Motion):
        raise WeftError(f"a motion part holds a {type(motion).__name__}: give a weft.motion.Motion")
    return motion if fps is None else motion.resample(fps)
