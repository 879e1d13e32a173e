"""Training judges on graded edits (`weft.reward.graded`, or any records with a picture and a grade).

A judge answers with a digit, as `weft.reward.judge` reads it: one token whose probabilities are taught to lie on the
two digits around the grade, so that their expectation is the grade. Reasons (`meta["says"]`) teach it where to look:
either they follow the digit in training and cost nothing when it judges, as only its first token is read, or the judge
writes them first (`reasoning`), which a small model learns much sooner.
A critic (`weft.reward.critic_training`) has a small head on the last state instead.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.errors import WeftError
from weft.models.rewriter_training import hidden_states
from weft.record import Record
from weft.reward.graded import picture_of
from weft.reward.judge import MARK, Judge, judge_folder
from weft.types import Draw, Example, Loss
from weft.vlm.local import load_vlm


def grade_of(record: Record, key: str, scale: tuple[int, int]) -> float:
    """The grade in a record's meta. Raises WeftError if it is missing or off the scale."""
    value = record.meta.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not scale[0] <= value <= scale[1]:
        raise WeftError(
            f'record {record.id!r}: meta["{key}"] is {value!r}; give a number from {scale[0]} to {scale[1]}'
        )
    return float(value)


def between(grades: Tensor, low: int, high: int) -> Tensor:
    """Probabilities [B, high - low + 1] over the whole numbers whose expectation is each grade [B]: all on the two
    that lie around it."""
    place = (grades - low).clamp(0, high - low)
    steps = torch.arange(high - low + 1, dtype=grades.dtype, device=grades.device)
    return (1 - (place[:, None] - steps).abs()).clamp(min=0)


