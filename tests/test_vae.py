"""The autoencoder as a trainable: its loss by hand, its randomness, its measured scale, and that it learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tiny import tiny_vae
from weft.errors import WeftError
from weft.models.image.vae import (
    AutoencoderTrainable,
    contrast_weight,
    from_bytes,
    gradient,
    latent_scale,
    psnr,
    to_bytes,
)
from weft.record import make_record
from weft.rng import numpy_rng
from weft.types import Draw, Trainable


def picture(seed: int, height: int = 32, width: int = 32) -> Image.Image:
    """Coloured rectangles."""
    rng = numpy_rng(seed, "test/picture")
    canvas = np.full((height, width, 3), rng.integers(0, 256, 3), np.uint8)
    for _ in range(3):
        top, left = rng.integers(0, height - 8), rng.integers(0, width - 8)
        canvas[top : top + 12, left : left + 12] = rng.integers(0, 256, 3)
    return Image.fromarray(canvas)


def record(seed: int, **given: object):
    return make_record("draw it", target=picture(seed), id=f"r{seed}", **given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_vae().save_pretrained(path / "vae")
    return path


def test_is_a_trainable_and_loads_both_layouts(folder: Path) -> None:
    whole, part = AutoencoderTrainable(folder), AutoencoderTrainable(folder / "vae")
    assert isinstance(whole, Trainable) and set(whole.modules()) == {"vae"}
    for a, b in zip(whole.vae.parameters(), part.vae.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(WeftError, match="neither"):
        AutoencoderTrainable(folder.parent / "nothing")


def test_bytes_round_trip() -> None:
    image = picture(1)
    x = from_bytes(to_bytes(image)[None])
    assert x.min() >= -1 and x.max() <= 1
    back = ((x[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(back, np.asarray(image))


def test_loss_terms_by_hand(folder: Path) -> None:
    """Without gradients the mode is decoded; each weight picks its term."""
    examples = AutoencoderTrainable(folder).examples([record(1), record(2)])
    draw = Draw(0, 0, ["r1", "r2"])
    x = from_bytes(torch.stack([e["picture"] for e in examples]))
    zero = {"l1": 0.0, "l2": 0.0, "edge": 0.0, "kl": 0.0}
    found = {}
    with torch.no_grad():
        for name in zero:
            model = AutoencoderTrainable(folder, **(zero | {name: 1.0}))
            found[name] = model.loss(examples, draw).per_sample
        posterior = model.vae.encode(x).latent_dist
        y = model.vae.decode(posterior.mode()).sample
    assert torch.allclose(found["l1"], (x - y).abs().mean((1, 2, 3)))
    assert torch.allclose(found["l2"], ((x - y) ** 2).mean((1, 2, 3)))
    e = (x - y).numpy()
    edges = np.abs(np.diff(e, axis=-1)).mean((1, 2, 3)) + np.abs(np.diff(e, axis=-2)).mean((1, 2, 3))
    assert np.allclose(found["edge"].numpy(), edges, rtol=1e-5)
    count = posterior.mean[0].numel()
    assert torch.allclose(found["kl"], posterior.kl() / count, rtol=1e-5)
    assert torch.equal(gradient(torch.ones(2, 3, 8, 8)), torch.zeros(2))
    assert torch.allclose(psnr(x, x.clamp(-1, 1)), torch.full((2,), 100.0))
    assert torch.allclose(psnr(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.2)), torch.tensor([20.0]))


def test_noise_depends_on_the_draw_only(folder: Path) -> None:
    model = AutoencoderTrainable(folder)
    examples = model.examples([record(1), record(2)])
    first = model.loss(examples, Draw(0, 3, ["r1", "r2"])).per_sample
    torch.manual_seed(99)
    assert torch.equal(first, model.loss(examples, Draw(0, 3, ["r1", "r2"])).per_sample)
    assert not torch.equal(first, model.loss(examples, Draw(0, 4, ["r1", "r2"])).per_sample)
    alone = model.loss(examples[:1], Draw(0, 3, ["r1"])).per_sample
    assert torch.allclose(first[:1], alone, atol=1e-5)


def test_examples_take_one_of_a_records_pictures_at_its_size(folder: Path) -> None:
    model = AutoencoderTrainable(folder)
    sized = make_record("grow", source=picture(3), target=picture(4), size=(48, 64), id="s")
    (example,) = model.examples([sized])
    assert example["picture"].shape == (3, 48, 64) and example["picture"].dtype == torch.uint8
    chosen = {
        bytes(
            model.examples([make_record("grow", source=picture(3), target=picture(4), id=str(i))])[0]["picture"][0, 0]
        )
        for i in range(12)
    }
    assert len(chosen) == 2, "sources and targets both occur"
    with pytest.raises(WeftError, match="multiples of 8"):
        model.examples([make_record("draw", target=picture(5, 36, 32))])
    with pytest.raises(WeftError, match="no picture"):
        model.examples([make_record("draw")])


def test_crops_mix_sizes_and_stay_inside(folder: Path) -> None:
    model = AutoencoderTrainable(folder, crop=16)
    examples = model.examples([make_record("a", target=picture(1, 36, 52)), record(2)])
    loss = model.loss(examples, Draw(0, 0, ["a", "b"]))
    assert loss.per_sample.shape == (2,) and torch.isfinite(loss.per_sample).all()
    whole = AutoencoderTrainable(folder)
    with pytest.raises(WeftError, match="several sizes"):
        whole.loss(whole.examples([make_record("a", target=picture(1, 32, 64)), record(2)]), Draw(0, 0, ["a", "b"]))
    with pytest.raises(WeftError, match="smaller than crop"):
        AutoencoderTrainable(folder, crop=64).examples([record(2)])


@pytest.mark.slow
def test_learns_and_saves_a_measured_scale(folder: Path, tmp_path: Path) -> None:
    """Some steps lower the loss; the saved factors give latents of mean 0, deviation 1, in plain diffusers."""
    from diffusers import AutoencoderKL

    model = AutoencoderTrainable(folder, kl=0.0)
    model.save(tmp_path / "untouched")
    before = AutoencoderKL.from_pretrained(tmp_path / "untouched" / "vae").config
    assert (before.scaling_factor, before.shift_factor) == (1.5305, 0.0609)
    examples = model.examples([record(i) for i in range(8)])
    names = [f"r{i}" for i in range(8)]
    optimizer = torch.optim.Adam(model.vae.parameters(), lr=5e-3)
    losses = []
    for step in range(30):
        loss = model.loss(examples, Draw(0, step, names)).per_sample.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    model.save(tmp_path / "trained")
    vae = AutoencoderKL.from_pretrained(tmp_path / "trained" / "vae")
    assert vae.config.scaling_factor != 1.5305
    with torch.no_grad():
        z = vae.encode(from_bytes(torch.stack([e["picture"] for e in examples]))).latent_dist.mode()
    z = (z - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(float(z.mean())) < 1e-3 and abs(float(z.std()) - 1) < 1e-2
    assert latent_scale(vae, [e["picture"] for e in examples]) == pytest.approx(
        (vae.config.shift_factor, vae.config.scaling_factor), abs=2e-4
    )
    with pytest.raises(WeftError, match="at least one"):
        latent_scale(vae, [])


def test_decoder_alone_leaves_latents_and_factors(folder: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    model = AutoencoderTrainable(folder, encoder=False, noise=0.1, detail=5.0, kl=0.0)
    before = {k: v.clone() for k, v in model.vae.state_dict().items()}
    examples = model.examples([record(1), record(2)])
    free = [p for p in model.vae.parameters() if p.requires_grad]
    loss = model.loss(examples, Draw(0, 0, ["a", "b"])).per_sample.mean()
    loss.backward()
    torch.optim.SGD(free, lr=0.1).step()
    for key, value in model.vae.state_dict().items():
        if key.startswith("encoder"):
            assert torch.equal(value, before[key]), key
    assert not torch.equal(model.vae.decoder.conv_in.weight, before["decoder.conv_in.weight"])
    quiet = AutoencoderTrainable(folder, encoder=False, detail=5.0, kl=0.0)
    assert quiet.loss(examples, Draw(0, 0, ["a", "b"])).per_sample.mean() != loss
    model.save(tmp_path)
    assert AutoencoderKL.from_pretrained(tmp_path / "vae").config.scaling_factor == 1.5305
    with pytest.raises(WeftError, match="noise is for"):
        AutoencoderTrainable(folder, noise=0.1)


def test_contrast_weight_favours_small_things() -> None:
    x = torch.zeros(2, 3, 32, 32)
    x[0, :, 10:14, 10:14] = 1
    weight = contrast_weight(x, 10.0)
    assert isinstance(weight, torch.Tensor) and weight.shape == (2, 1, 32, 32)
    assert torch.allclose(weight.mean((1, 2, 3)), torch.ones(2)) and torch.allclose(weight[1], torch.ones(()))
    assert weight[0, 0, 12, 12] > 3 * weight[0, 0, 30, 30]
    assert contrast_weight(x, 0.0) == 1.0
