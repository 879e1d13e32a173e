"""FLUX Kontext and DreamOmni2: layouts, mixed batches, routed adapters, budgets, training, folders."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from tiny import T5_LENGTH, tiny_flux_folder
from weft import rng
from weft.api import Model
from weft.errors import WeftError
from weft.models import flow, lora
from weft.models.adapt import add_lora, save_lora
from weft.models.image.flux_kontext import FluxKontext, FluxOptions
from weft.models.image.layouts import LAYOUTS, find_layout, picture_ids, text_ids
from weft.models.load import load
from weft.models.lora import find_adapters
from weft.models.routing import route_of
from weft.models.weights import licence_note
from weft.record import make_record
from weft.sample.rollout import sample_flow
from weft.types import Condition, Draw, FlowModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_flux_folder(tmp_path_factory.mktemp("flux") / "model")


@pytest.fixture(scope="module")
def model(folder) -> FluxKontext:
    return load(folder, device="cpu")


def condition(name, size, references, **tensors) -> Condition:
    """Random text and reference latents (sizes in latent cells) by name."""
    own = {"text": rng.normal((T5_LENGTH, 64), 0, f"{name}/text"), "pooled": rng.normal((32,), 0, f"{name}/pooled")}
    return Condition(
        name, size, own | tensors, [rng.normal((16, *s), 0, f"{name}/{k}") for k, s in enumerate(references)]
    )


def source(edits: bool) -> torch.Tensor:
    return torch.tensor(edits, dtype=torch.uint8)


MIXED = [
    condition("none", (64, 64), [], source=source(False)),
    condition("edit", (64, 64), [(8, 8)], source=source(True)),
    condition("pair", (48, 96), [(4, 4), (8, 6)], source=source(True)),
    condition("subjects", (80, 32), [(8, 8)] * 4, source=source(False)),
    condition("twin", (64, 64), [(8, 8), (8, 8), (4, 8)], source=source(True), align=torch.tensor([0, 1, 0])),
    condition("strong", (64, 64), [(8, 8)], source=source(True), guidance=torch.tensor(1.5)),
]
X, SIGMA = rng.normal((6, 16, 10, 12), 0, "x"), torch.tensor([1.0, 0.8, 0.5, 0.2, 0.01, 0.6])


def one_by_one(model, conditions, x, sigma):
    out = torch.zeros_like(x)
    for i, c in enumerate(conditions):
        h, w = c.size[0] // 8, c.size[1] // 8
        out[i, :, :h, :w] = model.velocity(x[i : i + 1, :, :h, :w], sigma[i : i + 1], model.prepare([c]))[0]
    return out


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(rng.numpy_rng(seed, "picture").integers(0, 256, (height, width, 3), dtype=np.uint8))


# -- where references stand


def starts(name, target, references, align=()):
    """The (index, row, column) of each reference's first token."""
    ids = picture_ids(find_layout(name), target, references, align)
    sizes = [h * w for h, w in (target, *references)]
    assert ids.dtype == torch.float32 and len(ids) == sum(sizes) and not ids[0].any()
    return [tuple(int(v) for v in ids[sum(sizes[: k + 1])]) for k in range(len(references))]


def test_every_layout_puts_references_where_its_paper_says():
    references = ((4, 6), (5, 3), (2, 2))
    assert starts("kontext", (7, 9), references) == [(1, 0, 0)] * 3
    assert starts("dreamomni2", (7, 9), references) == [(1, 0, 0), (2, 0, 6), (3, 0, 9)]
    assert starts("diagonal", (7, 9), references) == [(0, 7, 9), (0, 11, 15), (0, 16, 18)]
    assert starts("flux2", (7, 9), references) == [(10, 0, 0), (20, 0, 0), (30, 0, 0)]
    # below the first (9 <= 6 wide is false: 9 high against 9 wide), then beside the block
    assert starts("mosaic", (7, 9), references) == [(1, 0, 0), (1, 4, 0), (1, 0, 6)]
    one = {name: picture_ids(find_layout(name), (2, 2), ((2, 3),)).tolist() for name in LAYOUTS}
    assert one["dreamomni2"] == one["kontext"] == one["mosaic"]
    assert one["kontext"][4:] == [[1, r, c] for r in range(2) for c in range(3)]


