"""UniPic2-Kontext against the public code (stored outputs, see golden/make_unipic2.py) and stock diffusers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from golden.make_unipic2 import GRIDS, GUIDANCE, JOBS, NEGATIVE, PROMPT, STEPS, inputs, noise, picture
from tiny import T5_LENGTH, tiny_kontext_folder
from weft.errors import WeftError
from weft.models.image.sd3_kontext import UniPic2Kontext
from weft.models.load import load
from weft.sample.rollout import sample_flow
from weft.types import Condition, SkipLayers

TOLERANCE = 1e-5
# What a public LoRA recipe for this transformer adapts (yifan123/flow_grpo, scripts/train_sd3.py).
FLOW_GRPO_TARGETS = [
    "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out",
    "attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_kontext_folder(tmp_path_factory.mktemp("kontext") / "model")


@pytest.fixture(scope="module")
def model(folder) -> UniPic2Kontext:
    return load(folder, device="cpu")


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with safe_open("tests/golden/unipic2.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def sample(model: UniPic2Kontext, conditions, negatives, latents):
    """weft's own sampler from given noise, on the model's own grid."""
    rollout = sample_flow(
        model,
        conditions,
        seeds=[0] * len(conditions),
        steps=STEPS,
        guidance=GUIDANCE,
        negative=negatives,
        init_latents=latents,
    )
    return rollout.latents


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("shape", GRIDS)
def test_transformer_equals_the_public_one(model, golden, shape, reference):
    i = inputs(GRIDS[shape])
    h, w = GRIDS[shape]
    conditions = [
        Condition(
            str(k), (8 * h, 8 * w), {"text": i["text"][k], "pooled": i["pooled"][k]}, [i["reference"][k]] * reference
        )
        for k in range(2)
    ]
    with torch.no_grad():
        v = model.velocity(i["x"], i["sigma"], model.prepare(conditions))
    expected = golden[f"transformer/{shape}/{'reference' if reference else 'plain'}"]
    assert (v - expected).abs().max() <= TOLERANCE
    assert expected.std() > 0.1  # the numbers say something


@pytest.mark.parametrize("job", JOBS)
def test_pipeline_equals_the_public_one(model, golden, job):
    shape, edits = JOBS[job]
    h, w = GRIDS[shape]
    references = model.encode_images([picture(8 * h, 8 * w)]) if edits else []
    text, negative = model.encode_text([PROMPT, NEGATIVE])
    condition = Condition(job, (8 * h, 8 * w), text, references)
    against = Condition(job, (8 * h, 8 * w), negative, references)
    latents = sample(model, [condition], [against], noise(f"latents/{job}", 1, 16, h, w))
    assert (latents - golden[f"pipeline/{job}/latents"]).abs().max() <= TOLERANCE
    picture_out = np.asarray(model.decode(latents, [condition.size])[0], dtype=np.float32)
    expected = golden[f"pipeline/{job}/pixels"][0].numpy() * 255
    assert np.abs(picture_out - expected).max() <= 0.51  # rounding to 8 bits


def test_without_references_it_is_stock_diffusers_and_the_saved_folder_opens_there(model, folder, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    model.save(tmp_path / "saved")
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "saved")
    pipeline.set_progress_bar_config(disable=True)
    start = noise("stock", 2, 16, 12, 6)
    arguments = {
        "prompt": [PROMPT, "a green ring"], "negative_prompt": [NEGATIVE] * 2, "height": 96, "width": 48,
        "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "max_sequence_length": T5_LENGTH,
    }  # fmt: skip
    expected = pipeline(**arguments, latents=start.clone(), output_type="latent").images
    states = model.encode_text([PROMPT, "a green ring", NEGATIVE, NEGATIVE])
    conditions = [Condition(str(k), (96, 48), states[k]) for k in range(4)]
    latents = sample(model, conditions[:2], conditions[2:], start)
    assert (latents - expected).abs().max() <= 1e-6
    theirs = np.stack([np.asarray(p) for p in pipeline(**arguments, latents=start.clone()).images]).astype(int)
    ours = np.stack([np.asarray(p) for p in model.decode(latents, [(96, 48)] * 2)]).astype(int)
    assert np.abs(ours - theirs).max() <= 1  # a 1e-7 apart can round to the next of 256 levels
    assert (ours != theirs).mean() < 1e-3


def test_skip_layer_guidance_is_that_of_diffusers_and_keeps_references(model, folder):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    start = noise("skip", 2, 16, 8, 8)
    skip = SkipLayers((1,), scale=2.8, start=0.01, stop=0.5)
    expected = pipeline(
        prompt=[PROMPT, "a green ring"], negative_prompt=[NEGATIVE] * 2, height=64, width=64, num_inference_steps=8,
        guidance_scale=GUIDANCE, max_sequence_length=T5_LENGTH, latents=start.clone(), output_type="latent",
        skip_guidance_layers=[1], skip_layer_guidance_scale=2.8, skip_layer_guidance_start=0.01,
        skip_layer_guidance_stop=0.5,
    ).images  # fmt: skip
    states = model.encode_text([PROMPT, "a green ring", NEGATIVE, NEGATIVE])
    reference = noise("skip/reference", 16, 8, 8)

    def run(references, skip_layers=skip, guidance=GUIDANCE):
        conditions = [Condition(str(k), (64, 64), states[k], references) for k in range(4)]
        return sample_flow(
            model, conditions[:2], seeds=[0, 0], steps=8, guidance=guidance, init_latents=start,
            negative=conditions[2:] if guidance > 1 else None, skip_layers=skip_layers,
        ).latents  # fmt: skip

    plain, edited = run([]), run([reference])
    assert (plain - expected).abs().max() <= TOLERANCE and (plain - run([], None)).abs().max() > 1e-3
    # the released pipeline's skipping branch does not see the reference: what it adds would be that of a generation
    calls = []
    forget = model.skipping

    def forgetful(batch, layers):
        calls.append(layers)
        return forget(model.prepare([Condition(str(k), (64, 64), states[k]) for k in range(2)]), layers)

    model.skipping = forgetful
    try:
        assert (run([reference]) - edited).abs().max() > 1e-3 and calls == [(1,)]
    finally:
        del model.skipping
    with pytest.raises(WeftError, match="has the layers 0 to"):
        run([], SkipLayers((99,)))
    with pytest.raises(WeftError, match="raise guidance above 1"):
        run([], guidance=1)
    for wrong in ({"layers": ()}, {"layers": (1,), "start": 0.5, "stop": 0.2}):
        with pytest.raises(WeftError, match="skip-layer guidance"):
            SkipLayers(**wrong)


def test_without_the_third_encoder_its_tokens_are_zeros_as_in_diffusers(tmp_path):
    from diffusers import StableDiffusion3Pipeline

    folder = tiny_kontext_folder(tmp_path / "two", t5=False)
    model = load(folder, device="cpu")
    state = model.encode_text([PROMPT])[0]
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    text, _, pooled, _ = pipeline.encode_prompt(PROMPT, None, None, do_classifier_free_guidance=False)
    assert torch.equal(state["text"], text[0]) and torch.equal(state["pooled"], pooled[0])
    assert state["text"].shape[0] == 24 + 256 and not state["text"][24:].any()


SD35_MEDIUM = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
}  # fmt: skip


def test_real_sizes_on_the_meta_device():
    """The 2B transformer's parameters, its position table, and Flow-GRPO's default LoRA on it (rank 32)."""
    from diffusers import SD3Transformer2DModel
    from peft import LoraConfig

    from weft.models.image.attention import adopt

    with torch.device("meta"):
        transformer = adopt(SD3Transformer2DModel(**SD35_MEDIUM))
        assert sum(p.numel() for p in transformer.parameters()) == 2_243_171_520
        assert sum(b.numel() for b in transformer.buffers()) == 384 * 384 * 1536
        transformer.add_adapter(LoraConfig(r=32, lora_alpha=64, target_modules=FLOW_GRPO_TARGETS))
    adapted = {name.split(".lora_A")[0] for name, _ in transformer.named_parameters() if ".lora_A" in name}
    assert len(adapted) == 191
    assert sum(p.numel() for name, p in transformer.named_parameters() if "lora_" in name) == 18_776_064


def test_a_release_without_an_index_and_with_its_own_class_names_loads(folder, model, tmp_path):
    """The released UniPic2 folders are loaded part by part, and their configuration names their own class."""
    import shutil

    shutil.copytree(folder, tmp_path / "released")
    (tmp_path / "released" / "model_index.json").unlink()
    config = tmp_path / "released" / "transformer" / "config.json"
    content = json.loads(config.read_text()) | {"_class_name": "SD3Transformer2DKontextModel"}
    config.write_text(json.dumps(content))
    again = load(tmp_path / "released", device="cpu")
    for a, b in zip(model.transformer.parameters(), again.transformer.parameters(), strict=True):
        assert torch.equal(a, b)
