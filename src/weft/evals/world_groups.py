"""The groups of the world benchmark and their records."""

from __future__ import annotations

from typing import Any

from weft.evals.benchmark import Groups
from weft.world import records as world_records
from weft.world.edits import HELD_OUT_KIND, KINDS
from weft.world.references import CONCEPTS

MULTI = ("multi_edit", "multi_generate")
EDIT_KINDS = tuple(kind for kind in KINDS if kind != HELD_OUT_KIND)

# What each group asks of `weft.world.records`. Groups of a concept have one reference, which gives just that. The order
# is fixed (see `Groups`).
GROUPS: dict[str, dict[str, Any]] = {
    "generate": {"tasks": ["generate"]},
    **{f"edit/{kind}": {"tasks": ["edit"], "kinds": [kind]} for kind in EDIT_KINDS},
    "generate/unseen phrasing": {"tasks": ["generate"], "phrasing": "unseen"},
    "edit/unseen phrasing": {"tasks": ["edit"], "kinds": list(EDIT_KINDS), "phrasing": "unseen"},
    "generate/held-out pair": {"tasks": ["generate"], "combo": "held_out"},
    "edit/held-out pair": {"tasks": ["edit"], "kinds": list(EDIT_KINDS), "combo": "held_out"},
    f"edit/{HELD_OUT_KIND} (held out)": {"tasks": ["edit"], "kinds": [HELD_OUT_KIND]},
    "multi_edit": {"tasks": ["multi_edit"]},
    "multi_generate": {"tasks": ["multi_generate"]},
    **{
        f"{task}/{count} reference{'s' * (count > 1)}": {"tasks": [task], "references": [count]}
        for task in MULTI
        for count in (1, 2, 3, 4)
    },
    **{
        f"{task}/{concept}": {"tasks": [task], "references": [1], "concepts": [concept]}
        for task in MULTI
        for concept in CONCEPTS
    },
}
SHORT: dict[str, list[str]] = {
    "edit": [f"edit/{kind}" for kind in EDIT_KINDS],
    "unseen": ["generate/unseen phrasing", "edit/unseen phrasing"],
    "held-out pair": ["generate/held-out pair", "edit/held-out pair"],
    "held-out kind": [f"edit/{HELD_OUT_KIND} (held out)"],
    "references": [name for name in GROUPS if name.partition("/")[0] in MULTI and " reference" in name],
    "concepts": [f"{task}/{concept}" for task in MULTI for concept in CONCEPTS],
}
DEFAULT = ("generate", "edit", "unseen", "held-out pair", "held-out kind")


WORLD = Groups(GROUPS, SHORT, world_records)
expand = WORLD.expand
world_items = WORLD.items