def test_only_flux2_counts_text_on_a_fourth_axis():
    assert text_ids(find_layout("flux2"), 3, 4).tolist() == [[0, 0, 0, k] for k in range(3)]
    assert not text_ids(find_layout("flux2"), 3, 3).any() and not text_ids(find_layout("dreamomni2"), 3, 4).any()


def test_an_aligned_picture_shares_its_twin_s_place_and_leaves_no_trace():
    """A scribbled copy of the source, as DreamOmni3 has it."""
    references = ((4, 6), (4, 6), (5, 3))
    assert starts("dreamomni2", (4, 6), references, (0, 1, 0)) == [(1, 0, 0), (1, 0, 0), (2, 0, 6)]
    for wrong in ((1, 0, 0), (0, 3, 0), (0, 2, 0)):
        with pytest.raises(WeftError, match="cannot be aligned with picture"):
            picture_ids(find_layout("dreamomni2"), (4, 6), references, wrong)
    with pytest.raises(WeftError, match="2 entries for 3 input pictures"):
        picture_ids(find_layout("dreamomni2"), (4, 6), references, (0, 1))


@pytest.mark.slow
@torch.no_grad()
def test_the_layout_changes_what_the_model_sees(folder, model):
    c, x, sigma = MIXED[2], X[2:3, :, :6], SIGMA[2:3]
    seen = {
        name: load(folder, device="cpu", options={"layout": name}).velocity(x, sigma, model_batch)
        for name in LAYOUTS
        for model_batch in [load(folder, device="cpu", options={"layout": name}).prepare([c])]
    }
    assert torch.equal(seen["dreamomni2"], model.velocity(x, sigma, model.prepare([c])))
    for name in ("kontext", "diagonal", "flux2"):
        assert (seen[name] - seen["dreamomni2"]).abs().max() > 1e-4, name


# -- mixed batches


@torch.no_grad()
def test_a_mixed_batch_is_one_call_and_equals_one_by_one(model):
    assert isinstance(model, FlowModel)
    calls = []
    hook = model.transformer.register_forward_hook(lambda *_: calls.append(1))
    batch = model.prepare(MIXED)
    v = model.velocity(X, SIGMA, batch)
    hook.remove()
    assert len(calls) == 1 and v.dtype == torch.float32
    assert (v - one_by_one(model, MIXED, X, SIGMA)).abs().max() <= 1e-5
    assert not v[~batch["valid"].expand_as(v)].any()
    noisy = torch.where(batch["valid"], X, 1e3)
    assert torch.equal(model.velocity(noisy, SIGMA, batch), v)


@torch.no_grad()
def test_equal_shapes_with_different_alignment_are_kept_apart(model):
    pair = [condition(n, (64, 64), [(8, 8), (8, 8)], align=torch.tensor(a)) for n, a in (("a", [0, 0]), ("b", [0, 1]))]
    x, sigma = X[:2, :, :8, :8], SIGMA[:2]
    batch = model.prepare(pair)
    assert batch["layout"] is None and batch["mask"] is None
    v = model.velocity(x, sigma, batch)
    assert (v - one_by_one(model, pair, x, sigma)).abs().max() <= 1e-5
    free = model.velocity(x[1:], sigma[1:], model.prepare([condition("b", (64, 64), [(8, 8), (8, 8)])]))
    assert (v[1:] - free).abs().max() > 1e-4


