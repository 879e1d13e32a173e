"""weft: generate and edit pictures from interleaved instructions; train, post-train and evaluate the models.

    import weft

    model = weft.load("tiny-kontext")
    scene = model.generate("a red star at the top left on a white background", seed=7)
    model.edit(scene, "make the star green", seed=7).save("out.png")
    weft.train("recipe.yaml")

Names are imported on first use (PEP 562), so that `import weft` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from weft.api import Model, load
    from weft.api_motion import MotionModel, load_motion
    from weft.errors import WeftError
    from weft.record import Part, Record, Turn, make_record, read_records, weave, write_records

_HOME = {
    "Model": "weft.api",
    "load": "weft.api",
    "MotionModel": "weft.api_motion",
    "load_motion": "weft.api_motion",
    "Part": "weft.record",
    "Record": "weft.record",
    "Turn": "weft.record",
    "make_record": "weft.record",
    "read_records": "weft.record",
    "weave": "weft.record",
    "write_records": "weft.record",
    "WeftError": "weft.errors",
}

# `weft.train` is the room (`weft.train.run`, `weft.train.plan`), and can be called: weft.train("recipe.yaml").
__all__ = [
    "Model",
    "MotionModel",
    "Part",
    "Record",
    "Turn",
    "WeftError",
    "__version__",
    "load",
    "load_motion",
    "make_record",
    "read_records",
    "weave",
    "write_records",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name == "train":
        return import_module("weft.train")
    raise AttributeError(f"module 'weft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, "train"])
