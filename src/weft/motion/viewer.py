"""One offline HTML page that plays clips in the browser: orbit, zoom, scrub, two clips side by side or overlaid."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np

from weft.errors import WeftError
from weft.media import atomic_write
from weft.motion.clip import Motion
from weft.motion.skeleton import KIT


def viewer_page(motions: Sequence[Motion], *, names: Sequence[str] = (), title: str = "Motion") -> str:
    """A complete HTML page with one or two clips, without any outside resource; 264 bytes a frame and clip.

    Positions are kept to a tenth of a millimetre. Raises `WeftError` for no clip, more than two, or one that is
    200 km away.
    """
    return (
        files("weft.motion")
        .joinpath("viewer.html")
        .read_text(encoding="utf-8")
        .replace("%TITLE%", html.escape(title))
        .replace("%CLIPS%", json.dumps(_clips(motions, names)).replace("<", "\\u003c"))
    )


def write_viewer(
    motions: Sequence[Motion], path: str | Path, *, names: Sequence[str] = (), title: str = "Motion"
) -> None:
    """Writes `viewer_page` to a file."""
    page = viewer_page(motions, names=names, title=title)
    with atomic_write(path) as handle:
        handle.write(page.encode())


def _clips(motions: Sequence[Motion], names: Sequence[str]) -> list[dict[str, object]]:
    if not 1 <= len(motions) <= 2:
        raise WeftError(f"{len(motions)} clips: the page shows one or compares two")
    clips: list[dict[str, object]] = []
    for k, motion in enumerate(motions):
        joints = motion.joints.astype(np.float64) * (0.001 if motion.layout is KIT else 1.0)
        if np.abs(joints).max() > 200_000:
            raise WeftError(f"clip {k + 1} is {np.abs(joints).max():.0f} m from the origin: place() it first")
        clips.append(
            {
                "name": names[k] if k < len(names) else str(motion.meta.get("file", f"clip {k + 1}")),
                "fps": motion.fps,
                "frames": len(motion),
                "parents": list(motion.layout.parents),
                "sides": [n.split("_")[0] if "_" in n else "middle" for n in motion.layout.joints],
                "joints": base64.b64encode(np.round(joints * 1e4).astype("<i4").tobytes()).decode(),
            }
        )
    return clips
