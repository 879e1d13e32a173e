"""What one picture of the real models costs, estimated from their networks on the meta device: nothing is run.

    python benchmarks/sizes.py

Weights in bf16, what `--vram` makes of them, and operations and seconds of one picture of 1024 x 1024 (UniPic2: 512)
at the family's own steps and guidance. Seconds are the operations of the transformer at `RATE`, a good rate of an
H100 in bf16: an estimate, not a measurement. Text encoders and the autoencoder run once and are left out of it.
"""

from __future__ import annotations

from pathlib import Path

from weft.models.image.flux_kontext import FluxKontext
from weft.models.image.metaquery import UniPic2MetaQuery
from weft.models.image.qwen_image_edit import QwenImageEdit
from weft.models.image.sd3_kontext import UniPic2Kontext
from weft.models.load import KONTEXT, METAQUERY, QWEN, UNIPIC2
from weft.models.memory import PRESETS, Preset, preset
from weft.train import read_recipe
from weft.train.plan_models import networks

RATE = 4e14  # operations a second
RECIPES = Path(__file__).resolve().parents[1] / "recipes"
MODELS = (
    ("UniPic2-SD3.5M-Kontext", "unipic2/stage_b_kontext.yaml", UniPic2Kontext, UNIPIC2),
    ("UniPic2-MetaQuery", "unipic2/metaquery_c.yaml", UniPic2MetaQuery, METAQUERY),
    ("FLUX.1 Kontext, DreamOmni2", "dreamomni2/edit.yaml", FluxKontext, KONTEXT),
    ("Qwen-Image-Edit", "edit_r1/qwen_sft.yaml", QwenImageEdit, QWEN),
)


def words(found: Preset) -> str:
    """A preset in a few words."""
    bits = ", ".join(f"{part} {how}" for part, how in (found.quantization or {}).items())
    return " + ".join(filter(None, ["all" if found.offload == "none" else f"offload {found.offload}", bits]))


def main() -> None:
    """Print both tables."""
    print("| model | weights, GiB | largest part, GiB | " + " | ".join(f"--vram {v}" for v in PRESETS) + " |")
    print("|---|---|---|" + "---|" * len(PRESETS))
    costs = []
    for name, recipe, model, family in MODELS:
        config = read_recipe(RECIPES / recipe)
        config.model.lora = None
        if family is METAQUERY:  # the VLM reads once, not in every step
            config.trainable_args["train_queries"] = False
        net = networks(config, [])
        sizes = {part: 2.0 * sum(p.numel() for p in module.parameters()) for part, module in net.modules.items()}
        gib = [size / 2**30 for size in (sum(sizes.values()), max(sizes.values()))]
        presets = [words(preset(vram, sizes, family.quantized)) for vram in PRESETS]
        print(f"| {name} | {gib[0]:.1f} | {gib[1]:.1f} | " + " | ".join(presets) + " |")
        assert net.flops is not None
        cells, calls = (net.resolution / net.multiple) ** 2, model.steps * (2 if model.guidance > 1 else 1)
        done = [net.flops(cells * (1 + count), count) * calls for count in (0, 1, 3)]
        costs.append((name, net.resolution, model.steps, calls, done))
    print("\n| model | edge | steps | transformer calls | PFLOP (s) of no picture | one | three |")
    print("|---|---|---|---|---|---|---|")
    for name, edge, steps, calls, done in costs:
        row = " | ".join(f"{count / 1e15:.1f} ({count / RATE:.1f})" for count in done)
        print(f"| {name} | {edge} | {steps} | {calls} | {row} |")


if __name__ == "__main__":
    main()
