"""Records of the embedded world: an endless, deterministic set of generation and editing tasks.

Record i of a split is a function of (seed, split, i). The splits never overlap: a scene belongs to the split that
its digest names, and a record to the split of the scene that it starts from. Training records hold no scene with a
held-out pair of attributes, no held-out phrasing and no edit of the held-out kind.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from weft.errors import WeftError
from weft.record import Part, Record, Turn, image_part, text_part
from weft.rng import numpy_rng
from weft.world.edits import HELD_OUT_KIND, KINDS, Op, apply, propose
from weft.world.endless import Endless, named_weights, split_of
from weft.world.phrases import Speaker
from weft.world.references import CONCEPTS, concept_of, multi_edit, multi_generate
from weft.world.render import RENDERER, render
from weft.world.scene import Prior, Scene, draw_scene, pick

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


@dataclass(frozen=True, kw_only=True)
class World(Endless):
    """A lazy sequence of records.

    `tasks`: weights of generate, edit, multi_edit, multi_generate. `kinds`: weights of edit kinds (default: all
    but the held-out one, equally). `references`: how many pictures multi_edit and multi_generate refer to, `concepts`
    what these give ("concrete" things, "local" and "global" attributes). `standard`: the same records in the one
    wording that a rewriter writes, pictures named by their number; all records with references have it in
    `meta["standard"]`. `size`: pixels (height, width).
    """

    tasks: tuple[tuple[str, float], ...]
    kinds: tuple[tuple[str, float], ...]
    references: tuple[int, ...]
    concepts: tuple[str, ...]
    standard: bool
    prior: Prior
    size: tuple[int, int]

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
        standard = standard_text(draft.canonical, first=0 if source is None else 1)
        pictures = [Picture(r, *self.size) for r in draft.references]
        if self.standard:
            user += [image_part(picture, "reference") for picture in pictures]
            user += [text_part(""), text_part(standard)] if user else [text_part(standard)]
        else:
            user += _weave(draft.text, pictures)
        world = {
            "source": source and source.to_json(),
            "target": target.to_json(),
            "plan": draft.plan,
            "references": [r.to_json() for r in draft.references],
            "size": list(self.size),
        }
        return Record(
            id=f"world-{self.split}-{self.seed}-{kind}-{self.phrasing}-{self.combo}-{index:07d}"
            + ("-standard" if self.standard else ""),
            task=task,
            turns=[Turn("user", user), Turn("assistant", [image_part(Picture(target, *self.size), None)])],
            meta={
                "kind": kind,
                "canonical": draft.canonical,
                **({"standard": standard} if pictures else {}),
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
        if not made or any(concept_of(op) not in self.concepts for op in made[1] if "ref" in op):
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


def standard_text(canonical: str, first: int) -> str:
    """A canonical sentence whose references are named by the number of their picture; `first` counts those before."""
    return re.sub(r"\b(\d)\b", lambda match: f"picture {int(match[1]) + first}", canonical)


def _weave(text: str, references: list[Picture]) -> list[Part]:
    parts: list[Part] = []
    for k, piece in enumerate(re.split(r"<(\d)>", text)):
        if k % 2:
            parts.append(image_part(references[int(piece) - 1], "reference"))
        elif piece:
            parts.append(text_part(piece))
    return parts


def records(
    split: str = "train",
    count: int = 1000,
    *,
    seed: int = 0,
    start: int = 0,
    tasks: dict[str, float] | Sequence[str] = ("generate", "edit"),
    kinds: dict[str, float] | Sequence[str] = (),
    references: Sequence[int] = (1, 2, 3, 4),
    concepts: Sequence[str] = CONCEPTS,
    phrasing: str = "seen",
    standard: bool = False,
    combo: str = "seen",
    photo: float = 0.0,
    tone: float = 0.0,
    size: int | Sequence[int] = SIDE,
) -> World:
    """Records of the world as a lazy sequence; see `World` and `Endless`. Raises WeftError for unknown names."""
    if not concepts or not set(concepts) <= set(CONCEPTS):
        raise WeftError(f"world: concepts are some of {', '.join(CONCEPTS)}, not {list(concepts)}")
    if not references or not all(1 <= r <= 4 for r in references):
        raise WeftError(f"world: references are 1 to 4 pictures, not {list(references)}")
    known = ("generate", "edit", "multi_edit", "multi_generate")
    height, width = (size, size) if isinstance(size, int) else size
    return World(
        split=split,
        length=count,
        seed=seed,
        start=start,
        tasks=named_weights(tasks, known, "task"),
        kinds=named_weights(kinds, KINDS, "edit kind"),
        references=tuple(references),
        concepts=tuple(concepts),
        phrasing=phrasing,
        standard=standard,
        combo=combo,
        prior=replace(Prior(), photo=photo, tone=tone),
        size=(int(height), int(width)),
    )
