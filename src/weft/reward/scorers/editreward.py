"""EditReward's released critics as a critic's folder.

    python -m weft.reward.scorers.editreward CHECKPOINT BASE REPOSITORY OUT

CHECKPOINT: the file or folder with model.safetensors or model.pth, as EditReward's own reader takes it
(TIGER-AI-Lab/EditReward, EditReward/inference_edit.py). BASE: the folder of the model that it was trained from
(Qwen2.5-VL-7B-Instruct, MiMo-VL-7B-SFT-2508), for its configuration, tokenizer and image processor. REPOSITORY: a
checkout of EditReward, whose two questions are read from its source without running it. What is kept of it:
two questions with a head each (Linear, ReLU, dropout, Linear, ReLU, Linear), read at the token <|Reward|>; positions
that count tokens, pictures included, since its code gives the model no grids; pictures of about 448 x 448 pixels; the
instruction as it is, unquoted. The weights are held in memory twice.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.reward.scorers.critic import CriticForm, RankingHead
from weft.vlm.local import CLASSES
from weft.vlm.processor import Processor

TOKEN = "<|Reward|>"
FAMILY = "qwen2_5_vl"  # their code for Qwen3-VL is another
AREA = 256 * 28 * 28  # pixels
QUESTIONS = {"following": "INSTRUCTION_EDIT_FOLLOWING", "quality": "INSTRUCTION_EDIT_QUALITY"}
HEAD = re.compile(r"rm_heads\.head_(\d+)\.(\d+)\.(weight|bias)")


def import_editreward(checkpoint: str | Path, base: str | Path, repository: str | Path, out: str | Path) -> Path:
    """Write the folder `out`, which `weft.reward.scorers.critic.Critic` reads; returns it.

    Raises WeftError for another layout, for weights that do not fit the base model or its tokenizer, and if `out` is
    there already.
    """
    out = Path(out)
    if out.exists():
        raise WeftError(f"{out} exists; give a new folder")
    questions = read_questions(Path(repository))
    tensors = _tensors(Path(checkpoint))
    heads = {key: tensors.pop(key) for key in [key for key in tensors if key.startswith("rm_head")]}
    head, hidden = _head(heads, len(questions), str(checkpoint))
    _save_vlm(tensors, Path(base), out)
    form = CriticForm("ranking", (0, 5), True, hidden, questions, "mean", TOKEN, flat=True, quote=False)
    form.save(head, out)
    return out


def read_questions(repository: Path) -> dict[str, str]:
    """The two questions up to the token <|Reward|>, as templates of ours, read from constants in the source files."""
    folder = repository / "EditReward" / "dataset"
    texts = _constants(folder / "prompts.py", tuple(QUESTIONS.values()))
    end = _constants(folder / "data_collator_qwen_edit.py", ("prompt_with_special_token",))["prompt_with_special_token"]
    before, token, _ = end.partition(TOKEN)
    if not token:
        raise WeftError(f"{folder}/data_collator_qwen_edit.py: no {TOKEN} in prompt_with_special_token")
    found = {}
    for name, constant in QUESTIONS.items():
        if texts[constant].count("{text_prompt}") != 1:
            raise WeftError(f"{folder}/prompts.py: {constant} must have {{text_prompt}} once")
        found[name] = texts[constant].replace("{text_prompt}", "{instruction}") + before
    return found


def _constants(file: Path, names: tuple[str, ...]) -> dict[str, str]:
    if not file.is_file():
        raise WeftError(f"{file}: no such file: give a checkout of TIGER-AI-Lab/EditReward")
    found = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                found[node.targets[0].id] = node.value.value
    for name in names:
        if name not in found:
            raise WeftError(f"{file}: no text {name}: give a checkout of TIGER-AI-Lab/EditReward")
    return {name: found[name] for name in names}


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    from weft.models.foreign import read_foreign

    if path.is_dir():
        files = [path / name for name in ("model.safetensors", "model.pth") if (path / name).is_file()]
        if not files:
            raise WeftError(f"{path}: neither model.safetensors nor model.pth is there")
        path = files[0]
    if not path.is_file():
        raise WeftError(f"{path}: no such file: check the path")
    return load_file(path) if path.suffix == ".safetensors" else read_foreign(path)


def _head(heads: dict[str, Tensor], questions: int, where: str) -> tuple[RankingHead, list[int]]:
    """The heads and the widths of their hidden layers. Released numbers of layers count the ReLUs and the dropout."""
    parts: dict[int, dict[int, dict[str, Tensor]]] = {}
    for key, tensor in heads.items():
        match = HEAD.fullmatch(key)
        if match is None:
            raise WeftError(f"{where}: {key} is no head of ranknet_multi_head, the one layout that is known")
        parts.setdefault(int(match[1]), {}).setdefault(int(match[2]), {})[match[3]] = tensor.float()
    if sorted(parts) != list(range(questions)):
        raise WeftError(f"{where}: {len(parts)} heads (rm_heads.head_0 ...) for {questions} questions")
    layers = [[parts[k][n] for n in sorted(parts[k])] for k in sorted(parts)]
    widths = [[len(layer["bias"]) for layer in head] for head in layers]
    if widths[0] != widths[-1] or widths[0][-1] != 2:
        raise WeftError(f"{where}: heads of the widths {widths}; they must be equal and end in 2 (mean, log sigma)")
    head = RankingHead(layers[0][0]["weight"].shape[1], questions, widths[0][:-1], 2)
    head.load_state_dict(
        {
            f"questions.{k}.{2 * n}.{p}": t
            for k, own in enumerate(layers)
            for n, x in enumerate(own)
            for p, t in x.items()
        }
    )
    return head, widths[0][:-1]


def _save_vlm(tensors: dict[str, Tensor], base: Path, out: Path) -> None:
    import transformers
    from safetensors.torch import save_file

    try:
        config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise WeftError(f"{base}: no model can be read there ({str(error).splitlines()[0]})") from error
    if config.model_type != FAMILY:
        raise WeftError(f"{base}: model type {config.model_type}; only critics on {FAMILY} can be read")
    processor = Processor.load(base)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": [TOKEN]}, replace_extra_special_tokens=False)
    rows = {len(t) for key, t in tensors.items() if key.endswith(("embed_tokens.weight", "lm_head.weight"))}
    if rows != {len(processor.tokenizer)}:
        raise WeftError(
            f"the checkpoint has {', '.join(map(str, sorted(rows))) or 'no'} rows of embeddings, {base} with {TOKEN} "
            f"{len(processor.tokenizer)} tokens: give the model that it was trained from"
        )
    config.get_text_config().vocab_size = len(processor.tokenizer)
    processor.images.size = {"shortest_edge": AREA, "longest_edge": AREA}
    out.mkdir(parents=True)
    config.save_pretrained(out)
    processor.save(out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    kind = getattr(transformers, CLASSES[FAMILY])
    _, told = kind.from_pretrained(out, dtype=torch.bfloat16, output_loading_info=True)
    odd = sorted({*told["missing_keys"], *told["unexpected_keys"]})
    if odd or told["mismatched_keys"]:
        raise WeftError(f"{out}: the checkpoint does not fit {FAMILY}: {len(odd)} keys, such as {odd[:2]}")


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit("usage: python -m weft.reward.scorers.editreward CHECKPOINT BASE REPOSITORY OUT")
    try:
        print(import_editreward(*sys.argv[1:]))
    except WeftError as error:
        sys.exit(str(error))
