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
    rows: Sequence[int] | None = None,
) -> int:
    """Freeze `module` and add a trainable adapter `name` (fp32) to every linear layer whose name ends in a target.

    Returns the number of adapted layers. `init`: "gaussian" (A normal, B zero) or "default" (A Kaiming, B zero).
    `rows`: tokens of a transformers model whose embeddings (in and, where they are tied, out) are trained whole.
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
        trainable_token_indices=None if rows is None else token_tables(module, rows),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "lora", record=name))
        inject_adapter_in_model(config, module, adapter_name=name)
    count = 0
    for key, parameter in module.named_parameters():
        if f".lora_A.{name}." in key or f".lora_B.{name}." in key or key.endswith(f"trainable_tokens_delta.{name}"):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            count += key.endswith(f"lora_A.{name}.weight")
    return count


def token_tables(module: Any, rows: Sequence[int]) -> dict[str, list[int]]:
    """The embedding (and an output layer of its own) of a transformers model, each with `rows`, as peft names them."""
    tables = [module.get_input_embeddings()]
    if not getattr(module.config, "tie_word_embeddings", False):
        tables.append(module.get_output_embeddings())
    return {n: list(rows) for n, m in module.named_modules() if any(m is table for table in tables)}


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
        if not hasattr(module, "peft_config"):  # trained whole beside the adapters
            tensors |= {f"{prefix}.{k}": v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
            continue
        config = cast(Any, module).peft_config[name].to_dict()
        for key, value in lora_state(module, name).items():
            tensors[f"{prefix}.{key}"] = value
        for key in SAVED:
            value = config.get(key)
            if key == "trainable_token_indices" and value is None:
                continue
            metadata[f"{prefix}.{key}"] = sorted(value) if isinstance(value, set) else value
    path = folder / "pytorch_lora_weights.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(metadata, sort_keys=True)})
    return path


def read_lora(path: Path, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the module `prefix` and its settings in what `save_lora` wrote. Raises WeftError."""
    import json

    from safetensors import SafetensorError, safe_open

    file = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise WeftError(f"there is no {file}; give the export folder of an earlier LoRA run")
    try:
        with safe_open(file, framework="pt") as opened:
            own = [key for key in opened.keys() if key.startswith(f"{prefix}.")]
            saved = {key.removeprefix(f"{prefix}."): opened.get_tensor(key) for key in own}
            facts = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except SafetensorError as error:
        raise WeftError(f"{file} is not a safetensors file: {error}") from None
    return saved, {k.removeprefix(f"{prefix}."): v for k, v in facts.items() if k.startswith(f"{prefix}.")}


def load_adapter(module: Any, prefix: str, path: Path, *, name: str = "default") -> None:
    """Put the adapter that `save_lora` wrote for the module `prefix`, token rows included, on a transformers model.

    Raises WeftError if the file has none, or one of other layers.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    saved, facts = read_lora(path, prefix)
    if not saved or "r" not in facts:
        raise WeftError(f"{path}: no LoRA of {prefix} in it")
    options = {key: facts[key] for key in SAVED if key in facts}
    inject_adapter_in_model(LoraConfig(**options), module, adapter_name=name)
    mine = {k: v.shape for k, v in lora_state(module, name).items()}
    if {k: v.shape for k, v in saved.items()} != mine:
        raise WeftError(f"{path}: made for another base model")
    set_peft_model_state_dict(module, saved, adapter_name=name)
    module.requires_grad_(False).eval()


def load_whole(module: nn.Module, prefix: str, path: Path) -> bool:
    """Give a module the weights that it was trained to beside a LoRA; False if the file has none of it, because it did
    not train. Raises WeftError if they do not fit."""
    saved, _ = read_lora(path, prefix)
    if not saved:
        return False
    try:
        module.load_state_dict(saved)
    except RuntimeError as error:
        raise WeftError(f"{path}: the weights of {prefix} do not fit ({str(error).splitlines()[0][:200]})") from error
    return True


def start_lora(module: nn.Module, prefix: str, path: Path, *, name: str = "default") -> None:
    """Give the adapter `name` of `module` the weights that `save_lora` wrote for the module `prefix`.

    Raises WeftError if the file is of other layers or another rank, or was trained at another scale (alpha / rank).
    """
    from peft import set_peft_model_state_dict

    try:
        saved, facts = read_lora(path, prefix)
    except WeftError as error:
        raise WeftError(f"lora.start: {error}") from error
    file = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
    mine = lora_state(module, name)
    if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in mine.items()}:
        odd = sorted(k for k in saved.keys() | mine.keys() if k not in saved or k not in mine or
                     saved[k].shape != mine[k].shape)  # fmt: skip
        raise WeftError(f"lora.start: {file} has other layers or another rank than the recipe, for example {odd[0]}")
    config = cast(Any, module).peft_config[name]
    for key in ("r", "lora_alpha"):
        there = facts.get(key)
        if there is not None and there != getattr(config, key):
            raise WeftError(f"lora.start: {file} was trained with {key} {there}, the recipe has {getattr(config, key)}")
    set_peft_model_state_dict(module, saved, adapter_name=name)


SAVED = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "lora_dropout",
    "bias",
    "lora_bias",
    "use_rslora",
    "use_dora",
    "trainable_token_indices",
)


class Ema:
    """fp32 shadow of named parameters: shadow = d * shadow + (1 - d) * parameter after each optimiser step.

    With `warmup`, d = min(decay, (1 + n) / (10 + n)) at update n (from 0), so the start is forgotten soon; diffusers'
    `EMAModel` (without its own warm-up) has the same d, but 0 at the first update. Of `every` so many updates only the
    last moves the shadow (update_step_interval in yifan123/flow_grpo, flow_grpo/ema.py).
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], decay: float, *, warmup: bool = True, every: int = 1
    ) -> None:
        if every < 1:
            raise WeftError(f"ema.every is {every}: the average never moves, give 1 or more")
        self.parameters, self.decay, self.warmup, self.every = parameters, decay, warmup, every
        self.shadow = {k: p.detach().to(torch.float32, copy=True) for k, p in parameters.items()}

    def update(self, n: int) -> None:
        if (n + 1) % self.every:
            return
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
