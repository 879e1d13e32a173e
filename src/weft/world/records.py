"""Records of the embedded world: an endless, deterministic set of generation and editing tasks.

Record i of a split is a function of (seed, split, i). The splits never overlap: a scene belongs to the split that
its digest names, and a record to the split of the scene that it starts from. Training records hold no scene with a
held-out pair of attributes, no held-out phrasing and no edit of the held-out kind.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
from PIL import Image

from weft.errors import WeftError
from weft.record import Part, Record, Turn, image_part, text_part
from weft.rng import numpy_rng
from weft.world.edits import HELD_OUT_KIND, KINDS, Op, apply, propose
from weft.world.phrases import Speaker
from weft.world.references import multi_edit, multi_generate
from weft.world.render import RENDERER, render
from weft.world.scene import Prior, Scene, draw_scene, pick

SPLITS = ("train", "val", "test")
WORD = r"[\w-]+|[,;:?]"
MAX_WORDS = 38  # longer texts are said again, so that a short-context text encoder reads all of them
SIDE = 64


@dataclass(frozen=True, slots=True)
class Picture:
    """A scene as lazily drawn media of a record part; its digest names the scene and the renderer."""

    scene: Scene
    height: int = SIDE
    width: int = SIDE

    def load(self) -> Image.Image:
        return render(self.scene, self.height, self.width)

    @property
    def digest(self) -> str:
        return f"{self.scene.digest}-r{RENDERER}-{self.height}x{self.width}"


def split_of(scene: Scene) -> str:
    """The split that a scene belongs to: 90 % train, 5 % val, 5 % test, by its digest."""
    bucket = int(scene.digest[:8], 16) % 100
    return "train" if bucket < 90 else "val" if bucket < 95 else "test"


@dataclass(frozen=True)
class World(Sequence[Record]):
    """A lazy sequence of records.

    `tasks`: weights of generate, edit, multi_edit, multi_generate. `kinds`: weights of edit kinds (default: all
    but the held-out one, equally). `phrasing`: "seen", "unseen" or "mixed". `combo`: "seen" (no held-out pair of
    attributes), "held_out" (at least one in the target) or "any". `size`: pixels (height, width).
    """

    split: str = "train"
    length: int = 1000
    seed: int = 0
    start: int = 0
    tasks: tuple[tuple[str, float], ...] = (("generate", 1.0), ("edit", 1.0))
    kinds: tuple[tuple[str, float], ...] = ()
    references: tuple[int, ...] = (1, 2, 3, 4)
    phrasing: str = "seen"
    combo: str = "seen"
    prior: Prior = Prior()
    size: tuple[int, int] = (SIDE, SIDE)

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, i: int) -> Record: ...
    @overload
    def __getitem__(self, i: slice) -> list[Record]: ...
    def __getitem__(self, i: int | slice) -> Record | list[Record]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(self.length))]
        if not -self.length <= i < self.length:
            raise IndexError(i)
        return self._make(self.start + (i if i >= 0 else i + self.length))

    def _make(self, index: int) -> Record:
        rng = numpy_rng(self.seed, f"world/{self.split}/{self.phrasing}/{self.combo}", index)
        names, weights = zip(*self.tasks, strict=True)
        task = pick(rng, names, np.array(weights) / sum(weights))
        kinds = self.kinds or tuple((k, 1.0) for k in KINDS if k != HELD_OUT_KIND)
        names, weights = zip(*kinds, strict=True)
        kind = pick(rng, names, np.array(weights) / sum(weights)) if task == "edit" else task
        unseen = self.phrasing == "unseen" or self.phrasing == "mixed" and rng.random() < 0.5
        draft = next(filter(None, (self._draft(rng, task, kind, unseen) for _ in range(1000))), None)
        if draft is None:
            raise WeftError(f"world: no {kind} record found for combo={self.combo!r}, phrasing={self.phrasing!r}")
        source, target = draft.source, draft.target
        user: list[Part] = [] if source is None else [image_part(Picture(source, *self.size), "source")]
        user += _weave(draft.text, [Picture(r, *self.size) for r in draft.references])
        world = {
            "source": source and source.to_json(),
            "target": target.to_json(),
            "plan": draft.plan,
            "references": [r.to_json() for r in draft.references],
            "size": list(self.size),
        }
        return Record(
            id=f"world-{self.split}-{self.seed}-{kind}-{self.phrasing}-{self.combo}-{index:07d}",
            task=task,
            turns=[Turn("user", user), Turn("assistant", [image_part(Picture(target, *self.size), None)])],
            meta={
                "kind": kind,
                "canonical": draft.canonical,
                "phrasing": "unseen" if unseen else "seen",
                "combo": "held_out" if target.held_out else "seen",
                "size": list(self.size),
                "world": world,
            },
        )

    def _draft(self, rng: np.random.Generator, task: str, kind: str, unseen: bool) -> _Draft | None:
        speaker = Speaker(rng, unseen)
        # A caption does not say which part of a photograph it means, so new pictures have none.
        from_source = task in ("edit", "multi_edit")
        scene = draw_scene(rng, self.prior if from_source else replace(self.prior, photo=0.0))
        made: Any
        if task == "generate":
            made = (scene, [], [], *speaker.caption(scene))
        elif task == "edit":
            plan = propose(rng, scene, kind)
            made = plan and (apply(scene, plan), plan, [], *speaker.edit(scene, plan))
        elif task == "multi_edit":
            made = multi_edit(rng, speaker, scene, pick(rng, self.references))
        else:
            made = multi_generate(rng, speaker, scene, pick(rng, self.references))
        if not made:
            return None
        draft = _Draft(scene if from_source else None, *made)
        if split_of(draft.source or draft.target) != self.split or len(re.findall(WORD, draft.text)) > MAX_WORDS:
            return None
        shown = [draft.target, *draft.references] + ([draft.source] if draft.source else [])
        if self.combo == "seen" and any(s.held_out for s in shown):
            return None
        return None if self.combo == "held_out" and not draft.target.held_out else draft


@dataclass(frozen=True, slots=True)
class _Draft:
    source: Scene | None
    target: Scene
    plan: list[Op]
    references: list[Scene]
    text: str
    canonical: str


def _weave(text: str, references: list[Picture]) -> list[Part]:
    parts: list[Part] = []
    for k, piece in enumerate(re.split(r"<(\d)>", text)):
        if k % 2:
            parts.append(image_part(references[int(piece) - 1], "reference"))
        elif piece:
            parts.append(text_part(piece))
    return parts


def _weights(given: dict[str, float] | Sequence[str], known: Sequence[str], what: str) -> tuple[tuple[str, float], ...]:
    items = dict(given) if isinstance(given, dict) else dict.fromkeys(given, 1.0)
    for name in items:
        if name not in known:
            raise WeftError(f"world: unknown {what} {name!r}; known: {', '.join(known)}")
    return tuple(items.items())


def records(
    split: str = "train",
    count: int = 1000,
    seed: int = 0,
    start: int = 0,
    tasks: dict[str, float] | Sequence[str] = ("generate", "edit"),
    kinds: dict[str, float] | Sequence[str] = (),
    references: Sequence[int] = (1, 2, 3, 4),
    phrasing: str = "seen",
    combo: str = "seen",
    photo: float = 0.0,
    tone: float = 0.0,
    size: int | Sequence[int] = SIDE,
) -> World:
    """Records of the world as a lazy sequence; see `World`. Raises WeftError for unknown names."""
    if split not in SPLITS:
        raise WeftError(f"world: unknown split {split!r}; known: {', '.join(SPLITS)}")
    if phrasing not in ("seen", "unseen", "mixed") or combo not in ("seen", "held_out", "any"):
        raise WeftError("world: phrasing is seen, unseen or mixed; combo is seen, held_out or any")
    if not references or not all(1 <= r <= 4 for r in references):
        raise WeftError(f"world: references are 1 to 4 pictures, not {list(references)}")
    known = ("generate", "edit", "multi_edit", "multi_generate")
    height, width = (size, size) if isinstance(size, int) else size
    return World(
        split=split,
        length=count,
        seed=seed,
        start=start,
        tasks=_weights(tasks, known, "task"),
        kinds=_weights(kinds, KINDS, "edit kind"),
        references=tuple(references),
        phrasing=phrasing,
        combo=combo,
        prior=replace(Prior(), photo=photo, tone=tone),
        size=(int(height), int(width)),
    )
