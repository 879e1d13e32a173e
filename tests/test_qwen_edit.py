"""Qwen-Image-Edit: stock diffusers, mixed batches, long texts, guidance, sizes, training, folders."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from golden.make_dreamomni2 import noise, pack, picture
from tiny import tiny_qwen_edit_folder
from weft import rng
from weft.errors import WeftError
from weft.models import flow
from weft.models.image.qwen_image_edit import AFTER, BEFORE, QwenImageEdit, QwenOptions
from weft.models.load import load
from weft.record import make_record
from weft.sample.rollout import sample_flow
from weft.train.feed import fingerprint
from weft.types import Condition, Draw, FlowModel
from weft.vlm.processor import Processor

STEPS, PROMPT = 3, "make the red star blue"
SIZES = [(64, 64), (96, 32), (32, 96)]  # multiples of 32 that the pipeline's rule keeps at an area of 64 x 64


@pytest.fixture(scope="module", params=["2509", "2511"])
def folder(request, tmp_path_factory):
    """2511 tells the transformer that the input pictures are clean (`zero_cond_t`)."""
    return tiny_qwen_edit_folder(tmp_path_factory.mktemp("qwen") / request.param, zero_cond_t=request.param == "2511")


@pytest.fixture(scope="module")
def model(folder) -> QwenImageEdit:
    return load(folder, device="cpu")


def opened(folder, **options) -> QwenImageEdit:
    model = load(folder, device="cpu", options=options)
    model.factor = 32  # as at full size, where the tests compare with the pipeline
    return model


def records() -> list:
    return [
        make_record("a red star"),
        make_record("make it blue", picture(50, 100)),
        make_record("give the star the pattern of picture 2", picture(64, 64, 1), references=[picture(90, 50, 2)]),
        make_record("all of them in one picture", references=[picture(40, 40, k) for k in range(3)]),
    ]


# -- stock diffusers


class Stock:
    """diffusers' pipeline over the parts of a folder; its processor needs torchvision, so weft's stands in."""

    def __init__(self, folder, model: QwenImageEdit, grid: bool, monkeypatch) -> None:
        place = f"diffusers.pipelines.qwenimage.pipeline_qwenimage_edit{'_plus' if model.several else ''}"
        module, self.several = importlib.import_module(place), model.several
        for name in ("CONDITION_IMAGE_SIZE", "VAE_IMAGE_SIZE") if model.several else ():
            monkeypatch.setattr(module, name, 64 * 64)
        if not model.several:
            real = module.calculate_dimensions
            monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: real(64 * 64, ratio))
        parts = load(folder, device="cpu").parts
        processor = parts.pop("processor")
        self.pipeline = getattr(module, model.pipeline)(**parts, processor=None)
        listed = (lambda images: images) if model.several else (lambda image: [image])
        self.pipeline.processor = lambda text, images, **_: Inputs(processor, text, listed(images))
        self.pipeline.transformer = type(parts["transformer"]).from_pretrained(folder / "transformer")
        self.pipeline.prompt_template_encode_start_idx = model.skip
        self.pipeline.set_progress_bar_config(disable=True)
        self.grid = grid
        if grid:  # what the pipeline forgets to hand over, and transformers 5 needs to count rows and columns
            self.pipeline.text_encoder.register_forward_pre_hook(
                lambda m, a, k: (a, {**k, "mm_token_type_ids": (k["input_ids"] == processor.image_id).int()}),
                with_kwargs=True,
            )

    def __call__(self, pictures, size, latents, cfg):
        return self.pipeline(
            image=pictures if self.several else pictures[0], prompt=PROMPT, negative_prompt=" ",
            true_cfg_scale=cfg, height=size[0], width=size[1],
            num_inference_steps=STEPS, latents=pack(latents), output_type="latent",
        ).images  # fmt: skip


class Inputs(dict):
    def __init__(self, processor: Processor, text, images) -> None:
        batch = processor.batch([processor.encode(text[0], images)], side="right")
        super().__init__({name: value for name, value in batch.items() if name != "mm_token_type_ids"})

    def to(self, device):
        return self


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("mrope", ["grid", "flat"])
def test_it_is_the_stock_pipeline(folder, monkeypatch, count, mrope):
    model = opened(folder, parity=True, mrope=mrope)
    pictures = [picture(*size, k) for k, size in enumerate(SIZES[:count])]
    condition = model.encode([make_record(PROMPT, pictures[0], references=pictures[1:])])[0]
    record = make_record(PROMPT, pictures[0], references=pictures[1:])
    against = model.encode([record], negative="")
    assert condition.size == SIZES[count - 1]  # the pipeline follows the last picture
    assert [tuple(8 * n for n in z.shape[1:]) for z in condition.references] == SIZES[:count]
    h, w = (edge // 8 for edge in condition.size)
    start = noise(f"qwen/{count}", 1, 16, h, w)
    stock = Stock(folder, model, mrope == "grid", monkeypatch)
    for cfg in (1.0, 4.0):
        expected = stock(pictures, condition.size, start, cfg)
        found = sample_flow(
            model,
            [condition],
            seeds=[0],
            steps=STEPS,
            guidance=cfg,
            negative=against if cfg > 1 else None,
            init_latents=start,
        ).latents
        assert (pack(found) - expected).abs().max() <= 1e-5
        assert expected.std() > 0.1


def test_the_first_release_is_its_stock_pipeline_and_takes_one_picture(folder, tmp_path, monkeypatch):
    """QwenImageEditPipeline: the same networks, the picture not numbered, and shown to the VLM as large as it is."""
    first = tmp_path / "Qwen-Image-Edit"
    shutil.copytree(folder, first)
    index = json.loads((first / "model_index.json").read_text()) | {"_class_name": "QwenImageEditPipeline"}
    (first / "model_index.json").write_text(json.dumps(index))
    model = opened(first, parity=True)
    record, size = make_record(PROMPT, picture(70, 35, 0)), (96, 32)
    (condition,), against = model.encode([record]), model.encode([record], negative="")
    assert condition.size == size and "2509" not in model.licence and not isinstance(opened(folder), type(model))
    start, stock = noise("qwen/first", 1, 16, 12, 4), Stock(first, model, True, monkeypatch)
    for cfg in (1.0, 4.0):
        expected = stock([picture(70, 35, 0)], size, start, cfg)
        negative = against if cfg > 1 else None
        found = sample_flow(model, [condition], seeds=[0], steps=STEPS, guidance=cfg, negative=negative,
                            init_latents=start).latents  # fmt: skip
        assert (pack(found) - expected).abs().max() <= 1e-5 and expected.std() > 0.1
    numbered = opened(folder, parity=True).encode([record])[0].tensors["text"]
    assert len(numbered) > len(condition.tensors["text"])
    with pytest.raises(WeftError, match="takes one picture, the request has 2; use Qwen-Image-Edit-2509"):
        model.encode([make_record(PROMPT, picture(64, 64), references=[picture(64, 64)])])
    (first / "weft.json").write_text('{"resolution": 64}')
    assert load(first, device="cpu").options.condition_area == 1024 * 1024
    model.save(tmp_path / "saved")
    assert type(load(tmp_path / "saved", device="cpu")) is type(model)


def test_the_vlm_s_two_ways_to_count_a_picture_differ(folder):
    grid, flat = (opened(folder, mrope=how).encode(records()[1:2])[0].tensors["text"] for how in ("grid", "flat"))
    assert (grid - flat).abs().max() > 1e-3


def test_decoding_inverts_the_latents_statistics(model, folder):
    from diffusers import AutoencoderKLQwenImage

    vae = AutoencoderKLQwenImage.from_pretrained(folder / "vae")
    image = picture(32, 64)
    z = model.encode_images([image])[0]
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    x = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
    with torch.no_grad():
        raw = vae.encode(x).latent_dist.mode()
        assert torch.allclose(z, ((raw - mean) / std)[0, :, 0], atol=1e-5)
        expected = (vae.decode(raw).sample[0, :, 0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy() * 255
    assert np.abs(np.asarray(model.decode(z[None], [(32, 64)])[0]) - expected).max() <= 0.51


def test_the_prompt_is_the_pipeline_s_and_its_head_is_dropped_whole(model):
    from diffusers import QwenImageEditPlusPipeline

    stock = QwenImageEditPlusPipeline.__init__
    constants = [c for c in stock.__code__.co_consts if isinstance(c, str) and "{}" in c]
    assert constants == [BEFORE + "{}" + AFTER]
    assert 64 in stock.__code__.co_consts  # with the released tokenizer the head is 64 tokens
    assert model.processor.tokenizer.decode(model.processor.tokenizer(BEFORE).input_ids[: model.skip]) == BEFORE


# -- mixed batches


def one_by_one(model, conditions, x, sigma):
    out = torch.zeros_like(x)
    for i, c in enumerate(conditions):
        h, w = c.size[0] // 8, c.size[1] // 8
        out[i, :, :h, :w] = model.velocity(x[i : i + 1, :, :h, :w], sigma[i : i + 1], model.prepare([c]))[0]
    return out


@torch.no_grad()
def test_a_mixed_batch_is_one_call_and_equals_one_by_one(model):
    assert isinstance(model, FlowModel)
    conditions = model.encode(records())
    assert len({c.tensors["text"].shape[0] for c in conditions}) == 4 and [len(c.references) for c in conditions] == [
        0,
        1,
        2,
        3,
    ]
    height, width = (max(c.size[k] for c in conditions) // 8 for k in (0, 1))
    x, sigma = rng.normal((4, 16, height, width), 0, "x"), torch.tensor([1.0, 0.7, 0.3, 0.01])
    calls = []
    hook = model.transformer.register_forward_hook(lambda *_: calls.append(1))
    batch = model.prepare(conditions)
    v = model.velocity(x, sigma, batch)
    hook.remove()
    assert len(calls) == 1
    assert (v - one_by_one(model, conditions, x, sigma)).abs().max() <= 1e-5
    noisy = torch.where(batch["valid"], x, 1e3)
    assert torch.equal(model.velocity(noisy, sigma, batch), v)
    assert not v[~batch["valid"].expand_as(v)].any()


@torch.no_grad()
def test_texts_of_different_length_beside_equal_pictures(model):
    """The stock mask of texts; padding changes nothing."""
    pair = model.encode(
        [make_record(t, picture(64, 64)) for t in ("blue", "make the red star blue, and keep the rest")]
    )
    x, sigma = rng.normal((2, 16, 8, 8), 0, "x"), torch.tensor([0.8, 0.4])
    batch = model.prepare(pair)
    assert batch["layout"] is None and batch["text_mask"].sum(1).tolist() == [len(c.tensors["text"]) for c in pair]
    assert (model.velocity(x, sigma, batch) - one_by_one(model, pair, x, sigma)).abs().max() <= 1e-5


def test_gradients_with_and_without_checkpointing_agree(model):
    transformer = copy.deepcopy(model.transformer)
    other = QwenImageEdit({**model.parts, "transformer": transformer}, options=model.options, resolution=64)
    conditions = model.encode(records())
    x, sigma = rng.normal((4, 16, 8, 12), 0, "x"), torch.full((4,), 0.5)
    grads = []
    for on in (False, True):
        if on:
            transformer.enable_gradient_checkpointing()
        transformer.zero_grad()
        other.velocity(x, sigma, other.prepare(conditions)).square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in transformer.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and "img_in.weight" in grads[0]
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_a_mixed_batch_samples_with_guidance_as_alone(model):
    """Norm rescaling divides by a length that is zero in the padding."""
    rows = records()[:3]
    conditions, against = model.encode(rows), model.encode(rows, negative="blur")
    together = sample_flow(model, conditions, seeds=[1, 2, 3], steps=2, guidance=3.0, negative=against).latents
    assert torch.isfinite(together).all()
    for k in range(3):
        alone = sample_flow(
            model, conditions[k : k + 1], seeds=[k + 1], steps=2, guidance=3.0, negative=against[k : k + 1]
        )
        h, w = alone.latents.shape[2:]
        assert (together[k : k + 1, :, :h, :w] - alone.latents).abs().max() <= 1e-5


def test_guidance_keeps_the_length_of_each_token(model):
    negative, positive = rng.normal((2, 16, 8, 8), 0, "n"), rng.normal((2, 16, 8, 8), 0, "p")
    found = model.guide(negative, positive, 4.0)
    assert torch.allclose(pack(found).norm(dim=-1), pack(positive).norm(dim=-1), atol=1e-4)
    plain = negative + 4 * (positive - negative)
    cosine = torch.cosine_similarity(pack(found), pack(plain), dim=-1)
    assert torch.allclose(cosine, torch.ones_like(cosine), atol=1e-5)


# -- reading


@torch.no_grad()
def test_instructions_are_never_cut_and_do_not_depend_on_their_batch(model, caplog):
    long = "put " + "the red star and the blue circle beside the green ring and " * 60 + "then make it blue"
    rows = [make_record(t, picture(64, 64)) for t in (long, long.replace("make it blue", "make it red"), "a star")]
    states = [c.tensors["text"] for c in model.encode(rows)]
    assert len(states[0]) > 1024 and not caplog.records
    assert (states[0][-12:] - states[1][-12:]).abs().max() > 1e-3
    assert torch.allclose(states[2], model.encode(rows[2:])[0].tensors["text"], atol=1e-5)


def test_every_picture_is_read_and_numbered(model):
    seen = []
    encode = model.processor.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.processor, "encode", lambda text, shown: seen.append((text, shown)) or encode(text, shown))
        model.encode(records()[2:])
    for (text, shown), count in zip(seen, (2, 3), strict=True):
        assert len(shown) == count and all(f"Picture {k}: <|vision_start|>" in text for k in range(1, count + 1))
        assert all(image.width % 32 == image.height % 32 == 0 for image in shown)
    assert [image.size for image in seen[0][1]] == [(64, 64), (32, 96)]  # a tall picture stays tall


def test_sizes_follow_the_source_and_areas_are_options(folder):
    full = opened(folder)
    full.resolution = 1024
    assert full.own_size((1080, 1920)) == full.output_size([(1080, 1920), (10, 10)], (1080, 1920)) == (768, 1376)
    assert full.output_size([], None) == (1024, 1024) and full.resolution_of((768, 1376)) == 1024
    assert full.input_sizes([(1080, 1920), (500, 500)], True, (768, 1376)) == [(768, 1376), (1024, 1024)]
    small = opened(folder, vae_area=512 * 512)
    small.resolution = 1024
    assert small.input_sizes([(1080, 1920), (500, 500)], True, (768, 1376)) == [(384, 672), (512, 512)]
    parity = opened(folder, parity=True)
    assert parity.output_size([(64, 64), (200, 100)], (64, 64)) == (96, 32)
    tokens = [
        len(opened(folder, condition_area=a).encode(records()[1:2])[0].tensors["text"]) for a in (32 * 32, 64 * 64)
    ]
    assert tokens[0] < tokens[1]


@pytest.mark.parametrize("options", [{"parity": True}, {"vae_area": 64 * 64}])
def test_inputs_of_their_own_size_are_stretched_whatever_size_is_asked_for(folder, options):
    """As the pipeline does, which also rounds an odd size down; without the option the source covers the output."""
    model, source = opened(folder, **options), picture(50, 100)
    (bare,), (sized,) = (model.encode([make_record(PROMPT, source, size=s)]) for s in (None, (64, 64)))
    assert sized.size == (64, 64) and sized.references[0].shape[1:] == (4, 12)
    assert torch.equal(sized.references[0], bare.references[0])
    odd = make_record(PROMPT, source, size=(75, 60))
    if "parity" in options:
        assert model.encode([odd])[0].size == (64, 48)
    else:
        with pytest.raises(WeftError, match="multiples of 16"):
            model.encode([odd])


def test_options_that_mean_nothing_are_refused(folder):
    for options, message in (
        ({"mrope": "spiral"}, "choose grid or flat"),
        ({"condition_area": 100}, "at least 1024"),
        ({"layout": "kontext"}, "has no 'layout'"),
    ):
        with pytest.raises(WeftError, match=message):
            load(folder, device="cpu", options=options)


# -- training and folders


def test_examples_train_and_text_dropout_sees_the_pictures(folder, tmp_path):
    model = opened(folder, keep_empty=True)
    rows = [
        make_record("make it red", picture(50, 100), target=picture(50, 100, 3), id="a"),
        make_record("make it blue", picture(64, 64), target=picture(64, 64, 4), id="b"),
    ]
    examples = model.examples(rows)
    assert set(examples[0]) == {"target", "reference.0", "text", "empty", "task"}
    save_file({k: v.contiguous() for k, v in examples[0].items()}, tmp_path / "e.safetensors")
    back = flow.condition_of(load_file(tmp_path / "e.safetensors"), "a", 8)
    expected = model.encode(rows[:1], negative="")[0].tensors["text"]
    assert torch.allclose(model.without_text(back)["text"], expected, atol=1e-5)
    config = flow.FlowLossConfig(text_dropout=0.5, dropout_tasks=("edit",))
    together = flow.flow_matching_loss(model, examples, Draw(0, 3, ["a", "b"]), config).per_sample
    for k, name in enumerate("ab"):
        alone = flow.flow_matching_loss(model, examples[k : k + 1], Draw(0, 3, [name]), config).per_sample
        assert together[k].item() == pytest.approx(alone[0].item(), rel=1e-5)
    plain = load(folder, device="cpu")
    with pytest.raises(WeftError, match="keep_empty=true"):
        plain.without_text(plain.encode(rows[:1])[0])
    with pytest.raises(WeftError, match="see the pictures"):
        plain.with_text(plain.encode(rows[:1]), "")


def test_saving_and_loading_gives_the_same_model(model, tmp_path):
    model.save(tmp_path / "saved")
    again = load(tmp_path / "saved", device="cpu")
    assert again.options == model.options and again.resolution == 64
    c, x, sigma = model.encode(records()[2:3]), rng.normal((1, 16, 8, 8), 0, "x"), torch.tensor([0.5])
    with torch.no_grad():
        expected = model.velocity(x, sigma, model.prepare(c))
        assert torch.equal(again.velocity(x, sigma, again.prepare(again.encode(records()[2:3]))), expected)

    print_of = partial(fingerprint, trained=["transformer"], args={})  # as a cache knows the model
    assert print_of(model) == print_of(again)
    again.processor.images.image_mean = [0.0, 0.0, 0.0]
    assert print_of(model) != print_of(again)


@pytest.mark.parametrize("how", ["model", "sequential"])
def test_offloading_hooks_give_the_same_numbers(model, folder, how):
    """accelerate's hooks, with the CPU standing in for the accelerator that `load` insists on."""
    from weft.models.load import QWEN, _offload

    other = load(folder, device="cpu")
    _offload(other, how, torch.device("cpu"), QWEN.order)
    other._device = torch.device("cpu")
    rows = records()[1:3]
    x, sigma = rng.normal((2, 16, 8, 12), 0, "x"), torch.tensor([0.7, 0.3])
    with torch.no_grad():
        expected = model.velocity(x, sigma, model.prepare(model.encode(rows)))
        found = other.velocity(x, sigma, other.prepare(other.encode(rows)))
    assert torch.equal(found, expected)
    assert [p.size for p in other.decode(x[:, :, :8, :8], [(64, 64)] * 2)] == [(64, 64)] * 2


