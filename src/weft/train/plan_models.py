"""The networks of a recipe's model on the meta device, and what one call of them costs: for `weft.train.plan`.

A folder on this machine says its own sizes; of the public checkpoints that recipes name, the sizes are known here.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft.errors import WeftError
from weft.models.image.connector import StableDiffusion3Conditioner
from weft.models.image.flux_kontext import FluxOptions
from weft.models.image.metaquery import UniPic2MetaQuery
from weft.models.image.metaquery_parts import RELEASED_CONNECTOR
from weft.models.image.qwen_image_edit import QwenOptions
from weft.models.load import family_of, find_model
from weft.models.weights import FLUX, QWEN_EDIT, SD3, Parts, part_folder, read_json
from weft.train.config import Recipe
from weft.train.setup import make_trainable

VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768,
}  # fmt: skip
CLIP_G = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip
T5_XXL = {
    "d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
QWEN_VL_7B: dict[str, Any] = {
    "text_config": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 128000,
    },
    "vision_config": {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
    },
}  # fmt: skip
SD35_MEDIUM: dict[str, dict[str, Any]] = {
    "transformer": {
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
        "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
        "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
        "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm",
    },
    "vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL,
}  # fmt: skip
FLUX_KONTEXT: dict[str, dict[str, Any]] = {
    "transformer": {"guidance_embeds": True},  # the class's defaults are FLUX.1's: 19 and 38 blocks of 24 x 128
    "vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": T5_XXL,
}  # fmt: skip
QWEN_IMAGE: dict[str, dict[str, Any]] = {"transformer": {}, "vae": {}, "text_encoder": QWEN_VL_7B}  # and here Qwen's
CHECKPOINTS: dict[str, tuple[Parts, dict[str, dict[str, Any]]]] = {
    "stable-diffusion-3.5-medium": (SD3, SD35_MEDIUM),
    "UniPic2-SD3.5M-Kontext": (SD3, SD35_MEDIUM),
    "FLUX.1-Kontext-dev": (FLUX, FLUX_KONTEXT),
    "Qwen-Image-Edit": (QWEN_EDIT, QWEN_IMAGE),
}
"""Sizes of public checkpoints, by what their name contains."""
VLM = "Qwen2_5_VLForConditionalGeneration"
VLMS = {"Qwen2.5-VL-7B": QWEN_VL_7B}
OPEN_METAQUERY = "weft.models.image.metaquery_parts:open_metaquery"
REWRITER = "weft.models.rewriter_training:RewriterTrainable"
KONTEXT_TOKENS = 1369  # a picture of a FLUX Kontext format for Qwen2.5-VL: at most 37 x 37 tokens of 28 x 28 pixels
QWEN_PIXELS = 12_845_056  # and without a format: what Qwen2.5-VL's image processor allows
WORDS, ANSWER = 64, 96  # tokens of a prompt, and of a standardised answer


@dataclass(slots=True)
class Networks:
    """A model on the meta device: its `modules`; the edge of its pictures in pixels, `multiple` pixels to a token;
    `text(pictures)`, the text tokens of a sample; and `flops(cells, pictures)`, the operations of one forward of all
    that a training step runs, for picture tokens `cells` in all. `width` and `layers` are of what holds activations.
    Without `flops` nothing but the sizes is known. `whole`: modules that train whole also beside a LoRA."""

    modules: dict[str, nn.Module]
    resolution: int = 0
    multiple: int = 1
    width: int = 0
    layers: int = 0
    text: Callable[[float], float] = lambda pictures: 0.0
    flops: Callable[[float, float], float] | None = None
    whole: tuple[str, ...] = ()


def networks(config: Recipe, assumed: list[str]) -> Networks:
    """The networks that the recipe names; the trainable ones require a gradient. Appends to `assumed` what was assumed.

    Raises WeftError for a model that is neither here nor of known sizes, or a module that it does not have.
    """
    if _is_metaquery(config):
        found = _metaquery(config, assumed)
    elif config.trainable == REWRITER:
        found = _rewriter(config)
    elif config.trainable is not None:
        made = make_trainable(config, torch.device("cpu"))
        return Networks(made.modules(), whole=getattr(made, "whole", ()))
    else:
        found = _flow(config)
    for module in found.modules.values():
        module.requires_grad_(False)
    for name in config.model.train or (["transformer"] if config.trainable is None else list(found.modules)):
        if name not in found.modules:
            raise WeftError(f'model.train: the model has no module "{name}", it has {", ".join(found.modules)}')
        found.modules[name].requires_grad_(True)
    if config.trainable == REWRITER:
        vlm: Any = found.modules["vlm"]
        vlm.model.visual.requires_grad_(bool(config.trainable_args.get("vision", False)))
    if _is_metaquery(config) and config.trainable_args.get("train_queries") is False:
        conditioner: Any = found.modules["conditioner"]
        conditioner.meta_queries.requires_grad_(False)
    return found


def _is_metaquery(config: Recipe) -> bool:
    if config.trainable is not None:
        return config.trainable == OPEN_METAQUERY
    return (Path(str(config.model.path)) / "conditioner" / "config.json").is_file()


def _flow(config: Recipe) -> Networks:
    """A flow family: the transformer runs in a step, everything else only encodes."""
    path = str(config.model.path)
    folder, parts, sizes = _find(path)
    there = {name: kind for name, kind in parts.networks.items() if _there(name, parts, folder, sizes)}
    modules = {name: _module(kind, name, folder, sizes) for name, kind in there.items()}
    transformer: Any = modules["transformer"]
    text = _text(config, folder, modules)
    side, multiple = _picture(folder, modules)
    words = round(text(0))
    operations = _operations(transformer, words)
    return Networks(
        modules, side, multiple, *_width(transformer), text,
        # where the text grows with the pictures (Qwen), a token of it costs what one of them does
        lambda cells, pictures: operations(cells + text(pictures) - words),
    )  # fmt: skip


def _metaquery(config: Recipe, assumed: list[str]) -> Networks:
    """SD3.5's transformer behind a connector; the VLM runs in every step while the queries train."""
    args = config.trainable_args
    folder, _, sizes = _find(str(config.model.path), SD3, SD35_MEDIUM, assumed)
    modules = {name: _module(SD3.networks[name], name, folder, sizes) for name in ("transformer", "vae")}
    card = {} if folder is None else read_json(folder / "weft.json").get("options", {})
    inside = None if folder is None or not (folder / "vlm").is_dir() else str(folder / "vlm")
    modules["vlm"] = vlm = _vlm(str(args.get("vlm") or card.get("vlm") or inside or "Qwen/Qwen2.5-VL-7B-Instruct"))
    transformer: Any = modules["transformer"]
    own = folder is not None and args.get("conditioner") != "new" and (folder / "conditioner").is_dir()
    with torch.device("meta"):
        if own and folder is not None:
            conditioner: Any = StableDiffusion3Conditioner.from_config(
                read_json(folder / "conditioner" / "config.json")
            )
        else:
            conditioner = StableDiffusion3Conditioner(
                args.get("connector") or RELEASED_CONNECTOR,
                num_queries=args.get("queries", 256),
                llm_hidden_size=vlm.config.text_config.hidden_size,
                pooled_projection_dim=transformer.config.pooled_projection_dim,
                joint_attention_dim=transformer.config.joint_attention_dim,
            )
    modules["conditioner"] = conditioner
    queries = conditioner.config.num_queries
    side, multiple = _picture(folder, modules)
    operations = _operations(transformer, queries)
    reads = "conditioner" in (config.model.train or []) and args.get("train_queries", True)
    shown = (side / 28) ** 2
    connector = 2.0 * queries * sum(p.numel() for p in conditioner.parameters())
    language = 2.0 * sum(p.numel() for p in vlm.model.language_model.parameters()) if reads else 0.0
    assumed.append(
        f"VLM and connector: 2 operations a weight and token, {WORDS} tokens of text and {shown:.0f} a picture"
        if reads
        else "the VLM's states are cached; connector: 2 operations a weight and query"
    )
    return Networks(
        modules, side, multiple, *_width(transformer), lambda pictures: float(queries),
        lambda cells, pictures: (
            operations(cells) + connector + language * (queries + WORDS + shown * pictures)
        ),
        UniPic2MetaQuery.whole,
    )  # fmt: skip


