"""The groups of the motion benchmark and their records."""

from __future__ import annotations

from typing import Any

from weft.evals.benchmark import Groups
from weft.world.motion_edits import HELD_OUT_KIND, KINDS
from weft.world.motions import records

EDIT_KINDS = tuple(kind for kind in KINDS if kind != HELD_OUT_KIND)

# What each group asks of `weft.world.motions.records`. The order is fixed (see `Groups`): new groups go to the end.
GROUPS: dict[str, dict[str, Any]] = {
    "generate": {"tasks": ["generate"]},
    **{f"edit/{kind}": {"tasks": ["edit"], "kinds": [kind]} for kind in EDIT_KINDS},
    "in_context": {"tasks": ["in_context"]},
    "chain/two_turn": {"tasks": ["chain"], "kinds": ["two_turn"]},
    "chain/three_turn": {"tasks": ["chain"], "kinds": ["three_turn"]},
    "between": {"tasks": ["between"]},
    "knowledge": {"tasks": ["knowledge"]},
    "reflect": {"tasks": ["reflect"]},
    "describe": {"tasks": ["describe"]},
    "generate/unseen phrasing": {"tasks": ["generate"], "phrasing": "unseen"},
    "edit/unseen phrasing": {"tasks": ["edit"], "kinds": list(EDIT_KINDS), "phrasing": "unseen"},
    "generate/held-out pair": {"tasks": ["generate"], "combo": "held_out"},
    "edit/held-out pair": {"tasks": ["edit"], "kinds": list(EDIT_KINDS), "combo": "held_out"},
    f"edit/{HELD_OUT_KIND} (held out)": {"tasks": ["edit"], "kinds": [HELD_OUT_KIND]},
}
SHORT: dict[str, list[str]] = {
    "edit": [f"edit/{kind}" for kind in EDIT_KINDS],
    "chain": ["chain/two_turn", "chain/three_turn"],
    "unseen": ["generate/unseen phrasing", "edit/unseen phrasing"],
    "held-out pair": ["generate/held-out pair", "edit/held-out pair"],
    "held-out kind": [f"edit/{HELD_OUT_KIND} (held out)"],
}
DEFAULT = ("generate", "edit", "in_context", "chain", "between", "knowledge", "reflect", "describe", "unseen")
MOTIONS = Groups(GROUPS, SHORT, records)
