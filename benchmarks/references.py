"""Three reference pictures, four requests: weft's one batch against four calls of the public DreamOmni2 pipeline.

    python benchmarks/references.py --upstream PATH_TO_CHECKOUT_OF_dvlab-research_DreamOmni2

Both run in this process, in turn, on the same random weights, from the same pictures and noise; the best of
`--repeat` rounds counts (of CPU seconds, or on a GPU of wall-clock). Prints one JSON line with the seconds, their
ratio and the largest difference of the latents. The checkout is not part of weft. `--width`, `--layers` and `--steps`
set the size; the pictures are 64 x 64, so with the default width this measures a tiny model, whose fixed costs a batch
shares. `--device cuda` runs on a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from tiny import T5_LENGTH, fill_, tiny_flux_folder  # noqa: E402
from weft.models.load import load  # noqa: E402
from weft.rng import normal, numpy_rng  # noqa: E402
from weft.sample.rollout import sample_flow  # noqa: E402
from weft.types import Condition  # noqa: E402

REQUESTS, REFERENCES, SIDE = 4, 3, 64


def build(folder: Path, width: int, layers: int) -> Path:
    """A random FLUX Kontext folder with a transformer of this width and twice as many single blocks as double ones."""
    from diffusers import FluxTransformer2DModel

    tiny_flux_folder(folder)
    transformer = FluxTransformer2DModel(
        num_layers=layers, num_single_layers=2 * layers, attention_head_dim=32, num_attention_heads=width // 32,
        joint_attention_dim=64, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    fill_(transformer, "benchmark").save_pretrained(folder / "transformer")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upstream", type=Path, required=True)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    sys.path.insert(0, str(options.upstream))
    from dreamomni2.pipeline_dreamomni2 import DreamOmni2Pipeline

    git = ["git", "-C", str(options.upstream), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    pixels = numpy_rng(0, "pictures").integers(0, 256, (REQUESTS, REFERENCES, SIDE, SIDE, 3), dtype=np.uint8)
    pictures = [[Image.fromarray(array) for array in row] for row in pixels]
    prompts = [f"make the star {colour}" for colour in ("red", "blue", "green", "yellow")]
    noise = [normal((16, SIDE // 8, SIDE // 8), 0, "noise", sample=k) for k in range(REQUESTS)]
    with tempfile.TemporaryDirectory() as name:
        folder = build(Path(name), options.width, options.layers)
        model = load(folder, device=options.device, dtype="fp32")
        public = DreamOmni2Pipeline.from_pretrained(folder).to(options.device)
    public.set_progress_bar_config(disable=True)

    def ours() -> torch.Tensor:
        latents = iter(model.encode_images([image for row in pictures for image in row]))
        states = model.encode_text(prompts)
        conditions = [
            Condition(str(k), (SIDE, SIDE), states[k], [next(latents) for _ in row]) for k, row in enumerate(pictures)
        ]
        out = sample_flow(model, conditions, seeds=[0] * REQUESTS, steps=options.steps, init_latents=noise).latents
        model.decode(out, [(SIDE, SIDE)] * REQUESTS)
        return out

    def theirs() -> torch.Tensor:
        rows = []

        def keep(pipe: object, step: int, time: object, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            if step == options.steps - 1:
                rows.append(given["latents"])
            return given

        for row, prompt, start in zip(pictures, prompts, noise, strict=True):
            packed = start.view(1, 16, SIDE // 16, 2, SIDE // 16, 2).permute(0, 2, 4, 1, 3, 5)
            public(
                images=row, prompt=prompt, prompt_2=None, height=SIDE, width=SIDE, num_inference_steps=options.steps,
                guidance_scale=3.5, latents=packed.reshape(1, -1, 64).to(options.device), max_area=SIDE**2,
                max_sequence_length=T5_LENGTH, _auto_resize=False, callback_on_step_end=keep,
            )  # fmt: skip
        tokens = torch.cat(rows)
        side = SIDE // 16
        return tokens.view(-1, side, side, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(REQUESTS, 16, 2 * side, 2 * side)

    # On the CPU the process's own time, so that a busy machine does not count.
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {"weft": [], "public": []}
    found: dict[str, torch.Tensor] = {}
    for _ in range(options.repeat + 1):  # the first round warms up
        for who, run in (("weft", ours), ("public", theirs)):
            started = clock()
            found[who] = run().cpu()
            if options.device != "cpu":
                torch.cuda.synchronize()
            seconds[who].append(clock() - started)
    best = {who: min(times[1:]) for who, times in seconds.items()}
    line = {
        "weft_s": round(best["weft"], 4), "public_s": round(best["public"], 4),
        "ratio": round(best["public"] / best["weft"], 2),
        "difference": float((found["weft"] - found["public"]).abs().max()), "upstream": commit,
        "requests": REQUESTS, "references": REFERENCES, "width": options.width, "layers": options.layers,
        "steps": options.steps, "device": options.device, "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }  # fmt: skip
    print(json.dumps(line))


if __name__ == "__main__":
    main()
