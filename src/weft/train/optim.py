"""Optimisers, learning-rate schedules and the flat form of their state."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.train.config import OptimRecipe


def is_hidden_matrix(name: str, owner: nn.Module, parameter: Tensor, exclude: Iterable[str] = ()) -> bool:
    """Whether Muon takes this parameter: a linear layer's matrix inside a stack of blocks.

    Embeddings, the first and the last projection keep AdamW, as Muon's author advises (Keller Jordan, 2024).
    """
    inside = any(piece.isdigit() for piece in name.split(".")[:-2])
    return parameter.ndim == 2 and isinstance(owner, nn.Linear) and inside and not any(e in name for e in exclude)


class Optimizers:
    """One or two torch optimisers over named parameters, stepped together; learning rates set from the step."""

    def __init__(self, modules: dict[str, nn.Module], config: OptimRecipe, steps: int) -> None:
        self.config, self.steps = config, steps
        self.parameters: dict[str, nn.Parameter] = {}
        matrices: list[tuple[str, nn.Parameter]] = []
        decayed: list[tuple[str, nn.Parameter]] = []
        plain: list[tuple[str, nn.Parameter]] = []
        seen: set[int] = set()
        for prefix, module in modules.items():
            owners = dict(module.named_modules())
            for name, parameter in module.named_parameters():
                if not parameter.requires_grad or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                key = f"{prefix}.{name}"
                self.parameters[key] = parameter
                owner = owners[name.rpartition(".")[0]]
                if config.name == "muon" and is_hidden_matrix(key, owner, parameter, config.muon_exclude):
                    matrices.append((key, parameter))
                elif config.decay == "all" or parameter.ndim > 1:
                    decayed.append((key, parameter))
                else:
                    plain.append((key, parameter))
        if not self.parameters:
            raise WeftError("nothing to train: no parameter of the chosen modules requires a gradient")
        if config.name == "muon" and not matrices:
            raise WeftError("optim.name muon: the trained modules have no matrix inside a block; use adamw")
        self.names: list[list[list[str]]] = []  # [optimiser][group][parameter]
        self.optimizers: list[torch.optim.Optimizer] = []
        self.base: list[float] = []
        betas = (config.betas[0], config.betas[1])
        groups = [(decayed, config.weight_decay), (plain, config.weight_decay if config.decay == "all" else 0.0)]
        adam = [{"params": [p for _, p in g], "weight_decay": d} for g, d in groups if g]
        if adam:
            self.optimizers.append(torch.optim.AdamW(adam, lr=config.lr, betas=betas, eps=config.eps, foreach=True))
            self.names.append([[n for n, _ in g] for g, _ in groups if g])
            self.base.append(config.lr)
        if matrices:
            self.optimizers.append(
                torch.optim.Muon(
                    [p for _, p in matrices],
                    lr=config.muon_lr,
                    weight_decay=config.weight_decay,
                    momentum=config.muon_momentum,
                    adjust_lr_fn=config.muon_adjust,
                )
            )
            self.names.append([[n for n, _ in matrices]])
            self.base.append(config.muon_lr)

    def factor(self, step: int) -> float:
        """The learning rate's share at optimiser step `step` (from 0)."""
        return schedule(self.config, step, self.steps)

    def step(self, step: int) -> None:
        """Update the parameters from their gradients and clear these."""
        factor = self.factor(step)
        for optimizer, base in zip(self.optimizers, self.base, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * factor
            optimizer.step()
        self.zero()

    def zero(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def clip(self, limit: float | None) -> Tensor:
        """Scale the gradients to the norm `limit`; returns the norm before."""
        parameters = [p for p in self.parameters.values() if p.grad is not None]
        return nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)

    def state(self) -> dict[str, Tensor]:
        """The optimisers' state as flat tensors `<parameter>/<name>`."""
        flat: dict[str, Tensor] = {}
        for optimizer, groups in zip(self.optimizers, self.names, strict=True):
            for group, names in zip(optimizer.param_groups, groups, strict=True):
                for name, parameter in zip(names, group["params"], strict=True):
                    for key, value in optimizer.state.get(parameter, {}).items():
                        flat[f"{name}/{key}"] = torch.as_tensor(value)
        return flat

    def load(self, flat: dict[str, Tensor]) -> None:
        """Restore what `state` returned. Raises WeftError when it belongs to other parameters."""
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, value in flat.items():
            name, _, field = key.rpartition("/")
            by_name.setdefault(name, {})[field] = value
        unknown = sorted(set(by_name) - set(self.parameters))
        if unknown:
            raise WeftError(f"the checkpoint's optimiser state is of other parameters, for example {unknown[0]}")
        for optimizer, groups in zip(self.optimizers, self.names, strict=True):
            for group, names in zip(optimizer.param_groups, groups, strict=True):
                for name, parameter in zip(names, group["params"], strict=True):
                    if name not in by_name:
                        continue
                    state = {}
                    for field, value in by_name[name].items():
                        # AdamW counts its steps in a CPU tensor; moments live beside their parameter
                        state[field] = value.clone() if field == "step" else value.to(parameter.device).clone()
                    optimizer.state[parameter] = state


def schedule(config: OptimRecipe, step: int, steps: int) -> float:
    """The share of lr in a step (from 0): warm-up from `warmup_start` to 1, then constant, linear or cosine to `final`.

    The schedules of transformers' `get_scheduler` where `warmup_start` is 0, a share of the steps rounded up as there.
    """
    warmup = math.ceil(config.warmup * steps) if config.warmup < 1 else int(config.warmup)
    if step < warmup:
        return config.warmup_start + (1 - config.warmup_start) * step / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if config.schedule == "constant":
        return 1.0
    share = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.final + (1 - config.final) * share
