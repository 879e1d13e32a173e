"""Make unipic2.safetensors by running the public UniPic 2.0 code on the weights of tests/tiny.py.

    python tests/golden/make_unipic2.py PATH_TO_CHECKOUT_OF_SkyworkAI_UniPic COMMIT

Values in the repository: SkyworkAI/UniPic at 9e2a6091d7ba81b1a3ff6349afe1f7feb34b37f5, torch 2.13.0 (CPU),
diffusers 0.42.1, transformers 5.23.0. The released pipeline samples the VAE posterior with the global generator;
here it is given the posterior's mode instead, which is what weft encodes. torchvision is replaced by its ToTensor.
"""

from __future__ import annotations

import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny import T5_LENGTH, tiny_kontext_folder  # noqa: E402
from weft.rng import numpy_rng  # noqa: E402

GRIDS = {"square": (8, 8), "tall": (12, 6), "wide": (6, 12)}  # latent cells
STEPS, GUIDANCE = 28, 3.5
PROMPT, NEGATIVE = "make the red star blue", "blur low quality"
JOBS = {  # name: shape, with a reference
    "generate": ("square", False),
    "generate_wide": ("wide", False),
    "edit": ("square", True),
    "edit_tall": ("tall", True),
}


def noise(name: str, *shape: int) -> torch.Tensor:
    """Standard normal numbers by name, from NumPy, so that they are the same everywhere."""
    return torch.from_numpy(numpy_rng(0, f"golden/{name}").standard_normal(shape).astype(np.float32))


def picture(height: int, width: int) -> Image.Image:
    """A smooth coloured picture."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x * 255 / width, y * 255 / height, 127 + 100 * np.sin(x / 7 + y / 5)], axis=-1)
    return Image.fromarray(rgb.astype(np.uint8))


def inputs(grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The inputs of one transformer call for two samples."""
    h, w = grid
    name = f"{h}x{w}"
    return {
        "x": noise(f"x/{name}", 2, 16, h, w),
        "reference": noise(f"reference/{name}", 2, 16, h, w),
        "text": noise(f"text/{name}", 2, 56, 64),
        "pooled": noise(f"pooled/{name}", 2, 48),
        "sigma": torch.tensor([0.9, 0.25]),
    }


def _import_upstream(checkout: str) -> tuple[type, type]:
    import diffusers.pipelines.stable_diffusion_3  # noqa: F401  before torchvision is faked

    transforms = types.ModuleType("torchvision.transforms")

    class ToTensor:
        def __call__(self, image: Image.Image) -> torch.Tensor:
            return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255

    transforms.ToTensor = ToTensor  # type: ignore[attr-defined]
    fake = types.ModuleType("torchvision")
    fake.transforms = transforms  # type: ignore[attr-defined]
    sys.modules |= {"torchvision": fake, "torchvision.transforms": transforms}
    sys.path.insert(0, str(Path(checkout) / "UniPic-2"))
    from unipicv2.pipeline_stable_diffusion_3_kontext import StableDiffusion3KontextPipeline
    from unipicv2.transformer_sd3_kontext import SD3Transformer2DKontextModel

    return SD3Transformer2DKontextModel, StableDiffusion3KontextPipeline


def main(checkout: str, commit: str) -> None:
    import diffusers
    import transformers
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel

    from_upstream, pipeline_class = _import_upstream(checkout)
    torch.set_num_threads(1)
    out: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = tiny_kontext_folder(folder)
        transformer = from_upstream.from_pretrained(path / "transformer")  # type: ignore[attr-defined]
        for name, grid in GRIDS.items():
            i = inputs(grid)
            for kind, reference in {"plain": None, "reference": i["reference"]}.items():
                out[f"transformer/{name}/{kind}"] = transformer(
                    i["x"], i["text"], reference, i["pooled"], 1000 * i["sigma"], return_dict=False
                )[0]
        pipeline = pipeline_class(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(path / "scheduler"),
            vae=AutoencoderKL.from_pretrained(path / "vae"),
            text_encoder=CLIPTextModelWithProjection.from_pretrained(path / "text_encoder"),
            text_encoder_2=CLIPTextModelWithProjection.from_pretrained(path / "text_encoder_2"),
            text_encoder_3=T5EncoderModel.from_pretrained(path / "text_encoder_3"),
            tokenizer=AutoTokenizer.from_pretrained(path / "tokenizer"),
            tokenizer_2=AutoTokenizer.from_pretrained(path / "tokenizer_2"),
            tokenizer_3=AutoTokenizer.from_pretrained(path / "tokenizer_3"),
        )
        DiagonalGaussianDistribution.sample = lambda self, generator=None: self.mode()
        for name, (shape, edits) in JOBS.items():
            h, w = GRIDS[shape]
            arguments = {"image": picture(8 * h, 8 * w)} if edits else {}
            latents = noise(f"latents/{name}", 1, 16, h, w)
            for kind in ("latent", "np"):
                result = pipeline(
                    PROMPT, height=8 * h, width=8 * w, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
                    negative_prompt=NEGATIVE, max_sequence_length=T5_LENGTH, latents=latents.clone(),
                    output_type=kind, return_dict=False, **arguments,
                )[0]  # fmt: skip
                pixels = torch.as_tensor(result).float()
                out[f"pipeline/{name}/{'latents' if kind == 'latent' else 'pixels'}"] = pixels.contiguous()
    versions = {library.__name__: library.__version__ for library in (torch, diffusers, transformers)}
    target = Path(__file__).with_name("unipic2.safetensors")
    save_file(
        {name: tensor.contiguous() for name, tensor in out.items()},
        target,
        metadata={"source": f"https://github.com/SkyworkAI/UniPic {commit} UniPic-2/unipicv2", **versions},
    )
    print(target, {name: tuple(tensor.shape) for name, tensor in out.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
