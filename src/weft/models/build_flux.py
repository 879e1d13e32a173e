"""Build a new FLUX Kontext folder around the trained parts of an SD3-shaped one: how a tiny omni model starts.

    python -m weft.models.build_flux recipes/tiny/omni.yaml tiny-kontext runs/tiny/omni_init

The autoencoder, the first CLIP (its pooled vector) and T5 are taken over with their tokenizers; the transformer is
random, starts as the zero velocity, and has the configuration of the file's `transformer` section. `tokenizer_2.length`
sets how many tokens T5 reads, where instructions about several pictures are longer than those of the parts' model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft.errors import WeftError, exit_status
from weft.models.image.flux_kontext import FluxKontext, FluxOptions
from weft.models.load import KONTEXT, find_model, make_options
from weft.models.sections import read_sections
from weft.models.weights import SD3, load_parts
from weft.rng import seed_of

SECTIONS = ("seed", "resolution", "options", "scheduler", "tokenizer_2", "transformer")


def build_flux(config: str | Path | dict[str, Any], parts: str | Path, out: str | Path) -> Path:
    """Write a FLUX Kontext folder at `out` and return its path.

    `config` has a `transformer` section (arguments of `FluxTransformer2DModel`; the channels and text widths follow
    the other parts), and optionally `scheduler`, `resolution`, `options`, `tokenizer_2` ({length: tokens}) and `seed`.
    `parts` is a folder or zoo name of the SD3 layout with a T5. Raises WeftError for an unknown section, missing
    parts, or an `out` that exists.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler
    from transformers import CLIPTextModel

    settings = read_sections(config, SECTIONS, ["transformer"])
    out = Path(out)
    if out.exists():
        raise WeftError(f"{out} exists; give a new folder, or remove it first")
    taken = load_parts(find_model(str(parts)), SD3, dtype=torch.float32)
    if "text_encoder_3" not in taken:
        raise WeftError(f"{parts}: has no text_encoder_3; FLUX reads its text through T5")
    taken["tokenizer_3"].model_max_length = _length(settings, taken["tokenizer_3"].model_max_length)
    clip = CLIPTextModel(taken["text_encoder"].config)
    state = {k.removeprefix("text_model."): v for k, v in taken["text_encoder"].state_dict().items()}
    clip.load_state_dict({k: v for k, v in state.items() if not k.startswith("text_projection")})
    dynamic = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    model = FluxKontext(
        {
            "transformer": make_transformer(settings, taken["vae"], clip, taken["text_encoder_3"]),
            "vae": taken["vae"],
            "scheduler": FlowMatchEulerDiscreteScheduler(**{**dynamic, **settings.get("scheduler", {})}),
            "text_encoder": clip.eval(),
            "tokenizer": taken["tokenizer"],
            "text_encoder_2": taken["text_encoder_3"],
            "tokenizer_2": taken["tokenizer_3"],
        },
        options=make_options(KONTEXT, settings.get("options", {})) or FluxOptions(),
        resolution=settings.get("resolution"),
    )
    model.save(out)
    return out


def make_transformer(settings: dict[str, Any], vae: Any, clip: Any, t5: Any) -> nn.Module:
    """FluxTransformer2DModel with DiT's initialisation (arXiv 2212.09748, section 3.2: adaLN-Zero)."""
    from diffusers import FluxTransformer2DModel

    widths = {
        "in_channels": 4 * vae.config.latent_channels,
        "joint_attention_dim": t5.config.d_model,
        "pooled_projection_dim": clip.config.hidden_size,
    }
    for name, value in widths.items():
        if settings["transformer"].get(name, value) != value:
            raise WeftError(f"transformer.{name} is {settings['transformer'][name]}, the other parts need {value}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(int(settings.get("seed", 0)), "build/transformer"))
        model = FluxTransformer2DModel(**{**settings["transformer"], **widths})
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            nn.init.zeros_(module.bias)
            # every modulation is a linear layer inside a norm; the blocks start as the identity, the velocity as zero
            if name == "proj_out" or (name.endswith(".linear") and "norm" in name.split(".")[-2]):
                nn.init.zeros_(module.weight)
            elif name.startswith("time_text_embed"):
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight)
    return model


def _length(settings: dict[str, Any], own: int) -> int:
    section = settings.get("tokenizer_2", {"length": own})
    if not isinstance(section, dict) or list(section) != ["length"] or not isinstance(section["length"], int):
        raise WeftError(f"tokenizer_2: {section!r} is not of the form {{length: 44}} (tokens)")
    if section["length"] < 1:
        raise WeftError(f"tokenizer_2.length is {section['length']}; it must be at least 1 token")
    return section["length"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command: CONFIG PARTS OUT."""
    words = list(sys.argv[1:] if argv is None else argv)
    if len(words) != 3:
        print("usage: python -m weft.models.build_flux CONFIG PARTS OUT", file=sys.stderr)
        return 2
    return exit_status(lambda: print(build_flux(*words)))


if __name__ == "__main__":
    sys.exit(main())
