"""UniPic2-Kontext: mixed batches, training, encoding, loading and saving."""

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

from tiny import T5_LENGTH, tiny_kontext_folder, tiny_transformer
from weft import rng
from weft.errors import WeftError
from weft.models import flow
from weft.models.image.attention import adopt, make_layout
from weft.models.image.sd3_kontext import UniPic2Kontext
from weft.models.load import load
from weft.models.weights import licence_note
from weft.record import make_record
from weft.types import Condition, Draw, FlowModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_kontext_folder(tmp_path_factory.mktemp("kontext") / "model")


@pytest.fixture(scope="module")
def model(folder) -> UniPic2Kontext:
    return load(folder, device="cpu")


def condition(name: str, size: tuple[int, int], references: list[tuple[int, int]]) -> Condition:
    """Random text and reference latents (sizes in latent cells) by name."""
    return Condition(
        name,
        size,
        {"text": rng.normal((56, 64), 0, f"{name}/text"), "pooled": rng.normal((48,), 0, f"{name}/pooled")},
        [rng.normal((16, *shape), 0, f"{name}/{k}") for k, shape in enumerate(references)],
    )


MIXED = [
    condition("none", (64, 64), []),
    condition("same", (64, 64), [(8, 8)]),
    condition("wide", (48, 96), [(4, 4), (8, 6)]),
    condition("four", (80, 32), [(8, 8)] * 4),
    condition("three", (64, 64), [(2, 2), (12, 12), (4, 8)]),
]


def one_by_one(model, conditions, x, sigma):
    out = torch.zeros_like(x)
    for i, c in enumerate(conditions):
        h, w = c.size[0] // 8, c.size[1] // 8
        out[i, :, :h, :w] = model.velocity(x[i : i + 1, :, :h, :w], sigma[i : i + 1], model.prepare([c]))[0]
    return out


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    array = rng.numpy_rng(seed, "picture").integers(0, 256, (height, width, 4), dtype=np.uint8)
    array[..., 3] = 255
    return Image.fromarray(array, "RGBA").convert(mode)


# -- mixed batches


@torch.no_grad()
def test_a_mixed_batch_is_one_call_and_equals_one_by_one(model):
    assert isinstance(model, FlowModel)
    x, sigma = rng.normal((5, 16, 10, 12), 0, "x"), torch.tensor([1.0, 0.8, 0.5, 0.2, 0.01])
    calls, blocks = [], []
    hooks = [
        model.transformer.register_forward_hook(lambda *_: calls.append(1)),
        model.transformer.transformer_blocks[0].register_forward_hook(lambda *_: blocks.append(1)),
    ]
    batch = model.prepare(MIXED)
    v = model.velocity(x, sigma, batch)
    assert len(calls) == len(blocks) == 1
    for hook in hooks:
        hook.remove()
    assert v.dtype == torch.float32
    assert (v - one_by_one(model, MIXED, x, sigma)).abs().max() <= 1e-5
    assert batch["valid"].shape == (5, 1, 10, 12)
    assert not v[~batch["valid"].expand_as(v)].any()
    # what lies in the padding of x, and what else is in the batch, cannot matter
    noisy = torch.where(batch["valid"], x, 1e3)
    assert torch.equal(model.velocity(noisy, sigma, batch), v)


grids = st.tuples(st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=20, deadline=None)
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
    other = UniPic2Kontext({**model.parts, "transformer": transformer})
    x, sigma = rng.normal((5, 16, 10, 12), 0, "x"), torch.full((5,), 0.5)
    weight = rng.normal((5, 16, 10, 12), 0, "weight")

    def gradients(v: torch.Tensor) -> dict[str, torch.Tensor]:
        transformer.zero_grad()
        (v * weight).mean().backward()
        return {name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None}

    batch = other.prepare(MIXED)
    together = gradients(other.velocity(x, sigma, batch))
    alone = gradients(one_by_one(other, MIXED, x, sigma))
    transformer.enable_gradient_checkpointing()
    checkpointed = gradients(other.velocity(x, sigma, batch))
    assert together.keys() == alone.keys() and "pos_embed.proj.weight" in together
    for name in together:
        assert torch.allclose(together[name], alone[name], atol=1e-6), name
        assert torch.equal(together[name], checkpointed[name]), name