grids = st.tuples(st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=15, deadline=None)
@given(shapes=st.lists(st.tuples(grids, st.lists(grids, max_size=4)), min_size=1, max_size=4))
def test_any_mix_equals_one_by_one(model, shapes):
    conditions = [
        condition(str(i), (16 * h, 16 * w), [(2 * a, 2 * b) for a, b in references])
        for i, ((h, w), references) in enumerate(shapes)
    ]
    height, width = max(h for (h, _), _ in shapes), max(w for (_, w), _ in shapes)
    x, sigma = rng.normal((len(shapes), 16, 2 * height, 2 * width), 0, "x"), torch.linspace(0.1, 1, len(shapes))
    with torch.no_grad():
        v = model.velocity(x, sigma, model.prepare(conditions))
        assert (v - one_by_one(model, conditions, x, sigma)).abs().max() <= 1e-5


def test_gradients_of_a_mixed_batch_equal_one_by_one_with_and_without_checkpointing(model):
    transformer = copy.deepcopy(model.transformer)
    other = FluxKontext({**model.parts, "transformer": transformer}, resolution=64)
    weight = rng.normal(tuple(X.shape), 0, "weight")

    def gradients(v: torch.Tensor) -> dict[str, torch.Tensor]:
        transformer.zero_grad()
        (v * weight).mean().backward()
        return {name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None}

    batch = other.prepare(MIXED)
    together = gradients(other.velocity(X, SIGMA, batch))
    alone = gradients(one_by_one(other, MIXED, X, SIGMA))
    transformer.enable_gradient_checkpointing()
    checkpointed = gradients(other.velocity(X, SIGMA, batch))
    assert together.keys() == alone.keys() and "x_embedder.weight" in together
    for name in together:
        assert torch.allclose(together[name], alone[name], atol=1e-6), name
        assert torch.equal(together[name], checkpointed[name]), name


def test_mixed_sizes_sample_in_one_batch_as_alone(model):
    """FLUX's grid depends on the output's size, so every sample walks its own."""
    conditions = [MIXED[0], MIXED[2]]
    together = sample_flow(model, conditions, seeds=[1, 2], steps=3)
    assert not torch.equal(together.sigmas[0], together.sigmas[1])
    for k, c in enumerate(conditions):
        alone = sample_flow(model, [c], seeds=[k + 1], steps=3).latents
        assert (together.latents[k : k + 1, :, : alone.shape[2], : alone.shape[3]] - alone).abs().max() < 1e-5


@torch.no_grad()
def test_embedded_guidance_is_told_per_sample_and_needs_a_distilled_model(folder, model):
    told = condition("edit", (64, 64), [(8, 8)], guidance=torch.tensor(1.5))
    other = load(folder, device="cpu", options={"embedded_guidance": 1.5})
    x, sigma = X[:1, :, :8, :8], SIGMA[:1]
    plain = model.velocity(x, sigma, model.prepare([MIXED[1]]))
    assert torch.equal(
        model.velocity(x, sigma, model.prepare([told])), other.velocity(x, sigma, other.prepare([MIXED[1]]))
    )
    assert (model.velocity(x, sigma, model.prepare([told])) - plain).abs().max() > 1e-5


# -- adapters


def test_the_routing_rule():
    """An edit of one picture and a generation without any are the base's own tasks."""
    assert [route_of(True, n) for n in (1, 2, 5)] == [None, "edit", "edit"]
    assert [route_of(False, n) for n in (0, 1, 4)] == [None, "generation", "generation"]


@pytest.fixture(scope="module")
def release(folder, tmp_path_factory):
    """Two LoRAs in the folders of DreamOmni2's release, without alpha or metadata: peft's names, prefix transformer."""
    root = tmp_path_factory.mktemp("release")
    for k, (name, place) in enumerate((("edit", "edit_lora"), ("generation", "gen_lora"))):
        transformer = load(folder, device="cpu").transformer
        add_lora(transformer, rank=4, alpha=4, targets=["attn.to_q", "proj_mlp", "norm1.linear"], name=name)
        for key, p in transformer.named_parameters():
            if "lora_" in key:
                p.data = 0.2 * rng.normal(tuple(p.shape), k, key)
        file = save_lora({"transformer": transformer}, root / place, name=name)
        save_file(load_file(file), file)  # drops the header
    return root


