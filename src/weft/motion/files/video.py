"""GIF and MP4 of a shaded figure."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from weft.errors import WeftError
from weft.media import atomic_write
from weft.motion.clip import Motion
from weft.motion.render import Camera, render_frames


def write_gif(
    motion: Motion | Sequence[Motion],
    path: str | Path,
    *,
    size: int | tuple[int, int] = 256,
    camera: Camera | None = None,
    fps: float = 20.0,
    follow: bool | None = None,
    metadata: dict[str, Any] | None = None,
) -> None:
    """An endless GIF, one palette for all frames; `metadata` is its comment.

    GIF counts in hundredths of a second: 20, 25 and 50 fps are exact.
    """
    clips = [motion] if isinstance(motion, Motion) else list(motion)
    count = max((len(c.resample(fps)) for c in clips), default=0)
    few = sorted({round(k) for k in np.linspace(0, max(count - 1, 0), 6)})
    look = render_frames(clips, size=size, camera=camera, fps=fps, follow=follow, frames=few)
    save_gif(render_frames(clips, size=size, camera=camera, fps=fps, follow=follow), path, list(look), fps, metadata)


def save_gif(
    frames: Iterable[Image.Image],
    path: str | Path,
    look: Sequence[Image.Image],
    fps: float,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Write pictures as an endless GIF with one palette, that of the few pictures in `look`."""
    sheet = Image.fromarray(np.concatenate([np.asarray(f) for f in look]))
    palette = sheet.quantize(192, method=Image.Quantize.MEDIANCUT)
    reduced = (f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames)
    with atomic_write(path) as handle:
        next(reduced).save(
            handle, format="GIF", save_all=True, append_images=reduced, loop=0, duration=round(1000 / fps),
            **({"comment": json.dumps(metadata).encode()} if metadata else {}),
        )  # fmt: skip


def write_mp4(
    motion: Motion | Sequence[Motion],
    path: str | Path,
    *,
    size: int | tuple[int, int] = 384,
    camera: Camera | None = None,
    fps: float = 20.0,
    follow: bool | None = None,
    metadata: dict[str, Any] | None = None,
) -> None:
    """H.264 in MP4 by ffmpeg (extra `motion`; IMAGEIO_FFMPEG_EXE names your own). Sizes must be even.

    `metadata` is its comment.
    """
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise WeftError("MP4 needs the extra 'motion' (pip install 'weft[motion]'); GIF does not") from error
    height, width = (size, size) if isinstance(size, int) else size
    if height % 2 or width % 2:
        raise WeftError(f"size {height}x{width}: H.264 needs even numbers")
    frames = render_frames(motion, size=size, camera=camera, fps=fps, follow=follow)
    with tempfile.TemporaryDirectory() as folder:
        made = os.path.join(folder, "clip.mp4")
        facts = ["-metadata", f"comment={json.dumps(metadata)}"] if metadata else []
        writer = imageio_ffmpeg.write_frames(
            made, (width, height), fps=fps, quality=7, macro_block_size=2, output_params=facts
        )
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        data = Path(made).read_bytes()
    with atomic_write(path) as handle:
        handle.write(data)
