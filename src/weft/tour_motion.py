"""The tour's stage on movement, which runs where tiny-motion ships: what it does, and its part of the page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import weft
from weft.record import Record, instruction_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL import Image

    from weft.api import Model
    from weft.api_motion import MotionOutput
    from weft.report.page import Page
    from weft.tour import Findings
    from weft.world.motion_oracle import Verdict

STAGE = "move: human motion from sentences and movements"
ASKED = (("generate", 4), ("edit", 2), ("in_context", 1), ("describe", 1))
"""Task and number of requests."""
SIZE, FPS = 144, 10.0  # of the animated pictures


@dataclass(slots=True)
class Moved:
    """One request about movements, the answer, and what the oracle says of it."""

    record: Record
    output: MotionOutput
    verdict: Verdict
    files: list[tuple[str, Path]]  # animated pictures by what they show


def move(model: Model, found: Findings, folder: Path, seed: int, say: Callable[[str], None]) -> None:
    """Movements of sentences, edited ones, one of two examples, and a sentence about a movement, by the motion model;
    the tour's own `model` is not asked."""
    from weft.evals.motion_page import given_clips
    from weft.evals.motion_verdicts import verdicts
    from weft.motion import write_motion
    from weft.motion.files import load_part
    from weft.world import motions

    mover = weft.load_motion()
    requests = [
        record
        for task, count in ASKED
        for record in motions.records("test", count=count, seed=500 + seed, tasks=[task])
    ]
    outputs = mover.run(requests, seeds=[seed] * len(requests))
    for k, (record, output) in enumerate(zip(requests, outputs, strict=True), 1):
        given = [(name, load_part(part)) for name, part in given_clips(record)]
        shown = list(given)
        if output.motion is not None:
            output.save(folder / "movements" / f"{k}.bvh")
            shown.append(("output", output.motion))
        if record.target is not None and record.target.type == "motion":
            shown.append(("exact target" if given else "a right movement", load_part(record.target)))
        files = []
        for name, clip in shown:
            path = folder / "movements" / f"{k}-{name.replace(' ', '-')}.gif"
            write_motion(clip, path, size=SIZE, fps=FPS)
            files.append((name, path))
        moved = Moved(record, output, verdicts(record, [output.parts])[-1], files)
        found.moved.append(moved)
        said = f' -> "{output.text}"' if output.text else ""
        say(f'"{instruction_text(record.request)}"{said}')
    overview(found.moved, folder / "movements" / "overview.gif")


def overview(moved: Sequence[Moved], path: Path) -> None:
    """One animated sheet: movements of sentences, and below them edits with their sources."""
    from PIL import Image

    from weft.motion.files.video import save_gif
    from weft.report.sheet import contact_sheet

    made, edited = ([m for m in moved if m.record.task == task and m.output.motion] for task in ("generate", "edit"))
    strips: list[tuple[list[list[Image.Image]], list[str], list[Moved]]] = []
    for members, names in ((made, ["output"]), (edited, ["source", "output"])):
        if members:
            clips = [_pictures(dict(m.files)[name]) for m in members for name in names]
            strips.append((clips, names * len(members), members))
    count = max(len(clip) for clips, _, _ in strips for clip in clips)

    def sheet(t: int) -> Image.Image:
        parts = [
            contact_sheet(
                [[clip[min(t, len(clip) - 1)] for clip in clips]],
                columns=names,
                captions=["     |     ".join(f"\u201c{m.record.instruction}\u201d" for m in members)],
                scale=1,
            )
            for clips, names, members in strips
        ]
        whole = Image.new("RGB", (max(p.width for p in parts), sum(p.height for p in parts)), "white")
        for k, part in enumerate(parts):
            whole.paste(part, (0, sum(p.height for p in parts[:k])))
        return whole

    save_gif((sheet(t) for t in range(count)), path, [sheet(count // 2)], FPS)


def _pictures(path: Path) -> list[Image.Image]:
    from PIL import Image, ImageSequence

    with Image.open(path) as animation:
        return [frame.convert("RGB") for frame in ImageSequence.Iterator(animation)]


def moved_section(page: Page, found: Findings, number: int) -> None:
    """What the stage left, as animated pictures."""
    from PIL import Image

    from weft.report.page import Comparison

    section = page.section(f"{number}. Move")
    first = found.moved[0]
    section.code(f'weft generate "{first.record.instruction}" --seed {first.output.seed} -o walk.bvh')
    section.text(
        "Requests from the test split of the embedded motion world, to another tiny model: a language model over words "
        "and motion tokens. Movements are made of sentences, changed by sentences, made after the example of others, "
        "and put into words. A program measures the joints and says which attributes are as asked. movements/ beside "
        "this page has the files, for Blender and others."
    )
    cards = []
    for moved in found.moved:
        pictures: list[tuple[str, Any]] = [(name, Image.open(path)) for name, path in moved.files]
        asked = instruction_text(moved.record.request)
        caption = f"{asked} — \u201c{moved.output.text}\u201d" if moved.output.text else asked
        cards.append(Comparison(caption, pictures, moved.verdict.success, moved.verdict.requests))
    section.comparisons(cards)
