"""What the loop asks of a training method. It never asks which one it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from weft.errors import WeftError, nearest
from weft.settings import load_object
from weft.train.config import Recipe
from weft.train.fed import Fed
from weft.train.feed import Feed
from weft.train.parallel import Processes
from weft.types import Draw, Example, Loss

METHODS = {
    "sft": "weft.train.sft:Sft",
    "nft": "weft.train.nft:method",
    "grpo": "weft.train.grpo:method",
}


@dataclass(slots=True)
class Setting:
    """What the loop hands to a method. `model` is the trainable; `parameters` the trained ones of the modules
    `trained`; `reward` what was passed to `weft.train.run`; `stopped` says whether a signal asked to stop."""

    recipe: Recipe
    model: Any
    trained: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]
    feed: Feed
    processes: Processes
    device: torch.device
    reward: Any
    autocast: Callable[[], AbstractContextManager[Any]]
    stopped: Callable[[], bool]
    say: Callable[[str], None]
    file: str = "recipe"

    @property
    def lora(self) -> bool:
        """Whether nothing but a LoRA trains, so that the network without it is what it started from."""
        return all(hasattr(module, "peft_config") for module in self.trained.values())

    @property
    def rollout(self) -> Any:
        return self.recipe.rollout


@dataclass(slots=True)
class Cost:
    """What a method adds to rollouts, for `plan`: noise levels trained of each sample, forward passes without a
    gradient at each of them (old policy, reference), and copies of the trained weights that it keeps."""

    levels: int
    extra: int
    copies: int


class Method(Protocol):
    """A loss, and what has to happen around it. Constructed as `kind(setting, options)`."""

    def batch(self, step: int) -> Fed | None:
        """This process's items of an optimiser step; None if a signal asked to stop before they were there."""
        ...

    def loss(self, items: Sequence[Any], draw: Draw) -> Loss:
        """Per-item losses of one micro-batch of `batch`."""
        ...

    def stepped(self, step: int) -> dict[str, float]:
        """After an optimiser step, `step` of them done; what it returns is logged."""
        ...

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint must hold beside weights, optimiser and EMA. All processes call it."""
        ...

    def state(self) -> dict[str, Any]:
        """The same, as JSON."""
        ...

    def load(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Continue after `step` optimiser steps with what `tensors` and `state` returned then."""
        ...

    def held_out(
        self, examples: Sequence[Example], ids: Sequence[str], sigmas: Sequence[float], seed: int, batch: int
    ) -> dict[str, float]:
        """The supervised loss of held-out examples."""
        ...


def make_method(setting: Setting) -> Method:
    """The method that the recipe names: a known one, or a dotted path to the user's. Raises WeftError."""
    name = setting.recipe.method.name
    if name not in METHODS and ":" not in name:
        raise WeftError(f"{setting.file}: method.name: there is no method '{name}': {nearest(name, METHODS)}")
    kind = load_object(METHODS.get(name, name), "method.name")
    made: Method = kind(setting, setting.recipe.method.options)
    return made
