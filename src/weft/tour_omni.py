"""The tour's stage on reference pictures, which runs where tiny-omni ships: what it does, and its part of the page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import weft
from weft.media import save_image

if TYPE_CHECKING:
    from collections.abc import Callable

    from weft.api import Model
    from weft.report.page import Page
    from weft.tour import Findings

STAGE = "refer: what other pictures show"
ASKED = (("multi_edit", 1), ("multi_edit", 2), ("multi_edit", 3), ("multi_generate", 2), ("multi_generate", 3))
"""Task and number of references of each request."""


def refer(model: Model, found: Findings, folder: Path, seed: int, say: Callable[[str], None]) -> None:
    """One edit or picture for each of several requests about other pictures, by the model that is there for them; the
    tour's own `model` is not asked."""
    from weft.cli.shipped import picture_model
    from weft.world import records
    from weft.world.oracle import judge

    omni = weft.load(picture_model(references=True))
    requests = [
        records("test", count=1, seed=400 + seed + k, tasks=[task], references=[count])[0]
        for k, (task, count) in enumerate(ASKED)
    ]
    outputs = omni.run(requests, seeds=[seed] * len(requests))
    for k, (record, output) in enumerate(zip(requests, outputs, strict=True), 1):
        output.save(folder / "pictures" / f"refer-{k}.png")
        for j, part in enumerate(record.inputs, 1):
            save_image(record.load(part), folder / "pictures" / f"refer-{k}-source-{j}.png")
        found.referred.append((record, output, judge(record, output.image)))
        say(f'"{record.instruction}"')


def referred_section(page: Page, found: Findings, number: int) -> None:
    """What the stage left, with every input picture."""
    from weft.report.page import Comparison

    section = page.section(f"{number}. Refer to pictures")
    section.text(
        "Requests that point at other pictures, from the test split: a thing, or the colour, pattern, shape, style, "
        "light or tone of one. Another model does this, with FLUX's blocks and an adapter for each of the two tasks; "
        "it is chosen by itself as soon as a request has references."
    )
    cards = []
    for record, output, verdict in found.referred:
        pictures: list[tuple[str, Any]] = [
            (f"picture {k}", record.load(part)) for k, part in enumerate(record.inputs, 1)
        ]
        pictures.append(("output", output.image))
        if record.target is not None:
            pictures.append(("exact target" if record.source else "a right picture", record.load(record.target)))
        cards.append(Comparison(record.instruction, pictures, verdict.success, verdict.requests))
    section.comparisons(cards)
