"""Build a new, untrained SD3-shaped model folder from a YAML file of configurations and a corpus of texts.

    python -m weft.models.build recipes/tiny/model.yaml runs/tiny/init --from runs/tiny/vae/export

The networks are diffusers' and transformers' own classes with the given configurations and seeded random weights; the
tokenizers are made from the corpus. Folders after `--from` (exports of trainings) replace the parts that they hold.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft.data.sources import SourceConfig, load_source
from weft.errors import WeftError, exit_status
from weft.models.sections import read_sections
from weft.models.tokenizers import clip_tokenizer, t5_tokenizer
from weft.models.weights import SD3_OPTIONAL, SD3_PARTS, load_sd3_parts, save_folder
from weft.rng import seed_of

SECTIONS = ("seed", "corpus", "scheduler", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


def build(config: str | Path | dict[str, Any], out: str | Path, parts: Sequence[str | Path] = ()) -> Path:
    """Write a model folder in diffusers layout and return its path.

    `config` has the sections of `SECTIONS`, keyword arguments of the classes' configurations, and `tokenizer`,
    `tokenizer_2`, `tokenizer_3` with `length` (tokens) and `min_count`. `corpus` is a list of record sources
    (`weft.data.sources.SourceConfig`); instructions and `meta["canonical"]` sentences are its texts. `parts` are
    folders whose sub-folders replace freshly built parts of the same name. Raises WeftError for an unknown section,
    parts that do not fit each other, or an `out` that exists.
    """
    settings = read_config(config)
    out = Path(out)
    if out.exists():
        raise WeftError(f"{out} exists; give a new folder, or remove it first")
    made = untrained(settings)
    with tempfile.TemporaryDirectory() as temporary:
        draft = save_folder(made, Path(temporary) / "model")
        for folder in map(Path, parts):
            take_parts(folder, draft)
        final = load_sd3_parts(draft, dtype=torch.float32)
        check_fit(final)
        return save_folder(final, out)


def read_config(config: str | Path | dict[str, Any]) -> dict[str, Any]:
    """The configuration's sections, checked by name."""
    known = (*SECTIONS, *TOKENIZERS)
    required = [n for n in known if n not in ("seed", "scheduler", "text_encoder_3", "tokenizer_3")]
    config = read_sections(config, known, required)
    if ("text_encoder_3" in config) != ("tokenizer_3" in config):
        raise WeftError("the configuration: text_encoder_3 and tokenizer_3 come together; give both or neither")
    return config


def corpus_texts(sources: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The instructions, and canonical sentences where there are any, of the records of sources."""
    for source in sources:
        for record in load_source(SourceConfig(**source)):
            yield record.instruction
            if isinstance(record.meta.get("canonical"), str):
                yield record.meta["canonical"]


def untrained(settings: dict[str, Any]) -> dict[str, Any]:
    """The parts by folder name: tokenizers of the corpus and networks with random weights, a function of `seed`."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    texts = list(corpus_texts(settings["corpus"]))
    if not texts:
        raise WeftError("corpus: holds no text; tokenizers need one")
    parts: dict[str, Any] = {"scheduler": FlowMatchEulerDiscreteScheduler(**settings.get("scheduler", {}))}
    for name in TOKENIZERS:
        if name in settings:
            make = t5_tokenizer if name == "tokenizer_3" else clip_tokenizer
            parts[name] = make(texts, **settings[name])
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        if name in settings:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(int(settings.get("seed", 0)), f"build/{name}"))
                tokenizer = parts.get(name.replace("text_encoder", "tokenizer"))
                parts[name] = NETWORKS[name](settings[name], tokenizer)
    return parts


