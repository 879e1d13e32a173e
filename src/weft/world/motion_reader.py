"""Reads captions of the motion world back: which acts, style and speed a text names.

It knows the phrases of `weft.world.motion_words` in all their forms (walk, walks, walking) and looks for the longest
one at every place, so it also reads what a model has written in the same words, and what it cannot read it leaves out.
"""

from __future__ import annotations

import re
from functools import lru_cache

from weft.record import Record
from weft.world.motion_oracle import Seen, Verdict, compare
from weft.world.motion_phrases import gerund, limb, plain, third
from weft.world.motion_scripts import EVERY_ACT, SPEEDS, STYLES, Act, Script
from weft.world.motion_words import ACTS, CLOCK, GO, SPEED_WORDS, STYLE_WORDS, WAYS

NO_ACT = Act("nothing")


def read(text: str, style: str = STYLES[0], speed: str = SPEEDS[0]) -> Seen:
    """What a text names; what it leaves open is the default. `unclear` where it names no act that is known."""
    text = " ".join(re.findall(r"[a-z]+", text.lower()))
    acts = [_phrases()[match[0]] for match in _pattern().finditer(text)]
    for value, words in STYLE_WORDS.items():
        style = value if any(_has(text, w) for w in words) else style
    for value, words in SPEED_WORDS.items():
        speed = value if any(_has(text, w) for w in words) else speed
    return Seen(tuple(acts) or (NO_ACT,), style, speed, not acts, 0.0)


def judge_text(record: Record, text: str) -> Verdict:
    """Judge a caption (or a plan) by what it names: it must name what the record's target shows, and no more."""
    script = Script.from_json(record.meta["motion"]["target"])
    seen = read(text)
    requests = {name: ok and not seen.unclear for name, ok in compare(script, seen).items()}
    if len(seen.acts) < len(script.acts):
        requests["action 2"] = False
    said = {f"act {k + 1}": act.name for k, act in enumerate(seen.acts)} | {"style": seen.style, "speed": seen.speed}
    return Verdict(all(requests.values()), requests, seen=said)


def _has(text: str, words: str) -> bool:
    return f" {words} " in f" {text} "


@lru_cache(maxsize=1)
def _phrases() -> dict[str, Act]:
    """Every way of naming an act, as letters and single spaces."""
    known: dict[str, Act] = {}
    for act in EVERY_ACT:
        key = f"{act.action} {act.direction}"
        table = WAYS[act.path] if act.path else ACTS[key if key in ACTS else act.action]
        for words in (*table[0], *table[1]):
            if act.path and "{go" not in words and act.action != "walk":
                continue
            for go in GO.get(act.action, ("",)):
                slots = {"d": act.direction, "s": act.side, "c": CLOCK.get(act.direction, ""), "going": gerund(go)}
                slots |= {f"s {noun}": limb(act.side, noun) for noun in ("hand", "arm", "fist") if act.side}
                said = words
                for name, value in (slots | {"go": go}).items():
                    said = said.replace("{" + name + "}", value)
                for form in (plain(said), third(said), gerund(said)):
                    known[" ".join(re.findall(r"[a-z]+", form))] = act
    return known


@lru_cache(maxsize=1)
def _pattern() -> re.Pattern[str]:
    longest = sorted(_phrases(), key=len, reverse=True)
    return re.compile(r"\b(?:" + "|".join(longest) + r")\b")