def test_bf16_autocast_keeps_fp32_outside(model):
    x, sigma = rng.normal((5, 16, 10, 12), 0, "x"), torch.full((5,), 0.5)
    batch = model.prepare(MIXED)
    with torch.no_grad():
        full = model.velocity(x, sigma, batch)
        with torch.autocast("cpu", torch.bfloat16):
            half = model.velocity(x, sigma, batch)
            text = model.encode_text(["a red star"])[0]["text"]
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    assert (half - full).abs().mean() < 0.02 * full.abs().mean()
    assert torch.equal(text, model.encode_text(["a red star"])[0]["text"])


def test_lora_trains_and_leaves_the_start_unchanged():
    from peft import LoraConfig

    transformer = adopt(tiny_transformer())
    x, text, pooled = rng.normal((2, 16, 8, 8), 0, "x"), rng.normal((2, 56, 64), 0, "t"), rng.normal((2, 48), 0, "p")
    arguments = {"timestep": torch.tensor([500.0, 900.0]), "references": [x], "return_dict": False}
    before = transformer(x, text, pooled, **arguments)[0]
    transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v", "add_k_proj"]))
    after = transformer(x, text, pooled, **arguments)[0]
    assert torch.equal(before, after)
    after.square().mean().backward()
    trained = {name for name, p in transformer.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name for name in trained)


def test_adopting_changes_neither_class_nor_parameters_nor_the_stock_call():
    stock, ours = tiny_transformer(), adopt(tiny_transformer())
    assert type(ours) is type(stock) and ours.state_dict().keys() == stock.state_dict().keys()
    x, text, pooled = rng.normal((2, 16, 8, 8), 0, "x"), rng.normal((2, 56, 64), 0, "t"), rng.normal((2, 48), 0, "p")
    time = torch.tensor([500.0, 900.0])
    with torch.no_grad():
        ours_, stock_ = ours(x, text, pooled, time).sample, stock(x, text, pooled, time).sample
    assert torch.allclose(ours_, stock_, rtol=0, atol=1e-6)  # memory alignment may change the last bit


@torch.no_grad()
def test_skipping_layers_keeps_the_references(model):
    """The released pipeline forgets the reference in its skip-layer branch."""
    x, sigma = rng.normal((1, 16, 8, 8), 0, "x"), torch.tensor([0.5])
    with_reference, without = model.prepare([MIXED[1]]), model.prepare([condition("same", (64, 64), [])])
    full = model.velocity(x, sigma, with_reference)
    with_reference, without = (model.skipping(batch, [0]) for batch in (with_reference, without))
    skipped = model.velocity(x, sigma, with_reference)
    assert not torch.equal(skipped, full)
    assert not torch.allclose(skipped, model.velocity(x, sigma, without), atol=1e-4)


def test_layouts_put_targets_first_and_centre_every_window():
    layout = make_layout(((1, 2), (2, 1)), (((2, 2),), ()), 4, 3)
    assert layout.grid == (2, 2) and layout.targets == 2
    # target rows of the padded 2 x 2 grid, then the reference's rows behind its four cells
    assert layout.source.tolist() == [[0, 1, 4, 5, 6, 7], [0, 2, 0, 0, 0, 0]]
    assert layout.position[0].tolist() == [5, 6, 5, 6, 9, 10]  # rows (4-1)//2 = 1, columns 1..2; then rows 1..2
    assert layout.position[1, :2].tolist() == [5, 9]
    assert layout.image_mask[:, 0, 0].tolist() == [[True] * 6, [True, True] + [False] * 4]
    assert layout.joint_mask.shape[-1] == 9 and layout.joint_mask[1, 0, 0, 6:].all()
    assert layout.back is not None and layout.back.tolist() == [[0, 1, 2, 2], [0, 2, 1, 2]]


def test_pictures_beyond_the_position_table_are_refused(model):
    with pytest.raises(WeftError, match="26 x 4 patches does not fit the position table of 24 x 24"):
        model.prepare([condition("long", (26 * 16, 64), [])])
    with pytest.raises(WeftError, match="does not fit"):
        model.prepare([condition("long", (64, 64), [(4, 52)])])


# -- encoding


