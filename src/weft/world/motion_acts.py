"""From a script to the joints of its clip."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from weft.world import motion_feet as feet
from weft.world import motion_hands as hands
from weft.world.motion_body import Take, join, joints_of
from weft.world.motion_manner import Manner
from weft.world.motion_scripts import JITTER, Act, Script
from weft.world.motion_styles import STYLE

TEMPO = {"slow": 0.6, "normal": 1.0, "fast": 1.7}


# A take of every action, from standing to standing (or sitting).
MAKERS: dict[str, Callable[[Act, Manner], Take]] = {
    "walk": feet.going,
    "run": feet.going,
    "march": feet.march,
    "turn": feet.turn,
    "jump": feet.jump,
    "hop": feet.hop,
    "squat": feet.squat,
    "sit": feet.sit,
    "kick": feet.kick,
    "wave": hands.wave,
    "raise": hands.raise_hand,
    "reach": hands.reach,
    "punch": hands.punch,
    "bow": hands.bow,
    "clap": hands.clap,
    "dance": hands.dance,
}


def clip_joints(script: Script) -> np.ndarray:
    """The joints of a script, [T, 22, 3] float32 at 20 fps, metres: on the floor, from the origin, facing +z."""
    j = [v / JITTER for v in script.jitter]
    brief = len(script.acts) > 1
    manner = Manner(
        style=STYLE[script.style],
        tempo=TEMPO[script.speed] * (1 + 0.05 * j[0]) * (1.2 if brief else 1.0),
        size=j[1],
        length=j[2],
        more=j[3],
        late=j[4],
        first=int(script.jitter[5] % 2),
        brief=brief,
    )
    joints = joints_of(join([MAKERS[act.action](act, manner) for act in script.acts]))
    joints[..., 1] -= joints[..., 1].min()
    return joints