def make_transformer(config: dict[str, Any], tokenizer: None) -> nn.Module:
    """SD3Transformer2DModel with the initialisation of DiT (arXiv 2212.09748, section 3.2: adaLN-Zero)."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(**config)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.pos_embed.proj.weight.view(model.pos_embed.proj.weight.shape[0], -1))
    nn.init.zeros_(model.pos_embed.proj.bias)
    for embedder in (model.time_text_embed.timestep_embedder, model.time_text_embed.text_embedder):
        nn.init.normal_(embedder.linear_1.weight, std=0.02)
        nn.init.normal_(embedder.linear_2.weight, std=0.02)
    for name, module in model.named_modules():
        # every modulation is a linear layer inside a norm; the blocks start as the identity, the velocity as zero
        if name == "proj_out" or (name.endswith(".linear") and "norm" in name.split(".")[-2]):
            nn.init.zeros_(module.weight)
    return model


def make_vae(config: dict[str, Any], tokenizer: None) -> nn.Module:
    """AutoencoderKL that starts as a chain of orthogonal convolutions: every residual branch is zero.

    So colours and places pass from the first step on; the posterior starts narrow (deviation e^-3).
    """
    from diffusers import AutoencoderKL
    from diffusers.models.resnet import ResnetBlock2D

    config = {"scaling_factor": 1.0, "shift_factor": 0.0} | config  # until training measures them
    lists = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    levels = len(lists["block_out_channels"])
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels, **lists
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.orthogonal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
    channels = model.config.latent_channels
    with torch.no_grad():
        model.encoder.conv_out.weight[channels:] = 0
        model.encoder.conv_out.bias[channels:] = -6.0
    return model


def make_clip(config: dict[str, Any], tokenizer: Any) -> nn.Module:
    """CLIPTextModelWithProjection for a tokenizer: vocabulary, length and special tokens come from it."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **config,
        )
    )


def make_t5(config: dict[str, Any], tokenizer: Any) -> nn.Module:
    """T5EncoderModel for a tokenizer, its heads looking to their neighbours from the start.

    T5 knows order by a learned bias per distance only, and a small model learns it late: for long it reads a text as
    a bag of words. So heads start as previous word, next word, near words and all words, in turn.
    """
    from transformers import T5Config, T5EncoderModel

    model = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
            is_encoder_decoder=False,
            use_cache=False,
            **config,
        )
    )
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # [buckets, heads]
    half = bias.shape[0] // 2  # distance 0 and backward; the rest is forward. Half of each is exact, the rest coarser
    distance = torch.cat([torch.arange(half), torch.arange(half)]).float()
    with torch.no_grad():
        bias.zero_()
        bias[1, 0::4] = 6.0
        bias[half + 1, 1::4] = 6.0
        bias[:, 2::4] = -distance[:, None]
    return model


NETWORKS = {
    "transformer": make_transformer,
    "vae": make_vae,
    "text_encoder": make_clip,
    "text_encoder_2": make_clip,
    "text_encoder_3": make_t5,
}


def take_parts(folder: Path, draft: Path) -> None:
    """Replace the parts of `draft` that `folder` holds, too. Raises WeftError if there are none."""
    found = [name for name in (*SD3_PARTS, *SD3_OPTIONAL) if (folder / name).is_dir()]
    if not found:
        raise WeftError(f"{folder}: holds no part of a model ({', '.join(SD3_PARTS)}); give a training's export folder")
    for name in found:
        shutil.rmtree(draft / name, ignore_errors=True)
        shutil.copytree(folder / name, draft / name)


def check_fit(parts: dict[str, Any]) -> None:
    """Raise WeftError where the parts' widths or vocabularies do not fit each other."""
    transformer, clip, clip_2 = (parts[name].config for name in ("transformer", "text_encoder", "text_encoder_2"))

    def need(what: str, found: int, wanted: int) -> None:
        if found != wanted:
            raise WeftError(f"{what} is {found}, but {wanted} is needed; change the configuration")

    need("vae.latent_channels", parts["vae"].config.latent_channels, transformer.in_channels)
    pooled = clip.projection_dim + clip_2.projection_dim
    need("the sum of the text encoders' projection_dim", pooled, transformer.pooled_projection_dim)
    if "text_encoder_3" in parts:
        need("text_encoder_3.d_model", parts["text_encoder_3"].config.d_model, transformer.joint_attention_dim)
    if clip.hidden_size + clip_2.hidden_size > transformer.joint_attention_dim:
        raise WeftError(
            f"the text encoders' hidden sizes {clip.hidden_size} + {clip_2.hidden_size} exceed the transformer's "
            f"joint_attention_dim {transformer.joint_attention_dim}"
        )
    for name in TOKENIZERS:
        if name in parts:
            encoder = parts[name.replace("tokenizer", "text_encoder")]
            need(f"the vocabulary of {name}", len(parts[name]), encoder.config.vocab_size)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m weft.models.build", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", help="YAML file, for example recipes/tiny/model.yaml")
    parser.add_argument("out", help="new folder")
    parser.add_argument("--from", dest="parts", action="append", default=[], help="folder with trained parts")
    options = parser.parse_args(arguments)
    return exit_status(lambda: print(f"wrote {build(options.config, options.out, options.parts)}"))


if __name__ == "__main__":
    sys.exit(main())
