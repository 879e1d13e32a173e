"""The embedded world: procedural scenes with exact targets, and the oracle that measures truth by the program."""

from weft.world.records import World, records, split_of
from weft.world.render import render
from weft.world.scene import Scene, Thing

__all__ = ["Scene", "Thing", "World", "records", "render", "split_of"]
