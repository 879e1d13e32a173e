"""Build a new, untrained motion model folder from a YAML file of configurations and a source of records.

    python -m weft.models.motion.build recipes/tiny/motion_model.yaml runs/tiny/motion_init --from runs/tiny/rvq/export

The sections are `SECTIONS`: `statistics` and `corpus` are record sources (movements and texts; `statistics` may be
{kind: dataset or generator, mean: file.npy, std: file.npy} instead), `rvq` the quantiser's configuration (with
`heading`), `tokenizer` that of `weft.models.tokenizers.t5_tokenizer` or {path: folder}, `transformer` a transformers
configuration with its `model_type` or {path: folder of a causal LM}, `tokens` the options of
`weft.models.motion.lm.TokenOptions`. The folder after `--from` gives its trained quantiser.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from weft.data.sources import SourceConfig, load_source
from weft.errors import WeftError, exit_status
from weft.models.motion.codec import Codec, codec_of_dataset, load_codec, make_config
from weft.models.motion.rvq import Rvq
from weft.models.sections import read_sections
from weft.motion.clip import Motion
from weft.motion.features import extract
from weft.motion.files import load_part
from weft.motion.stats import DatasetStats, GeneratorStats, dataset_stats
from weft.record import Record
from weft.rng import seed_of

SECTIONS = ("seed", "statistics", "corpus", "rvq", "tokenizer", "transformer", "tokens")
REQUIRED = ("rvq", "tokenizer", "transformer")


def build(config: str | Path | dict[str, Any], out: str | Path, trained: str | Path | None = None) -> Path:
    """Write a motion model folder and return its path; `trained` is a folder with a quantiser (a training's export).

    Raises WeftError for an unknown or missing section, an `out` that exists, or parts that do not fit each other.
    """
    from weft.models.motion.lm import MotionLM

    settings = read_settings(config)
    out = Path(out)
    if out.exists():
        raise WeftError(f"{out} exists; give a new folder, or remove it first")
    codec = load_codec(trained) if trained is not None else new_codec(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(int(settings.get("seed", 0)), "build/transformer"))
        tokenizer = make_tokenizer(settings)
        model = MotionLM.create(codec, tokenizer, make_transformer(settings, tokenizer), settings.get("tokens", {}))
    model.save(out)
    return out


def read_settings(config: str | Path | dict[str, Any]) -> dict[str, Any]:
    """The sections, checked by name."""
    return read_sections(config, SECTIONS, REQUIRED)


def new_codec(settings: dict[str, Any]) -> Codec:
    """A quantiser with random weights, its statistics measured on the movements of `statistics`, or read from files
    {kind, mean, std}: kind "dataset" (HumanML3D's Mean.npy and Std.npy) or "generator" (the meta of a MoMask run).

    Raises WeftError for files whose kind is not said: nothing in them tells the two apart.
    """
    config, heading = make_config(settings["rvq"], "rvq")
    source = settings.get("statistics")
    if source is None:
        raise WeftError("section 'statistics' is missing: a source of records with movements, or {kind, mean, std}")
    seed = int(settings.get("seed", 0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "build/rvq"))
        if isinstance(source, dict) and "mean" in source:
            if set(source) != {"kind", "mean", "std"} or source["kind"] not in ("dataset", "generator"):
                raise WeftError(
                    "statistics from files: give kind, mean and std; kind is dataset (HumanML3D's Mean.npy and "
                    "Std.npy) or generator (the meta folder of a MoMask run)"
                )
            files = source["mean"], source["std"]
            if source["kind"] == "dataset":
                return codec_of_dataset(config, DatasetStats.from_npy(*files), heading)
            return Codec(Rvq(config), GeneratorStats.from_npy(*files), heading)
        stats = dataset_stats(extract([c.joints], heading=heading)[0] for c in movements(records_of(source)))
        return codec_of_dataset(config, stats, heading)


def records_of(source: dict[str, Any] | list[dict[str, Any]]) -> Iterator[Record]:
    """The records of one source or of several."""
    for one in source if isinstance(source, list) else [source]:
        yield from load_source(SourceConfig(**one))


def movements(records: Iterator[Record]) -> Iterator[Motion]:
    """Every movement of at least two frames, at 20 frames a second."""
    for record in records:
        for part in (p for turn in record.turns for p in turn.parts if p.type == "motion"):
            clip = load_part(part, record.root, fps=None)
            clip = clip.resample(clip.layout.fps)
            if len(clip) > 1:
                yield Motion(np.asarray(clip.joints), clip.fps, clip.layout)


def texts(records: Iterator[Record]) -> Iterator[str]:
    """Everything that is written in the records."""
    for record in records:
        yield from (p.text for turn in record.turns for p in turn.parts if p.type == "text" and p.text)


def make_tokenizer(settings: dict[str, Any]) -> Any:
    """The released tokenizer in `tokenizer.path`, or a new one of the corpus' words."""
    from weft.models.tokenizers import t5_tokenizer

    given = dict(settings["tokenizer"])
    if "path" in given:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(given["path"], trust_remote_code=False)
    source = settings.get("corpus") or settings.get("statistics")
    if source is None:
        raise WeftError("section 'corpus' is missing: a source of records whose texts make the tokenizer")
    return t5_tokenizer(list(texts(records_of(source))), **given)


def make_transformer(settings: dict[str, Any], tokenizer: Any) -> Any:
    """The causal LM in `transformer.path`, or one of transformers' classes with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    given = dict(settings["transformer"])
    if "path" in given:
        return AutoModelForCausalLM.from_pretrained(
            given["path"], dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    kind = given.pop("model_type", None)
    if kind is None:
        raise WeftError("transformer: give model_type (such as gemma2) with its sizes, or path")
    facts = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id,
             "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(facts | given)))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m weft.models.motion.build", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("config", help="YAML file, for example recipes/tiny/motion_model.yaml")
    parser.add_argument("out", help="new folder")
    parser.add_argument("--from", dest="trained", help="folder with a trained quantiser")
    options = parser.parse_args(arguments)
    return exit_status(lambda: print(f"wrote {build(options.config, options.out, options.trained)}"))


if __name__ == "__main__":
    sys.exit(main())