def _rewriter(config: Recipe) -> Networks:
    """A VLM that reads pictures and writes an answer; all its tokens count as text."""
    vlm = _vlm(str(config.model.path))
    text_config, fit = vlm.config.text_config, config.trainable_args.get("fit", "kontext")
    vision, shown = vlm.config.vision_config, KONTEXT_TOKENS
    if fit != "kontext":  # the most that the image processor makes of a picture
        card = read_json(Path(str(config.model.path)) / "preprocessor_config.json")
        area = card.get("size", {}).get("longest_edge", QWEN_PIXELS)
        shown = max(1, area // (vision.patch_size * vision.spatial_merge_size) ** 2)
    weights = sum(p.numel() for p in vlm.parameters()) - vlm.get_input_embeddings().weight.numel()

    def text(pictures: float) -> float:
        return WORDS + ANSWER + shown * pictures

    return Networks(
        {"vlm": vlm}, 0, 1, text_config.hidden_size, text_config.num_hidden_layers, text,
        lambda cells, pictures: 2.0 * weights * text(pictures),
    )  # fmt: skip


def _find(
    path: str,
    parts: Parts | None = None,
    sizes: dict[str, dict[str, Any]] | None = None,
    assumed: list[str] | None = None,
) -> tuple[Path | None, Parts, dict[str, dict[str, Any]]]:
    """The folder of a model, or None and the sizes of a public checkpoint (`parts`, `sizes`: of one to come)."""
    known = next((CHECKPOINTS[name] for name in CHECKPOINTS if name in path), None)
    if Path(path).exists() or known is None:
        try:
            folder = find_model(path)
            return folder, family_of(folder).parts, {}
        except WeftError:
            if parts is not None and sizes is not None and assumed is not None:
                assumed.append(f"{path} is not on this machine: the released sizes")
                return None, parts, sizes
            raise WeftError(f"model.path: {path} is not on this machine and not a known size; give a folder") from None
    return None, *known


def _there(name: str, parts: Parts, folder: Path | None, sizes: dict[str, dict[str, Any]]) -> bool:
    if folder is None:
        return name in sizes
    return name not in parts.optional or (part_folder(folder, name) / "config.json").is_file()


def _module(kind: str, name: str, folder: Path | None, sizes: dict[str, dict[str, Any]]) -> nn.Module:
    """A network of a class (`library:Class`) on the meta device."""
    library, _, called = kind.partition(":")
    cls = getattr(importlib.import_module(library), called)
    path = None if folder is None else part_folder(folder, name)
    with torch.device("meta"):
        if hasattr(cls, "from_config"):  # diffusers
            return cls.from_config(sizes[name] if path is None else read_json(path / "config.json"))
        own = cls.config_class
        return cls(own(**sizes[name]) if path is None else own.from_pretrained(path))


def _vlm(path: str) -> Any:
    import transformers

    sizes = next((sizes for name, sizes in VLMS.items() if name in path), None)
    folder = Path(path) if Path(path).is_dir() else None
    if folder is None and sizes is None:
        raise WeftError(f"VLM {path}: not on this machine and not a known size; give a folder")
    cls = getattr(transformers, VLM)
    with torch.device("meta"):
        own = cls.config_class
        return cls(own.from_pretrained(folder) if folder is not None else own(**(sizes or {})))


def _width(transformer: Any) -> tuple[int, int]:
    """Width and number of blocks."""
    c = transformer.config
    return c.num_attention_heads * c.attention_head_dim, c.num_layers + getattr(c, "num_single_layers", 0)


def _picture(folder: Path | None, modules: dict[str, Any]) -> tuple[int, int]:
    """The edge of the model's own pictures, and how many pixels a token has."""
    vae, transformer = modules["vae"].config, modules["transformer"].config
    blocks = getattr(vae, "block_out_channels", None)
    down = 2 ** (len(blocks) - 1) if blocks is not None else 2 ** len(vae.temperal_downsample)
    if getattr(transformer, "sample_size", None):  # SD3
        return min(512, transformer.sample_size * down), down * transformer.patch_size
    card = {} if folder is None else read_json(folder / "weft.json")
    return int(card.get("resolution", 1024)), 2 * down


def _text(config: Recipe, folder: Path | None, modules: dict[str, Any]) -> Callable[[float], float]:
    """Text tokens of a sample with so many pictures, by family."""
    kind = type(modules["transformer"]).__name__
    card = {} if folder is None else read_json(folder / "weft.json").get("options", {})
    options = {**card, **config.model.options}
    if kind == "SD3Transformer2DModel":
        t5 = modules.get("text_encoder_3")
        length = modules["text_encoder"].config.max_position_embeddings
        length += 256 if t5 is None or t5.config.d_model >= 1024 else 32
    elif kind == "FluxTransformer2DModel":
        length = options.get("text_length", FluxOptions().text_length)
        if folder is not None:
            own = read_json(part_folder(folder, "tokenizer_2") / "tokenizer_config.json")
            length = min(length, own.get("model_max_length", length))
    else:
        known = (None if folder is None else family_of(folder).options) or QwenOptions
        fields = {field.name: field.default for field in dataclasses.fields(known)}
        area = options.get("condition_area", fields["condition_area"])
        return lambda pictures: WORDS + pictures * area / 28**2
    return lambda pictures: float(length)


def _operations(transformer: Any, text: int) -> Callable[[float], float]:
    """Operations of one forward of one sample with `text` tokens of text as a function of its picture tokens.

    Counted on the meta device at three small lengths: linear layers make them linear, attention quadratic, so that
    three points fix them for every length. References cost what as many tokens of the target would. The counting
    waits for the first question, when adapters are on.
    """
    import numpy as np
    from torch.utils.flop_counter import FlopCounterMode

    found: list[Any] = []
    lengths = (16, 32, 48)

    def operations(tokens: float) -> float:
        if not found:
            counts = []
            for length in lengths:
                with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
                    transformer(**_inputs(transformer, length, text))
                counts.append(float(counter.get_total_flops()))
            found.append(np.polynomial.Polynomial.fit(lengths, counts, 2).convert())
        return float(found[0](tokens))

    return operations


def _inputs(transformer: Any, tokens: int, text: int) -> dict[str, Any]:
    """Empty arguments of one call with so many picture tokens (a multiple of 16) and text tokens."""
    c, empty = transformer.config, torch.empty
    inputs = {"encoder_hidden_states": empty(1, text, c.joint_attention_dim), "timestep": empty(1)}
    kind = type(transformer).__name__
    if kind == "SD3Transformer2DModel":
        inputs["hidden_states"] = empty(1, c.in_channels, tokens // 16 * c.patch_size, 16 * c.patch_size)
        return inputs | {"pooled_projections": empty(1, c.pooled_projection_dim)}
    inputs["hidden_states"] = empty(1, tokens, c.in_channels)
    if kind == "FluxTransformer2DModel":
        axes = len(c.axes_dims_rope)
        inputs |= {"pooled_projections": empty(1, c.pooled_projection_dim), "img_ids": empty(tokens, axes)}
        return inputs | {"txt_ids": empty(text, axes), "guidance": empty(1) if c.guidance_embeds else None}
    return inputs | {"img_shapes": [[(1, tokens // 16, 16)]], "encoder_hidden_states_mask": None}
