"""The words and sentence frames of the embedded world: each table holds what training shows and what it never does."""

from __future__ import annotations

import numpy as np

from weft.world.scene import pick

PATTERN_WORDS = {
    "solid": ("solid", "plain"),
    "striped": ("striped", "stripy"),
    "checkered": ("checkered", "chequered"),
    "dotted": ("dotted", "spotted"),
    "split": ("two-tone", "split"),
    "glossy": ("glossy", "shiny"),
}
PATTERN_NOUNS = {
    "solid": ("a solid fill", "no pattern"),
    "striped": ("stripes", "a striped pattern"),
    "checkered": ("checks", "a checkered pattern"),
    "dotted": ("dots", "a dotted pattern"),
    "split": ("two tones", "a two-tone pattern"),
    "glossy": ("a glossy finish", "a shiny surface"),
}
SIZE_WORDS = {"small": ("small", "little"), "medium": ("medium", "medium-sized"), "large": ("large", "big")}
STYLE_WORDS = {
    "flat": ("flat", "plain flat"),
    "outlined": ("outlined", "ink outline"),
    "pastel": ("pastel", "soft pastel"),
    "neon": ("neon", "glowing neon"),
}

# Each table: (phrasings of training, phrasings held out).
Table = tuple[tuple[str, ...], tuple[str, ...]]


class Voice:
    """Draws from tables. `unseen` takes the sentence frames that training never shows."""

    def __init__(self, rng: np.random.Generator, unseen: bool = False) -> None:
        self.rng, self.unseen = rng, unseen

    def frame(self, table: Table) -> str:
        return pick(self.rng, table[1 if self.unseen else 0])

    def word(self, forms: tuple[str, ...]) -> str:
        return pick(self.rng, forms, (0.7, 0.3) if len(forms) == 2 else None)


