"""LoRAs as they are published: every layout at its own strength, checkpoints of trainers, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tiny import tiny_flux_folder, tiny_qwen_edit_folder
from weft import rng
from weft.errors import WeftError
from weft.models.export import merge_adapters
from weft.models.load import load
from weft.models.lora import load_lora, split_weight

LAYER, RANK = "transformer_blocks.0.attn.to_out.0", 4
KOHYA = "lora_unet_double_blocks_0_img_attn_proj"  # the same layer by Black Forest Labs' name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_flux_folder(tmp_path_factory.mktemp("flux") / "model")


@pytest.fixture(scope="module")
def halves(folder):
    weight = load(folder, device="cpu").transformer.get_submodule(LAYER).weight
    return rng.normal((RANK, weight.shape[1]), 0, "down"), rng.normal((weight.shape[0], RANK), 0, "up")


def added(folder, path) -> torch.Tensor:
    """What a LoRA, merged, adds to the layer's weight."""
    adapted, plain = load(folder, device="cpu", lora=[str(path)]), load(folder, device="cpu")
    assert merge_adapters(adapted.transformer) == 1
    found = [m.transformer.get_submodule(LAYER).weight.detach() for m in (adapted, plain)]
    return found[0] - found[1]


@pytest.mark.parametrize(
    ("down", "up", "alpha", "strength"),
    [
        (f"transformer.{LAYER}.lora_A.weight", f"transformer.{LAYER}.lora_B.weight", None, 1.0),
        (f"transformer.{LAYER}.lora_A.weight", f"transformer.{LAYER}.lora_B.weight", f"transformer.{LAYER}.alpha", 0.5),
        (f"base_model.model.{LAYER}.lora_A.weight", f"base_model.model.{LAYER}.lora_B.weight", None, 1.0),
        (f"{LAYER}.lora_A.default.weight", f"{LAYER}.lora_B.default.weight", None, 1.0),
        (f"{LAYER}.lora_down.weight", f"{LAYER}.lora_up.weight", f"{LAYER}.alpha", 0.5),
        (f"diffusion_model.{LAYER}.lora_A.weight", f"diffusion_model.{LAYER}.lora_B.weight", None, 1.0),
        (f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight", f"{KOHYA}.alpha", 0.5),
    ],
)
def test_every_layout_acts_at_its_strength(folder, halves, tmp_path, down, up, alpha, strength):
    state = dict(zip((down, up), halves, strict=True)) | ({alpha: torch.tensor(2.0)} if alpha else {})
    save_file(state, tmp_path / "lora.safetensors")
    expected = strength * halves[1] @ halves[0]
    assert (added(folder, tmp_path / "lora.safetensors") - expected).abs().max() < 1e-5


def test_a_checkpoint_of_edit_r1_acts_with_its_alpha(folder, halves, tmp_path):
    """`checkpoint-N` as its trainer leaves it, with the copy that its converter writes beside."""
    own = tmp_path / "checkpoint-500" / "lora"
    (own / "old").mkdir(parents=True)
    state = {f"base_model.model.{LAYER}.lora_{h}.weight": t for h, t in zip("AB", halves, strict=True)}
    save_file(state, own / "adapter_model.safetensors")
    save_file({k: -t for k, t in state.items()}, own / "old" / "adapter_model.safetensors")
    theirs = {key.replace("base_model.model", "transformer"): t for key, t in state.items()}
    save_file(theirs, own / "adapter_model_converted.safetensors")
    config = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["to_out.0"], "peft_type": "LORA"}
    (own / "adapter_config.json").write_text(json.dumps(config))
    for path in (own, own.parent, own / "adapter_model_converted.safetensors"):
        assert (added(folder, path) - 2 * halves[1] @ halves[0]).abs().max() < 1e-5


def test_qwen_s_distilled_steps_load(tmp_path):
    """Keys as Qwen-Image-Lightning has them."""
    transformer = load(tiny_qwen_edit_folder(tmp_path / "qwen"), device="cpu").transformer
    layer = "transformer_blocks.0.attn.add_k_proj"
    weight = transformer.get_submodule(layer).weight.detach().clone()
    down, up = rng.normal((RANK, weight.shape[1]), 0, "down"), rng.normal((weight.shape[0], RANK), 0, "up")
    state = {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up, f"{layer}.alpha": torch.tensor(1.0)}
    save_file(state, tmp_path / "lightning.safetensors")
    load_lora(transformer, tmp_path / "lightning.safetensors", "lora0")
    merge_adapters(transformer)
    assert (transformer.get_submodule(layer).weight - weight - up @ down / RANK).abs().max() < 1e-5


def test_what_a_file_holds_besides_is_said(folder, halves, tmp_path, caplog):
    state = {f"transformer.{LAYER}.lora_{h}.weight": t for h, t in zip("AB", halves, strict=True)}
    text = {"text_encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 4)}
    save_file(state | text, tmp_path / "text.safetensors")
    added(folder, tmp_path / "text.safetensors")
    assert "its 1 weights for text encoders are left out" in caplog.text
    save_file(state | {"transformer.norm.diff": torch.zeros(4)}, tmp_path / "more.safetensors")
    with pytest.raises(WeftError, match=r"1 of its weights are no LoRA of the transformer, the first is norm\.diff"):
        load(folder, device="cpu", lora=[str(tmp_path / "more.safetensors")])
    save_file(state | {f"transformer.{LAYER}.alpha": torch.tensor(1.0)}, tmp_path / "two.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 8, "target_modules": ["x"]}))
    with pytest.raises(WeftError, match="holds alphas, and its configuration another"):
        load(folder, device="cpu", lora=[str(tmp_path / "two.safetensors")])
    with pytest.raises(WeftError, match="exactly one"):
        load(folder, device="cpu", lora=[str(Path(tmp_path))])


@pytest.mark.parametrize("item", ["some/lora:nan", "some/lora:strong", ("some/lora", float("inf"))])
def test_a_weight_is_a_finite_number(item):
    with pytest.raises(WeftError, match="is not a weight; write path or path:0.8"):
        split_weight(item)
