"""Adapting a model: LoRA as named peft adapters, and the exponential moving average of trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.rng import seed_of


def add_lora(
    module: nn.Module,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    init: str = "gaussian",
    dropout: float = 0.0,
    seed: int = 0,
    name: str = "default",
) -> int:
    """Freeze `module` and add a trainable adapter `name` (fp32) to every linear layer whose name ends in a target.

    Returns the number of adapted layers. `init`: "gaussian" (A normal, B zero) or "default" (A Kaiming, B zero).
    Raises WeftError if a target matches nothing.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]
    for target in targets:
        if not any(n == target or n.endswith(f".{target}") for n in linear):
            raise WeftError(f'lora.targets: no linear layer ends in "{target}" (there is, e.g., {linear[:3]})')
    module.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft scales by alpha / r and accepts fractions
        target_modules=list(targets),
        lora_dropout=dropout,
        init_lora_weights="gaussian" if init == "gaussian" else True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "lora", record=name))
        inject_adapter_in_model(config, module, adapter_name=name)
    count = 0
    for key, parameter in module.named_parameters():
        if f".lora_A.{name}." in key or f".lora_B.{name}." in key:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            count += key.endswith(f"lora_A.{name}.weight")
    return count


def lora_state(module: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors under peft's names (`<layer>.lora_A.weight`)."""
    from peft import get_peft_model_state_dict

    return {k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(module, adapter_name=name).items()}


def save_lora(modules: dict[str, nn.Module], folder: Path, *, name: str = "default") -> Path:
    """Write `folder/pytorch_lora_weights.safetensors` as diffusers' `load_lora_weights` reads it."""
    import json

    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, object] = {}
    for prefix, module in modules.items():
        config = cast(Any, module).peft_config[name].to_dict()
        for key, value in lora_state(module, name).items():
            tensors[f"{prefix}.{key}"] = value
        for key in ("r", "lora_alpha", "target_modules", "lora_dropout", "bias", "use_rslora", "use_dora"):
            value = config[key]
            metadata[f"{prefix}.{key}"] = sorted(value) if isinstance(value, set) else value
    path = folder / "pytorch_lora_weights.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(metadata, sort_keys=True)})
    return path


def start_lora(module: nn.Module, prefix: str, path: Path, *, name: str = "default") -> None:
    """Give the adapter `name` of `module` the weights that `save_lora` wrote for the module `prefix`.

    Raises WeftError if the file is of other layers or another rank, or was trained at another scale (alpha / rank).
    """
    import json

    from peft import set_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    file = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise WeftError(f"lora.start: there is no {file}; give the export folder of an earlier LoRA run")
    try:
        with safe_open(file, framework="pt") as opened:
            own = [key for key in opened.keys() if key.startswith(f"{prefix}.")]
            saved = {key.removeprefix(f"{prefix}."): opened.get_tensor(key) for key in own}
            facts = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except SafetensorError as error:
        raise WeftError(f"lora.start: {file} is not a safetensors file: {error}") from None
    mine = lora_state(module, name)
    if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in mine.items()}:
        odd = sorted(k for k in saved.keys() | mine.keys() if k not in saved or k not in mine or
                     saved[k].shape != mine[k].shape)  # fmt: skip
        raise WeftError(f"lora.start: {file} has other layers or another rank than the recipe, for example {odd[0]}")
    config = cast(Any, module).peft_config[name]
    for key in ("r", "lora_alpha"):
        there = facts.get(f"{prefix}.{key}")
        if there is not None and there != getattr(config, key):
            raise WeftError(f"lora.start: {file} was trained with {key} {there}, the recipe has {getattr(config, key)}")
    set_peft_model_state_dict(module, saved, adapter_name=name)


class Ema:
    """fp32 shadow of named parameters: shadow = d * shadow + (1 - d) * parameter after each optimiser step.

    With `warmup`, d = min(decay, (1 + n) / (10 + n)) at update n (from 0), so the start is forgotten soon.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float, *, warmup: bool = True) -> None:
        self.parameters, self.decay, self.warmup = parameters, decay, warmup
        self.shadow = {k: p.detach().to(torch.float32, copy=True) for k, p in parameters.items()}

    def update(self, n: int) -> None:
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        current = [p.detach().float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.shadow.values()), current, 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The averaged weights stand in the model inside the `with` block; the raw ones return after it."""
        raw = {k: p.data for k, p in self.parameters.items()}
        try:
            for key, parameter in self.parameters.items():
                parameter.data = self.shadow[key].to(parameter.dtype)
            yield
        finally:
            for key, parameter in self.parameters.items():
                parameter.data = raw[key]

    def load(self, shadow: dict[str, Tensor]) -> None:
        """Restore the shadow. Raises WeftError if it is of other parameters."""
        if set(shadow) != set(self.shadow):
            raise WeftError("the checkpoint's EMA weights are of other parameters")
        for key, value in shadow.items():
            self.shadow[key].copy_(value)
