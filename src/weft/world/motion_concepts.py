"""Instructions that name no movement: what a person of the world would do in a situation."""

from __future__ import annotations

import numpy as np

from weft.world.motion_phrases import MotionSpeaker
from weft.world.motion_scripts import STYLES, Act, Script, draw_jitter
from weft.world.scene import pick
from weft.world.words import Table

# By concept: acts, style, and the situations in which they are implied.
CONCEPTS: dict[str, tuple[tuple[Act, ...], str, Table]] = {
    "actor": (
        (Act("bow"),), STYLES[0],
        (("what an actor does at the end of a play", "thank the audience after a concert",
          "be an actor who says thanks"),
         ("thank the audience at the end of a play", "be an actor at the end of a concert")),
    ),
    "boxer": (
        (Act("punch", "both"),), STYLES[0],
        (("what a boxer does in a fight", "be a boxer in training", "fight like a boxer"),
         ("be a boxer in a fight", "what a boxer does in training")),
    ),
    "goal": (
        (Act("run", path="straight"), Act("raise", "both")), "happy",
        (("be a footballer who has scored a goal", "celebrate a goal", "what a footballer does after a goal"),
         ("be a footballer after a goal", "celebrate like a footballer")),
    ),
    "burglar": (
        (Act("walk", path="straight"),), "sneaky",
        (("be a burglar in a house at night", "get past a guard who sleeps", "what a burglar does in a house"),
         ("be a burglar in front of a guard", "get past a guard at night")),
    ),
    "undead": (
        (Act("walk", path="straight"),), "zombie",
        (("the undead are coming", "be one of the undead", "what the undead do at night"),
         ("be one of the undead at night",)),
    ),
    "question": (
        (Act("raise", "right"),), STYLES[0],
        (("a pupil knows the answer", "what a pupil does who has a question", "be a pupil who knows the answer"),
         ("be a pupil who has a question", "what a pupil does who knows the answer")),
    ),
    "concert": (
        (Act("clap"),), "happy",
        (("the concert was great", "you like the concert", "what people do after a great concert"),
         ("you like the great concert", "what people do who like the concert")),
    ),
    "friend": (
        (Act("wave", "right"),), "happy",
        (("you see a friend across the street", "a friend comes home", "what people do who see a friend"),
         ("you see a friend who comes home", "what people do across the street")),
    ),
    "marathon": (
        (Act("walk", path="straight"),), "tired",
        (("be a runner after a marathon", "you come home after a long night",
          "what people do after a long day of work"),
         ("you come home after a long day of work", "be a runner after a long day")),
    ),
    "coin": (
        (Act("reach", "right", "down"),), STYLES[0],
        (("there is a coin on the ground", "you have lost a coin", "what people do who see a coin"),
         ("you see a coin on the ground", "what people do who have lost a coin")),
    ),
    "soldier": (
        (Act("march"),), STYLES[0],
        (("what soldiers do in a parade", "be a soldier in a parade", "be a soldier in training"),
         ("what soldiers do in training",)),
    ),
    "penalty": (
        (Act("kick", "right"),), STYLES[0],
        (("shoot a penalty", "be a footballer who shoots a ball", "shoot the ball at the goal"),
         ("shoot a ball at the goal", "be a footballer who shoots a penalty")),
    ),
    "king": (
        (Act("walk", path="straight"),), "proud",
        (("be a king in front of the people", "you have won a medal", "what a winner does with a medal"),
         ("be a king who has won", "be a winner in front of the people")),
    ),
    "chair": (
        (Act("walk", path="straight"), Act("sit")), "tired",
        (("there is a chair and you have worked all day", "you see a chair after a long day"),
         ("you have worked all day and see a chair",)),
    ),
    "party": (
        (Act("dance"),), "happy",
        (("it is a party with music", "the music plays at a party", "what people do at a party"),
         ("what people do at a party with music",)),
    ),
}  # fmt: skip
EVERY = tuple(CONCEPTS)


def draw_concept(rng: np.random.Generator, speaker: MotionSpeaker, split: str) -> tuple[str, str, Script]:
    """A concept, an instruction and what it implies."""
    name = pick(rng, EVERY)
    acts, style, said = CONCEPTS[name]
    return name, speaker.frame(said), Script(acts, style, jitter=draw_jitter(rng, split))
