"""Random tiny models in the released folder layout, built in code: what most tests run on.

The networks are the real diffusers/transformers classes with tiny configurations. Every weight is a function of
(seed, module, parameter name), drawn by NumPy, so the same folder comes out on every machine and with every
version of the libraries' own initialisers; golden values can therefore be stored without the weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from weft.rng import numpy_rng

CLIP_LENGTH = 24
T5_LENGTH = 32
WORDS = (
    "a an the of to and with on in at is it one two three four left right above below next between behind front "
    "red blue green yellow orange purple pink cyan black white grey brown "
    "square circle triangle star ring cross heart hexagon diamond crescent pentagon ellipse "
    "small medium large tiny big bigger smaller striped dotted checkered plain wavy grid pattern colour color "
    "picture scene image object background light style shape size draw make add remove replace move change turn "
    "give put take use from into than more less edit generate keep same first second third fourth blur low quality"
).split()


def fill_(module: nn.Module, name: str, seed: int = 0) -> nn.Module:
    """Overwrite every parameter: matrices N(0, 1/(4 fan_in)), norm scales around 1, biases N(0, 0.1). In place."""
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            noise = numpy_rng(seed, f"tiny/{name}/{key}").standard_normal(tuple(parameter.shape)).astype(np.float32)
            value = torch.from_numpy(noise)
            if parameter.ndim > 1:
                value = value / (2 * parameter[0].numel() ** 0.5)
            elif key.endswith("bias"):
                value = 0.1 * value
            else:
                value = 1 + 0.1 * value
            parameter.copy_(value)
    return module.eval()


def tiny_transformer(seed: int = 0, *, layers: int = 2, heads: int = 2, dual: tuple[int, ...] = (0,)) -> nn.Module:
    """SD3Transformer2DModel: heads x 32 wide, 16 latent channels, 2x2 patches, windows of a 24 x 24 position table."""
    from diffusers import SD3Transformer2DModel

    width = heads * 32
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=32,
        joint_attention_dim=64,
        caption_projection_dim=width,
        pooled_projection_dim=48,
        pos_embed_max_size=24,
        dual_attention_layers=dual,
        qk_norm="rms_norm",
    )
    return fill_(model, "transformer", seed)


def tiny_vae(seed: int = 0) -> nn.Module:
    """AutoencoderKL with the geometry of SD3's: 8x downsampling, 16 channels, no quant convolutions."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return fill_(model, "vae", seed)


def tiny_clip(seed: int = 0, *, index: int = 1) -> nn.Module:
    """CLIPTextModelWithProjection, 32 wide (`index` 1) or 16 wide (2): together narrower than the T5 states."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    tokenizer = tiny_clip_tokenizer()
    width = 32 if index == 1 else 16
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        hidden_act="quick_gelu" if index == 1 else "gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return fill_(CLIPTextModelWithProjection(config), f"text_encoder_{index}", seed)


def tiny_t5(seed: int = 0) -> nn.Module:
    """T5EncoderModel, d_model 64."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tiny_t5_tokenizer()),
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return fill_(T5EncoderModel(config), "text_encoder_3", seed)


def tiny_clip_tokenizer():
    """CLIP's byte-level BPE: all bytes, and the merges that spell `WORDS` from left to right."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            pair = (symbols[0], symbols[1])
            if pair not in merges:
                merges.append(pair)
                pieces.append("".join(pair))
            symbols[:2] = ["".join(pair)]
    pieces = list(dict.fromkeys(pieces)) + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH)


def tiny_t5_tokenizer():
    """T5's unigram model: `WORDS` as whole pieces, single characters for everything else."""
    from transformers import T5Tokenizer

    characters = [chr(i) for i in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(f"▁{word}", -3.0) for word in dict.fromkeys(WORDS)] + [(c, -8.0) for c in characters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=T5_LENGTH)