def packed(patches: Tensor, images: Any) -> Tensor:
    """Patches [P, D] of the image processor `images` as the bytes that they were [P, D / frames]: an eighth of the
    room, and exact, because resized pictures are bytes and a still picture's frames are equal."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (images.image_mean, images.image_std))
    frames, side = images.temporal_patch_size, images.patch_size
    still = patches.view(-1, 3, frames, side * side)[:, :, :1]
    return ((still * std + mean) * 255).round().to(torch.uint8).flatten(1)


def unpacked(packs: Tensor, images: Any) -> Tensor:
    """The inverse of `packed`, [P, D] in fp32."""
    mean, std = (torch.tensor(v, device=packs.device).view(1, 3, 1, 1) for v in (images.image_mean, images.image_std))
    still = packs.float().view(len(packs), 3, 1, -1)
    return ((still / 255 - mean) / std).expand(-1, -1, images.temporal_patch_size, -1).flatten(1)


class GradedTrainable:
    """What a judge and a critic have in common: the VLM, and the question that the judge asks."""

    def __init__(
        self,
        path: str | Path,
        template: str | None,
        quote: bool,
        scale: Sequence[int],
        grade: str,
        vision: bool,
        min_pixels: int | None,
        max_pixels: int | None,
        attention: str,
    ) -> None:
        folder = judge_folder(str(path))
        self.reader = load_vlm(folder, device="cpu", dtype=torch.float32, min_pixels=min_pixels, max_pixels=max_pixels)
        self.judge = Judge(self.reader, template=template, quote=quote, scale=(scale[0], scale[1]))
        self.model: Any = self.reader.model
        self.model.set_attn_implementation({"text_config": attention, "vision_config": "sdpa"})
        self.model.requires_grad_(True)
        self.model.model.visual.requires_grad_(vision)
        self.template, self.scale, self.grade = template, self.judge.scale, grade

    def asked(self, record: Record) -> Example:
        """`ids` [L] of the question, `bytes` [P, D] (`packed`) and `grids` [n, 3] of its pictures, and `grade` []."""
        prompt = self.reader.encode(self.judge.question(record, record.load(picture_of(record))))
        grade = torch.tensor(grade_of(record, self.grade, self.scale))
        patches = packed(torch.cat(prompt.patches), self.reader.processor.images)
        return {"ids": prompt.ids, "bytes": patches, "grids": prompt.grids, "grade": grade}

    def example_facts(self) -> dict[str, Any]:
        """What else decides about an example, for the cache: the question and the tokenizer."""
        tokenizer = self.reader.processor.tokenizer
        vocabulary = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
        pictures = self.reader.processor.images.to_dict()
        return {
            "question": self.judge.version,
            "chat": self.reader.processor.template,
            "vocabulary": vocabulary,
            "pictures": pictures,
        }

    def states(self, examples: Sequence[Example]) -> Tensor:
        """The last layer's states [B, L, C]."""
        images = self.reader.processor.images
        return hidden_states(self.model, [e | {"pixels": unpacked(e["bytes"], images)} for e in examples])

    def answers(self) -> dict[str, Any]:
        """What judge.json says beside the question."""
        return {}

    def saved(self, folder: Path) -> None:
        """Write the VLM folder and judge.json, which holds the question."""
        self.model.save_pretrained(folder)
        self.reader.processor.save(folder)
        facts = {"template": self.template, "scale": list(self.scale), "question": self.judge.version} | self.answers()
        (Path(folder) / "judge.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


class JudgeTrainable(GradedTrainable):
    """Trains the VLM in `path` (a folder or zoo name; full or LoRA) to answer with the digit of `meta[grade]`.

    `template`, `quote`, `scale` ask as `weft.reward.judge.Judge` does with the same values. `says`: the meta key of
    reasons (None: none), `reasons` their share of the loss. They follow the digit, or with `reasoning` stand before it
    and "Score:", as the judge then writes them; judge.json says so, and `Judge` follows. `vision`: train the vision
    tower, too. `min_pixels`, `max_pixels`: how large pictures are shown. `attention`: "eager" is faster on a CPU in
    bf16.

    The loss of a sample is the cross-entropy of its digit over the whole vocabulary, plus `reasons` times the mean
    cross-entropy of the answer's other tokens.
    """

    name = "judge"

    def __init__(
        self,
        path: str | Path,
        *,
        template: str | None = None,
        quote: bool = True,
        scale: Sequence[int] = (0, 5),
        grade: str = "grade",
        says: str | None = "says",
        reasons: float = 0.5,
        reasoning: bool = False,
        vision: bool = True,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        attention: Literal["sdpa", "eager"] = "sdpa",
    ) -> None:
        super().__init__(path, template, quote, scale, grade, vision, min_pixels, max_pixels, attention)
        if reasoning and says is None:
            raise WeftError("reasoning without reasons: name their meta key (says)")
        self.says, self.reasons, self.reasoning = says, reasons, reasoning
        digits = {text: i for i, text in self.reader.choice_ids(self.judge.choices).items()}
        self.digits = torch.tensor([digits[choice] for choice in self.judge.choices])

    def modules(self) -> dict[str, nn.Module]:
        """The VLM."""
        return {"vlm": self.model}

    def examples(self, records: Sequence[Record]) -> list[Example]:
        """`ids` [L] of question and answer, `begin` [] and `digit` [] (where the answer and its digit stand), `grade`
        [], `bytes`, `grids`."""
        out = []
        low, encode = self.scale[0], self.reader.processor.encode
        end = torch.tensor([self.reader.processor.tokenizer.eos_token_id])
        for record in records:
            example = self.asked(record)
            begin = len(example["ids"])
            digit = self.digits[round(float(example["grade"])) - low].view(1)
            says = record.meta.get(self.says) if self.says else None
            told = encode(says).ids if isinstance(says, str) and says else torch.empty(0, dtype=torch.long)
            before = torch.cat([told, encode(f" {MARK} ").ids]) if self.reasoning else told[:0]
            after = end if self.reasoning else told
            example |= {"begin": torch.tensor(begin), "digit": torch.tensor(begin + len(before))}
            example["ids"] = torch.cat([example["ids"], before, digit, after])
            out.append(example)
        return out

    def loss(self, examples: Sequence[Example], draw: Draw) -> Loss:
        """Per-sample losses [B]; `mae` is the mean distance of the expectation to the grade on the scale, `mass` the
        probability on the digits."""
        states = self.states(examples)
        rows = torch.arange(len(examples))
        place = torch.stack([example["digit"] for example in examples])
        grades = torch.stack([example["grade"] for example in examples]).to(states.device, torch.float32)
        logits = self.model.lm_head(states[rows, place - 1]).float()
        log_probs = logits.log_softmax(-1)[:, self.digits.to(logits.device)]  # [B, digits]
        losses = -(between(grades, *self.scale) * log_probs).sum(-1)
        metrics = agreement(log_probs, grades, self.scale)
        metrics["digit_loss"] = float(losses.detach().mean())
        told, owner, labels = [], [], []
        for k, example in enumerate(examples):
            where = torch.arange(int(example["begin"]), len(example["ids"]))
            where = where[where != example["digit"]]
            told.append(states[k, where - 1])
            labels.append(example["ids"][where])
            owner.append(torch.full((len(where),), k))
        if self.reasons and sum(map(len, labels)):
            of = torch.cat(owner).to(states.device)
            wanted = torch.cat(labels).to(states.device)
            said = self.model.lm_head(torch.cat(told)).float()
            each = F.cross_entropy(said, wanted, reduction="none")
            count = torch.bincount(of, minlength=len(examples)).clamp(min=1)
            losses = losses + self.reasons * torch.zeros_like(losses).index_add(0, of, each) / count
            metrics["reasons_right"] = float((said.argmax(-1) == wanted).float().mean())
        return Loss(losses, metrics)

    def answers(self) -> dict[str, Any]:
        """How this judge was taught to answer."""
        return {"reasoning": self.reasoning}

    def save(self, folder: Path) -> None:
        """Write a judge's folder, which `weft.reward.judge.Judge` reads as it is."""
        self.saved(Path(folder))


def agreement(log_probs: Tensor, grades: Tensor, scale: tuple[int, int]) -> dict[str, float]:
    """`mae` of the expectation over the numbers of `scale` [B, numbers] to the grades [B], and the mean `mass`."""
    probs = log_probs.detach().exp()
    mass = probs.sum(-1)
    numbers = torch.arange(scale[0], scale[1] + 1, device=probs.device, dtype=probs.dtype)
    expected = (probs * numbers).sum(-1) / mass
    return {"mae": float((expected - grades).abs().mean()), "mass": float(mass.mean())}
