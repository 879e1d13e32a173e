"""The groups of the world benchmark and their records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from weft.errors import WeftError
from weft.world import records as world_records
from weft.world.edits import HELD_OUT_KIND, KINDS
from weft.world.references import CONCEPTS

if TYPE_CHECKING:
    from weft.record import Record

MULTI = ("multi_edit", "multi_generate")
EDIT_KINDS = tuple(kind for kind in KINDS if kind != HELD_OUT_KIND)

# What each group asks of `weft.world.records`. Groups of a concept have one reference, which gives just that. The order
# is fixed: a group's place gives its records their own indices, so that records of two groups are independent and no
# two share an id.
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


def expand(groups: Sequence[str]) -> list[str]:
    """Names of `GROUPS`, short names resolved, without repeats, in the order given."""
    names = [name for group in groups for name in SHORT.get(group, [group])]
    for name in names:
        if name not in GROUPS:
            raise WeftError(f"unknown group {name!r}; known: {', '.join([*SHORT, *GROUPS])}")
    if not names:
        raise WeftError(f"no group to evaluate; known: {', '.join([*SHORT, *GROUPS])}")
    return list(dict.fromkeys(names))


def world_items(split: str, groups: Sequence[str], count: int, data_seed: int) -> dict[str, Record]:
    """The records of the benchmark by key (group and id). Record i of a group is the same for every `count`."""
    if not 1 <= count <= 100_000:
        raise WeftError(f"count is {count}; it must be 1 to 100000 records per group")
    place = {name: index for index, name in enumerate(GROUPS)}
    items: dict[str, Record] = {}
    for name in groups:
        start = place[name] * 100_000
        for record in world_records(split, count=count, seed=data_seed, start=start, **GROUPS[name]):
            items[f"{name}/{record.id}"] = record
    return items


def group_of(key: str) -> str:
    """The group in a key of `world_items`."""
    return key.rpartition("/")[0]
