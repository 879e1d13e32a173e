"""Human movement as data, without networks: clips, features, files, pictures.

>>> from weft.motion import read_motion, write_motion
>>> clip = read_motion("walk.bvh", fps=20)        # the 22 joints of HumanML3D, metres, y up
>>> clip.features().shape                         # [frames - 1, 263]
>>> write_motion(clip, "walk.glb")
"""

from __future__ import annotations

from weft.motion.clip import Motion, from_features, mirror, mirror_text, resample
from weft.motion.features import extract, place, retarget
from weft.motion.files import load_part, read_motion, write_motion
from weft.motion.recover import recover
from weft.motion.rig import TABLES, Rig, to_motion
from weft.motion.skeleton import HUMANML3D, KIT, Layout

__all__ = [
    "HUMANML3D",
    "KIT",
    "TABLES",
    "Layout",
    "Motion",
    "Rig",
    "extract",
    "from_features",
    "load_part",
    "mirror",
    "mirror_text",
    "place",
    "read_motion",
    "recover",
    "resample",
    "retarget",
    "to_motion",
    "write_motion",
]
