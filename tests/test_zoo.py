"""The models that ship: they open everywhere, stay small, and keep what their cards claim."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import weft
from weft.models.load import find_model
from weft.world import records, render
from weft.world.corrupt import corruptions
from weft.world.oracle import judge

ZOO = Path(weft.__file__).parent / "zoo"


@pytest.fixture(scope="module")
def model():
    return weft.load("tiny-kontext")


def test_the_zoo_is_small_and_labelled() -> None:
    files = [f for f in ZOO.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 40e6
    for folder in (f.parent for f in ZOO.glob("*/model_index.json")):
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "licence" in card.lower() and "does not" in card.lower(), f"{folder.name}: say what it is not"
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]


def test_plain_diffusers_opens_it_and_draws_the_same(model) -> None:
    from diffusers import StableDiffusion3Pipeline

    prompt = "a red star at the top left on a white background"
    pipe = StableDiffusion3Pipeline.from_pretrained(find_model("tiny-kontext"), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    length = model.flow.parts["tokenizer_3"].model_max_length
    from weft.sample.rollout import initial_latents

    condition = model.flow.encode([weft.make_record(prompt, size=(64, 64))])
    start = torch.stack(initial_latents(model.flow, condition, [3]))
    with torch.no_grad():
        image = pipe(
            prompt, height=64, width=64, num_inference_steps=8, guidance_scale=1.0, latents=start,
            max_sequence_length=length, output_type="np",
        ).images[0]  # fmt: skip
    ours = np.asarray(model.generate(prompt, seed=3, steps=8, guidance=1.0, size=(64, 64)), np.float64) / 255
    assert np.abs(image - ours).max() < 0.02


def through_vae(model, pictures):
    """What the autoencoder makes of pictures."""
    latents = torch.stack(model.flow.encode_images(pictures))
    return model.flow.decode(latents, [(64, 64)] * len(pictures))


@pytest.mark.slow
@pytest.mark.parametrize("count", [20, pytest.param(60, marks=pytest.mark.long)])
def test_oracle_and_autoencoder_agree(model, count) -> None:
    accepted, fooled = [], []
    for task in ("generate", "edit"):
        some = list(records("test", count=count, seed=21, tasks=[task]))
        targets = through_vae(model, [r.load(r.target) for r in some])
        accepted += [judge(r, image).success for r, image in zip(some, targets, strict=True)]
        wrong = [
            (r, render(scene))
            for i, r in enumerate(some[: count // 4])
            for _, scene in corruptions(r, np.random.default_rng(i))
        ]
        pictures = through_vae(model, [image for _, image in wrong])
        fooled += [judge(r, image).success for (r, _), image in zip(wrong, pictures, strict=True)]
    assert accepted.count(False) <= max(1, 0.02 * len(accepted))
    assert fooled.count(True) <= 0.02 * len(fooled)
