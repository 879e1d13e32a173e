"""Leaving weft: merged weights as a model folder, or a LoRA with its alpha; what was written is opened and compared.

Each kind of model says how it is opened, asked and written (`Leaver`); the steps are the same for all (`export`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import weft
from weft.errors import WeftError
from weft.models.adapt import save_lora
from weft.models.load import DTYPES, find_model, load, makes_motion
from weft.models.lora import ADAPTERS
from weft.record import make_record
from weft.rng import normal

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
"""Largest difference of the reloaded model's answer, relative to its spread, by the dtype of the written weights."""
Loras = Sequence[str | tuple[str, float]]


@dataclass(frozen=True, slots=True)
class Exported:
    """Where the export lies, and how far the reloaded model was from the original (relative)."""

    path: Path
    difference: float


@dataclass(frozen=True, slots=True)
class Leaver:
    """A kind of model: `open` (folder, LoRAs), what it answers to a fixed question (`probe`), and how its `model`, its
    adapters still on, is written with these merged (`save`: model, folder, dtype), or how the one LoRA of the model is
    (`save_lora`: model, folder). Both return facts for export.json. `reopen` opens (folder, the written LoRA) where
    this is not in the form that `open` reads."""

    open: Callable[[str | Path, Loras], Any]
    probe: Callable[[Any], Tensor]
    save: Callable[[Any, Path, str], dict[str, Any]]
    save_lora: Callable[[Any, Path], dict[str, Any]]
    reopen: Callable[[str | Path, Path], Any] | None = None


