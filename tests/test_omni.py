"""tiny-omni's way into the zoo: parts shared with another model, adapters beside them, and who uses it by default."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, T5EncoderModel

import weft
from golden.make_unipic2 import picture
from tiny import tiny_kontext_folder
from weft.cli.options import ModelOptions
from weft.cli.shipped import picture_model, zoo_models
from weft.errors import WeftError
from weft.models.adapt import add_lora, save_lora
from weft.models.build_flux import build_flux
from weft.models.export import export
from weft.models.image.flux_kontext import FluxKontext
from weft.models.load import load
from weft.models.memory import preset_for
from weft.models.share import main, share
from weft.record import make_record
from weft.train import read_recipe, run
from weft.train.loop import Trainer

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "tiny"
TRANSFORMER = {
    "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32,
    "axes_dims_rope": [16, 8, 8], "guidance_embeds": False,
}  # fmt: skip
TARGETS = ["attn.to_q", "attn.to_v", "proj_out"]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A zoo of a Kontext and an omni model with two adapters, which shares its parts; and the omni model as trained."""
    root = tmp_path_factory.mktemp("package")
    kontext = tiny_kontext_folder(root / "zoo" / "tiny-kontext")
    whole = build_flux({"transformer": TRANSFORMER, "resolution": 64}, kontext, root / "trained")
    model = load(whole, device="cpu")
    with torch.no_grad():  # a velocity that is not zero
        for k, parameter in enumerate(model.transformer.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k)) * 0.05)
    shutil.rmtree(whole)
    model.save(whole)
    adapters = {}
    for k, name in enumerate(("edit", "generation")):
        model = load(whole, device="cpu")
        add_lora(model.transformer, rank=2, alpha=4, targets=TARGETS)
        with torch.no_grad():
            for key, parameter in model.transformer.named_parameters():
                if "lora_B" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k)) * 0.5)
        adapters[name] = save_lora({"transformer": model.transformer}, root / name).parent
    out = share(whole, kontext, root / "zoo" / "tiny-omni", adapters=adapters, card={"steps": 12})
    return root, whole, out


def requests():
    pictures = [picture(64, 64).rotate(90 * k) for k in range(3)]
    return [
        make_record("a star", size=(64, 64), id="text"),
        make_record("make it red", pictures[0], size=(64, 64), id="edit"),
        make_record("the colour of picture 2", pictures[0], references=pictures[1:2], size=(64, 64), id="refer"),
        make_record("both of them", references=pictures[:2], size=(64, 64), id="make"),
    ]


@torch.no_grad()
def velocities(model):
    x = torch.randn(1, model.channels, 8, 8, generator=torch.Generator().manual_seed(5))
    return [model.velocity(x, torch.tensor([0.7]), model.prepare(model.encode([record]))) for record in requests()]


def test_shared_parts_are_named_and_the_model_is_the_same(zoo):
    root, whole, out = zoo
    card = json.loads((out / "weft.json").read_text())
    assert card["parts"] == {"vae": "../tiny-kontext/vae", "text_encoder_2": "../tiny-kontext/text_encoder_3"}
    assert card["steps"] == 12 and card["resolution"] == 64
    assert not (out / "vae").exists() and (out / "edit_lora").is_dir() and (out / "gen_lora").is_dir()
    routed, base = load(out, device="cpu"), load(whole, device="cpu")
    after, before = velocities(routed), velocities(base)
    for name, own, plain in zip(("text", "edit", "refer", "make"), after, before, strict=True):
        same = float((own - plain).abs().max()) < 0.02 * float(plain.std())  # half precision
        assert same == (name in ("text", "edit"))  # the adapters work where references are, and only there
    routed.router.switch(None)
    routed.router = None  # one picture to edit: to the last bit what the base alone makes of it
    assert all(torch.equal(own, alone) for own, alone in zip(after[:2], velocities(routed)[:2], strict=True))
    assert preset_for(out, 16).offload == "none"


def test_an_export_has_every_part_and_keeps_the_adapters(zoo, tmp_path):
    _, _, out = zoo
    done = export(out, tmp_path / "alone", device="cpu")
    assert (done.path / "vae").is_dir() and "parts" not in json.loads((done.path / "weft.json").read_text())
    again = load(done.path, device="cpu")
    assert again.router is not None and again.router.names == ("edit", "generation")
    for one, other in zip(velocities(load(out, device="cpu")), velocities(again), strict=True):
        assert (one - other).abs().max() < 1e-4


def test_what_is_not_there_is_named(zoo, tmp_path):
    root, whole, out = zoo
    lonely = tmp_path / "tiny-omni"
    shutil.copytree(out, lonely)
    with pytest.raises(WeftError, match="its part vae is kept in .*tiny-kontext/vae, which is not there"):
        load(lonely, device="cpu")
    (lonely / "weft.json").write_text('{"parts": ["vae"]}')
    with pytest.raises(WeftError, match="parts must map names to folders"):
        load(lonely, device="cpu")
    with pytest.raises(WeftError, match="exists"):
        share(whole, root / "zoo" / "tiny-kontext", out)
    with pytest.raises(WeftError, match="adapter 'style' is unknown"):
        share(whole, root / "zoo" / "tiny-kontext", tmp_path / "x", adapters={"style": root})
    words = [str(whole), str(root / "zoo" / "tiny-kontext"), str(tmp_path / "y")]
    assert main([*words, "--adapter", "edit"]) == 2
    assert main([*words, "--adapter", f"edit={tmp_path / 'none'}"]) == 2