def with_lora(folder, release, place):
    return load(folder, device="cpu", lora=[str(release / place)])


@torch.no_grad()
def test_each_row_of_a_batch_takes_the_adapter_of_its_request(folder, release, model):
    both = load(folder, device="cpu", adapters=str(release))
    batch = both.prepare(MIXED)
    assert batch["routes"] == [None, None, "edit", "generation", "edit", None]
    v = both.velocity(X, SIGMA, batch)
    assert (v - one_by_one(both, MIXED, X, SIGMA)).abs().max() <= 1e-5
    base = model.velocity(X, SIGMA, model.prepare(MIXED))
    edit, generation = (with_lora(folder, release, place) for place in ("edit_lora", "gen_lora"))
    for rows, expected in (
        ([0, 1, 5], base),
        ([2, 4], edit.velocity(X, SIGMA, edit.prepare(MIXED))),
        ([3], generation.velocity(X, SIGMA, generation.prepare(MIXED))),
    ):
        assert (v[rows] - expected[rows]).abs().max() <= 1e-5
    assert (v - base)[[2, 3, 4]].abs().amax((1, 2, 3)).min() > 1e-3
    for module in both.transformer.modules():  # as a trainer's reference policy does it
        if hasattr(module, "lora_A"):
            module.enable_adapters(False)
    assert torch.equal(both.velocity(X, SIGMA, batch), base)


@torch.no_grad()
def test_routed_adapters_go_with_weights_and_with_ones_that_are_always_on(folder, release):
    file = release / "edit_lora" / "pytorch_lora_weights.safetensors"
    half = load(folder, device="cpu", adapters={"edit": f"{file}:0.5"}, lora=[f"{file}:0.5"])
    whole = with_lora(folder, release, "edit_lora")
    halved = load(folder, device="cpu", lora=[f"{file}:0.5"])
    v = half.velocity(X, SIGMA, half.prepare(MIXED))
    assert (v - whole.velocity(X, SIGMA, whole.prepare(MIXED)))[[2, 4]].abs().max() <= 1e-5
    rest = [0, 1, 3, 5]
    assert (v - halved.velocity(X, SIGMA, halved.prepare(MIXED)))[rest].abs().max() <= 1e-5


@torch.no_grad()
def test_a_lora_acts_as_if_merged_into_the_weights(folder, release, model):
    """Without alpha in the file its scale is 1 (alpha = rank), as diffusers reads it."""
    state = load_file(release / "edit_lora" / "pytorch_lora_weights.safetensors")
    merged = load(folder, device="cpu")
    for key in [k for k in state if "lora_A" in k]:
        layer = merged.transformer.get_submodule(key.removeprefix("transformer.").removesuffix(".lora_A.weight"))
        layer.weight += state[key.replace("lora_A", "lora_B")] @ state[key]
    both = load(folder, device="cpu", adapters=str(release))
    v = both.velocity(X, SIGMA, both.prepare(MIXED))
    expected = merged.velocity(X, SIGMA, merged.prepare(MIXED))
    assert (v - expected)[[2, 4]].abs().max() <= 1e-5


def test_adapters_are_found_in_the_model_s_folder_and_as_single_files(folder, release, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "omni")
    for place in ("edit_lora", "gen_lora"):
        shutil.copytree(release / place, tmp_path / "omni" / place)
    assert load(tmp_path / "omni", device="cpu").router.names == ("edit", "generation")
    single = tmp_path / "single"
    single.mkdir()
    for place, name in (("edit_lora", "Edit"), ("gen_lora", "Gen")):
        shutil.copy(
            release / place / "pytorch_lora_weights.safetensors", single / f"DreamOmni2-7.6B-{name}-Lora.safetensors"
        )
    assert set(find_adapters(single)) == {"edit", "generation"}
    assert load(folder, device="cpu", adapters=single).router.names == ("edit", "generation")
    with pytest.raises(WeftError, match=r"holds adapters \(edit, generation\), not a model: load their base"):
        load(release, device="cpu")
    monkeypatch.setattr(lora, "from_hub", lambda name, *rest: release)
    assert load(folder, device="cpu", adapters="xiabs/DreamOmni2").router.names == ("edit", "generation")
    with pytest.raises(WeftError, match="no edit_lora or gen_lora folder"):
        load(folder, device="cpu", adapters=tmp_path)
    with pytest.raises(WeftError, match="'style' is unknown; name them edit and generation"):
        load(folder, device="cpu", adapters={"style": "x"})


