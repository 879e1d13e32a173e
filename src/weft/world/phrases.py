"""The language of the embedded world: many ways of saying one thing.

Every choice is drawn from a generator. Phrasings in the `unseen` half of a table never occur in training text, but
use words that do: they measure whether a model understands sentences or has learnt them by heart. Each text has a
canonical form, one fixed sentence per meaning, on which text encoders are trained.

A value that a reference picture gives is written `<k>` for the k-th reference; `weft.world.records` weaves the
picture in at that place.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from weft.world.edits import Op
from weft.world.scene import CELLS, SIZES, Scene, Thing, pick
from weft.world.words import (
    EDITS,
    JOINTS,
    LIT,
    PATTERN_NOUNS,
    PATTERN_WORDS,
    PICTURES,
    POLITE,
    SIZE_WORDS,
    STATEMENT,
    STYLE_WORDS,
    STYLED,
    TONED,
    Voice,
)

Rng = np.random.Generator


class Speaker(Voice):
    """Says scenes and plans in words. `unseen` takes the sentence frames that training never shows."""

    # --- things ---------------------------------------------------------------------------------------------

    def thing(self, look: dict[str, str], article: bool = True) -> str:
        """A noun phrase for a new thing: `a small red striped star`. Defaults stay unsaid, most of the time."""
        before, after = [], ""
        if look["size"] != "medium" or self.rng.random() < 0.1:
            before.append(self.word(SIZE_WORDS[look["size"]]))
        pattern = look["pattern"]
        spoken = pattern != "solid" or self.rng.random() < 0.08
        if spoken and self.rng.random() < 0.2:
            before.append(look["colour"])
            after = " with " + pick(self.rng, PATTERN_NOUNS[pattern])
        else:
            words = [look["colour"]] + ([self.word(PATTERN_WORDS[pattern])] if spoken else [])
            before += words if self.rng.random() < 0.6 else words[::-1]
        phrase = " ".join([*before, look["shape"]]) + after
        return ("an " if phrase[0] in "aeiou" else "a ") + phrase if article else phrase

    def place(self, scene: Scene, cell: int, to: bool = False, but: int | None = None) -> tuple[str, str]:
        """Words for a quadrant, absolute or relative to another thing, and their canonical form."""
        mode = pick(self.rng, ("absolute", "absolute", "relative"))
        if mode == "relative":
            for other in self.rng.permutation(4):
                thing = scene.at(int(other))
                relation = relation_of(cell, int(other))
                if thing is None or relation is None or thing.cell == but:
                    continue
                name, canonical = self.refer(scene, thing, relative=False)
                return f"{'to the place ' if to else ''}{relation} {name}", f"{relation} {canonical}"
        name = CELLS[cell]
        forms = (f"to the {name}", f"into the {name} corner") if to else (f"at the {name}", f"in the {name} corner")
        return self.word(forms), f"at {name}"

    def refer(self, scene: Scene, thing: Thing, relative: bool = True) -> tuple[str, str]:
        """A phrase that picks out one thing of a scene and no other, and its canonical form."""
        others = [t for t in scene.things if t.cell != thing.cell]
        pattern = self.word(PATTERN_WORDS[thing.pattern])
        options: list[tuple[str, str]] = []

        def offer(words: str, canonical: str, *attributes: str) -> None:
            if not any(all(getattr(o, a) == getattr(thing, a) for a in attributes) for o in others):
                options.append((f"the {words}", canonical))

        one = pick(self.rng, ("one", "thing", "object"))
        s, c, p = thing.shape, thing.colour, thing.pattern
        offer(s, s, "shape")
        offer(s, s, "shape")
        offer(f"{c} {s}", f"{c} {s}", "shape", "colour")
        offer(f"{c} {s}", f"{c} {s}", "shape", "colour")
        offer(f"{c} {one}", f"{c} thing", "colour")
        if p != "solid":
            offer(f"{pattern} {s}", f"{p} {s}", "shape", "pattern")
            offer(f"{pattern} {one}", f"{p} thing", "pattern")
        if others:
            size = self.word(SIZE_WORDS[thing.size])
            offer(f"{size} {s}", f"{thing.size} {s}", "shape", "size")
            if not any(o.size == thing.size for o in others) and thing.size != "medium":
                rank = "smallest" if all(SIZES.index(o.size) > SIZES.index(thing.size) for o in others) else None
                rank = rank or ("largest" if all(SIZES.index(o.size) < SIZES.index(thing.size) for o in others) else "")
                if rank:
                    options.append((f"the {rank} {one}", f"{rank} thing"))
        options.append((f"the {s} at the {CELLS[thing.cell]}", f"{s} at {CELLS[thing.cell]}"))
        options.append((f"the {one} at the {CELLS[thing.cell]}", f"thing at {CELLS[thing.cell]}"))
        if relative and others and self.rng.random() < 0.3:
            other = pick(self.rng, others)
            relation = relation_of(thing.cell, other.cell)
            if relation:
                name, canonical = self.refer(scene, other, relative=False)
                return f"the {one} {relation} {name}", f"thing {relation} {canonical}"
        return pick(self.rng, options)

    def background(self, value: tuple[Any, ...] | list[Any], named: bool = False) -> tuple[str, str]:
        """Words for a background and their canonical form; `named`: the sentence says already what they are of."""
        if value[0] == "plain":
            return (value[1] if named else f"a {value[1]} background", f"plain {value[1]}")
        if value[0] == "gradient":
            upper, lower = value[1:]
            words = (f"a gradient from {upper} to {lower}", f"a {upper} to {lower} gradient")
            return self.word(words), f"gradient {upper} {lower}"
        return f"a {value[1]} photo", f"photo {value[1]}"

    # --- edits ----------------------------------------------------------------------------------------------

    def edit(self, scene: Scene, plan: list[Op]) -> tuple[str, str]:
        """The instruction for a plan on a scene, and its canonical form."""
        said = [self.op(scene, op) for op in plan]
        text = said[0][0] if len(said) == 1 else self.frame(JOINTS).format(said[0][0], said[1][0])
        for words, _ in said[2:]:
            text += f", and {words}"
        meaning = " ; ".join(canonical for _, canonical in said)
        if text.split()[0] in STATEMENT:
            return text, meaning
        polite = self.frame(POLITE).format(text)
        # "can you the star should be red" is no English, also behind a first request; there the form is drawn and left,
        # because records by their seeds should stay what they are
        return text if any(words.split()[0] in STATEMENT for words, _ in said) else polite, meaning

    def op(self, scene: Scene, op: Op) -> tuple[str, str]:
        kind, slots, canonical = op["op"], {}, {}
        thing = scene.at(op["cell"]) if "cell" in op else None
        if thing is not None:
            slots["the"], canonical["the"] = self.refer(scene, thing)
        if "ref" in op:
            return self._by_reference(op, kind, scene, slots.get("the", ""), canonical.get("the", ""))
        if kind in ("add", "replace"):
            slots["a"], canonical["a"] = self.thing(op), canonical_thing(op)
        if kind == "add":
            slots["at"], canonical["at"] = self.place(scene, op["cell"])
            return self.frame(EDITS[kind]).format(**slots), f"add {canonical['a']} {canonical['at']}"
        if kind == "remove":
            return self.frame(EDITS[kind]).format(**slots), f"remove {canonical['the']}"
        if kind == "replace":
            return self.frame(EDITS[kind]).format(**slots), f"replace {canonical['the']} with {canonical['a']}"
        if kind == "move":
            words = self.frame(EDITS[kind])
            place, canonical["to"] = self.place(scene, op["to"], to="{to}" in words, but=op["cell"])
            return words.format(**slots, to=place, at=place), f"move {canonical['the']} {canonical['to']}"
        if kind == "background":
            words = self.frame(EDITS[kind])
            named = "background {b}" in words or "background to" in words or "background should" in words
            slots["b"], plain = self.background(op["value"], named)
            return words.format(**slots), f"background {plain}"
        value = op["value"]
        if kind == "resize" and thing is not None and self.rng.random() < 0.4:
            step = SIZES.index(value) - SIZES.index(thing.size)
            if abs(step) == 1:
                words = self.frame(EDITS["grow" if step > 0 else "shrink"])
                return words.format(**slots), f"resize {canonical['the']} {'bigger' if step > 0 else 'smaller'}"
        spoken = {
            "repattern": lambda: self.word(PATTERN_WORDS[value]),
            "resize": lambda: self.word(SIZE_WORDS[value]),
            "style": lambda: self.word(STYLE_WORDS[value]),
        }.get(kind, lambda: value)()
        slots["v"] = spoken
        slots["n"] = pick(self.rng, PATTERN_NOUNS[value]) if kind == "repattern" else ""
        target = f" {canonical['the']}" if "the" in canonical else ""
        text = self.frame(EDITS[kind]).format(**slots)
        return re.sub(r"\ba(?= [aeiou])", "an", text), f"{kind}{target} {value}"

    def _by_reference(self, op: Op, kind: str, scene: Scene, the: str, canonical: str) -> tuple[str, str]:
        k, mark = op["ref"], f"<{op['ref']}>"
        if kind == "add":
            place, short = self.place(scene, op["cell"])
            words = self.frame(EDITS[kind]).format(a=f"the object of {mark}", at=place)
            return words, f"add object {k} {short}"
        if kind == "replace":
            return (
                self.frame(EDITS[kind]).format(the=the, a=f"the object of {mark}"),
                f"replace {canonical} with object {k}",
            )
        if kind in ("light", "style", "tone"):
            noun = {"light": "light", "style": "style", "tone": "colour tone"}[kind]
            frames = (f"use the {noun} of {mark}", f"change the {noun} to that of {mark}", f"take the {noun} of {mark}")
            return pick(self.rng, frames), f"{kind} of {k}"
        noun = {"recolour": "colour", "repattern": "pattern", "reshape": "shape"}[kind]
        frames = (
            f"give {the} the {noun} of {mark}",
            f"change the {noun} of {the} to that of {mark}",
            f"{the} should have the {noun} of {mark}",
        )
        return pick(self.rng, frames), f"{kind} {canonical} as {k}"

    # --- whole pictures -------------------------------------------------------------------------------------

    def caption(self, scene: Scene, names: dict[int, tuple[str, str]] | None = None) -> tuple[str, str]:
        """A complete caption of a scene and its canonical form. `names` overrides how a quadrant's thing is named
        (by a reference picture)."""
        names = names or {}
        things = [scene.things[int(i)] for i in self.rng.permutation(len(scene.things))]
        spoken: list[str] = []
        terse = len(things) > 2 and self.rng.random() < 0.8
        for i, thing in enumerate(things):
            look = dict(zip(("shape", "colour", "pattern", "size"), thing.look, strict=True))
            name = names[thing.cell][0] if thing.cell in names else self.thing(look, article=not terse)
            relation = relation_of(thing.cell, things[i - 1].cell) if i else None
            if relation and thing.cell not in names and self.rng.random() < 0.3:
                before = things[i - 1]
                anchor = before.shape if sum(t.shape == before.shape for t in things) == 1 else "last one"
                anchor = "it" if i == 1 else f"the {anchor}"
                if things[i - 1].cell in names:
                    anchor = "it"
                spoken.append(f"{name} {relation} {anchor}")
            elif terse:
                spoken.append(f"{name} {CELLS[thing.cell]}")
            else:
                spoken.append(f"{name} {self.word((f'at the {CELLS[thing.cell]}', f'in the {CELLS[thing.cell]}'))}")
        joined = ", ".join(spoken[:-1]) + (", " if terse else " and ") + spoken[-1] if len(spoken) > 1 else spoken[0]
        words, plain = self.background(scene.background)
        frame = self.frame(PICTURES)
        if scene.background[0] == "plain" and ("background is" in frame or "background should" in frame):
            words = scene.background[1]
        text = frame.format(list=joined, b=words)
        parts = [
            f"{names[t.cell][1] if t.cell in names else canonical_thing(look_of(t))} at {CELLS[t.cell]}"
            for t in sorted(scene.things, key=lambda t: t.cell)
        ]
        parts.append(f"background {plain}")
        for value, default, table, key in (
            (scene.style, "flat", STYLED, "style"),
            (scene.light, "even", LIT, "light"),
            (scene.tone, "neutral", TONED, "tone"),
        ):
            if value != default:
                spoken_value = self.word(STYLE_WORDS[value]) if key == "style" else value
                text = self.frame(table).format(text, v=spoken_value)
                parts.append(f"{key} {value}")
        return text, " ; ".join(parts)


def look_of(thing: Thing) -> dict[str, str]:
    return dict(zip(("shape", "colour", "pattern", "size"), thing.look, strict=True))


def canonical_thing(look: dict[str, Any]) -> str:
    """One fixed name of a look: size colour pattern shape, nothing left out."""
    return f"{look['size']} {look['colour']} {look['pattern']} {look['shape']}"


def relation_of(cell: int, other: int) -> str | None:
    """How a quadrant lies to its neighbour, or None for the same or the opposite one."""
    if 4 in (cell, other):
        return None
    dy, dx = cell // 2 - other // 2, cell % 2 - other % 2
    return {(0, 1): "right of", (0, -1): "left of", (1, 0): "below", (-1, 0): "above"}.get((dy, dx))
