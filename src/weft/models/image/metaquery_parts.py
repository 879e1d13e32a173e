"""Opening UniPic2-MetaQuery: the VLM beside a released folder, and the parts of stages A and C (arXiv 2509.04548)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from weft.errors import WeftError
from weft.models.image.connector import StableDiffusion3Conditioner, initialise
from weft.models.image.metaquery import MetaQueryOptions, UniPic2MetaQuery
from weft.models.lora import ADAPTER_FILES
from weft.models.weights import METAQUERY, Parts, _network, from_hub, is_hub_id, load_parts, read_json
from weft.vlm.processor import Processor

VLM_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt")
RELEASED_CONNECTOR = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 24, "num_attention_heads": 24,
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_vlm(name: str, folder: Path) -> Path:
    """The folder of a VLM: `name` (a folder or hub id), or with "" `folder/vlm`. Raises WeftError if there is none:
    a model that was trained with one VLM says nothing with another."""
    for path in (Path(name), folder / name) if name else (folder / "vlm",):
        if path.is_dir():
            return path
    if not name:
        raise WeftError(
            f"{folder}: a MetaQuery model needs its VLM: give its folder or hub id (--option vlm=...), for the "
            "released checkpoint Qwen/Qwen2.5-VL-7B-Instruct"
        )
    if not is_hub_id(name):
        raise WeftError(f"vlm {name!r}: no such folder; give the folder or hub id of a Qwen2.5-VL model")
    return from_hub(name, f"vlm {name!r}: no such folder", VLM_FILES, ADAPTER_FILES)


def vlm_parts(
    folder: Path, options: MetaQueryOptions, dtype: torch.dtype, quantization: Any = None, device_map: Any = None
) -> dict[str, Any]:
    """`vlm` and `processor`: a Qwen2.5-VL model for the model in `folder`, checked to belong together."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    path = find_vlm(options.vlm, folder)
    kind = read_json(path / "config.json").get("model_type")
    if kind != "qwen2_5_vl":
        raise WeftError(f"{path}: model type {kind!r}, but MetaQuery needs a Qwen2.5-VL model (qwen2_5_vl)")
    processor = Processor.load(path)
    model: Any = _network(path, Qwen2_5_VLForConditionalGeneration, dtype, quantization, device_map)
    if model.config.image_token_id != processor.image_id:
        token = model.config.image_token_id
        raise WeftError(f"{path}: the model's image token is {token}, the tokenizer's {processor.image_id}")
    return {"vlm": model, "processor": processor}


def open_metaquery(
    path: str | Path,
    *,
    vlm: str = "",
    conditioner: str | None = None,
    transformer: str | None = None,
    queries: int = 256,
    connector: dict[str, Any] | None = None,
    seed: int = 0,
    train_queries: bool = True,
    mrope: str = "flat",
    conditioning: str = "both",
    dtype: str = "bf16",
    gradient_checkpointing: bool = False,
    resolution: int | None = None,
) -> UniPic2MetaQuery:
    """A MetaQuery model to train; what a recipe's `trainable` names.

    `path`: a MetaQuery folder, or any SD3.5 folder, whose transformer, VAE and scheduler are taken. `conditioner`: a
    model to take it from, or "new" for stage A: `queries` of them, a `connector` (sizes; default the released ones)
    and fresh weights of `seed`. `transformer`: a model to take it from (stage C: that of stage B). `train_queries`:
    False freezes the queries, and the VLM's states are cached. `dtype`: of what is not trained. For `vlm`, `mrope` and
    `conditioning` see `MetaQueryOptions`.

    Raises WeftError for a missing part, parts that do not fit, and sizes of a conditioner that is not new.
    """
    from weft.models.load import find_model

    if dtype not in DTYPES:
        raise WeftError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    if conditioner != "new" and (connector is not None or queries != 256):
        raise WeftError('queries and connector size a new conditioner: say conditioner="new", or leave them out')
    options = MetaQueryOptions(vlm, mrope, conditioning)
    folder = find_model(str(path))
    sources = {
        "transformer": find_model(transformer) if transformer else folder,
        "conditioner": find_model(conditioner) if conditioner not in (None, "new") else folder,
    }
    parts = vlm_parts(folder, options, DTYPES[dtype])
    for name, kind in METAQUERY.networks.items():
        if name != "conditioner" or conditioner != "new":
            part = Parts({name: kind}, {})
            parts |= load_parts(sources.get(name, folder), part, dtype=DTYPES[dtype])
    parts |= load_parts(folder, Parts({}, METAQUERY.readers), dtype=DTYPES[dtype])
    if conditioner == "new":
        parts["conditioner"] = _new(parts, queries, connector or RELEASED_CONNECTOR, seed)
    model = UniPic2MetaQuery(
        parts, options=options, gradient_checkpointing=gradient_checkpointing, resolution=resolution
    )
    model.queries.requires_grad_(train_queries)
    return model


def _new(parts: dict[str, Any], queries: int, connector: dict[str, Any], seed: int) -> StableDiffusion3Conditioner:
    """A conditioner of fresh fp32 weights, sized by transformer and VLM."""
    config = parts["transformer"].config
    made = StableDiffusion3Conditioner(
        connector,
        num_queries=queries,
        llm_hidden_size=parts["vlm"].config.text_config.hidden_size,
        pooled_projection_dim=config.pooled_projection_dim,
        joint_attention_dim=config.joint_attention_dim,
    )
    initialise(made, seed)
    return made
