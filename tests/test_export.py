"""Leaving weft and fitting in: exports that open again, memory presets, licence notes, and the commands for them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from golden.make_unipic2 import picture
from tiny import fill_, tiny_flux_folder, tiny_kontext_folder
from tiny_metaquery import tiny_metaquery_folder, tiny_qwen_folder
from weft.cli.main import main
from weft.errors import WeftError
from weft.models import export_vlm
from weft.models.adapt import add_lora, save_lora
from weft.models.export import export, merge_adapters, probe
from weft.models.licences import LICENCES, find_licence
from weft.models.load import load
from weft.models.memory import Preset, preset, preset_for, weight_bytes
from weft.rng import normal
from weft.vlm.local import load_vlm

GIB = 2.0**30
TARGETS = ["attn.to_q", "attn.to_v"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_kontext_folder(tmp_path_factory.mktemp("kontext") / "model")


@pytest.fixture(scope="module")
def lora(folder, tmp_path_factory):
    """A LoRA whose weights change something: rank 4, alpha 8."""
    model = load(folder, device="cpu")
    add_lora(model.transformer, rank=4, alpha=8, targets=TARGETS)
    with torch.no_grad():
        for name, parameter in model.transformer.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    return save_lora({"transformer": model.transformer}, tmp_path_factory.mktemp("lora"))


# -- export


@pytest.mark.slow
def test_merged_weights_equal_the_adapter_at_its_strength(folder, lora, tmp_path, scale=0.5):
    adapted, plain = load(folder, device="cpu", lora=[(str(lora), scale)]), load(folder, device="cpu")
    before = probe(adapted)
    assert (before - probe(plain)).abs().max() > 0.05  # it does something
    done = export(folder, tmp_path / "merged", lora=[(str(lora), scale)], device="cpu")
    again = load(done.path, device="cpu")
    assert (probe(again) - before).abs().max() < 1e-5 and done.difference < 1e-5
    assert not any("lora" in name for name in again.transformer.state_dict())
    facts = json.loads((tmp_path / "merged" / "export.json").read_text())
    assert facts["merged_layers"] == 4 and facts["what"] == "model"


def test_the_merged_folder_opens_in_plain_diffusers(folder, lora, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    export(folder, tmp_path / "merged", lora=[str(lora)], device="cpu")
    theirs = StableDiffusion3Pipeline.from_pretrained(tmp_path / "merged").transformer.state_dict()
    ours = load(tmp_path / "merged", device="cpu").transformer.state_dict()
    assert all(torch.equal(theirs[key], value) for key, value in ours.items())


def test_a_lora_leaves_with_rank_alpha_and_its_strength(folder, lora, tmp_path):
    before = probe(load(folder, device="cpu", lora=[(str(lora), 0.5)]))
    done = export(folder, tmp_path / "half", lora=[(str(lora), 0.5)], what="lora", device="cpu")
    assert (probe(load(folder, device="cpu", lora=[str(done.path)])) - before).abs().max() < 1e-5
    from diffusers import StableDiffusion3Pipeline
    from safetensors import safe_open

    with safe_open(tmp_path / "half" / "pytorch_lora_weights.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["lora_adapter_metadata"])
    assert facts["transformer.r"] == 4 and facts["transformer.lora_alpha"] == 8
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path / "half")
    layer = pipeline.transformer.transformer_blocks[0].attn.to_q
    assert next(iter(layer.scaling.values())) == 2.0


@pytest.mark.parametrize("kind", ["ranks", "rslora", "bias"])
def test_another_trainers_lora_leaves_at_its_strength(folder, tmp_path, kind):
    """Layers of different ranks, rank-stabilised scaling (arXiv 2312.03732), a bias."""
    from safetensors.torch import save_file

    state, layers = {}, load(folder, device="cpu").transformer
    for k, rank in enumerate((4, 4, 8 if kind == "ranks" else 4)):
        name = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q", "transformer_blocks.0.attn.to_v")[k]
        rows, columns = layers.get_submodule(name).weight.shape
        state[f"transformer.{name}.lora_A.weight"] = normal((rank, columns), k, "down")
        state[f"transformer.{name}.lora_B.weight"] = normal((rows, rank), k, "up") * 0.2
        if kind == "bias":
            state[f"transformer.{name}.lora_B.bias"] = normal((rows,), k, "bias")
            state[f"transformer.{name}.alpha"] = torch.tensor(2.0)
    facts = {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["attn.to_q", "0.attn.to_v"]}
    header = json.dumps({f"transformer.{key}": value for key, value in facts.items()})
    save_file(state, tmp_path / "in.safetensors", {"lora_adapter_metadata": header} if kind == "rslora" else None)
    given = [(str(tmp_path / "in.safetensors"), 0.5)]
    done = export(folder, tmp_path / "out", lora=given, what="lora", device="cpu")
    assert done.difference < 1e-5  # reopened by weft
    from diffusers import StableDiffusion3Pipeline

    theirs = StableDiffusion3Pipeline.from_pretrained(folder)
    theirs.load_lora_weights(done.path)
    ours = load(folder, device="cpu", lora=given)
    x = normal((2, 64), 0, "x")
    for name in ("transformer_blocks.1.attn.to_q", "transformer_blocks.0.attn.to_v"):
        found, expected = (model.transformer.get_submodule(name)(x) for model in (theirs, ours))
        assert torch.allclose(found, expected, atol=1e-5)
        assert (found - layers.get_submodule(name)(x)).abs().max() > 0.01


def test_written_in_16_bits(folder, tmp_path):
    done = export(folder, tmp_path / "half", dtype="bf16", device="cpu")
    assert 0 < done.difference < 5e-2
    assert weight_bytes(tmp_path / "half" / "transformer") == pytest.approx(
        (tmp_path / "half" / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size, rel=0.05
    )


def test_a_wrong_export_is_found(folder, tmp_path, monkeypatch):
    from weft.models.image.sd3_kontext import UniPic2Kontext

    save = UniPic2Kontext.save

    def spoil(self, path):
        fill_(self.transformer.proj_out, "spoilt", 3)
        save(self, path)

    monkeypatch.setattr(UniPic2Kontext, "save", spoil)
    with pytest.raises(WeftError, match="differs from the original.*do not use it"):
        export(folder, tmp_path / "wrong", device="cpu")


def test_a_metaquery_model_leaves_with_its_options(tmp_path):
    model, vlm = tiny_metaquery_folder(tmp_path)
    done = export(model, tmp_path / "out", device="cpu", options={"vlm": str(vlm), "mrope": "grid"})
    assert load(done.path, device="cpu").options.mrope == "grid"


def test_export_refuses(folder, lora, tmp_path):
    with pytest.raises(WeftError, match="exists"):
        export(folder, tmp_path)
    with pytest.raises(WeftError, match="exactly one"):
        export(folder, tmp_path / "x", what="lora")
    with pytest.raises(WeftError, match="choose model or lora"):
        export(folder, tmp_path / "x", what="onnx")
    assert merge_adapters(load(folder, device="cpu").transformer) == 0


# -- memory

SD35 = {"text_encoder_3": 9.5, "transformer": 4.5, "text_encoder_2": 1.4, "text_encoder": 0.3, "vae": 0.2}
KONTEXT = {"transformer": 23.8, "text_encoder_2": 9.5, "text_encoder": 0.3, "vae": 0.2}
QWEN = {"transformer": 40.9, "text_encoder": 16.6, "vae": 0.3}
QUANTIZED = ("transformer", "text_encoder_2", "text_encoder_3", "text_encoder")


@pytest.mark.parametrize(
    ("sizes", "vram", "expected"),
    [
        (SD35, 16, Preset("model", None, True, True)),
        (SD35, 24, Preset("none", None, True, True)),
        (SD35, 48, Preset()),
        (KONTEXT, 16, Preset("model", {"transformer": "4bit", "text_encoder_2": "4bit"}, True, True)),
        (KONTEXT, 24, Preset("model", {"transformer": "4bit"}, True, True)),
        (KONTEXT, 48, Preset()),
        (QWEN, 16, Preset("sequential", None, True, True)),
        (QWEN, 24, Preset("model", {"transformer": "4bit", "text_encoder": "4bit"}, True, True)),
        (QWEN, 48, Preset("model")),
        (QWEN, 80, Preset()),
    ],
)
def test_presets(sizes, vram, expected):
    assert preset(vram, {name: size * 1e9 for name, size in sizes.items()}, QUANTIZED) == expected


def test_presets_are_of_the_folder_and_of_known_sizes_only(folder):
    assert preset_for(folder, 80) == Preset()
    count = sum(p.numel() for p in load(folder, device="cpu").vae.parameters())
    assert weight_bytes(folder / "vae") == 2 * count
    assert load(folder, device="cpu", vram=24).vae.use_tiling
    with pytest.raises(WeftError, match="choose one of 16, 24, 48, 80"):
        load(folder, device="cpu", vram=12)
    with pytest.raises(WeftError, match="leave out vram"):
        load(folder, device="cpu", vram=16, quantization="4bit")


def test_presets_count_the_vlm_that_the_user_names_and_no_weight_twice(folder, tmp_path):
    """A released MetaQuery folder does not say where its VLM is, and some folders hold a second copy in fp16."""
    metaquery, vlm = tiny_metaquery_folder(tmp_path / "metaquery")
    model = load(metaquery, device="cpu", options={"vlm": str(vlm)}, vram=24)
    assert model.vae.use_tiling
    shutil.copytree(folder / "vae", tmp_path / "vae")
    (copy,) = (folder / "vae").glob("*.safetensors")
    shutil.copy(copy, tmp_path / "vae" / copy.name.replace(".safetensors", ".fp16.safetensors"))
    assert weight_bytes(tmp_path / "vae") == weight_bytes(folder / "vae")


# -- licences


def test_licences_name_weights_base_and_data():
    for name, note in LICENCES.items():
        assert note.weights and str(note).startswith("weights: "), name
    assert "Stability" in find_licence("Skywork/UniPic2-Metaquery-9B").base
    assert find_licence("/cache/models--Qwen--Qwen2.5-VL-7B-Instruct/snapshots/ab").weights == "Apache-2.0"
    assert find_licence("mine") is None


def test_a_model_tells_the_licences_of_all_that_it_is_made_of(tmp_path):
    """A base in a folder of any name, with an adapter whose licence differs."""
    base = tiny_flux_folder(tmp_path / "FLUX.1-Kontext-dev")
    transformer = load(base, device="cpu").transformer
    add_lora(transformer, rank=2, alpha=2, targets=TARGETS, name="edit")
    save_lora({"transformer": transformer}, tmp_path / "DreamOmni2" / "edit_lora", name="edit")
    assert "DreamOmni2" not in load(base, device="cpu").licence
    licence = load(base, device="cpu", adapters=tmp_path / "DreamOmni2").licence
    assert "no commercial use of the weights" in licence and "; with DreamOmni2: weights: Apache-2.0" in licence
    metaquery, vlm = tiny_metaquery_folder(tmp_path / "metaquery")
    named = vlm.rename(tmp_path / "Qwen2.5-VL-3B-Instruct")
    assert "Qwen Research" in load(metaquery, device="cpu", options={"vlm": str(named)}).licence


# -- commands


def test_the_commands(folder, lora, tmp_path, capsys):
    assert main(["export", str(folder), "-o", str(tmp_path / "out"), "--lora", f"{lora}:0.5", "--device", "cpu"]) == 0
    assert (tmp_path / "out" / "model_index.json").is_file()
    assert main(["doctor", "--licences"]) == 0
    assert "UniPic2-Metaquery-9B" in capsys.readouterr().out
    model, vlm = tiny_metaquery_folder(tmp_path / "mq")
    picture(64, 64).save(tmp_path / "a.png")
    asked = ["describe", str(tmp_path / "a.png"), "what is it?", "--max-tokens", "4", "--device", "cpu"]
    assert main([*asked, "--vlm", str(vlm)]) == 0
    assert capsys.readouterr().out.strip()
    assert main([*asked, "--vlm", str(tmp_path / "nothing")]) == 2
    made = ["edit", str(tmp_path / "a.png"), "make it red", "-o", str(tmp_path / "b.png"), "--steps", "1"]
    made += ["--guidance", "1", "--device", "cpu", "--size", "64", "--model", str(model), "--option", f"vlm={vlm}"]
    assert main(made) == 0 and (tmp_path / "b.png").is_file()


# -- a VLM


@pytest.fixture(scope="module")
def vlm_lora(tmp_path_factory):
    """A tiny VLM's folder, and a LoRA of it that changes something."""
    root = tmp_path_factory.mktemp("vlm")
    folder = tiny_qwen_folder(root / "model")
    (folder / "weft.json").write_text('{"rewriter": {"fit": "none"}}')
    model = load_vlm(folder, device="cpu").model
    add_lora(model, rank=4, alpha=8, targets=["self_attn.q_proj", "self_attn.v_proj"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    return folder, save_lora({"vlm": model}, root / "lora").parent


def test_a_vlms_lora_is_merged_or_written_for_peft(vlm_lora, tmp_path):
    folder, lora = vlm_lora
    plain = export_vlm.probe(load_vlm(folder, device="cpu"))
    full = export(folder, tmp_path / "full", lora=[str(lora)], device="cpu")
    half = export(folder, tmp_path / "half", lora=[(str(lora), 0.5)], device="cpu")
    alone = export(folder, tmp_path / "alone", lora=[(str(lora), 0.5)], what="lora", device="cpu")
    answers = [export_vlm.probe(load_vlm(done.path, device="cpu")) for done in (full, half)]
    assert (answers[0] - plain).abs().max() > 10 * full.difference and (answers[0] - answers[1]).abs().max() > 1e-3
    reader = load_vlm(folder, device="cpu")
    reader.model.load_adapter(str(alone.path))
    assert torch.allclose(export_vlm.probe(reader), answers[1], atol=1e-4)
    assert json.loads((full.path / "weft.json").read_text()) == {"rewriter": {"fit": "none"}}
    assert json.loads((alone.path / "export.json").read_text())["rank"] == 4
    with pytest.raises(WeftError, match="no LoRA of vlm"):
        export(folder, tmp_path / "x", lora=[str(tmp_path / "full" / "model.safetensors")], device="cpu")
    with pytest.raises(WeftError, match="a VLM has none"):
        export(folder, tmp_path / "x", options={"layout": "mosaic"})
