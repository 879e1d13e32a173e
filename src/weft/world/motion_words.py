"""The words of the motion world: each table holds what training shows and what it never does.

Phrases of acts stand in the infinitive with a star before every verb (`*bend and *pick something up`), so that one
table serves "a person bends", "a person bending" and "bend". `{s}` is a side, `{d}` a direction, `{go}` the verb of
an act that travels.
"""

from __future__ import annotations

from weft.world.words import Table

SUBJECTS = ("a person", "a person", "someone", "a man", "a woman", "a figure")
GO = {"walk": ("*walk", "*walk", "*stroll"), "run": ("*run", "*run", "*jog")}
WAYS: dict[str, Table] = {
    "straight": (
        ("{go}", "{go} forward", "{go} straight ahead", "{go} in a straight line", "{go} ahead"),
        ("{go} straight forward", "{go} ahead in a straight line"),
    ),
    "back": (("{go} backwards", "{go} back", "*go backwards"), ("*go back", "{go} straight backwards")),
    "circle": (
        ("{go} in a circle to the {d}", "{go} a full circle to the {d}", "{go} around in a circle, {c}",
         "{go} in a {c} circle", "*make a circle to the {d} while {going}"),
        ("{go} around in a {c} circle", "{go} around in a circle to the {d}"),
    ),
    "curve": (
        ("{go} in a curve to the {d}", "{go} along a curve to the {d}", "{go} and *bend to the {d}",
         "{go} in an arc to the {d}", "*make a {d} turn while {going}"),
        ("{go} along an arc to the {d}", "*make a curve to the {d} while {going}"),
    ),
    "zigzag": (
        ("{go} in a zigzag", "{go} along a zigzag line", "{go} zigzag", "*zigzag while {going}"),
        ("{go} in a zigzag line", "*make a zigzag while {going}"),
    ),
}  # fmt: skip
CLOCK = {"left": "counterclockwise", "right": "clockwise"}

# By action, or action and direction.
ACTS: dict[str, Table] = {
    "march": (
        ("*march on the spot", "*march in place", "*step on the spot with high knees"),
        ("*march in place with high knees", "*step in place with high knees"),
    ),
    "turn": (
        ("*turn to the {d}", "*turn {d}", "*turn around to the {d}", "*make a turn to the {d}"),
        ("*make a turn around to the {d}", "*turn on the spot to the {d}"),
    ),
    "jump up": (
        ("*jump", "*jump up", "*jump into the air", "*leap up"),
        ("*leap into the air", "*jump up on the spot"),
    ),
    "jump forward": (
        ("*jump forward", "*leap forward", "*make a jump forward", "*jump ahead"),
        ("*leap ahead", "*make a leap forward"),
    ),
    "hop": (
        ("*hop on the {s} leg", "*hop on the {s} foot", "*hop forward on the {s} leg", "*jump on one leg, the {s} one"),
        ("*hop ahead on the {s} foot", "*hop on one leg, the {s} one"),
    ),
    "squat": (
        ("*squat", "*do a squat", "*squat down and *stand up again", "*crouch down and *come up again"),
        ("*crouch down and *stand up again", "*squat down and *come up again"),
    ),
    "sit": (
        ("*sit down", "*take a seat", "*sit down on a chair", "*sit on a chair"),
        ("*take a seat on a chair", "*sit down on a seat"),
    ),
    "kick": (
        ("*kick with the {s} leg", "*kick with the {s} foot", "*give a {s} kick", "*kick forward with the {s} leg"),
        ("*give a kick with the {s} foot", "*kick forward with the {s} foot"),
    ),
    "wave": (
        ("*wave with {s hand}", "*wave {s hand}", "*wave {s arm}", "*greet with {s hand}"),
        ("*wave with {s arm}", "*greet with {s arm}"),
    ),
    "raise": (
        ("*raise {s arm}", "*lift {s arm}", "*put {s arm} up", "*hold {s arm} up high", "*raise {s hand}"),
        ("*lift {s hand} up high", "*put {s hand} up"),
    ),
    "reach forward": (
        ("*reach forward with {s hand}", "*reach out with {s hand}", "*reach to the front with {s arm}",
         "*stretch {s arm} out to the front"),
        ("*reach out to the front with {s hand}", "*reach forward with {s arm}"),
    ),
    "reach down": (
        ("*reach down with {s hand}", "*reach to the floor with {s hand}", "*pick something up with {s hand}",
         "*bend and *reach down with {s hand}"),
        ("*reach down to the floor with {s hand}", "*bend and *pick something up with {s hand}"),
    ),
    "punch": (
        ("*punch with {s hand}", "*punch with {s fist}", "*box with {s fist}", "*throw punches with {s hand}"),
        ("*throw punches with {s fist}", "*box with {s hand}"),
    ),
    "bow": (("*bow", "*bow down", "*take a bow", "*make a bow"), ("*make a bow down", "*bow down to the front")),
    "clap": (
        ("*clap", "*clap the hands", "*clap with both hands", "*applaud"),
        ("*clap both hands", "*applaud with both hands"),
    ),
    "dance": (
        ("*dance", "*dance from side to side", "*do a dance step", "*step from side to side to a beat"),
        ("*dance to a beat", "*do a dance step from side to side"),
    ),
}  # fmt: skip
IRREGULAR = {
    "go": ("goes", "going"), "run": ("runs", "running"), "jog": ("jogs", "jogging"), "hop": ("hops", "hopping"),
    "squat": ("squats", "squatting"), "sit": ("sits", "sitting"), "clap": ("claps", "clapping"),
    "step": ("steps", "stepping"), "put": ("puts", "putting"), "do": ("does", "doing"), "zigzag":
    ("zigzags", "zigzagging"), "stand": ("stands", "standing"), "bow": ("bows", "bowing"), "throw":
    ("throws", "throwing"), "box": ("boxes", "boxing"),
}  # fmt: skip

