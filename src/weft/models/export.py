"""Leaving weft: merged weights as a model folder, or a LoRA with its alpha; what was written is opened and compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import weft
from weft.errors import WeftError
from weft.models.adapt import save_lora
from weft.models.load import DTYPES, load
from weft.models.weights import ADAPTERS
from weft.record import make_record
from weft.rng import normal

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
"""Largest difference of the reloaded model's velocity, relative to its spread, by the dtype of the written weights."""


@dataclass(frozen=True, slots=True)
class Exported:
    """Where the export lies, and how far the reloaded model was from the original (relative)."""

    path: Path
    difference: float


def merge_adapters(module: nn.Module) -> int:
    """Add the active adapters, at their strengths, to the weights of their layers and take them off. Returns the number
    of layers. The sums are made in fp32."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    count = 0
    for name, layer in list(module.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            base: Any = layer.get_base_layer()
            kind = base.weight.dtype
            base.float()
            layer.merge()
            base.to(kind)
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, base)
            count += 1
    if count:
        del module.peft_config
        module._hf_peft_config_loaded = False  # type: ignore[assignment]  # a flag of diffusers and transformers
    return count


@torch.no_grad()
def probe(model: Any) -> Tensor:
    """A velocity of fixed noise, edited picture and text, by which two models are compared."""
    from PIL import Image

    edge = 4 * model.multiple
    source = Image.linear_gradient("L").convert("RGB").resize((edge, edge))
    records = [make_record("make the star red", source, size=(edge, edge), id="probe")]
    shape = (1, model.channels, edge // model.downsample, edge // model.downsample)
    x = normal(shape, 0, "probe")
    return model.velocity(x, torch.tensor([0.5]), model.prepare(model.encode(records))).float().cpu()


def export(
    source: str | Path,
    out: Path,
    *,
    lora: Sequence[str | tuple[str, float]] = (),
    what: str = "model",
    dtype: str = "fp32",
    device: str | None = None,
    options: dict[str, Any] | None = None,
) -> Exported:
    """Write `source` with its `lora` merged as a folder in diffusers layout (`what="model"`), or the one LoRA itself,
    strength folded in, as diffusers reads it (`what="lora"`). `dtype` is that of the written weights (of a model).
    A VLM's folder, with the LoRA of a rewriter or judge, goes the same way (`weft.models.export_vlm`); its LoRA is
    written as peft reads it.

    `export.json` beside the weights says what was exported. The result is then loaded anew and its velocity (a VLM's
    next token) compared with the original's. Raises WeftError if it differs, if `out` exists, and for what
    `weft.models.load.load` refuses.
    """
    if out.exists():
        raise WeftError(f"{out} exists; name a new folder")
    if what not in ("model", "lora"):
        raise WeftError(f"what is {what!r}; choose model or lora")
    if dtype not in TOLERANCE:
        raise WeftError(f"dtype {dtype!r} is unknown; choose one of {', '.join(TOLERANCE)}")
    if what == "lora" and len(lora) != 1:
        raise WeftError(f"{len(lora)} LoRAs given: a LoRA is exported from exactly one (merge several into a model)")
    from weft.models.export_vlm import export_vlm, is_vlm

    if is_vlm(source):
        if options:
            raise WeftError(f"options: a VLM has none, found {', '.join(options)}")
        return export_vlm(source, out, lora=lora, what=what, dtype=dtype, device=device)
    model = load(source, device=device, dtype=torch.float32, lora=lora, options=options)
    before = probe(model)
    if what == "lora":
        config = model.transformer.peft_config["lora0"]
        fold_strength(model.transformer, "lora0")
        save_lora({"transformer": model.transformer}, out, name="lora0")
        facts: dict[str, Any] = {"rank": config.r, "alpha": config.lora_alpha}
    else:
        router = getattr(model, "router", None)
        for name in router.names if router is not None else ():  # they stay adapters, beside the model
            save_lora({"transformer": model.transformer}, out / ADAPTERS[name][0], name=name)
        facts = {"merged_layers": merge_adapters(model.transformer), "dtype": dtype}
        for module in model.modules().values() if dtype != "fp32" else ():
            module.to(DTYPES[dtype])
        model.save(out)
    facts |= {"weft": weft.__version__, "source": str(source), "lora": [str(item) for item in lora], "what": what}
    facts |= {"licence": model.licence}
    del model
    if what == "lora":
        again = load(source, device=device, dtype=torch.float32, lora=[str(out)], options=options)
    else:
        again = load(out, device=device, dtype=torch.float32, options=options)
    return settle(out, before, probe(again), dtype if what == "model" else "fp32", facts)


def settle(out: Path, before: Tensor, after: Tensor, dtype: str, facts: dict[str, Any]) -> Exported:
    """Compare what the original and the reloaded export answer, and write `export.json`. Raises WeftError if they
    differ by more than the rounding of `dtype`."""
    difference = float((after - before).abs().max() / before.std())
    if not difference <= TOLERANCE[dtype]:
        raise WeftError(
            f"{out}: the reloaded export differs from the original by {difference:.2g} of its spread (at most "
            f"{TOLERANCE[dtype]:g} is rounding): do not use it"
        )
    facts["reload_difference"] = difference
    (out / "export.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return Exported(out, difference)


@torch.no_grad()
def fold_strength(module: nn.Module, name: str) -> None:
    """Multiply the adapter by the strength it is used at, so that the written file has it at 1."""
    from peft.tuners.lora import LoraLayer

    for layer in module.modules():
        if isinstance(layer, LoraLayer) and name in layer.lora_B:
            full, adapter = layer.lora_alpha[name] / layer.r[name], layer.lora_B[name]
            cast(nn.Linear, adapter).weight.mul_(layer.scaling[name] / full)
            layer.scaling[name] = full
