"""Making what a recipe names: the trainable, its trained modules, precision, adapters."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft.errors import WeftError, nearest
from weft.models.adapt import add_lora, load_whole, start_lora
from weft.rng import seed_of
from weft.settings import check_arguments, load_object
from weft.train.config import Recipe
from weft.types import Trainable

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """`auto`: cuda if there is one, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise WeftError("run.device cuda: this machine has no CUDA device, use cpu or auto")
    return device


def make_trainable(recipe: Recipe, device: torch.device) -> Trainable:
    """The flow model in `model.path`, or the `trainable` class: its first argument is `model.path` if there is one,
    the others come from `trainable_args`. A class that starts from random weights is seeded by `run.seed`."""
    if recipe.trainable is None:
        from weft.models.load import load

        dtype = DTYPES[recipe.model.dtype]
        backend = recipe.model.attention_backend
        assert recipe.model.path is not None  # checked with the recipe
        return load(
            recipe.model.path, device=device, dtype=dtype, attention_backend=backend, options=recipe.model.options
        )
    kind = load_object(recipe.trainable, "trainable")
    args = dict(recipe.trainable_args)
    known = list(inspect.signature(kind).parameters)
    torch.manual_seed(seed_of(recipe.run.seed, "init"))
    first = [recipe.model.path] if recipe.model.path is not None and known and known[0] not in args else []
    check_arguments(kind, args, f"trainable_args of {recipe.trainable}", given=len(first))
    trainable = kind(*first, **args)
    for module in trainable.modules().values():
        module.to(device)
    return trainable


def choose_modules(recipe: Recipe, trainable: Trainable) -> dict[str, nn.Module]:
    """The trained modules, in fp32 (adapters only with LoRA) and train mode; all others frozen, in eval mode."""
    modules = trainable.modules()
    names = recipe.model.train
    if names is None:
        names = ["transformer"] if recipe.trainable is None else list(modules)
    for name in names:
        if name not in modules:
            raise WeftError(f"model.train: the model has no module '{name}': {nearest(name, modules)}")
    trained = {name: modules[name] for name in names}
    rows = trainable.new_rows() if hasattr(trainable, "new_rows") else {}
    whole = getattr(trainable, "whole", ())  # modules that train whole also beside a LoRA
    if recipe.model.lora is not None and names and set(names) <= set(whole):
        raise WeftError(f"model.lora: {', '.join(names)} trains whole; leave model.lora out, or train a module with it")
    for name, module in modules.items():
        if name not in trained:
            module.requires_grad_(False).eval()
    for name, module in trained.items():
        lora = recipe.model.lora
        if lora is not None and name not in whole:
            add_lora(
                module,
                rank=lora.rank,
                alpha=lora.alpha,
                targets=lora.targets,
                init=lora.init,
                dropout=lora.dropout,
                seed=recipe.run.seed,
                rows=rows.get(name),
            )
            if lora.start is not None:
                start_lora(module, name, Path(lora.start))
        else:
            if recipe.trainable is None:
                module.requires_grad_(True)
            module.float()
            if lora is not None and lora.start is not None:
                load_whole(module, name, Path(lora.start))
        module.train()
        if recipe.model.gradient_checkpointing:
            _enable_checkpointing(name, module)
    return trained


def _enable_checkpointing(name: str, module: Any) -> None:
    if isinstance(module, nn.Linear):
        return  # one layer, such as a critic's head: nothing would be computed again
    for method in ("enable_gradient_checkpointing", "gradient_checkpointing_enable"):  # diffusers, transformers
        if hasattr(module, method):
            getattr(module, method)()
            return
    raise WeftError(f"model.gradient_checkpointing: {name} ({type(module).__name__}) does not support it")


def trained_parameters(trained: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """All parameters that require a gradient, by `<module>.<name>`; shared ones once."""
    seen: set[int] = set()
    found: dict[str, nn.Parameter] = {}
    for prefix, module in trained.items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{prefix}.{name}"] = parameter
    return found


class Buffers:
    """The buffers of trained modules that training has changed (codebooks, running means): part of a checkpoint.

    Constant tables such as position embeddings are left out: a buffer counts once it was written to or replaced.
    """

    def __init__(self, trained: dict[str, nn.Module]) -> None:
        self.trained = trained
        self.first = {k: (id(b), b._version) for k, b in self._all().items()}

    def _all(self) -> dict[str, torch.Tensor]:
        return {f"{p}.{n}": b for p, m in self.trained.items() for n, b in m.named_buffers()}

    def changed(self) -> dict[str, torch.Tensor]:
        return {k: b for k, b in self._all().items() if self.first.get(k) != (id(b), b._version)}

    def load(self, saved: dict[str, torch.Tensor]) -> None:
        buffers = self._all()
        for key, value in saved.items():
            if key not in buffers or buffers[key].shape != value.shape:
                raise WeftError(f"the checkpoint has a buffer {key} {tuple(value.shape)} that the model has not")
            buffers[key].copy_(value)