def tiny_kontext_folder(
    path: str | Path,
    seed: int = 0,
    *,
    layers: int = 2,
    heads: int = 2,
    dual: tuple[int, ...] = (0,),
    t5: bool = True,
    shift: float = 3.0,
) -> Path:
    """Write a random tiny UniPic2-Kontext / SD3.5 folder in diffusers layout and return its path.

    `t5=False` leaves out text_encoder_3 and tokenizer_3. Loads with `weft.models.load` and, as it is, with
    `diffusers.StableDiffusion3Pipeline` (texts there need `max_sequence_length=32`).
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        "transformer": ("diffusers", tiny_transformer(seed, layers=layers, heads=heads, dual=dual)),
        "vae": ("diffusers", tiny_vae(seed)),
        "scheduler": ("diffusers", FlowMatchEulerDiscreteScheduler(shift=shift)),
        "text_encoder": ("transformers", tiny_clip(seed, index=1)),
        "text_encoder_2": ("transformers", tiny_clip(seed, index=2)),
        "tokenizer": ("transformers", tiny_clip_tokenizer()),
        "tokenizer_2": ("transformers", tiny_clip_tokenizer()),
    }
    if t5:
        parts["text_encoder_3"] = ("transformers", tiny_t5(seed))
        parts["tokenizer_3"] = ("transformers", tiny_t5_tokenizer())
    index: dict[str, object] = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.42.1"}
    for name, (library, part) in parts.items():
        part.save_pretrained(folder / name)
        index[name] = [library, type(part).__name__]
    for name in ("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor"):
        index.setdefault(name, [None, None])
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def tiny_flux_transformer(seed: int = 0, *, layers: int = 1, single: int = 2, guidance: bool = True) -> nn.Module:
    """FluxTransformer2DModel: two heads of 16, double and single blocks, 16 latent channels."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=layers,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )
    return fill_(model, "flux_transformer", seed)


def tiny_flux_folder(path: str | Path, seed: int = 0, *, layers: int = 1, single: int = 2) -> Path:
    """Write a random tiny FLUX.1-Kontext folder in diffusers layout, at a resolution of 64, and return its path.

    Loads with `weft.models.load` and, as it is, with `diffusers.FluxKontextPipeline` (texts there need
    `max_sequence_length=32`, pictures `_auto_resize=False` and an area of 64 x 64).
    """
    from diffusers import FlowMatchEulerDiscreteScheduler
    from transformers import CLIPTextModel

    text_encoder = fill_(CLIPTextModel(tiny_clip(seed, index=1).config), "flux_text_encoder", seed)
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256
    )
    parts = {
        "transformer": ("diffusers", tiny_flux_transformer(seed, layers=layers, single=single)),
        "vae": ("diffusers", tiny_vae(seed)),
        "scheduler": ("diffusers", scheduler),
        "text_encoder": ("transformers", text_encoder),
        "text_encoder_2": ("transformers", tiny_t5(seed)),
        "tokenizer": ("transformers", tiny_clip_tokenizer()),
        "tokenizer_2": ("transformers", tiny_t5_tokenizer()),
    }
    return _write_folder(Path(path), "FluxKontextPipeline", parts, ("image_encoder", "feature_extractor"), 64)


def tiny_qwen_vae(seed: int = 0) -> nn.Module:
    """AutoencoderKLQwenImage with the real geometry (8x, 16 channels, its statistics) and thin layers."""
    from diffusers import AutoencoderKLQwenImage

    return fill_(AutoencoderKLQwenImage(base_dim=4, dim_mult=[1, 1, 2, 2], num_res_blocks=1), "qwen_vae", seed)


def tiny_qwen_edit_folder(path: str | Path, seed: int = 0, *, layers: int = 2, zero_cond_t: bool = False) -> Path:
    """Write a random tiny Qwen-Image-Edit-2509 folder at a resolution of 64 (`zero_cond_t`: 2511), and return its path.

    The VLM sees pictures of about 64 x 64 pixels.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

    from tiny_vlm import qwen_tokenizer, tiny_vlm_folder

    transformer = QwenImageTransformer2DModel(
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        zero_cond_t=zero_cond_t,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    parts = {
        "transformer": ("diffusers", fill_(transformer, "qwen_transformer", seed)),
        "vae": ("diffusers", tiny_qwen_vae(seed)),
        "scheduler": ("diffusers", scheduler),
        "tokenizer": ("transformers", qwen_tokenizer()),
    }
    folder = _write_folder(Path(path), "QwenImageEditPlusPipeline", parts, (), 64)
    vlm = tiny_vlm_folder(folder / "processor", seed=seed)
    (folder / "text_encoder").mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (vlm / name).rename(folder / "text_encoder" / name)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["text_encoder"] = ["transformers", "Qwen2_5_VLForConditionalGeneration"]
    index["processor"] = ["transformers", "Qwen2VLProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    card = {"resolution": 64, "options": {"condition_area": 64 * 64}}
    (folder / "weft.json").write_text(json.dumps(card) + "\n", encoding="utf-8")
    return folder


def _write_folder(
    folder: Path, pipeline: str, parts: dict[str, tuple[str, object]], missing: tuple[str, ...], resolution: int
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, object] = {"_class_name": pipeline, "_diffusers_version": "0.42.1"}
    for name, (library, part) in parts.items():
        part.save_pretrained(folder / name)  # type: ignore[attr-defined]
        index[name] = [library, type(part).__name__]
    index |= {name: [None, None] for name in missing}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "weft.json").write_text(json.dumps({"resolution": resolution}) + "\n", encoding="utf-8")
    return folder
