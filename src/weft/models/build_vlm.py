"""Build a new, untrained Qwen2.5-VL folder of any size from a YAML file of configurations and a corpus of texts.

    python -m weft.models.build_vlm recipes/tiny/judge_model.yaml runs/tiny/judge_init

The network is transformers' own class with seeded random weights, the tokenizer Qwen2's byte-level BPE made from the
corpus: any text can be encoded, single digits are single tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft.data.sources import SourceConfig, load_source
from weft.errors import WeftError, exit_status
from weft.models.sections import read_sections
from weft.rng import seed_of
from weft.vlm.processor import Processor

PADS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *PADS)
SECTIONS = ("seed", "corpus", "tokenizer", "text", "vision", "pictures")
# The turns of Qwen's template; no system line, which a small model would have to read every time.
TEMPLATE = """\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}
{%- if part.type == 'text' %}{{ part.text }}{% else %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% endif %}
{%- endfor %}{% endif %}{{ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def qwen_tokenizer(texts: Sequence[str], *, min_count: int = 5, vocabulary: int = 4096) -> Any:
    """Qwen2's byte-level BPE, trained on `texts` until pieces seen `min_count` times are one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    blank = Qwen2Tokenizer()
    trained = Tokenizer(models.BPE())
    trained.normalizer = blank.backend_tokenizer.normalizer
    trained.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, min_frequency=min_count, initial_alphabet=letters, show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=merges, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(settings: dict[str, Any], tokenizer: Any) -> nn.Module:
    """Qwen2_5_VLForConditionalGeneration with seeded weights: residual branches start at zero, the others keep the
    scale of their input, so that a small model learns fast from the first step."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    text = {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        **settings["text"],
    }
    vision = {"out_hidden_size": text["hidden_size"], **settings["vision"]}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(int(settings.get("seed", 0)), "build_vlm"))
        model = Qwen2_5_VLForConditionalGeneration(config)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if name.endswith(("o_proj", "down_proj", "attn.proj", "lm_head")):
                    nn.init.zeros_(module.weight)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)
            elif isinstance(module, nn.Conv3d):  # one patch, one vector
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def build(config: str | Path | dict[str, Any], out: str | Path) -> Path:
    """Write a model folder and return its path.

    `corpus`: record sources; their instructions, as JSON texts too, and `meta["says"]` are the tokenizer's texts.
    `tokenizer`: `min_count`, `vocabulary`. `text`, `vision`: keyword arguments of the class's configurations.
    `pictures`: those of the image processor (patch_size, size ...). Raises WeftError for an unknown or missing
    section, or an `out` that exists.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    settings = read_sections(config, SECTIONS, ("corpus", "text", "vision", "pictures"))
    out = Path(out)
    if out.exists():
        raise WeftError(f"{out} exists; give a new folder, or remove it first")
    texts: list[str] = []
    for source in settings["corpus"]:
        for record in load_source(SourceConfig(**source)):
            texts += [json.dumps(record.instruction, ensure_ascii=False), record.instruction]
            if isinstance(record.meta.get("says"), str):
                texts.append(record.meta["says"])
    tokenizer = qwen_tokenizer(texts, **settings.get("tokenizer", {}))
    model: Any = make_model(settings, tokenizer)
    model.save_pretrained(out)
    Processor(tokenizer, Qwen2VLImageProcessorPil(**settings["pictures"]), TEMPLATE).save(out)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m weft.models.build_vlm", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", help="YAML file, for example recipes/tiny/judge_model.yaml")
    parser.add_argument("out", help="new folder")
    options = parser.parse_args(arguments)
    return exit_status(lambda: print(f"wrote {build(options.config, options.out)}"))


if __name__ == "__main__":
    sys.exit(main())
