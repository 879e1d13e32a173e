"""Make dreamomni2.safetensors by running the public DreamOmni2 pipeline on the weights of tests/tiny.py.

    python tests/golden/make_dreamomni2.py PATH_TO_CHECKOUT_OF_dvlab-research_DreamOmni2 COMMIT

Values in the repository: dvlab-research/DreamOmni2 at 82f9a63 (dreamomni2/pipeline_dreamomni2.py), torch 2.13.0 (CPU),
diffusers 0.42.1, transformers 5.23.0. Pictures are given at the sizes of weft's formats at resolution 64, so nothing is
resized (`_auto_resize=False`, an area of 64 x 64); ids are those that reach the transformer.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny import T5_LENGTH, tiny_flux_folder  # noqa: E402
from weft.rng import numpy_rng  # noqa: E402

STEPS, GUIDANCE = 4, 3.5
PROMPTS, NEGATIVE = ("make the red star blue", "give the circle the pattern of the second picture"), "blur low quality"
JOBS = {  # name: (height, width) of the pictures, asked-for (height, width), prompts, true CFG
    "none": ((), (64, 64), 1, 1.0),
    "one": (((64, 64),), (64, 64), 1, 1.0),
    "one_wide": (((48, 96),), (48, 96), 1, 1.0),
    "two": (((48, 80), (64, 64)), (48, 80), 1, 1.0),
    "three": (((64, 64), (96, 48), (48, 80)), (64, 64), 1, 1.0),
    "three_batch": (((80, 48), (48, 96), (64, 64)), (80, 48), 2, 1.0),
    "two_cfg": (((64, 64), (80, 48)), (64, 64), 2, 2.5),
}


def noise(name: str, *shape: int) -> torch.Tensor:
    """Standard normal numbers by name, from NumPy, so that they are the same everywhere."""
    return torch.from_numpy(numpy_rng(0, f"golden/{name}").standard_normal(shape).astype(np.float32))


def picture(height: int, width: int, k: int = 0) -> Image.Image:
    """A smooth coloured picture."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x * 255 / width, y * 255 / height, 127 + 100 * np.sin(x / (7 + k) + y / 5 + k)], axis=-1)
    return Image.fromarray(rgb.astype(np.uint8))


def released_size(height: int, width: int) -> tuple[int, int]:
    """The pipeline's output (height, width) for a picture of this aspect and an area of 64 x 64."""
    area, aspect = 64 * 64, width / height
    return round((area / aspect) ** 0.5) // 16 * 16, round((area * aspect) ** 0.5) // 16 * 16


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, H, W] as the pipeline's tokens [B, H W / 4, 4 C]."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def main(checkout: str, commit: str) -> None:
    import diffusers
    import transformers
    from safetensors.torch import save_file

    sys.path.insert(0, checkout)
    from dreamomni2.pipeline_dreamomni2 import DreamOmni2Pipeline

    torch.set_num_threads(1)
    out: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        tiny_flux_folder(folder)
        pipeline = DreamOmni2Pipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        seen: dict[str, torch.Tensor] = {}
        pipeline.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(ids=kwargs["img_ids"], text=kwargs["txt_ids"]), with_kwargs=True
        )
        for name, (sizes, (height, width), count, cfg) in JOBS.items():
            h, w = (edge // 8 for edge in released_size(height, width))
            result = pipeline(
                images=[picture(*size, k) for k, size in enumerate(sizes)] or None,
                prompt=list(PROMPTS[:count]), prompt_2=None, height=height, width=width, num_inference_steps=STEPS,
                guidance_scale=GUIDANCE, latents=pack(noise(f"latents/{name}", count, 16, h, w)), output_type="latent",
                max_sequence_length=T5_LENGTH, max_area=64 * 64, _auto_resize=False, true_cfg_scale=cfg,
                **({"negative_prompt": [NEGATIVE] * count} if cfg > 1 else {}),
            ).images  # fmt: skip
            out[f"{name}/latents"] = result.contiguous()
            out[f"{name}/ids"] = torch.cat([seen["text"], seen["ids"]]).contiguous()
    versions = {library.__name__: library.__version__ for library in (torch, diffusers, transformers)}
    target = Path(__file__).with_name("dreamomni2.safetensors")
    source = f"https://github.com/dvlab-research/DreamOmni2 {commit} dreamomni2/pipeline_dreamomni2.py"
    save_file(out, target, metadata={"source": source, **versions})
    print(target, {name: tuple(tensor.shape) for name, tensor in out.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