STYLE_WORDS = {
    "neutral": ("normally", "in a normal way", "in a neutral way"),
    "zombie": ("like a zombie", "as a zombie", "in the style of a zombie"),
    "happy": ("happily", "in a happy way", "cheerfully", "in a happy mood"),
    "tired": ("tiredly", "in a tired way", "as if exhausted", "wearily"),
    "proud": ("proudly", "in a proud way", "with pride", "with the hands on the hips"),
    "sneaky": ("sneakily", "in a sneaky way", "stealthily", "like a thief"),
}
STYLE_NOUNS = {
    "neutral": ("neutral", "normal"), "zombie": ("zombie", "zombie"), "happy": ("happy", "cheerful"),
    "tired": ("tired", "exhausted"), "proud": ("proud", "proud"), "sneaky": ("sneaky", "stealthy"),
}  # fmt: skip
SPEED_WORDS = {
    "normal": ("at a normal speed", "at a normal pace"),
    "slow": ("slowly", "at a slow pace", "at a low speed", "without hurry"),
    "fast": ("quickly", "fast", "at a fast pace", "at a high speed"),
}

CAPTIONS: Table = (
    ("{a} {does}", "{a} {does}", "{a} is {doing}", "{do}", "show {a} {doing}", "{a} {doing}", "a clip of {a} {doing}"),
    ("a clip: {a} is {doing}", "show a clip of {a} {doing}", "a motion of {a} {doing}"),
)
ANSWERS: Table = (
    ("{a} {does}", "{a} is {doing}", "{a} {doing}", "a motion of {a} {doing}"),
    ("a clip of {a} {doing}", "a clip: {a} is {doing}"),
)
SEQUENCES: Table = (
    ("{0}, then {1}", "{0} and then {1}", "first {0}, then {1}", "{0}, and after that {1}"),
    ("first {0}, and after that {1}", "first {0} and then {1}"),
)