def test_an_export_whose_adapters_came_out_wrong_is_found(folder, release, tmp_path, monkeypatch):
    from weft.models import export as leaving

    shutil.copytree(folder, tmp_path / "model")
    shutil.copytree(release, tmp_path / "model", dirs_exist_ok=True)
    assert leaving.export(tmp_path / "model", tmp_path / "right", device="cpu").difference < 1e-5
    real = leaving.save_lora

    def scaled(modules, out, *, name):
        file = real(modules, out, name=name)
        factor = 1.1 if name == "generation" else 1.0
        save_file({key: factor * value for key, value in load_file(file).items()}, file)  # alpha is the rank
        return file

    monkeypatch.setattr(leaving, "save_lora", scaled)
    with pytest.raises(WeftError, match="do not use it"):
        leaving.export(tmp_path / "model", tmp_path / "wrong", device="cpu")


def test_a_lora_for_another_base_is_refused_by_name(folder, release, tmp_path):
    state = load_file(release / "edit_lora" / "pytorch_lora_weights.safetensors")
    key = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    save_file({**state, key: torch.zeros(4, 48)}, tmp_path / "wide.safetensors")
    with pytest.raises(
        WeftError, match=r"another base model: transformer_blocks\.0\.attn\.to_q is 48 wide there, 32 here"
    ):
        load(folder, device="cpu", lora=[str(tmp_path / "wide.safetensors")])
    deep = {k.replace("blocks.0.", "blocks.7."): v for k, v in state.items()}
    save_file(deep, tmp_path / "deep.safetensors")
    with pytest.raises(WeftError, match="another base model: here is no layer"):
        load(folder, device="cpu", adapters={"edit": str(tmp_path / "deep.safetensors")})


@pytest.mark.parametrize("how", ["model", "sequential"])
def test_offloading_hooks_and_routed_adapters_go_together(folder, release, how):
    """accelerate's hooks, with the CPU standing in for the accelerator that `load` insists on."""
    from weft.models.load import KONTEXT, _offload

    plain, other = (load(folder, device="cpu", adapters=str(release)) for _ in range(2))
    _offload(other, how, torch.device("cpu"), KONTEXT.order)
    other._device = torch.device("cpu")
    with torch.no_grad():
        expected = plain.velocity(X, SIGMA, plain.prepare(MIXED))
        assert torch.equal(other.velocity(X, SIGMA, other.prepare(MIXED)), expected)
    record = make_record("make it red", picture(64, 64))
    ours, theirs = other.encode([record])[0], plain.encode([record])[0]
    assert torch.equal(ours.tensors["pooled"], theirs.tensors["pooled"])
    assert torch.equal(ours.references[0], theirs.references[0])


def test_half_precision_keeps_positions_whole_and_backends_reach_the_transformer(folder, release):
    """In bf16, columns beyond 256 would fall together; the release rounds them so."""
    half = load(folder, device="cpu", dtype="bf16", adapters=str(release), attention_backend="_native_math")
    full = load(folder, device="cpu", adapters=str(release))
    batch = half.prepare(MIXED)
    assert half.dtype == batch["text"].dtype == torch.bfloat16 and batch["picture_ids"].dtype == torch.float32
    with torch.no_grad():
        expected, found = full.velocity(X, SIGMA, full.prepare(MIXED)), half.velocity(X, SIGMA, batch)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().mean() < 0.05 * expected.abs().mean()
    half.transformer.single_transformer_blocks[0].attn.processor._attention_backend = "_native_flash"
    with pytest.raises(WeftError, match="'_native_flash' takes no mask"):
        half.velocity(X, SIGMA, batch)