def merge_adapters(module: nn.Module) -> int:
    """Add the active adapters, at their strengths, to the weights of their layers and take them off. Returns the number
    of layers. The sums are made in fp32."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import TrainableTokensWrapper

    count = 0
    for name, layer in list(module.named_modules()):
        if isinstance(
            layer, TrainableTokensWrapper
        ):  # rows of an embedding; an output layer that is tied has them, too
            base: Any = layer.token_adapter.get_base_layer()
            if layer.token_adapter.tied_adapter is None:
                layer.token_adapter.merge()
        elif isinstance(layer, BaseTunerLayer) and not name.endswith(".token_adapter"):
            base = layer.get_base_layer()
            kind = base.weight.dtype
            base.float()
            layer.merge()
            base.to(kind)
            count += 1
        else:
            continue
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, base)
    if count:
        del module.peft_config
        module._hf_peft_config_loaded = False  # type: ignore[assignment]  # a flag of diffusers and transformers
    return count


@torch.no_grad()
def probe(model: Any) -> Tensor:
    """Velocities of fixed noise, edited picture and text, by which two models are compared; of a model with routed
    adapters also beside a reference, edited and made anew, which is where these act."""
    from PIL import Image

    edge = 4 * model.multiple
    source = Image.linear_gradient("L").convert("RGB").resize((edge, edge))
    routed = getattr(model, "router", None) is not None
    records = [
        make_record("make the star red", picture, references=references, size=(edge, edge), id="probe")
        for picture, references in [(source, []), (source, [source]), (None, [source])][: 3 if routed else 1]
    ]
    shape = (model.channels, edge // model.downsample, edge // model.downsample)
    x = normal(shape, 0, "probe").expand(len(records), *shape)
    return model.velocity(x, torch.full((len(records),), 0.5), model.prepare(model.encode(records))).float().cpu()


def export(
    source: str | Path,
    out: Path,
    *,
    lora: Loras = (),
    what: str = "model",
    dtype: str = "fp32",
    device: str | None = None,
    options: dict[str, Any] | None = None,
) -> Exported:
    """Write `source` with its `lora` merged as a folder of its kind (`what="model"`), or the one LoRA itself
    (`what="lora"`), strength folded in. `dtype` is that of the written weights (of a model).

    Picture models leave in diffusers' layout, and their LoRA as diffusers reads it; a VLM, with the LoRA of a rewriter
    or judge, as transformers and peft read it (`weft.models.export_vlm`); models of movement, whose LoRA holds token
    rows and a head, too, as weft and transformers do (`weft.models.motion.export`).

    `export.json` beside the weights says what was exported. The result is then loaded anew, and what it answers is
    compared with the original's answer. Raises WeftError if they differ, if `out` exists, and for what
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
    kind = leaver(source, device, options)
    model = kind.open(source, lora)
    before = kind.probe(model)
    if what == "lora":
        facts = kind.save_lora(model, out)
    else:
        facts = kind.save(model, out, dtype) | {"dtype": dtype}
    facts |= {"weft": weft.__version__, "source": str(source), "lora": [str(item) for item in lora], "what": what}
    del model
    if what == "model":
        again = kind.open(out, ())
    else:
        again = kind.reopen(source, out) if kind.reopen is not None else kind.open(source, [str(out)])
    difference = float((kind.probe(again) - before).abs().max() / before.std())
    most = TOLERANCE[dtype if what == "model" else "fp32"]
    if not difference <= most:
        raise WeftError(
            f"{out}: the reloaded export differs from the original by {difference:.2g} of its spread (at most "
            f"{most:g} is rounding): do not use it"
        )
    facts["reload_difference"] = difference
    (out / "export.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return Exported(out, difference)


def leaver(source: str | Path, device: str | None, options: dict[str, Any] | None) -> Leaver:
    """The kind of a model. Raises WeftError for options that it has not."""
    from weft.models.export_vlm import is_vlm, vlm_leaver

    other = "a VLM" if is_vlm(source) else "a model of movement" if makes_motion(find_model(str(source))) else None
    if other is None:
        return flow_leaver(device, options)
    if options:
        raise WeftError(f"options: {other} has none, found {', '.join(options)}")
    if other == "a VLM":
        return vlm_leaver(device)
    from weft.models.motion.export import motion_leaver

    return motion_leaver(device)


def flow_leaver(device: str | None, options: dict[str, Any] | None) -> Leaver:
    """Picture models, opened with the family's `options`."""

    def save(model: Any, out: Path, dtype: str) -> dict[str, Any]:
        router = getattr(model, "router", None)
        for name in router.names if router is not None else ():  # they stay adapters, beside the model
            save_lora({"transformer": model.transformer}, out / ADAPTERS[name][0], name=name)
        facts = {"merged_layers": merge_adapters(model.transformer), "licence": model.licence}
        for module in model.modules().values() if dtype != "fp32" else ():
            module.to(DTYPES[dtype])
        model.save(out)
        return facts

    def save_one(model: Any, out: Path) -> dict[str, Any]:
        config = model.transformer.peft_config["lora0"]
        fold_strength(model.transformer, "lora0")
        parts = {name: model.modules()[name] for name in ("transformer", *model.brought)}
        save_lora(parts, out, name="lora0")
        return {"rank": config.r, "alpha": config.lora_alpha, "licence": model.licence}

    def open_(folder: str | Path, lora: Loras) -> Any:
        return load(folder, device=device, dtype=torch.float32, lora=lora, options=options)

    return Leaver(open_, probe, save, save_one)


@torch.no_grad()
def fold_strength(module: nn.Module, name: str) -> None:
    """Multiply the adapter by the strength it is used at, so that the written file, at alpha / rank, has it at 1."""
    from peft.tuners.lora import LoraLayer

    for layer in module.modules():
        if isinstance(layer, LoraLayer) and name in layer.lora_B:
            full = layer.lora_alpha[name] / layer.r[name]
            for parameter in layer.lora_B[name].parameters():  # a few LoRAs have a bias
                parameter.mul_(layer.scaling[name] / full)
            layer.scaling[name] = full
    cast(Any, module).peft_config[name].use_rslora = False  # alpha / sqrt(rank): in the weights now