EDITS: dict[str, Table] = {
    "add": (
        (
            "add {a} {at}",
            "put {a} {at}",
            "place {a} {at}",
            "draw {a} {at}",
            "insert {a} {at}",
            "there should be {a} {at}",
            "{at}, add {a}",
            "i want {a} {at}",
        ),
        ("{at} there should be {a}", "{at}, draw {a}", "add {a} to the picture, {at}"),
    ),
    "remove": (
        (
            "remove {the}",
            "delete {the}",
            "erase {the}",
            "take away {the}",
            "get rid of {the}",
            "make {the} disappear",
            "take {the} out of the picture",
            "{the} should be gone",
        ),
        ("take {the} away", "{the} should disappear", "erase {the} from the picture"),
    ),
    "replace": (
        (
            "replace {the} with {a}",
            "replace {the} by {a}",
            "turn {the} into {a}",
            "swap {the} for {a}",
            "put {a} in place of {the}",
            "change {the} into {a}",
            "instead of {the}, draw {a}",
            "{the} should become {a}",
        ),
        ("instead of {the}, put {a}", "in place of {the}, draw {a}", "{the} should turn into {a}"),
    ),
    "recolour": (
        (
            "make {the} {v}",
            "paint {the} {v}",
            "colour {the} {v}",
            "change the colour of {the} to {v}",
            "turn {the} {v}",
            "recolour {the} to {v}",
            "{the} should be {v}",
            "change {the} to {v}",
        ),
        ("turn the colour of {the} to {v}", "{the} should become {v}", "let {the} be {v}"),
    ),
    "repattern": (
        (
            "make {the} {v}",
            "give {the} {n}",
            "change the pattern of {the} to {v}",
            "draw {the} with {n}",
            "{the} should have {n}",
            "{the} should be {v}",
            "fill {the} with {n}",
            "turn {the} {v}",
        ),
        ("let {the} have {n}", "{the} should be drawn with {n}", "turn the pattern of {the} to {v}"),
    ),
    "resize": (
        (
            "make {the} {v}",
            "resize {the} to {v}",
            "change the size of {the} to {v}",
            "{the} should be {v}",
            "turn {the} into a {v} one",
            "draw {the} {v}",
        ),
        ("let {the} be {v}", "the size of {the} should be {v}", "{the} should become {v}"),
    ),
    "grow": (
        ("make {the} bigger", "enlarge {the}", "make {the} larger", "{the} should be bigger", "grow {the}"),
        ("{the} should be larger", "draw {the} bigger", "let {the} grow"),
    ),
    "shrink": (
        ("make {the} smaller", "shrink {the}", "{the} should be smaller", "reduce the size of {the}"),
        ("draw {the} smaller", "let {the} shrink", "{the} should shrink"),
    ),
    "move": (
        (
            "move {the} {to}",
            "shift {the} {to}",
            "put {the} {at}",
            "place {the} {at}",
            "{the} should be {at}",
            "bring {the} {to}",
            "drag {the} {to}",
        ),
        ("{the} should move {to}", "take {the} {to}", "let {the} be {at}"),
    ),
    "background": (
        (
            "change the background to {b}",
            "make the background {b}",
            "replace the background with {b}",
            "put everything on {b}",
            "use {b} as the background",
            "the background should be {b}",
            "set the background to {b}",
        ),
        ("turn the background into {b}", "the background should become {b}", "let the background be {b}"),
    ),
    "light": (
        (
            "light the scene from the {v}",
            "let the light come from the {v}",
            "put the light on the {v}",
            "the light should come from the {v}",
            "illuminate everything from the {v}",
            "add light from the {v}",
        ),
        ("everything should be lit from the {v}", "make the light come from the {v}", "use light from the {v}"),
    ),
    "style": (
        (
            "draw it in {v} style",
            "redraw the picture in {v} style",
            "change the style to {v}",
            "make the whole picture {v}",
            "use a {v} style",
            "turn the picture into {v} style",
            "the style should be {v}",
        ),
        ("everything should be in {v} style", "let the style be {v}", "give the picture a {v} style"),
    ),
    "tone": (
        (
            "give the picture a {v} tone",
            "make the tone {v}",
            "use {v} colours",
            "change the tone to {v}",
            "the colours should be {v}",
        ),
        ("let the tone be {v}", "turn the picture {v}", "everything should have a {v} tone"),
    ),
    "reshape": (
        ("change the shape of {the} to {v}", "give {the} {v}", "{the} should have {v}", "draw {the} with {v}"),
        ("let {the} have {v}", "turn the shape of {the} to {v}"),
    ),
}
JOINTS: Table = (("{0} and {1}", "{0}, then {1}", "first {0}, then {1}", "{0}; also {1}"), ("{0}, and also {1}",))
POLITE: Table = (
    ("{0}", "{0}", "{0}", "{0}", "please {0}", "{0}, please", "can you {0}?", "i want you to {0}"),
    ("{0}", "please, {0}", "can you please {0}?"),
)
STATEMENT = {"the", "there", "at", "in", "above", "below", "left", "right", "i", "instead", "everything", "let"}
PICTURES: Table = (
    (
        "{list} on {b}",
        "a picture of {list} on {b}",
        "draw {list} on {b}",
        "{list}, the background is {b}",
        "on {b}: {list}",
        "show {list} on {b}",
        "i want a picture with {list} on {b}",
    ),
    ("a picture with {list} on {b}", "on {b}, draw {list}", "please show {list}; the background should be {b}"),
)
STYLED: Table = (
    ("{0}, in {v} style", "{0}, drawn in {v} style", "in {v} style: {0}", "{0}, {v} style"),
    ("{0}; the style is {v}", "use {v} style: {0}"),
)
LIT: Table = (
    ("{0}, lit from the {v}", "{0}, with light from the {v}", "{0}, the light comes from the {v}"),
    ("{0}; light comes from the {v}", "{0}; the light is from the {v}"),
)
TONED: Table = (("{0}, in a {v} tone", "{0}, with {v} colours"), ("{0}; the tone is {v}",))