# -- sizes and records


def test_records_become_conditions_at_kontext_formats(model):
    assert model.formats() == [(96, 48), (80, 48), (64, 64), (48, 80), (48, 96)]
    wide, tall = picture(190, 100), picture(40, 70, seed=1)
    records = [
        make_record("a red star"),
        make_record("make it blue", wide, references=[tall, picture(33, 30, seed=2)]),
        make_record("the star of picture 1", references=[tall]),
        make_record("make it blue", wide, size=(32, 96)),
    ]
    records[1].meta["align_to"] = [0, None, 1]
    conditions = model.encode(records)
    assert [c.size for c in conditions] == [(64, 64), (48, 96), (64, 64), (32, 96)]
    shapes = [[tuple(8 * n for n in z.shape[1:]) for z in c.references] for c in conditions]
    assert shapes == [[], [(48, 96), (80, 48), (64, 64)], [(80, 48)], [(32, 96)]]
    assert [int(c.tensors["source"]) for c in conditions] == [0, 1, 0, 1]
    assert conditions[1].tensors["align"].tolist() == [0, 0, 1]
    expected = model.encode_images([tall.resize((48, 80), Image.Resampling.LANCZOS)])[0]
    assert torch.allclose(conditions[2].references[0], expected, atol=1e-5)
    assert model.prepare(conditions)["routes"] == [None, "edit", "generation", None]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(20, 400), st.integers(20, 400)), min_size=1, max_size=6),
    budget=st.integers(6, 90),
    edits=st.booleans(),
)
def test_references_stay_within_their_budget_and_keep_their_shape(model, sizes, budget, edits):
    other = copy.copy(model)
    other.options = FluxOptions(reference_tokens=budget)
    plain = model.input_sizes(sizes, edits, (48, 80))
    found = other.input_sizes(sizes, edits, (48, 80))
    tokens = [h * w // 256 for h, w in found][int(edits) :]
    assert sum(tokens) <= budget and all(h % 16 == w % 16 == 0 and h and w for h, w in found)
    assert not edits or found[0] == (48, 80)
    if sum(h * w // 256 for h, w in plain[int(edits) :]) <= budget:
        assert found == plain


def test_a_budget_below_one_token_each_is_refused(model):
    other = copy.copy(model)
    other.options = FluxOptions(reference_tokens=2)
    with pytest.raises(WeftError, match="reference_tokens is 2, less than one for each of 3 references"):
        other.input_sizes([(64, 64)] * 3, False, (64, 64))


# -- training and the Python face


def test_examples_carry_what_conditions_carry_and_train(model, tmp_path):
    records = [
        make_record(
            "make it red", picture(60, 64), references=[picture(90, 40, seed=3)], target=picture(60, 64, seed=4), id="a"
        ),
        make_record("a wide one", target=picture(100, 50, seed=5), id="b"),
    ]
    records[0].meta["align_to"] = [0, 1]
    examples = model.examples(records)
    assert set(examples[0]) == {"target", "reference.0", "reference.1", "text", "pooled", "task", "source", "align"}
    save_file({k: v.contiguous() for k, v in examples[0].items()}, tmp_path / "e.safetensors")
    back = flow.condition_of(load_file(tmp_path / "e.safetensors"), "a", 8)
    assert model.prepare([back])["routes"] == ["edit"] and back.tensors["align"].tolist() == [0, 1]
    config = flow.FlowLossConfig(text_dropout=0.0)
    together = flow.flow_matching_loss(model, examples, Draw(0, 3, ["a", "b"]), config).per_sample
    for k, name in enumerate("ab"):
        alone = flow.flow_matching_loss(model, examples[k : k + 1], Draw(0, 3, [name]), config).per_sample
        assert together[k].item() == pytest.approx(alone[0].item(), rel=1e-5)
    assert together.requires_grad
    assert model.shift_of((1024, 1024)) == pytest.approx(np.exp(1.15))
    assert model.shift_of((256, 256)) == pytest.approx(np.exp(0.5))


def test_one_adapter_trains_while_the_routed_ones_rest(folder, release):
    model = load(folder, device="cpu", adapters=str(release))
    add_lora(model.transformer, rank=2, alpha=2, targets=["attn.to_v"])
    model.velocity(X, SIGMA, model.prepare(MIXED)).square().mean().backward()
    trained = {name for name, p in model.transformer.named_parameters() if p.grad is not None}
    assert trained and all(".default." in name for name in trained)


def test_the_python_face_edits_generates_and_mixes(model):
    face = Model(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(face, "defaults", type(face.defaults)(2, model.guidance))
        edited = face.edit(picture(100, 64), "make it red", references=[picture(40, 40, seed=1)], seed=3)
        assert edited.size == (80, 48)
        assert face.generate("a red star", references=[picture(40, 40)], seed=3).size == (64, 64)
        guided = face.edit(picture(64, 64), "make it red", seed=3, guidance=2.0, negative="blur")
    assert guided.size == (64, 64) and model.guidance == 1.0


def test_the_command_line_takes_adapters_and_options(folder, release, tmp_path, capsys):
    from weft.cli.main import main

    picture(64, 64).save(tmp_path / "a.png")
    picture(40, 60, 1).save(tmp_path / "b.png")
    line = [
        "edit",
        str(tmp_path / "a.png"),
        f"use {{{tmp_path}/b.png}}",
        "-o",
        str(tmp_path / "out.png"),
        "--steps",
        "2",
    ]
    line += ["--model", str(folder), "--adapters", str(release)]
    seen = []
    for options in (["--option", "reference_tokens=4"], ["--option", "layout=diagonal"], []):
        assert main([*line, *options]) == 0
        seen.append(np.asarray(Image.open(tmp_path / "out.png")).astype(int))
    assert all(np.abs(a - seen[2]).max() > 0 for a in seen[:2])
    assert main([*line, "--option", "layout"]) == 2 and "name=value" in capsys.readouterr().err


# -- folders


def test_options_are_read_from_the_folder_checked_and_overridden(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "own")
    card = {"resolution": 64, "steps": 9, "options": {"layout": "diagonal", "embedded_guidance": 2}}
    (tmp_path / "own" / "weft.json").write_text(json.dumps(card))
    assert load(tmp_path / "own", device="cpu").options == FluxOptions("diagonal", embedded_guidance=2)
    assert load(tmp_path / "own", device="cpu", options={"layout": "mosaic"}).options.layout == "mosaic"
    load(tmp_path / "own", device="cpu").save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "weft.json").read_text()) == card
    for options, message in (
        ({"layout": "spiral"}, "choose one of kontext, dreamomni2, diagonal, flux2, mosaic"),
        ({"lay": "kontext"}, "has no 'lay'"),
        ({"parity": 1}, "not of the type"),
        ({"reference_tokens": 0}, "at least 1"),
        ({"embedded_guidance": -1.0}, "must not be negative"),
        ({"text_length": 0}, "at least 1 token"),
    ):
        with pytest.raises(WeftError, match=message):
            load(folder, device="cpu", options=options)


def test_released_folders_of_older_libraries_load(folder, model, tmp_path):
    """CLIP's keys with the prefix `text_model`, and no index beside the parts."""
    shutil.copytree(folder, tmp_path / "old")
    (tmp_path / "old" / "model_index.json").unlink()
    file = tmp_path / "old" / "text_encoder" / "model.safetensors"
    state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    again = load(tmp_path / "old", device="cpu")
    assert isinstance(again, FluxKontext)
    assert torch.equal(again.encode_text(["a red star"])[0]["pooled"], model.encode_text(["a red star"])[0]["pooled"])


@torch.no_grad()
def test_a_transformer_in_a_single_file(folder, model, release, tmp_path):
    """The folder then has its configuration alone; presets count the file."""
    shutil.copytree(folder, tmp_path / "base")
    (weights,) = (tmp_path / "base" / "transformer").glob("*.safetensors")
    file = weights.rename(tmp_path / "flux1-kontext-dev.safetensors")
    again = load(tmp_path / "base", device="cpu", files={"transformer": file}, vram=80)
    assert torch.equal(again.velocity(X, SIGMA, again.prepare(MIXED)), model.velocity(X, SIGMA, model.prepare(MIXED)))
    with pytest.raises(WeftError, match=r"transformer: no \*\.safetensors weights"):
        load(tmp_path / "base", device="cpu")
    with pytest.raises(WeftError, match="'text_encoder' is not read from a single file; transformer, vae can be"):
        load(tmp_path / "base", device="cpu", files={"text_encoder": file})
    other = release / "edit_lora" / "pytorch_lora_weights.safetensors"
    with pytest.raises(WeftError, match="diffusers finds no FluxTransformer2DModel"):
        load(tmp_path / "base", device="cpu", files={"transformer": other})
    state = load_file(file)
    state.pop("proj_out.weight")
    save_file(state, file)
    with pytest.raises(WeftError, match="diffusers finds no FluxTransformer2DModel"):
        load(tmp_path / "base", device="cpu", files={"transformer": file})


def test_missing_parts_and_licences_are_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "text_encoder_2")
    with pytest.raises(WeftError, match="no folder 'text_encoder_2'; a model needs transformer, vae"):
        load(tmp_path / "broken", device="cpu")
    assert "Non-Commercial" in licence_note("black-forest-labs/FLUX.1-Kontext-dev")
    assert "non-commercial" in licence_note("xiabs/DreamOmni2")


