"""The language of the motion world: acts, scripts and edits in words, each with one canonical form."""

from __future__ import annotations

import re
from typing import Any

from weft.world.motion_scripts import SPEEDS, STYLES, Act, Script
from weft.world.motion_words import (
    ACTS,
    ANSWERS,
    CAPTIONS,
    CLOCK,
    EDITS,
    GO,
    IRREGULAR,
    JOINTS,
    POLITE,
    SEQUENCES,
    SPEED_WORDS,
    STYLE_NOUNS,
    STYLE_WORDS,
    SUBJECTS,
    WAYS,
)
from weft.world.scene import pick
from weft.world.words import Voice

Op = dict[str, Any]


def third(phrase: str) -> str:
    """`*walk forward` as `walks forward`."""
    return re.sub(r"\*(\w+)", lambda m: _forms(m[1])[0], phrase)


def gerund(phrase: str) -> str:
    """`*walk forward` as `walking forward`."""
    return re.sub(r"\*(\w+)", lambda m: _forms(m[1])[1], phrase)


def plain(phrase: str) -> str:
    """`*walk forward` as `walk forward`."""
    return phrase.replace("*", "")


def _forms(verb: str) -> tuple[str, str]:
    if verb in IRREGULAR:
        return IRREGULAR[verb]
    es = verb.endswith(("ch", "sh", "s", "x"))
    return verb + ("es" if es else "s"), (verb[:-1] if verb.endswith("e") else verb) + "ing"


def limb(side: str, noun: str) -> str:
    """`the left hand`, `both hands`, `both fists`."""
    return f"both {noun}s" if side == "both" else f"the {side} {noun}"


class MotionSpeaker(Voice):
    """Says scripts and edits in words. `unseen` takes the sentence frames that training never shows."""

    def act(self, act: Act) -> str:
        """A starred infinitive."""
        slots = {"d": act.direction, "s": act.side, "c": CLOCK.get(act.direction, "")}
        slots |= {f"s {noun}": limb(act.side, noun) for noun in ("hand", "arm", "fist") if act.side}
        if act.path:
            go = pick(self.rng, GO[act.action])
            words = self.frame(WAYS[act.path])
            if "{go" not in words and act.action == "run":  # "go backwards" does not say how
                words = WAYS[act.path][0][0]
            slots |= {"go": go, "going": gerund(go)}
        else:
            key = f"{act.action} {act.direction}"
            words = self.frame(ACTS[key if key in ACTS else act.action])
        for name, value in slots.items():
            words = words.replace("{" + name + "}", value)
        return words

    def acts(self, script: Script) -> str:
        """The acts with style and speed, a starred infinitive: `*walk like a zombie, then *wave ...`."""
        said = [self.act(act) for act in script.acts]
        words = said[0] if len(said) == 1 else self.frame(SEQUENCES).format(*said)
        extra = []
        if script.style != STYLES[0]:
            extra.append(pick(self.rng, STYLE_WORDS[script.style]))
        if script.speed != SPEEDS[0]:
            extra.append(pick(self.rng, SPEED_WORDS[script.speed]))
        for k in self.rng.permutation(len(extra)):
            if len(said) == 1:
                words = f"{words} {extra[int(k)]}" if "," not in words else f"{words}, {extra[int(k)]}"
            else:  # of both acts
                words = f"{words}, {'all of it ' * self.rng.integers(2)}{extra[int(k)]}"
        return words

    def caption(self, script: Script, answer: bool = False) -> tuple[str, str]:
        """A caption of a script (as a request, or as the answer to a question) and its canonical form."""
        words = self.acts(script)
        frame = self.frame(ANSWERS if answer else CAPTIONS)
        text = frame.format(a=pick(self.rng, SUBJECTS), does=third(words), doing=gerund(words), do=plain(words))
        return text, script.canonical

    def statement(self, script: Script) -> str:
        """A plain sentence without its full stop: `the person walks like a zombie`."""
        return "the person " + third(self.acts(script))

    # --- edits ------------------------------------------------------------------------------------------------

    def edit(self, script: Script, plan: list[Op]) -> tuple[str, str]:
        """The instruction for a plan on a script, and its canonical form."""
        said = [self.op(script, op) for op in plan]
        text = said[0][0] if len(said) == 1 else self.frame(JOINTS).format(said[0][0], said[1][0])
        return self.frame(POLITE).format(text), " ; ".join(canonical for _, canonical in said)

    def op(self, script: Script, op: Op) -> tuple[str, str]:
        """One operation in words (imperative), and its canonical form."""
        kind, value = op["op"], op.get("value", "")
        if kind == "style":
            words = self.frame(EDITS[kind])
            return words.format(v=pick(self.rng, STYLE_WORDS[value]), n=self.word(STYLE_NOUNS[value])), f"style {value}"
        if kind == "speed":
            order = ("slow", "normal", "fast")
            step = order.index(value) - order.index(script.speed)
            if abs(step) == 1 and self.rng.random() < 0.6:
                name = "faster" if step > 0 else "slower"
                return self.frame(EDITS[name]), f"speed {name}"
            return self.frame(EDITS[kind]).format(v=pick(self.rng, SPEED_WORDS[value])), f"speed {value}"
        if kind == "trajectory":
            act = Act(script.acts[op["act"]].action, path=value, direction=op["direction"])
            words = plain(self.act(act))
            return self.frame(EDITS[kind]).format(do=words), f"trajectory {' '.join((value, op['direction'])).strip()}"
        if kind == "body_part":
            action = script.acts[op["act"]].action
            noun = "leg" if action in ("kick", "hop") else self.word(("hand", "arm"))
            return self.frame(EDITS[kind]).format(v=limb(value, noun)), f"body_part {value}"
        if kind == "direction":
            return self.frame(EDITS[kind]).format(v=value), f"direction {value}"
        return self._acting(script, op)

    def _acting(self, script: Script, op: Op) -> tuple[str, str]:
        """Replace, append or drop an act."""
        kind = op["op"]
        if kind == "drop":
            old, kept = self.act(script.acts[1]), self.act(script.acts[0])
            words = self.frame(EDITS[kind])
            slots = {"do": plain(kept), "redoing": gerund(kept), "undo": plain(old), "doing": gerund(old)}
            return words.format(**slots), f"drop {script.acts[1].name}"
        new = Act(**op["value"])
        words = self.act(new)
        slots = {"do": plain(words), "redoing": gerund(words)}
        if kind == "append":
            return self.frame(EDITS[kind]).format(**slots), f"append {new.name}"
        old = self.act(script.acts[op["act"]])
        slots |= {"undo": plain(old), "doing": gerund(old)}
        return self.frame(EDITS[kind]).format(**slots), f"action {script.acts[op['act']].name} to {new.name}"


__all__ = ["MotionSpeaker", "gerund", "limb", "plain", "third"]
