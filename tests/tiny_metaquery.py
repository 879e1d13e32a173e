"""Random tiny UniPic2-MetaQuery models: a Qwen2.5-VL folder, and the released layout of what is conditioned on it.

The VLM keeps the real patches (14 pixels, merged 2 x 2), because the size at which it sees a picture depends on them.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from tiny import WORDS, fill_, tiny_transformer, tiny_vae

VLM_TEMPLATE = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template with the two habits of Qwen2.5-VL's that matter: its marks, and a system turn by default."""
VLM_SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>".split()
)


def tiny_qwen_tokenizer():
    """Qwen2's byte-level BPE: all bytes, and merges that spell `WORDS` with and without a space before them."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in [*WORDS, *(f"Ġ{word}" for word in WORDS)]:
        symbols = list(word)
        while len(symbols) > 1:
            pair = (symbols[0], symbols[1])
            if pair not in merges:
                merges.append(pair)
                pieces.append("".join(pair))
            symbols[:2] = ["".join(pair)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, model_max_length=4096)
    tokenizer.add_special_tokens({"additional_special_tokens": list(VLM_SPECIAL)})
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.chat_template = VLM_TEMPLATE
    return tokenizer


def tiny_qwen(seed: int = 0, *, width: int = 32, layers: int = 2) -> nn.Module:
    """Qwen2_5_VLForConditionalGeneration: `width` wide text model, 2-layer vision tower with windowed attention."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = tiny_qwen_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in VLM_SPECIAL}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 2 * width,
            "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 1,
            "max_position_embeddings": 4096, "tie_word_embeddings": True, "eos_token_id": ids["<|im_end|>"],
            "bos_token_id": None, "pad_token_id": ids["<|endoftext|>"],
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [width // 8, width // 16, width // 16]
            },
        },
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": width,
            "window_size": 56, "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    return fill_(Qwen2_5_VLForConditionalGeneration(config), "vlm", seed)


def tiny_qwen_folder(path: str | Path, seed: int = 0, *, width: int = 32, layers: int = 2) -> Path:
    """Write a random tiny Qwen2.5-VL folder: weights, tokenizer with chat template, image processor."""
    from transformers import GenerationConfig
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder = Path(path)
    model, tokenizer = tiny_qwen(seed, width=width, layers=layers), tiny_qwen_tokenizer()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 16).save_pretrained(folder)
    return folder


def tiny_conditioner(seed: int = 0, *, queries: int = 6, hidden: int = 32) -> nn.Module:
    """The conditioner of `tiny_transformer`: 2 connector layers of width 24; its configuration asks for flash."""
    from weft.models.image.connector import StableDiffusion3Conditioner

    connector = {
        "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "_attn_implementation": "flash_attention_2",
    }  # fmt: skip
    model = StableDiffusion3Conditioner(
        connector, num_queries=queries, llm_hidden_size=hidden, pooled_projection_dim=48, joint_attention_dim=64
    )
    return fill_(model, "conditioner", seed)


def tiny_metaquery_folder(path: str | Path, seed: int = 0) -> tuple[Path, Path]:
    """Write the released layout (`model`: transformer, vae, conditioner, scheduler) and `vlm` under `path`."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder, vlm = Path(path) / "model", Path(path) / "vlm"
    tiny_transformer(seed).save_pretrained(folder / "transformer")
    tiny_vae(seed).save_pretrained(folder / "vae")
    tiny_conditioner(seed).save_pretrained(folder / "conditioner")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    tiny_qwen_folder(vlm, seed)
    return folder, vlm