def test_a_text_that_is_cut_is_reported(model, caplog):
    model.encode_text(["a red star " * 20])
    assert "a text has 61 tokens, the model reads 32" in caplog.records[0].getMessage()


@torch.no_grad()
def test_a_new_model_is_built_around_trained_parts(tmp_path):
    from tiny import tiny_kontext_folder
    from weft.models.build_flux import build_flux, main

    kontext = tiny_kontext_folder(tmp_path / "kontext")
    out = build_flux("recipes/tiny/omni.yaml", kontext, tmp_path / "omni")
    new, old = load(out, device="cpu"), load(kontext, device="cpu")
    assert new.resolution == 64 and not new.transformer.config.guidance_embeds
    assert new.encode_text(["a red star"])[0]["text"].shape == (44, 64)
    new.parts["tokenizer_2"].model_max_length = old.parts["tokenizer_3"].model_max_length
    states, theirs = new.encode_text(["a red star"])[0], old.encode_text(["a red star"])[0]
    assert torch.allclose(states["text"], theirs["text"][24:], atol=1e-6)  # T5's half of SD3's text
    pooled = old.parts["text_encoder"].text_projection(states["pooled"])
    assert torch.allclose(pooled, theirs["pooled"][:32], atol=1e-5)
    c = new.encode([make_record("make it red", picture(64, 64), references=[picture(40, 80, 1)])])
    assert not new.velocity(X[:1, :, :8, :8], SIGMA[:1], new.prepare(c)).any()  # starts as the zero velocity
    with pytest.raises(WeftError, match="exists"):
        build_flux("recipes/tiny/omni.yaml", kontext, out)
    with pytest.raises(WeftError, match="joint_attention_dim is 7, the other parts need 64"):
        build_flux({"transformer": {"joint_attention_dim": 7}}, kontext, tmp_path / "x")
    with pytest.raises(WeftError, match="unknown section 'transformr'"):
        build_flux({"transformer": {}, "transformr": {}}, kontext, tmp_path / "x")
    with pytest.raises(WeftError, match="length: 44"):
        build_flux({"transformer": {}, "tokenizer_2": {"size": 3}}, kontext, tmp_path / "x")
    assert main(["recipes/tiny/omni.yaml", str(tmp_path / "none"), str(tmp_path / "x")]) == 2
