"""FLUX Kontext against the public DreamOmni2 pipeline (stored, see golden/make_dreamomni2.py) and stock diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open

from golden.make_dreamomni2 import GUIDANCE, JOBS, NEGATIVE, PROMPTS, STEPS, noise, pack, picture, released_size
from tiny import T5_LENGTH, tiny_flux_folder
from weft.models.image.flux_kontext import KONTEXT_FORMATS, FluxKontext
from weft.models.load import load
from weft.record import make_record
from weft.sample.rollout import sample_flow
from weft.types import Condition

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_flux_folder(tmp_path_factory.mktemp("flux") / "model")


@pytest.fixture(scope="module")
def model(folder) -> FluxKontext:
    return load(folder, device="cpu", options={"parity": True, "embedded_guidance": GUIDANCE})


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with safe_open("tests/golden/dreamomni2.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


@pytest.mark.parametrize("job", JOBS)
def test_pipeline_equals_the_public_one(model, golden, job):
    sizes, asked, count, cfg = JOBS[job]
    size = released_size(*asked)
    if sizes:
        assert model.output_size([], sizes[0]) == size == model.encode([make_record("x", picture(*sizes[0]))])[0].size
    references = model.encode_images([picture(*own, k) for k, own in enumerate(sizes)])
    states = model.encode_text([*PROMPTS[:count], NEGATIVE])
    conditions = [Condition(str(k), size, states[k], references) for k in range(count)]
    against = [Condition(str(k), size, states[-1], references) for k in range(count)]
    batch = model.prepare(conditions)
    ids = torch.cat([batch["text_ids"], batch["picture_ids"]])
    assert ids.dtype == torch.float32 and torch.equal(ids, golden[f"{job}/ids"])
    latents = sample_flow(
        model,
        conditions,
        seeds=[0] * count,
        steps=STEPS,
        guidance=cfg,
        negative=against if cfg > 1 else None,
        init_latents=noise(f"latents/{job}", count, 16, size[0] // 8, size[1] // 8),
    ).latents
    expected = golden[f"{job}/latents"]
    assert (pack(latents) - expected).abs().max() <= TOLERANCE
    assert expected.std() > 0.1  # the numbers say something


def test_with_one_picture_it_is_stock_diffusers_bit_by_bit(model, folder):
    from diffusers import FluxKontextPipeline

    pipeline = FluxKontextPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    start, image = noise("stock", 2, 16, 8, 8), picture(64, 64)
    arguments = {
        "image": image, "prompt": list(PROMPTS), "height": 64, "width": 64, "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE, "max_sequence_length": T5_LENGTH, "max_area": 64 * 64, "_auto_resize": False,
    }  # fmt: skip
    expected = pipeline(**arguments, latents=pack(start), output_type="latent").images
    references = model.encode_images([image])
    states = model.encode_text(PROMPTS)
    conditions = [Condition(str(k), (64, 64), state, references) for k, state in enumerate(states)]
    latents = sample_flow(model, conditions, seeds=[0, 0], steps=STEPS, init_latents=start).latents
    assert torch.equal(pack(latents), expected)
    theirs = np.stack([np.asarray(p) for p in pipeline(**arguments, latents=pack(start)).images]).astype(int)
    ours = np.stack([np.asarray(p) for p in model.decode(latents, [(64, 64)] * 2)]).astype(int)
    assert np.abs(ours - theirs).max() <= 1 and (ours != theirs).mean() < 1e-3


def test_a_saved_folder_opens_in_stock_diffusers_and_as_the_same_model(model, tmp_path):
    from diffusers import FluxKontextPipeline

    model.save(tmp_path / "saved")
    theirs = FluxKontextPipeline.from_pretrained(tmp_path / "saved").transformer.state_dict()
    again = load(tmp_path / "saved", device="cpu")
    assert again.options == model.options and again.resolution == 64
    for name, tensor in model.transformer.state_dict().items():
        assert torch.equal(tensor, theirs[name]) and torch.equal(tensor, again.transformer.state_dict()[name])


def test_formats_and_the_released_output_grid():
    """Released: 4 of the 17 formats come back smaller. Here an edit keeps the grid of its source."""
    plain, parity = (FluxKontext.__new__(FluxKontext) for _ in range(2))
    for model, on in ((plain, False), (parity, True)):
        model.resolution, model.multiple = 1024, 16
        model.options = type("Options", (), {"parity": on, "reference_tokens": None})()
    assert plain.formats() == [(h, w) for w, h in KONTEXT_FORMATS]
    smaller = {}
    for w, h in KONTEXT_FORMATS:
        assert plain.own_size((h, w)) == plain.output_size([], (h, w)) == (h, w)
        assert plain.own_size((h // 8, w // 8)) == (h, w)
        if parity.output_size([], (h, w)) != (h, w):
            smaller[w, h] = parity.output_size([], (h, w))[::-1]
    assert smaller == {
        (672, 1568): (656, 1552), (800, 1328): (784, 1312), (1328, 800): (1312, 784), (1568, 672): (1552, 656)
    }  # fmt: skip
    assert plain.output_size([], None) == (1024, 1024)
    assert plain.own_size((50, 60)) == (944, 1104)  # its programs resize before the pipeline rounds edges down
    assert parity.own_size((50, 60)) == parity.own_size((9, 9)) == (1024, 1024)
    assert parity.input_sizes([(1568, 672), (500, 500)], True, (1552, 656)) == [(1568, 672), (1024, 1024)]


@pytest.mark.parametrize("asked", [(32, 32), (64, 128), (100, 50), (512, 512)])
def test_of_a_size_that_is_asked_for_the_release_takes_the_shape_alone(model, folder, asked):
    size = released_size(*asked)
    for sources in ((), (picture(48, 96),)):
        record = make_record("x", *sources, size=asked)
        (condition,), (bare,) = model.encode([record]), model.encode([make_record("x", *sources)])
        assert condition.size == size and size[0] * size[1] <= 64 * 64
        assert all(torch.equal(a, b) for a, b in zip(condition.references, bare.references, strict=True))  # stretched
    if asked[0] % 16 == 0 and asked[1] % 16 == 0:
        plain = load(folder, device="cpu")
        assert plain.encode([make_record("x", size=asked)])[0].size == asked
        answer = make_record("x", size=asked, target=picture(*asked))
        assert model.examples([answer])[0]["target"].shape[1:] == (asked[0] // 8, asked[1] // 8)  # trains as asked


KONTEXT_DEV = {
    "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
}  # fmt: skip


def test_real_sizes_on_the_meta_device():
    """The 12B transformer's parameters, and a LoRA of DreamOmni3's rank (arXiv 2512.22525) on its attention."""
    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig

    from weft.models.image.attention_flux import adopt_flux

    with torch.device("meta"):
        transformer = adopt_flux(FluxTransformer2DModel(**KONTEXT_DEV))
        assert sum(p.numel() for p in transformer.parameters()) == 11_901_408_320
        transformer.add_adapter(
            LoraConfig(r=256, target_modules=["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"])
        )
    adapted = {name.split(".lora_A")[0] for name, _ in transformer.named_parameters() if ".lora_A" in name}
    assert len(adapted) == 3 * (19 + 38) + 19
    assert sum(p.numel() for name, p in transformer.named_parameters() if "lora_" in name) == 190 * 256 * 2 * 3072
