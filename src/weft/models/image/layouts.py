"""Where reference pictures stand in rotary position space: published schemes as data.

Every picture token has an integer position (index, row, column); models with four rotary axes have a text position
behind it. A scheme says which index the k-th reference has and by how much its rows and columns are shifted:

    kontext     FLUX.1 Kontext (arXiv 2506.15742): index 1, no shift. Several references would coincide.
    dreamomni2  DreamOmni2 (arXiv 2510.06679, section 3.2; dvlab-research/DreamOmni2, pipeline_dreamomni2.py): index k,
                columns shifted by the widths of the references before it, from 0, whatever the output's size.
                With one reference it is `kontext`.
    diagonal    UNO (arXiv 2504.02160) and its successors UMO and USO: index 0, rows and columns shifted by the sizes
                of the output and of the references before it.
    flux2       FLUX.2 (diffusers, pipeline_flux2.py): index 10 k, no shift; text tokens count on the fourth axis.
    mosaic      ComfyUI's default for several Kontext references: index 1, each placed right of or below the block of
                the ones before it, whichever keeps the block squarer.

DreamOmni2's two facts matter together: its paper (table 5) reports success of .24 without either, .46 with the shift
alone, .34 with the index alone, .66 with both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from weft.errors import WeftError

Grid = tuple[int, int]  # (rows, columns) of tokens


@dataclass(frozen=True)
class ReferenceLayout:
    """A scheme: reference k (from 1) has the index `first + step (k - 1)`; see the module's head for `shift`."""

    first: int
    step: int
    shift: Literal["none", "width", "diagonal", "mosaic"]
    after_target: bool = False  # the shift starts behind the output instead of at 0
    text_axis: bool = False  # the fourth axis, if the model has one, counts text tokens


LAYOUTS = {
    "kontext": ReferenceLayout(1, 0, "none"),
    "dreamomni2": ReferenceLayout(1, 1, "width"),
    "diagonal": ReferenceLayout(0, 0, "diagonal", after_target=True),
    "flux2": ReferenceLayout(10, 10, "none", text_axis=True),
    "mosaic": ReferenceLayout(1, 0, "mosaic"),
}


def find_layout(name: str) -> ReferenceLayout:
    """The scheme of this name, or a WeftError with the known ones."""
    if name not in LAYOUTS:
        raise WeftError(f"reference layout {name!r} is unknown; choose one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


@lru_cache(maxsize=1024)
def picture_ids(
    layout: ReferenceLayout, target: Grid, references: tuple[Grid, ...], align: tuple[int, ...] = (), axes: int = 3
) -> Tensor:
    """Positions [N, axes] in fp32 of the output's tokens and then each reference's, row by row.

    `align` names for each reference the earlier one (from 1) whose index and shift it shares, 0 for none: a scribbled
    copy of the source stays aligned with it pixel by pixel, and later references are numbered as if it were not
    there (DreamOmni3, arXiv 2512.22525, section 3.2). Raises WeftError for an alignment with no earlier reference.
    """
    align = align or (0,) * len(references)
    if len(align) != len(references):
        raise WeftError(f"align_to has {len(align)} entries for {len(references)} input pictures; give one for each")
    places: list[tuple[int, int, int]] = []
    index, (down, right) = layout.first, target if layout.after_target else (0, 0)
    for k, ((rows, columns), twin) in enumerate(zip(references, align, strict=True), 1):
        if twin:
            if not 1 <= twin < k:
                raise WeftError(f"align_to: picture {k} cannot be aligned with picture {twin}; name an earlier one")
            places.append(places[twin - 1])
            continue
        place = {"none": (0, 0), "width": (0, right), "diagonal": (down, right)}.get(layout.shift)
        if place is None:  # mosaic: beside the block if that leaves it less wide than putting it below leaves it tall
            place = (0, right) if rows + down > columns + right else (down, 0)
            down, right = max(down, rows + place[0]), max(right, columns + place[1])
        else:
            down, right = down + rows, right + columns
        places.append((index, *place))
        index += layout.step
    grids = [grid_ids(target, (0, 0, 0), axes)]
    grids += [grid_ids(grid, place, axes) for grid, place in zip(references, places, strict=True)]
    return torch.cat(grids)


def grid_ids(grid: Grid, start: Sequence[int], axes: int = 3) -> Tensor:
    """Positions [rows * columns, axes] in fp32 of a grid of tokens from (index, row, column) `start`."""
    ids = torch.zeros(*grid, axes)
    ids[..., 0] = start[0]
    ids[..., 1] = torch.arange(start[1], start[1] + grid[0])[:, None]
    ids[..., 2] = torch.arange(start[2], start[2] + grid[1])
    return ids.reshape(-1, axes)


def text_ids(layout: ReferenceLayout, length: int, axes: int = 3) -> Tensor:
    """Positions [length, axes] in fp32 of the text tokens: zeros, or counted on the fourth axis."""
    ids = torch.zeros(length, axes)
    if layout.text_axis and axes > 3:
        ids[:, 3] = torch.arange(length)
    return ids