EDITS: dict[str, Table] = {
    "style": (
        ("do it {v}", "change the style to {n}", "make it {n}", "keep the action, but do it {v}",
         "the style should be {n}", "use a {n} style", "move {v}"),
        ("let the style be {n}", "keep the action, but move {v}", "turn the style to {n}"),
    ),
    "faster": (("speed up", "do it faster", "increase the speed", "move faster", "make it faster"),
               ("let it be faster", "it should be faster")),
    "slower": (("slow down", "do it slower", "reduce the speed", "move slower", "make it slower"),
               ("let it be slower", "it should be slower")),
    "speed": (
        ("do it {v}", "move {v}", "change the speed: {v}", "let the person move {v}",
         "keep the action, but do it {v}", "the same, but {v}"),
        ("keep the action, but move {v}", "change it: the same, but {v}"),
    ),
    "trajectory": (
        ("{do} instead", "now {do}", "change the path: {do}", "the path should change: {do}",
         "take another path: {do}"),
        ("instead, {do}", "let the path change: {do}"),
    ),
    "body_part": (
        ("use {v} instead", "do it with {v}", "do it with {v} instead", "the same, but with {v}", "take {v} for it"),
        ("take {v} instead", "keep the action, but with {v}"),
    ),
    "direction": (
        ("go to the {v} instead", "change the direction to the {v}", "the same, but to the {v}", "do it to the {v}"),
        ("do it to the {v} instead", "the direction should be {v}"),
    ),
    "action": (
        ("instead of {doing}, {do}", "{do} instead of {doing}", "replace {doing} with {redoing}",
         "do not {undo}, but {do}", "change the action: {do}"),
        ("replace it: {do} instead of {doing}", "do not {undo}, {do} instead"),
    ),
    "append": (
        ("then {do}", "{do} at the end", "add {redoing} at the end", "after that, {do}", "and then {do}"),
        ("at the end, {do}", "after that, {do} at the end"),
    ),
    "drop": (
        ("leave out the last action", "do not {undo}", "only {do}", "stop after {redoing}", "remove {doing}"),
        ("leave out {doing}", "only {do} and stop"),
    ),
}  # fmt: skip
JOINTS: Table = (("{0} and {1}", "{0}, and {1}", "{0}; also, {1}", "first {0}, then {1}"), ("{0}, and also {1}",))
POLITE: Table = (("{0}", "{0}", "{0}", "please {0}", "{0}, please", "the person should: {0}"), ("{0}", "please, {0}"))

QUESTIONS: Table = (
    ("what does the person do?", "describe the motion", "what is happening?", "describe what the person does",
     "what kind of motion is it?", "write a caption of the motion"),
    ("describe what is happening", "what is the person doing?", "write what the person does"),
)  # fmt: skip
IN_CONTEXT: dict[str, Table] = {
    "style": (
        ("the action of {a} in the style of {b}", "take the style of {b} and the action of {a}",
         "do what {a} does, in the style of {b}", "the style of {b}, the action of {a}"),
        ("do the action of {a} in the style of {b}", "take the action of {a} and the style of {b}"),
    ),
    "trajectory": (
        ("the action of {a} on the path of {b}", "take the path of {b} and the action of {a}",
         "do what {a} does, on the path of {b}", "the path of {b}, the action of {a}"),
        ("do the action of {a} on the path of {b}", "take the action of {a} and the path of {b}"),
    ),
    "speed": (
        ("the action of {a} at the speed of {b}", "take the speed of {b} and the action of {a}",
         "do what {a} does, at the speed of {b}", "the speed of {b}, the action of {a}"),
        ("do the action of {a} at the speed of {b}", "take the action of {a} and the speed of {b}"),
    ),
}  # fmt: skip
BY_REFERENCE: dict[str, Table] = {
    "style": (
        ("keep the action, take the style of {b}", "do it in the style of {b}", "change the style to that of {b}"),
        ("keep the action, but do it in the style of {b}",),
    ),
    "trajectory": (
        ("keep the action, take the path of {b}", "do it on the path of {b}", "change the path to that of {b}"),
        ("keep the action, but do it on the path of {b}",),
    ),
    "speed": (
        ("keep the action, take the speed of {b}", "do it at the speed of {b}", "change the speed to that of {b}"),
        ("keep the action, but do it at the speed of {b}",),
    ),
}  # fmt: skip
BETWEEN: Table = (
    ("fill in the motion between the two: {0}", "from the start to the end: {0}", "{0}; begin and end as shown",
     "what is between? {0}"),
    ("fill in what is between the start and the end: {0}", "begin and end as shown: {0}"),
)  # fmt: skip
CHECKS: Table = (
    ("does the motion match the text?", "check the result", "is that right?", "look again: does it match?"),
    ("check: does the motion match the text?", "look again and check the result"),
)
RIGHT: Table = (
    ("yes, the motion matches the text.", "yes, that is right.", "it matches the text."),
    ("yes, it matches.",),
)
WRONG: Table = (
    ("no: {is}, but it should be that {should}.", "the motion does not match: {is}, not {should}.",
     "not yet: {is} instead of {should}."),
    ("no, it does not match: {is}, but it should be that {should}.",),
)  # fmt: skip
AGAIN = ("i do it again.", "here is a new one.", "i make a new one.")
PLANS: Table = (
    ("{0}.", "the plan: {0}.", "this means that {0}."),
    ("the plan is that {0}.",),
)
