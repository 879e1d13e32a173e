"""One offline HTML page that plays clips in the browser: orbit, zoom, scrub, clips side by side or overlaid."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from weft.errors import WeftError
from weft.media import atomic_write
from weft.motion.clip import Motion
from weft.motion.figure import stature, table
from weft.motion.skeleton import KIT, LAYOUTS

MOST = 4  # clips of a scene: more would be too narrow side by side


@dataclass(slots=True)
class Scene:
    """What is seen at once: one to four clips with their names, under a title and a text such as an instruction."""

    clips: Sequence[Motion]
    names: Sequence[str] = ()
    title: str = ""
    text: str = field(default="")


def viewer_page(
    motions: Sequence[Motion] | Sequence[Scene], *, names: Sequence[str] = (), title: str = "Motion"
) -> str:
    """A complete HTML page without any outside resource: clips side by side, or several scenes to choose from.

    264 bytes a frame and clip; positions are kept to a tenth of a millimetre. `page.html#scene=2&time=1.5` opens
    there. Raises `WeftError` for nothing to show, more than four clips at once, or a clip that is 200 km away.
    """
    scenes = [m if isinstance(m, Scene) else None for m in motions]
    if None in scenes:
        clips = [m for m in motions if isinstance(m, Motion)]
        if len(clips) != len(motions):
            raise WeftError("clips and scenes mixed: put every clip into a scene")
        scenes = [Scene(clips, names)]
    if not scenes:
        raise WeftError("nothing to show: give a clip")
    shown = [_scene(scene, k) for k, scene in enumerate(scenes) if scene is not None]
    bodies = {name: table(layout) | {"joints": len(layout.joints)} for name, layout in LAYOUTS.items()}
    return (
        files("weft.motion")
        .joinpath("viewer.html")
        .read_text(encoding="utf-8")
        .replace("%TITLE%", html.escape(title))
        .replace("%CLIPS%", json.dumps({"bodies": bodies, "scenes": shown}).replace("<", "\\u003c"))
    )


def write_viewer(
    motions: Sequence[Motion] | Sequence[Scene],
    path: str | Path,
    *,
    names: Sequence[str] = (),
    title: str = "Motion",
) -> None:
    """Writes `viewer_page` to a file."""
    page = viewer_page(motions, names=names, title=title)
    with atomic_write(path) as handle:
        handle.write(page.encode())


def _scene(scene: Scene, number: int) -> dict[str, Any]:
    if not 1 <= len(scene.clips) <= MOST:
        raise WeftError(f"{len(scene.clips)} clips in one scene: show one to {MOST}")
    clips: list[dict[str, Any]] = []
    for k, motion in enumerate(scene.clips):
        joints = motion.joints.astype(np.float64) * (0.001 if motion.layout is KIT else 1.0)
        if np.abs(joints).max() > 200_000:
            raise WeftError(f"clip {k + 1} is {np.abs(joints).max():.0f} m from the origin: place() it first")
        clips.append(
            {
                "name": scene.names[k] if k < len(scene.names) else str(motion.meta.get("file", f"clip {k + 1}")),
                "fps": motion.fps,
                "frames": len(motion),
                "layout": motion.layout.name,
                "scale": round(stature(joints, motion.layout), 4),
                "joints": base64.b64encode(np.round(joints * 1e4).astype("<i4").tobytes()).decode(),
            }
        )
    return {"title": scene.title or f"{number + 1}", "text": scene.text, "clips": clips}