def test_text_is_encoded_once_per_sentence_and_independently_of_its_batch(model, monkeypatch):
    seen = []
    tokenize = model._tokenize
    monkeypatch.setattr(model, "_tokenize", lambda name, texts, n: seen.append(list(texts)) or tokenize(name, texts, n))
    states = model.encode_text(["a red star", "a blue ring", "a red star"])
    assert seen == [["a red star", "a blue ring"]] * 3
    assert torch.equal(states[0]["text"], states[2]["text"])
    assert not torch.allclose(states[0]["text"], states[1]["text"], atol=1e-3)
    assert not torch.allclose(states[0]["pooled"], states[1]["pooled"], atol=1e-3)
    alone = model.encode_text(["a blue ring"])[0]
    assert torch.allclose(alone["text"], states[1]["text"], atol=1e-5)
    assert states[0]["text"].shape == (24 + T5_LENGTH, 64) and states[0]["pooled"].shape == (48,)


def test_a_text_that_is_cut_is_reported(model, caplog):
    model.encode_text(["a red star left of a blue ring"])
    assert not caplog.records
    model.encode_text(["a red star " * 20])
    assert [r.getMessage()[:47] for r in caplog.records] == ["a text has 61 tokens, the model reads 32 of the"]


def test_tokenizers_of_the_released_folders_have_no_tokenizer_json(folder, model, tmp_path):
    target = broken(folder, tmp_path)
    content = json.loads((target / "tokenizer" / "tokenizer.json").read_text())["model"]
    shutil.rmtree(target / "tokenizer")
    (target / "tokenizer").mkdir()
    (target / "tokenizer" / "vocab.json").write_text(json.dumps(content["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in content["merges"])
    (target / "tokenizer" / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 24, "pad_token": "<|endoftext|>"}
    (target / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    text = "Make the red STAR blue, please!"
    assert torch.equal(load(target, device="cpu").encode_text([text])[0]["text"], model.encode_text([text])[0]["text"])


def test_pictures_are_encoded_deterministically_and_in_any_mode(model):
    images = [picture(64, 48), picture(32, 32, seed=1), picture(64, 48, seed=2)]
    first = model.encode_images(images)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, model.encode_images(images), strict=True))
    assert [tuple(z.shape) for z in first] == [(16, 6, 8), (16, 4, 4), (16, 6, 8)]
    assert torch.allclose(first[2], model.encode_images(images[2:])[0], atol=1e-5)
    grey = picture(32, 32).convert("L")
    for mode in ("RGBA", "L", "P"):
        expected = grey.convert("RGB") if mode in ("L", "P") else picture(32, 32)
        found = model.encode_images([grey.convert(mode) if mode != "RGBA" else picture(32, 32, "RGBA")])[0]
        assert torch.allclose(found, model.encode_images([expected])[0], atol=1e-5), mode


def test_decoding_crops_before_it_decodes(model):
    z = rng.normal((2, 16, 8, 10), 0, "z")
    wide, small = model.decode(z, [(64, 80), (48, 32)])
    assert wide.size == (80, 64) and small.size == (32, 48)
    alone = model.decode(z[1:, :, :6, :4], [(48, 32)])[0]
    assert np.array_equal(np.asarray(small), np.asarray(alone))


@pytest.mark.parametrize(
    ("size", "longer", "expected"),
    [
        ((480, 640), 512, (384, 512)),
        ((1080, 1920), 512, (288, 512)),
        ((1080, 1920), 1024, (576, 1024)),
        ((640, 480), 512, (512, 384)),
        ((700, 700), 512, (512, 512)),
    ],
)
def test_the_release_s_sizing_rule(size, longer, expected):
    assert flow.fit_longer_edge(size, longer) == expected


@pytest.mark.parametrize(("resolution", "expected"), [(64, (48, 64)), (256, (192, 256)), (512, (352, 512))])
def test_from_256_pixels_on_the_shorter_edge_is_a_multiple_of_32_as_in_the_release(folder, resolution, expected):
    assert load(folder, device="cpu", resolution=resolution).own_size((700, 1000)) == expected


def test_a_picture_too_narrow_is_refused_with_the_numbers():
    with pytest.raises(WeftError, match=r"1000x30 \(width x height\) is too narrow: at a longer edge of 512"):
        flow.fit_longer_edge((30, 1000), 512)


def test_sizes_must_be_multiples_of_sixteen(model):
    with pytest.raises(WeftError, match=r"size 70x64 .* multiples of 16; nearest valid sizes are 64x64 and 80x64"):
        model.encode([make_record("a red star", size=(70, 64))])
    with pytest.raises(WeftError, match="multiples of 16"):
        model.encode_images([picture(60, 64)])


def test_records_become_conditions_with_the_source_first(model):
    source, reference = picture(128, 96), picture(40, 80, seed=1)
    records = [
        make_record("a red star"),
        make_record("make it blue", source, references=[reference]),
        make_record("a wide one", size=(32, 64)),
        make_record("make it blue", source, size=(64, 64)),
    ]
    conditions = model.encode(records)
    assert [c.size for c in conditions] == [(64, 64), (48, 64), (32, 64), (64, 64)]
    assert [[tuple(z.shape[1:]) for z in c.references] for c in conditions] == [[], [(6, 8), (8, 4)], [], [(8, 8)]]
    expected = model.encode_images([source.resize((64, 48), Image.Resampling.BICUBIC)])[0]
    assert torch.allclose(conditions[1].references[0], expected, atol=1e-5)
    negatives = model.encode(records, negative="")
    quick = model.with_text(conditions, "")
    for a, b, c in zip(negatives, quick, conditions, strict=True):
        assert torch.equal(a.tensors["text"], b.tensors["text"])
        assert not torch.equal(a.tensors["text"], c.tensors["text"])
        assert all(torch.equal(m, n) for m, n in zip(a.references, b.references, strict=True))


def test_an_empty_instruction_is_refused(model):
    record = make_record("a red star")
    record.turns[0].parts[0].text = "  "
    with pytest.raises(WeftError, match="empty instruction"):
        model.encode([record])


# -- the loss


def examples_of(model, n: int = 3):
    records = [
        make_record(f"make it {colour}", picture(64, 64, seed=k), target=picture(64, 64, seed=10 + k), id=f"r{k}")
        for k, colour in enumerate(["red", "blue", "green"][:n])
    ]
    return model.examples(records), [record.id for record in records]


def test_examples_hold_everything_flat_and_survive_safetensors(model, tmp_path):
    from safetensors.torch import load_file, save_file

    examples, _ = examples_of(model, 1)
    assert set(examples[0]) == {"target", "reference.0", "text", "pooled", "task"}
    assert examples[0]["target"].dtype == torch.float32 and flow.task_of(examples[0]) == "edit"
    save_file({k: v.contiguous() for k, v in examples[0].items()}, tmp_path / "e.safetensors")
    back = flow.condition_of(load_file(tmp_path / "e.safetensors"), "r0", 8)
    assert back.size == (64, 64) and len(back.references) == 1 and set(back.tensors) == {"text", "pooled"}
    again = flow.example_of(back, examples[0]["target"], "edit")
    assert all(torch.equal(again[k], v) for k, v in examples[0].items())


def test_the_loss_is_the_mean_square_error_of_the_velocity_per_sample(model):
    examples, ids = examples_of(model, 2)
    draw = Draw(7, 3, ids)
    result = flow.flow_matching_loss(model, examples, draw, sigma=[0.25, 0.75])
    for k, sigma in enumerate((0.25, 0.75)):
        x0, noise = examples[k]["target"], rng.normal((16, 8, 8), 7, "noise", 3, ids[k], 0)
        batch = model.prepare([flow.condition_of(examples[k], ids[k], 8)])
        with torch.no_grad():
            v = model.velocity(((1 - sigma) * x0 + sigma * noise)[None], torch.tensor([sigma]), batch)[0]
        expected = float((v - (noise - x0)).square().mean())
        assert result.per_sample[k].item() == pytest.approx(expected, rel=1e-5)
    assert result.per_sample.dtype == torch.float32 and result.per_sample.requires_grad


@torch.no_grad()
def test_a_sample_s_loss_depends_on_its_coordinates_not_on_its_batch(model):
    examples, ids = examples_of(model)
    together = model.loss(examples, Draw(0, 5, ids)).per_sample
    alone = torch.cat([model.loss(examples[k : k + 1], Draw(0, 5, ids[k : k + 1])).per_sample for k in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(together, model.loss(examples, Draw(0, 6, ids)).per_sample, atol=1e-3)
    twice = model.loss([examples[0]] * 2, Draw(0, 5, [ids[0]] * 2)).per_sample
    assert twice[0] != twice[1]  # a record drawn twice gets fresh noise the second time


@torch.no_grad()
def test_the_loss_of_mixed_sizes_ignores_the_padding(model):
    records = [
        make_record("a wide one", target=picture(96, 32), size=(32, 96), id="a"),
        make_record("make it red", picture(64, 64), target=picture(64, 64, seed=2), id="b"),
    ]
    examples = model.examples(records)
    config = flow.FlowLossConfig(text_dropout=0.0)
    together = flow.flow_matching_loss(model, examples, Draw(0, 0, ["a", "b"]), config).per_sample
    for k, name in enumerate("ab"):
        alone = flow.flow_matching_loss(model, examples[k : k + 1], Draw(0, 0, [name]), config).per_sample
        assert together[k] == pytest.approx(float(alone[0]), rel=1e-5)


def test_text_dropout_takes_the_empty_text_for_the_named_tasks_only(model, monkeypatch):
    examples, ids = examples_of(model, 2)
    seen = []
    prepare = model.prepare
    monkeypatch.setattr(model, "prepare", lambda conditions: seen.append(conditions) or prepare(conditions))
    config = flow.FlowLossConfig(text_dropout=1.0, dropout_tasks=("edit",))
    assert flow.flow_matching_loss(model, examples, Draw(0, 0, ids), config).metrics["text_dropped"] == 1
    assert all(torch.equal(c.tensors["text"], model.empty_text()["text"]) for c in seen[0])
    assert all(len(c.references) == 1 for c in seen[0])
    default = flow.FlowLossConfig(text_dropout=1.0)
    assert flow.flow_matching_loss(model, examples, Draw(0, 0, ids), default).metrics["text_dropped"] == 0


@pytest.mark.parametrize("kind", flow.TIMESTEPS)
def test_every_timestep_option_spreads_over_the_line(kind):
    u = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    sigma = flow.sigmas_of(flow.FlowLossConfig(timestep=kind), 3.0, u)
    assert 0 <= sigma.min() < 0.06 and 0.94 < sigma.max() <= 1
    assert sigma.median() == pytest.approx(0.75 if kind == "uniform_shifted" else 0.5, abs=0.02)


def test_unknown_loss_options_are_refused():
    with pytest.raises(WeftError, match="choose one of uniform_shifted"):
        flow.FlowLossConfig(timestep="uniform")
    with pytest.raises(WeftError, match="shift is of timestep uniform_shifted; it does nothing with logit_normal"):
        flow.FlowLossConfig(timestep="logit_normal", shift=3.0)
    assert flow.FlowLossConfig(timestep="logit_normal", mean=0.5, std=1.2).mean == 0.5
    with pytest.raises(WeftError, match="share between 0 and 1"):
        flow.FlowLossConfig(text_dropout=10)


def test_a_dynamic_shift_reads_the_output_s_size_and_editing_still_works(model):
    """The released pipeline overwrites the size under dynamic shifting and then refuses every edit."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    other = UniPic2Kontext({**model.parts, "transformer": copy.deepcopy(model.transformer), "scheduler": scheduler})
    small, large = other.sigmas(4, (64, 64)), other.sigmas(4, (1024, 1024))
    assert small.shape == (5,) and small[0] == 1 and small[-1] == 0 and (large[1:4] > small[1:4]).all()
    edit = other.encode([make_record("make it red", picture(64, 64))])
    assert torch.isfinite(other.velocity(rng.normal((1, 16, 8, 8), 0, "x"), small[:1], other.prepare(edit))).all()


# -- folders and options


def test_saving_and_loading_gives_the_same_model_and_replaces_an_old_folder(model, tmp_path):
    from weft.models.weights import save_folder

    target = tmp_path / "deep" / "model"
    model.save(target)
    (target / "README.md").write_text("a card")
    model.save(target)
    assert (target / "README.md").read_text() == "a card"
    assert sorted(path.name for path in target.parent.iterdir()) == ["model"]
    again = load(target, device="cpu")
    batch = model.prepare(MIXED)
    x, sigma = rng.normal((5, 16, 10, 12), 0, "x"), torch.full((5,), 0.5)
    with torch.no_grad():
        assert torch.equal(model.velocity(x, sigma, batch), again.velocity(x, sigma, again.prepare(MIXED)))
    assert torch.equal(model.encode_text(["a red star"])[0]["text"], again.encode_text(["a red star"])[0]["text"])
    save_folder(model.parts, tmp_path / "half", torch.float16)
    sizes = [(path / WEIGHTS).stat().st_size for path in (target, tmp_path / "half")]
    assert sizes[1] < 0.52 * sizes[0]
    assert load(tmp_path / "half", device="cpu").dtype == torch.float32


def broken(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "broken")
    return tmp_path / "broken"


def _remove_key(path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors.pop("proj_out.weight")
    save_file(tensors, path, metadata={"format": "pt"})


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f / "vae"), "no folder 'vae'"),
        (lambda f: (f / "text_encoder_2" / "model.safetensors").unlink(), r"text_encoder_2: no \*\.safetensors"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:5000]), "transformer: cannot be read"),
        (lambda f: _remove_key(f / WEIGHTS), r"transformer: 1 weights are missing, the first is proj_out\.weight"),
        (lambda f: (f / "transformer" / "config.json").write_text("{"), "transformer: cannot be read"),
        (lambda f: (f / "text_encoder" / "model.safetensors").write_bytes(b"<html>"), "text_encoder: cannot be read"),
        (lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{"), "tokenizer: cannot be read"),
        (lambda f: (f / "model_index.json").write_text("{"), r"model_index\.json: not valid JSON"),
        (
            lambda f: (f / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'),
            "model class 'FluxPipeline' is not supported",
        ),
    ],
)
def test_a_broken_folder_names_its_broken_part_in_one_line(folder, tmp_path, damage, message):
    damage(broken(folder, tmp_path))
    with pytest.raises(WeftError, match=message) as caught:
        load(tmp_path / "broken", device="cpu")
    assert "\n" not in str(caught.value)


def test_other_shapes_than_the_configuration_says_are_refused(folder, tmp_path):
    path = broken(folder, tmp_path) / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pooled_projection_dim": 64}))
    with pytest.raises(WeftError, match="transformer"):
        load(tmp_path / "broken", device="cpu")


def test_options_that_cannot_be_honoured_are_refused(folder, tmp_path):
    with pytest.raises(WeftError, match="not a folder and not in the zoo"):
        load("tiny-kontex")
    with pytest.raises(WeftError, match="not a model folder"):
        load(tmp_path)
    with pytest.raises(WeftError, match="offload='model' needs an accelerator"):
        load(folder, device="cpu", offload="model")
    with pytest.raises(WeftError, match="choose none, model or sequential"):
        load(folder, device="cpu", offload="disk")
    with pytest.raises(WeftError, match="bitsandbytes|accelerator"):
        load(folder, device="cpu", quantization="4bit")
    with pytest.raises(WeftError, match="choose 4bit or 8bit"):
        load(folder, device="cpu", quantization="3bit")
    with pytest.raises(WeftError, match="attention_backend 'nothing'"):
        load(folder, device="cpu", attention_backend="nothing")
    with pytest.raises(WeftError, match="dtype 'int4' is unknown"):
        load(folder, device="cpu", dtype="int4")
    for resolution in (100, 0, -64):
        with pytest.raises(WeftError, match="must be a multiple of 16"):
            load(folder, device="cpu", resolution=resolution)


def test_options_reach_diffusers(folder):
    model = load(
        folder, device="cpu", dtype="bf16", attention_backend="_native_math", tiling=True, slicing=True, resolution=512
    )
    assert model.dtype == torch.bfloat16 and model.vae.use_tiling and model.vae.use_slicing
    assert (model.resolution, model.factor) == (512, 32)
    block = model.transformer.transformer_blocks[0]
    assert {p._attention_backend.value for p in (block.attn.processor, block.attn2.processor)} == {"_native_math"}
    x, sigma = rng.normal((5, 16, 10, 12), 0, "x"), torch.full((5,), 0.5)
    with torch.no_grad():
        assert model.velocity(x, sigma, model.prepare(MIXED)).dtype == torch.float32
    block.attn.processor._attention_backend = "_native_flash"
    with pytest.raises(WeftError, match="'_native_flash' takes no mask"):
        model.velocity(x, sigma, model.prepare(MIXED))


@pytest.mark.parametrize("how", ["model", "sequential"])
def test_offloading_hooks_give_the_same_numbers(folder, model, how):
    """accelerate's hooks, with the CPU standing in for the accelerator that `load` insists on."""
    from weft.models.load import _offload

    other = load(folder, device="cpu")
    _offload(other, how, torch.device("cpu"), skip=set())
    other._device = torch.device("cpu")
    assert (how == "sequential") == other.transformer.proj_out.weight.is_meta
    x, sigma = rng.normal((5, 16, 10, 12), 0, "x"), torch.full((5,), 0.5)
    record = make_record("make it red", picture(64, 64))
    with torch.no_grad():
        for conditions, noisy in ((MIXED, x), (model.encode([record]), x[:1, :, :8, :8])):
            expected = model.velocity(noisy, sigma[: len(noisy)], model.prepare(conditions))
            found = other.velocity(noisy, sigma[: len(noisy)], other.prepare(conditions))
            assert torch.equal(found, expected)
    ours, theirs = other.encode([record])[0], model.encode([record])[0]
    assert torch.equal(ours.tensors["text"], theirs.tensors["text"])
    assert torch.equal(ours.references[0], theirs.references[0])
    pictures = [m.decode(ours.references[0][None], [(64, 64)])[0] for m in (model, other)]
    assert np.array_equal(*map(np.asarray, pictures))


def test_loras_load_with_their_weights(folder, tmp_path):
    from peft import LoraConfig, get_peft_model_state_dict
    from safetensors.torch import save_file

    plain = load(folder, device="cpu")
    x, sigma = rng.normal((5, 16, 10, 12), 0, "x"), torch.full((5,), 0.5)
    trained = copy.deepcopy(plain.transformer)
    trained.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "ff.net.2"]))
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * rng.normal(tuple(parameter.shape), 0, name)
    state = {key: value.contiguous() for key, value in get_peft_model_state_dict(trained).items()}
    (tmp_path / "peft").mkdir()
    peft_state = {f"base_model.model.{key}": value for key, value in state.items()}
    save_file(peft_state, tmp_path / "peft" / "adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "ff.net.2"]}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    meta = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    save_file({f"transformer.{key}": value for key, value in state.items()}, tmp_path / "d.safetensors", metadata=meta)
    with torch.no_grad():
        batch = plain.prepare(MIXED)
        without = plain.velocity(x, sigma, batch)
        expected = UniPic2Kontext({**plain.parts, "transformer": trained}).velocity(x, sigma, batch)
        assert (expected - without).abs().max() > 1e-3
        for lora in (str(tmp_path / "peft"), str(tmp_path / "d.safetensors"), f"{tmp_path}/d.safetensors:1.0"):
            found = load(folder, device="cpu", lora=[lora]).velocity(x, sigma, batch)
            assert torch.allclose(found, expected, atol=1e-6), lora
        off = load(folder, device="cpu", lora=[(str(tmp_path / "peft"), 0.0)])
        assert torch.allclose(off.velocity(x, sigma, batch), without, atol=1e-6)
        halves = load(folder, device="cpu", lora=[f"{tmp_path}/peft:0.5", f"{tmp_path}/d.safetensors:0.5"])
        assert torch.allclose(halves.velocity(x, sigma, batch), expected, atol=1e-6)
    with pytest.raises(WeftError, match="merge it or take it off"):
        halves.save(tmp_path / "never")
    with pytest.raises(WeftError, match="no LoRA at"):
        load(folder, device="cpu", lora=["missing.safetensors:0.5"])


def test_licences_of_known_checkpoints_are_stated():
    assert "MIT" in licence_note("Skywork/UniPic2-SD3.5M-Kontext-2B")
    assert "Stability" in licence_note("/cache/models--stabilityai--stable-diffusion-3.5-medium/snapshots/abc")
    assert licence_note("my-model") is None