def test_references_go_to_tiny_omni_where_it_ships(zoo, monkeypatch):
    root, _, out = zoo
    monkeypatch.setattr(weft, "__file__", str(root / "__init__.py"))
    assert set(zoo_models()) == {"tiny-kontext", "tiny-omni"}
    assert picture_model(references=True) == "tiny-omni" and picture_model(references=False) == "tiny-kontext"
    assert ModelOptions(model="mine").name(references=True) == "mine"
    made = ModelOptions(device="cpu").load(references=True)
    assert made.name == "tiny-omni" and made.defaults.steps == 12
    (output,) = made.run(requests()[3:], seeds=[1])
    assert output.image.size == (64, 64) and output.metadata["model"] == "tiny-omni"
    monkeypatch.setattr(weft, "__file__", str(Path(root / "elsewhere" / "__init__.py")))
    assert picture_model(references=True) == "tiny-kontext"


def test_the_tours_stage_on_references(zoo, tmp_path, monkeypatch):
    from weft import tour
    from weft.report.page import Page
    from weft.tour_omni import ASKED, refer, referred_section

    monkeypatch.setattr(weft, "__file__", str(zoo[0] / "__init__.py"))
    monkeypatch.setattr("weft.tour_omni.ASKED", ASKED[2:4])
    found, lines = tour.Findings(tour.Pace(0.01, 0.01, 0.01, 0.01)), []
    refer(None, found, tmp_path, 0, lines.append)
    assert len(found.referred) == len(lines) == 2 and "picture 4" in lines[0]
    assert len(list((tmp_path / "pictures").glob("refer-1*.png"))) == 1 + 4
    page = Page("A tour of weft", "", {}, [])
    referred_section(page, found, 5)
    text = page.write(tmp_path / "report.html").read_text()
    assert "5. Refer to pictures" in text and text.count("data:image/png;base64") >= 4 + 2 + 2 * 2


def released(whole, folder):
    """A copy whose configurations are as old releases have them: what is a default today is left out."""
    shutil.copytree(whole, folder)
    for part in ("vae", "transformer"):
        config = json.loads((folder / part / "config.json").read_text())
        fewer = {k: v for k, v in config.items() if v is not None and k not in ("act_fn", "force_upcast", "patch_size")}
        text = json.dumps(fewer | {"_diffusers_version": "0.30.0", "_name_or_path": "../elsewhere"})
        (folder / part / "config.json").write_text(text)


def noted(monkeypatch, kind, name):
    """The positional arguments of every call of a method from now on."""
    seen, whole = [], getattr(kind, name)

    def method(self, *args, **options):
        seen.append(args)
        return whole(self, *args, **options)

    monkeypatch.setattr(kind, name, method)
    return seen


@pytest.mark.slow
def test_the_adapters_train_on_what_the_base_has_encoded(zoo, tmp_path, monkeypatch):
    """The three recipes in turn, as `make tiny-omni` runs them, on few records for two steps each."""
    monkeypatch.chdir(tmp_path)  # their folders are relative
    released(zoo[1], Path("runs/tiny/omni_init"))

    def few(name, *more):
        path = RECIPES / f"omni_{name}.yaml"
        counts = [f"data.{k}.source.args.count=2" for k in range(len(read_recipe(path).data))]
        off = ["run.validate_every=0", "run.grid_every=0", "method.options.text_dropout=0"]
        return read_recipe(path, [*counts, *off, "run.steps=2", "run.batch_size=2", "run.precision=fp32", *more])

    def quiet(line):
        pass

    encoded = noted(monkeypatch, FluxKontext, "examples")
    run(few("base"), say=quiet)
    assert sum(len(records) for (records,) in encoded) == 2 * 11
    for name in ("edit", "generation"):
        encoded.clear()
        run(few(name), say=quiet)
        new = [record for (records,) in encoded for record in records]
        assert len(new) == 2 * 4 and all(record.instruction == record.meta["standard"] for record in new)

    kinds = ((AutoencoderKL, "encode"), (CLIPTextModel, "forward"), (T5EncoderModel, "forward"))
    calls = [noted(monkeypatch, *kind) for kind in kinds]
    assert run(few("edit", "run.folder=runs/again"), say=quiet).step == 2
    assert calls == [[], [], []]

    base = Path("runs/tiny/omni_base/export")
    for part, key in (("vae", "encoder.conv_out.bias"), ("text_encoder", "final_layer_norm"), ("text_encoder_2", "wo")):
        changed = shutil.copytree(base, tmp_path / f"other_{part}")
        (file,) = (changed / part).glob("*.safetensors")
        tensors = load_file(file)
        name = next(name for name in tensors if key in name)
        save_file(tensors | {name: tensors[name] * 1.01}, file, metadata={"format": "pt"})
        encoded.clear()
        trainer = Trainer(few("edit", f"model.path={changed}", f"run.folder=runs/{part}"), {}, quiet)
        trainer.prepare_data()
        assert sum(len(records) for (records,) in encoded) == 2 * 8, part
    assert all(calls)
