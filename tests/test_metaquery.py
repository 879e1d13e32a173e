"""UniPic2-MetaQuery: parity with the public code, positions, caching, what trains, and the released folder layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from golden.make_metaquery import GUIDANCE, JOBS, NEGATIVE, PROMPT, STEPS
from golden.make_unipic2 import noise, picture
from tiny import tiny_kontext_folder
from tiny_metaquery import tiny_metaquery_folder, tiny_qwen, tiny_qwen_folder
from weft.errors import WeftError
from weft.models.flow import FlowLossConfig, flow_matching_loss
from weft.models.image.connector import StableDiffusion3Conditioner, initialise
from weft.models.image.metaquery import UniPic2MetaQuery, positions
from weft.models.image.metaquery_parts import open_metaquery
from weft.models.load import load
from weft.record import make_record
from weft.sample.rollout import sample_flow
from weft.train import read_recipe
from weft.types import Draw, FlowModel

TOLERANCE = 1e-5
SMALL = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    return tiny_metaquery_folder(tmp_path_factory.mktemp("metaquery"))


@pytest.fixture(scope="module")
def model(folders) -> UniPic2MetaQuery:
    return load(folders[0], device="cpu", options={"vlm": str(folders[1])}, resolution=64)


def opened(folders, **options) -> UniPic2MetaQuery:
    return open_metaquery(str(folders[0]), vlm=str(folders[1]), dtype="fp32", resolution=64, **options)


def record(job: str):
    height, width, edits = JOBS[job]
    return make_record(PROMPT, picture(height, width) if edits else None, size=(height, width), id=job)


def edit(name="e", text="make the star red", **options):
    return make_record(text, picture(64, 64), target=picture(64, 64), id=name, task="edit", **options)


def generation(name="g", text="a blue ring"):
    return make_record(text, target=picture(64, 64), id=name, task="generate")


# -- parity with the public code


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with safe_open("tests/golden/metaquery.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


@pytest.mark.parametrize("job", JOBS)
def test_conditioner_and_pipeline_equal_the_public_ones(model, golden, job):
    positive, negative = model.encode([record(job)]), model.encode([record(job)], negative=NEGATIVE)
    for k, condition in enumerate((positive[0], negative[0])):
        assert (condition.tensors["states"] - golden[f"{job}/states"][k]).abs().max() <= TOLERANCE
    with torch.no_grad():
        batch = model.prepare(positive + negative)
    for name in ("text", "pooled"):
        assert (batch[name] - golden[f"{job}/{name}"]).abs().max() <= TOLERANCE
        assert golden[f"{job}/{name}"].std() > 0.05  # the numbers say something
        assert (golden[f"{job}/{name}"][0] - golden[f"{job}/{name}"][1]).abs().max() > 1e-3
    height, width, _ = JOBS[job]
    start = noise(f"latents/{job}", 1, 16, height // 8, width // 8)
    rollout = sample_flow(
        model, positive, steps=STEPS, guidance=GUIDANCE, negative=negative, seeds=[0], init_latents=start
    )
    assert (rollout.latents - golden[f"{job}/latents"]).abs().max() <= TOLERANCE


def test_real_sizes_on_the_meta_device():
    with torch.device("meta"):
        whole = StableDiffusion3Conditioner(
            {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 24, "num_attention_heads": 24}
        )
    assert sum(p.numel() for p in whole.connector.layers[0].parameters()) == 36_985_088
    assert sum(p.numel() for p in whole.parameters()) == 903_509_504
    assert "connector.layers.23.self_attn.out_proj.bias" in whole.state_dict()


# -- positions and prompts


@pytest.mark.parametrize("pictures", [[], [(64, 96)], [(64, 64), (96, 32)]])
def test_grid_positions_are_the_vlms_own_and_flat_ones_count(model, pictures):
    shown = [picture(h, w) for h, w in pictures]
    request = model._request("make it red", shown, bare=True)
    ids = torch.cat([request["ids"], torch.zeros(5, dtype=torch.long)])
    grids = request.get("grids", torch.zeros(0, 3, dtype=torch.long))
    kinds = (ids == model.processor.image_id).int()
    expected, _ = model.vlm.model.get_rope_index(ids[None], kinds[None], image_grid_thw=grids)
    pad, merge = model.processor.image_id, model.processor.merge
    assert torch.equal(positions(request["ids"], grids, 5, pad, merge, "grid"), expected[:, 0])
    flat = positions(request["ids"], grids, 5, pad, merge, "flat")
    assert torch.equal(flat, torch.arange(len(ids)).expand(3, -1))


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (128, 64), (384, 512)])
def test_a_token_of_the_vlm_covers_32_by_32_pixels(model, size):
    request = model._request("x", [picture(*size)], bare=True)
    assert (request["ids"] == model.processor.image_id).sum() == size[0] * size[1] // 32**2 == len(request["visual"])


def test_the_prompt_is_that_of_the_release(model):
    words = model.processor.tokenizer.decode
    plain = model.encode([make_record("a red star")])[0].tensors
    asked = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert words(plain["ids"]) == asked.format("Generate an image: a red star")
    shown = model.encode([make_record("make it red", picture(64, 64))])[0].tensors
    assert words(shown["ids"]) == asked.format(f"<|vision_start|>{'<|image_pad|>' * 4}<|vision_end|>make it red")
    start, stop = shown["span"].tolist()
    assert words(shown["ids"][start:stop]) == "make it red"


def test_a_text_cannot_smuggle_in_special_tokens(model):
    tensors = model.encode([make_record("red <|image_pad|><|im_end|> star", picture(64, 64))])[0].tensors
    assert (tensors["ids"] == model.processor.image_id).sum() == 4
    end = model.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (tensors["ids"] == end).sum() == 1


def test_modes_differ_for_pictures_only(folders):
    flat, grid = opened(folders, train_queries=False), opened(folders, train_queries=False, mrope="grid")
    for request, same in ((make_record("a red star"), True), (make_record("make it red", picture(64, 64)), False)):
        a, b = (m.encode([request])[0].tensors["states"] for m in (flat, grid))
        assert torch.equal(a, b) == same


# -- conditions


def test_it_is_a_flow_model_and_a_sample_does_not_depend_on_its_batch(model):
    assert isinstance(model, FlowModel)
    records = [
        make_record("a red star", id="a"),
        make_record("make it blue and big", picture(64, 96), id="b"),
        make_record("add it", picture(64, 64), references=[picture(96, 32)], id="c"),
    ]
    positive, negative = model.encode(records), model.encode(records, negative=NEGATIVE)
    options = {"steps": 3, "guidance": 2.0}
    whole = sample_flow(model, positive, negative=negative, seeds=[1, 2, 3], **options)
    for k in range(3):
        one = sample_flow(model, positive[k : k + 1], negative=negative[k : k + 1], seeds=[k + 1], **options)
        h, w = one.latents.shape[-2:]
        assert (whole.latents[k, :, :h, :w] - one.latents[0]).abs().max() <= TOLERANCE


def test_another_text_keeps_the_pictures(model):
    records = [generation(), edit(), edit("f", references=[picture(32, 64)])]
    swapped = model.with_text(model.encode(records), NEGATIVE)
    for a, b in zip(swapped, model.encode(records, negative=NEGATIVE), strict=True):
        assert torch.equal(a.tensors["ids"], b.tensors["ids"])
        assert (a.tensors["states"] - b.tensors["states"]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("conditioning", ["vlm", "dit"])
def test_who_sees_the_pictures(folders, conditioning):
    model = opened(folders, train_queries=False, conditioning=conditioning)
    condition, example = model.encode([edit()])[0], model.examples([edit()])[0]
    assert bool(condition.references) == ("reference.0" in example) == (conditioning == "dit")
    assert ("visual" in condition.tensors) == (conditioning == "vlm")
    words = model.processor.tokenizer.decode(condition.tensors["ids"])
    assert "Generate" not in words
    swapped, other = model.with_text([condition], "x")[0], model.encode([edit(text="x")])[0]
    assert torch.equal(swapped.tensors["ids"], other.tensors["ids"])


# -- training


def test_cached_states_and_the_vlm_at_every_step_are_the_same_loss(folders):
    cached, live = opened(folders, train_queries=False), opened(folders)
    records, draw = [edit(), edit("f", "add it")], Draw(0, 0, ["e", "f"])
    examples = [m.examples(records) for m in (cached, live)]
    assert "states" in examples[0][0] and "states" not in examples[1][0]
    options = FlowLossConfig(text_dropout=0.5, dropout_tasks=("edit",))
    losses = [flow_matching_loss(m, e, draw, options) for m, e in zip((cached, live), examples, strict=True)]
    assert (losses[0].per_sample - losses[1].per_sample).abs().max() <= TOLERANCE
    cached.vlm.forward = cached.vlm.model.forward = None  # the cached one needs no VLM
    flow_matching_loss(cached, examples[0], draw, FlowLossConfig(text_dropout=0.0))


def test_a_dropped_text_leaves_the_pictures_of_an_edit(folders):
    model = opened(folders, train_queries=False)
    condition = model.encode([edit()])[0]
    dropped, empty = model.without_text(condition), model.encode([edit()], negative="")[0].tensors
    assert torch.equal(dropped["ids"], empty["ids"])
    assert (dropped["states"] - empty["states"]).abs().max() <= TOLERANCE
    dropped, empty = model.without_text(model.encode([generation()])[0]), model.encode_text([""])[0]
    assert torch.equal(dropped["states"], empty["states"])


def gradients(model: UniPic2MetaQuery) -> dict[str, bool]:
    records = [generation("g"), generation("h", "a red star")]
    model.loss(model.examples(records), Draw(0, 0, ["g", "h"])).per_sample.sum().backward()
    found = {n: any(p.grad is not None and p.grad.any() for p in m.parameters()) for n, m in model.modules().items()}
    return found | {"queries": model.queries.grad is not None and bool(model.queries.grad.any())}


def test_what_the_report_freezes_stays_frozen(folders):
    """Table 3: the connector alone (stage A, too), the transformer alone, both; never VLM and VAE."""
    for train in (("conditioner",), ("transformer",), ("conditioner", "transformer")):
        model = opened(folders, train_queries="conditioner" in train)
        for name, module in model.modules().items():
            if name not in train:
                module.requires_grad_(False)
        found = gradients(model)
        assert {name for name, some in found.items() if some} - {"queries"} == set(train)
        assert found["queries"] == ("conditioner" in train)


def test_recomputed_activations_give_the_same_gradient(folders):
    plain, saving = opened(folders), opened(folders, gradient_checkpointing=True)
    for model in (plain, saving):
        model.transformer.requires_grad_(False)
        gradients(model)
    assert (plain.queries.grad - saving.queries.grad).abs().max() <= TOLERANCE * plain.queries.grad.abs().max()
    assert not any(p.requires_grad for p in saving.vlm.parameters())


def test_a_new_conditioner_fits_starts_empty_and_is_a_function_of_its_seed(folders, tmp_path):
    base = tiny_kontext_folder(tmp_path / "base")
    options = {"vlm": str(folders[1]), "conditioner": "new", "queries": 4, "connector": SMALL, "dtype": "fp32"}
    one, two, other = (open_metaquery(base, seed=seed, resolution=64, **options) for seed in (0, 0, 1))
    assert torch.equal(one.queries, two.queries) and not torch.equal(one.queries, other.queries)
    batch = one.prepare(one.encode([make_record("a red star")]))
    assert not batch["text"].any() and not batch["pooled"].any()
    assert one.conditioner.projector_1.weight.dtype == torch.float32
    initialise(one.conditioner, zero_output=False)
    assert one.prepare(one.encode([make_record("a red star")]))["text"].any()


def quiet(line):
    pass


def recipe(folders, out, train, **options):
    source = {"call": "weft.world:records", "args": {"count": 6, "tasks": ["edit", "generate"]}}
    args = {"vlm": str(folders[1]), "dtype": "fp32", "resolution": 64, **options}
    return {
        "model": {"path": str(folders[0]), "train": train},
        "trainable": "weft.models.image.metaquery_parts:open_metaquery",
        "trainable_args": args,
        "data": [{"source": source}],
        "cache": {"ahead": True, "drop_encoders": True},
        "run": {"folder": str(out), "steps": 2, "batch_size": 2, "threads": 1},
    }


def test_with_frozen_queries_and_a_warm_cache_no_vlm_is_needed(folders, tmp_path):
    from weft.train.loop import Trainer

    trainer = Trainer(read_recipe(recipe(folders, tmp_path, ["transformer"], train_queries=False)), {}, print)
    trainer.prepare_data()
    assert next(trainer.model.vlm.parameters()).is_meta and not next(trainer.model.conditioner.parameters()).is_meta
    assert torch.isfinite(torch.tensor(trainer.train_step()["loss"]))
    first = trainer.model.example_facts()
    trainer.model.queries.data += 1
    assert trainer.model.example_facts() != first  # other queries, other states: the cache must know


def test_trained_queries_keep_the_vlm_and_the_export_opens(folders, tmp_path):
    from weft.train import run

    result = run(recipe(folders, tmp_path, ["conditioner"]), say=lambda line: None)
    made, first = load(result.export, device="cpu", resolution=64), opened(folders)
    assert not torch.equal(made.queries, first.queries)
    for a, b in zip(made.transformer.parameters(), first.transformer.parameters(), strict=True):
        assert torch.equal(a, b)


LORA = {"rank": 2, "alpha": 4, "targets": ["attn.to_q"]}


@pytest.mark.slow
def test_a_lora_and_the_conditioner_beside_it_are_one_export(folders, tmp_path):
    """It opens with one option, at its strength alone; continues; leaves merged or as it is."""
    from weft.models.export import export, probe
    from weft.train import plan, run
    from weft.train.loop import Trainer

    tree = recipe(folders, tmp_path / "run", ["conditioner", "transformer"])
    tree["model"]["lora"], tree["optim"] = LORA, {"lr": 0.01}
    trained = run(tree, say=quiet)
    options = {"device": "cpu", "resolution": 64, "options": {"vlm": str(folders[1])}}
    base, made = load(folders[0], **options), load(folders[0], lora=[str(trained.export)], **options)
    assert made.brought == ["conditioner"] and not torch.equal(made.queries, base.queries)
    assert any("lora_B" in name and p.any() for name, p in made.transformer.named_parameters())
    assert (probe(made) - probe(base)).abs().max() > 1e-3
    with pytest.raises(WeftError, match="its conditioner was trained whole and has no strength: give 1"):
        load(folders[0], lora=[f"{trained.export}:0.5"], **options)
    with pytest.raises(WeftError, match="has brought a conditioner already"):
        load(folders[0], lora=[str(trained.export)] * 2, **options)
    with pytest.raises(WeftError, match="no LoRA of the transformer, the first is conditioner"):
        load(tiny_kontext_folder(tmp_path / "sd3"), device="cpu", lora=[str(trained.export)])

    plain = {"device": "cpu", "options": options["options"]}
    for what in ("model", "lora"):
        out = export(folders[0], tmp_path / what, lora=[str(trained.export)], what=what, **plain).path
        again = load(out, **options) if what == "model" else load(folders[0], lora=[str(out)], **options)
        assert (probe(again) - probe(made)).abs().max() < 1e-5

    tree["model"]["lora"] = LORA | {"start": str(trained.export)}
    following = Trainer(read_recipe(tree, [f"run.folder={tmp_path / 'next'}"]), {}, quiet)
    assert torch.equal(following.model.queries, made.queries)  # not those of the base
    whole = sum(p.numel() for p in made.conditioner.parameters())
    assert plan(tree).trained == whole + sum(p.numel() for n, p in made.transformer.named_parameters() if "lora_" in n)
    tree["model"]["train"] = ["conditioner"]
    with pytest.raises(WeftError, match="model.lora: conditioner trains whole; leave model.lora out"):
        Trainer(read_recipe(tree), {}, quiet)


def test_the_reference_of_a_lora_with_a_conditioner_beside_it_is_the_start(folders, tmp_path):
    """Without its adapters the network would still have the trained conditioner."""
    from weft.train.loop import Trainer
    from weft.types import Score

    tree = recipe(folders, tmp_path, ["conditioner", "transformer"])
    tree |= {"method": {"name": "nft", "options": {"kl": 0.1}}, "cache": None, "reward": None}
    tree["rollout"] = {"groups": 2, "group_size": 2, "batch": 4, "steps": 2}
    tree["model"]["lora"] = LORA

    def reward(batch):
        return [Score(0.5) for _ in batch]

    assert Trainer(read_recipe(tree), {}, quiet, reward=reward).method.objective.reference == "start"
    tree["method"]["options"]["reference"] = "off"
    with pytest.raises(WeftError, match='reference "off"'):
        Trainer(read_recipe(tree), {}, quiet, reward=reward)


# -- folders


def test_a_saved_model_opens_again_and_in_plain_diffusers(model, folders, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    model.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "weft.json").read_text())["options"]["vlm"] == str(folders[1])
    again = load(tmp_path / "saved", device="cpu", resolution=64)  # weft.json names the VLM
    for a, b in zip(model.encode([edit()]), again.encode([edit()]), strict=True):
        assert torch.equal(a.tensors["states"], b.tensors["states"])
    for name in ("transformer", "conditioner", "vae"):
        for a, b in zip(model.parts[name].parameters(), again.parts[name].parameters(), strict=True):
            assert torch.equal(a, b)
    without = dict.fromkeys(f"{kind}{k}" for kind in ("text_encoder", "tokenizer") for k in ("", "_2", "_3"))
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "saved", **without)
    assert pipeline.text_encoder is None and pipeline.transformer is not None


def test_the_vlm_inside_the_folder_is_found(folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "model")
    shutil.copytree(folders[1], tmp_path / "model" / "vlm")
    assert load(tmp_path / "model", device="cpu").vlm is not None


def test_a_release_that_keeps_its_parts_one_folder_down_opens(folders, tmp_path):
    """Skywork/UniPic2-Metaquery-Flash."""
    shutil.copytree(folders[0], tmp_path / "flash" / "UniPic2-Metaquery")
    (tmp_path / "flash" / "UniPic2-Metaquery" / "model_index.json").unlink(missing_ok=True)
    assert isinstance(load(tmp_path / "flash", device="cpu", options={"vlm": str(folders[1])}), UniPic2MetaQuery)


def test_clear_errors(folders, tmp_path):
    with pytest.raises(WeftError, match="needs its VLM.*Qwen/Qwen2.5-VL-7B-Instruct"):
        load(folders[0], device="cpu")
    with pytest.raises(WeftError, match="no such folder"):
        load(folders[0], device="cpu", options={"vlm": str(tmp_path / "nothing")})
    wide = tiny_qwen_folder(tmp_path / "wide", width=64)
    with pytest.raises(WeftError, match="llm_hidden_size is 32, the VLM's hidden_size is 64"):
        load(folders[0], device="cpu", options={"vlm": str(wide)})
    with pytest.raises(WeftError, match="model type 'clip_text_model'"):
        other = tiny_kontext_folder(tmp_path / "k") / "text_encoder"
        load(folders[0], device="cpu", options={"vlm": str(other)})
    with pytest.raises(WeftError, match="sd3_kontext takes none, found vlm"):
        load(tmp_path / "k", device="cpu", options={"vlm": str(folders[1])})
    shutil.copytree(folders[0], tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "vae")
    with pytest.raises(WeftError, match="no folder 'vae'"):
        load(tmp_path / "part", device="cpu", options={"vlm": str(folders[1])})
    with pytest.raises(WeftError, match="mrope 'round'"):
        opened(folders, mrope="round")
    with pytest.raises(WeftError, match='say conditioner="new"'):
        opened(folders, queries=8)


def test_the_vlm_answers_questions_with_its_own_weights(model):
    text = model.describe([picture(64, 64)], "what is it?", max_tokens=4)
    own = tiny_qwen()
    assert text and all(torch.equal(a, b) for a, b in zip(own.parameters(), model.vlm.parameters(), strict=True))


def test_describe_takes_a_metaquery_folder_and_a_release_says_what_to_give(folders, model, tmp_path, capsys):
    """A release neither holds nor names its VLM, and `describe` has no --option to name it with."""
    from weft.cli.main import main

    picture(64, 64).save(tmp_path / "a.png")
    ask = ["describe", str(tmp_path / "a.png"), "what is it?", "--max-tokens", "4", "--device", "cpu"]
    answers = []
    model.save(tmp_path / "saved")  # its weft.json names the VLM
    vlm = shutil.copytree(folders[1], tmp_path / "Qwen2.5-VL-3B-Instruct")
    for option, folder in (("--vlm", tmp_path / "saved"), ("--model", tmp_path / "saved"), ("--vlm", vlm)):
        assert main([*ask, option, str(folder)]) == 0
        said = capsys.readouterr()
        answers.append(said.out)
        assert (f"licence of {folder}: weights: Qwen Research License" in said.err) == (folder == vlm)
    assert answers[0].strip() and len(set(answers)) == 1
    assert main([*ask, "--model", str(folders[0])]) != 0
    said = capsys.readouterr().err
    assert "give the VLM's own folder or hub id in its place" in said and "--option" not in said
    assert main([*ask, "--model", str(folders[0]), "--vlm", str(folders[1])]) != 0
    assert "--model does nothing for pictures with --vlm" in capsys.readouterr().err
