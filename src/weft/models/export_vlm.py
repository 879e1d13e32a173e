"""Leaving weft with a VLM: a rewriter's or judge's LoRA merged into its folder, or alone in the layout of peft."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.models.adapt import load_adapter, lora_state
from weft.models.export import Leaver, Loras, fold_strength, merge_adapters
from weft.models.image.metaquery_parts import find_vlm
from weft.models.load import DTYPES
from weft.models.lora import split_weight
from weft.models.rewriter import question
from weft.models.weights import read_json
from weft.record import make_record
from weft.vlm.local import CLASSES, LocalVLM, load_vlm

CARDS = ("weft.json", "judge.json", "critic.json", "critic.safetensors")
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


def vlm_leaver(device: str | None) -> Leaver:
    """Folders or hub ids of Qwen2.5-VL and Qwen3-VL models, with LoRAs of their part `vlm` (`model.lora` of a recipe).
    A LoRA alone becomes `adapter_model.safetensors` and `adapter_config.json`."""

    def save(reader: LocalVLM, out: Path, dtype: str) -> dict[str, Any]:
        folder = Path(reader.model.name_or_path)
        facts = {"merged_layers": merge_adapters(reader.model)}
        reader.model.to(DTYPES[dtype]).save_pretrained(out)
        reader.processor.save(out)
        for name in CARDS:
            if (folder / name).is_file():
                shutil.copy(folder / name, out / name)
        return facts

    def reopen(source: str | Path, out: Path) -> LocalVLM:
        again = load_vlm(find_vlm(str(source), Path()), device=device, dtype="fp32")
        again.model.load_adapter(str(out))
        return again

    return Leaver(lambda source, lora: _open(source, lora, device), probe, save, _save_adapter, reopen)


def _open(source: str | Path, lora: Loras, device: str | None) -> LocalVLM:
    """The VLM in fp32 with its LoRAs on, at their strengths."""
    from peft.tuners.lora import LoraLayer

    reader = load_vlm(find_vlm(str(source), Path()), device=device, dtype="fp32")
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


def _save_adapter(reader: LocalVLM, out: Path) -> dict[str, Any]:
    """Write the adapter `lora0` as peft does; returns what it is."""
    from safetensors.torch import save_file

    fold_strength(reader.model, "lora0")
    out.mkdir(parents=True)
    tensors = {f"base_model.model.{key}": value for key, value in lora_state(reader.model, "lora0").items()}
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = reader.model.peft_config["lora0"].to_dict()
    kept = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    kept |= {"base_model_name_or_path": Path(reader.model.name_or_path).name}
    kept |= {"inference_mode": True, "peft_type": "LORA"}
    text = json.dumps(kept, indent=2, sort_keys=True, default=str) + "\n"
    (out / "adapter_config.json").write_text(text, encoding="utf-8")
    return {"rank": config["r"], "alpha": config["lora_alpha"]}
