"""Leaving weft with a VLM: a rewriter's or judge's LoRA merged into its folder, or alone in the layout of peft."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import weft
from weft.models.adapt import load_adapter, lora_state
from weft.models.export import Exported, fold_strength, merge_adapters, settle
from weft.models.image.metaquery_parts import find_vlm
from weft.models.load import DTYPES, split_weight
from weft.models.rewriter import question
from weft.models.weights import read_json
from weft.record import make_record
from weft.vlm.local import CLASSES, LocalVLM, load_vlm

CARDS = ("weft.json", "judge.json", "critic.safetensors")
"""What weft keeps beside a VLM's weights: how it answers."""


def is_vlm(source: str | Path) -> bool:
    """Whether a folder is a VLM's, by its configuration."""
    return read_json(Path(source) / "config.json").get("model_type") in CLASSES


@torch.no_grad()
def probe(reader: LocalVLM) -> Tensor:
    """The scores [V] of the next token after a fixed question with a picture, by which two models are compared."""
    from PIL import Image

    source = Image.linear_gradient("L").convert("RGB").resize((56, 56))
    asked = reader.encode(question(make_record("make the star red", source, id="probe"), "none"))
    device = reader.model.device
    output = reader.model(
        input_ids=asked.ids[None].to(device),
        attention_mask=torch.ones_like(asked.ids)[None].to(device),
        pixel_values=torch.cat(asked.patches).to(device, reader.model.dtype),
        image_grid_thw=asked.grids.to(device),
        mm_token_type_ids=asked.kinds[None].int().to(device),
    )
    return output.logits[0, -1].float().cpu()


def export_vlm(
    source: str | Path,
    out: Path,
    *,
    lora: Sequence[str | tuple[str, float]] = (),
    what: str = "model",
    dtype: str = "fp32",
    device: str | None = None,
) -> Exported:
    """As `weft.models.export.export`, for the folder or hub id of a Qwen2.5-VL or Qwen3-VL model and LoRAs of its part
    `vlm` (`model.lora` of a recipe). A LoRA alone becomes `adapter_model.safetensors` and `adapter_config.json`."""
    folder = find_vlm(str(source), Path())
    reader = _open(folder, lora, device)
    before = probe(reader)
    facts: dict[str, Any] = {"weft": weft.__version__, "source": str(source), "what": what}
    facts |= {"lora": [str(item) for item in lora]}
    if what == "lora":
        fold_strength(reader.model, "lora0")
        facts |= _save_adapter(reader.model, folder, out)
        again = load_vlm(folder, device=device, dtype="fp32")
        again.model.load_adapter(str(out))
    else:
        facts |= {"merged_layers": merge_adapters(reader.model), "dtype": dtype}
        reader.model.to(DTYPES[dtype]).save_pretrained(out)
        reader.processor.save(out)
        for name in CARDS:
            if (folder / name).is_file():
                shutil.copy(folder / name, out / name)
        again = load_vlm(out, device=device, dtype="fp32")
    return settle(out, before, probe(again), dtype if what == "model" else "fp32", facts)


def _open(folder: Path, lora: Sequence[str | tuple[str, float]], device: str | None) -> LocalVLM:
    """The VLM in fp32 with its LoRAs on, at their strengths."""
    from peft.tuners.lora import LoraLayer

    reader = load_vlm(folder, device=device, dtype="fp32")
    names = [f"lora{k}" for k in range(len(lora))]
    weights = []
    for name, item in zip(names, lora, strict=True):
        path, weight = split_weight(item)
        load_adapter(reader.model, "vlm", path, name=name)
        weights.append(weight)
    for layer in reader.model.modules():
        if isinstance(layer, LoraLayer):
            own = [name for name in names if name in layer.lora_A]
            layer.set_adapter(own)
            for name in own:
                layer.set_scale(name, weights[names.index(name)])
    return reader


def _save_adapter(model: Any, folder: Path, out: Path) -> dict[str, Any]:
    """Write the adapter `lora0` as peft does; returns what it is."""
    from safetensors.torch import save_file

    out.mkdir(parents=True)
    tensors = {f"base_model.model.{key}": value for key, value in lora_state(model, "lora0").items()}
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["lora0"].to_dict()
    kept = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    kept |= {"base_model_name_or_path": folder.name, "inference_mode": True, "peft_type": "LORA"}
    text = json.dumps(kept, indent=2, sort_keys=True, default=str) + "\n"
    (out / "adapter_config.json").write_text(text, encoding="utf-8")
    return {"rank": config["r"], "alpha": config["lora_alpha"]}
