"""Several LoRA adapters in one model, each applied to the samples of a batch that ask for it.

DreamOmni2 (arXiv 2510.06679, section 3.2) trains one adapter for editing and one for generation, so that FLUX Kontext
keeps its own editing: an adapter is switched on as soon as a reference picture is there. The release
(dvlab-research/DreamOmni2) runs the two as separate programs, each with its adapter always on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError

EDIT, GENERATION = "edit", "generation"
ROUTES = (EDIT, GENERATION)


def route_of(source: bool, pictures: int) -> str | None:
    """The adapter of a request: whether its first picture is a source to be edited, and how many pictures it has.

    An edit of one picture is the base model's own task; with references beside the source it is `edit`'s; pictures
    without a source are references of a `generation`; without any picture nothing is added to the base.
    """
    if pictures == 0 or (source and pictures == 1):
        return None
    return EDIT if source else GENERATION


class Router:
    """Adds the low-rank updates of the routed adapters `names` to their own rows; other adapters act as before.

    The adapters must be loaded (peft, plain LoRA). `switch` sets the rows of the calls to come, and stays in force,
    so that gradient checkpointing recomputes with the same ones.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.rows: dict[str, Tensor | None] = {}  # None: every row
        adapted: list[Any] = [m for m in module.modules() if hasattr(m, "lora_A")]
        self.layers = [layer for layer in adapted if any(name in layer.lora_A for name in self.names)]
        for name in self.names:
            if not any(name in layer.lora_A for layer in self.layers):
                raise WeftError(f"no adapter {name!r} is loaded; load its LoRA first")
        for layer in self.layers:
            if any(name in getattr(layer, "lora_variant", {}) for name in self.names):
                raise WeftError("a routed adapter must be a plain LoRA; DoRA and its kin are not supported")
            layer.set_adapter([name for name in layer.active_adapters if name not in self.names])
            layer.register_forward_hook(self._add)

    def switch(self, routes: Sequence[str | None] | None) -> None:
        """Which adapter each row of the next calls takes (None: the base); None as a whole switches all off."""
        self.rows = {}
        for name in self.names:
            own = [i for i, route in enumerate(routes or ()) if route == name]
            if own:
                self.rows[name] = None if routes and len(own) == len(routes) else torch.tensor(own)

    def _add(self, layer: Any, args: tuple[Any, ...], out: Tensor) -> Tensor:
        if not self.rows or layer.disable_adapters:
            return out
        dtype = out.dtype
        for name, rows in self.rows.items():
            if name not in layer.lora_A:
                continue
            down, up, scale = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
            x = args[0]
            if rows is None:
                out = out + up(down(x.to(down.weight.dtype))) * scale
                continue
            rows = rows.to(out.device)
            delta = up(down(x[rows].to(down.weight.dtype))) * scale
            out = out.to(delta.dtype).index_add(0, rows, delta)
        return out.to(dtype)