def test_half_precision_and_backends_reach_the_transformer(folder):
    half = load(folder, device="cpu", dtype="bf16", attention_backend="_native_math", tiling=True, slicing=True)
    full = load(folder, device="cpu")
    conditions = full.encode(records())
    x, sigma = rng.normal((4, 16, 8, 12), 0, "x"), torch.full((4,), 0.5)
    with torch.no_grad():
        expected, found = (
            full.velocity(x, sigma, full.prepare(conditions)),
            half.velocity(x, sigma, half.prepare(conditions)),
        )
    assert half.dtype == torch.bfloat16 and found.dtype == torch.float32
    assert 0 < (found - expected).abs().mean() < 0.03 * expected.abs().mean()
    assert torch.isfinite(half.encode(records()[:2])[1].tensors["text"].float()).all()
    half.transformer.transformer_blocks[0].attn.processor._attention_backend = "_native_flash"
    with pytest.raises(WeftError, match="'_native_flash' takes no mask"):
        half.velocity(x, sigma, half.prepare(conditions))


def test_real_sizes_on_the_meta_device():
    """The 20B transformer, the 7B VLM, and Edit-R1's LoRA (rank 32 on attention) on the transformer."""
    from diffusers import QwenImageTransformer2DModel
    from peft import LoraConfig

    from weft.models.image.attention_qwen import adopt_qwen

    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel()
        assert sum(p.numel() for p in transformer.parameters()) == 20_430_401_088
        targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
        transformer.add_adapter(LoraConfig(r=32, target_modules=[f"attn.{name}" for name in targets]))
    assert sum(p.numel() for n, p in transformer.named_parameters() if "lora_" in n) == 60 * 8 * 32 * 2 * 3072
    assert adopt_qwen(transformer) is transformer
    with pytest.raises(WeftError, match="not a Qwen-Image transformer"):
        adopt_qwen(SimpleNamespace())


def test_options_object_defaults_are_the_pipeline_s():
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

    assert QwenOptions().condition_area == module.CONDITION_IMAGE_SIZE
    assert Image.Resampling.LANCZOS == QwenImageEdit.resample
    assert Condition("x", (64, 64), {}).references == []
