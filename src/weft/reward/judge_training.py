"""Training judges and critics on graded edits (`weft.reward.graded`, or any records with a picture and a grade).

A judge answers with a digit, as `weft.reward.judge` reads it: one token whose probabilities are taught to lie on the
two digits around the grade, so that their expectation is the grade. Reasons may follow the digit in training
(`meta["says"]`); they teach the model where to look and cost nothing when it judges, as only its first token is read.
A critic (EditReward, arXiv 2509.26346; EditScore, arXiv 2509.23909) has a small head on the last state instead.
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
from weft.reward.judge import Judge, judge_folder
from weft.reward.scorers.critic import KINDS, head_of, save_head
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


class _Graded:
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

    def saved(self, folder: Path) -> None:
        """Write the VLM folder and judge.json, which holds the question."""
        self.model.save_pretrained(folder)
        self.reader.processor.save(folder)
        facts = {"template": self.template, "scale": list(self.scale), "question": self.judge.version}
        (Path(folder) / "judge.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


class JudgeTrainable(_Graded):
    """Trains the VLM in `path` (a folder or zoo name; full or LoRA) to answer with the digit of `meta[grade]`.

    `template`, `quote`, `scale` ask as `weft.reward.judge.Judge` does with the same values. `says`: the meta key of
    reasons that follow the digit (None: none), `reasons` their share of the loss. `vision`: train the vision tower,
    too. `min_pixels`, `max_pixels`: how large pictures are shown. `attention`: "eager" is faster on a CPU in bf16.
    The loss of a sample is the cross-entropy of its first token over the whole vocabulary, plus `reasons` times the
    mean cross-entropy of its reasons' tokens.
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
        vision: bool = True,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        attention: Literal["sdpa", "eager"] = "sdpa",
    ) -> None:
        super().__init__(path, template, quote, scale, grade, vision, min_pixels, max_pixels, attention)
        self.says, self.reasons = says, reasons
        digits = {text: i for i, text in self.reader.choice_ids(self.judge.choices).items()}
        self.digits = torch.tensor([digits[choice] for choice in self.judge.choices])

    def modules(self) -> dict[str, nn.Module]:
        """The VLM."""
        return {"vlm": self.model}

    def examples(self, records: Sequence[Record]) -> list[Example]:
        """`ids` [L] of question and answer, `answer` [] (where the answer begins), `grade` [], `bytes`, `grids`."""
        out = []
        low = self.scale[0]
        for record in records:
            example = self.asked(record)
            example["answer"] = torch.tensor(len(example["ids"]))
            answer = [self.digits[round(float(example["grade"])) - low].view(1)]
            says = record.meta.get(self.says) if self.says else None
            if isinstance(says, str) and says:
                answer.append(self.reader.processor.encode(says).ids)
            example["ids"] = torch.cat([example["ids"], *answer])
            out.append(example)
        return out

    def loss(self, examples: Sequence[Example], draw: Draw) -> Loss:
        """Per-sample losses [B]; `mae` is the mean distance of the expectation to the grade on the scale, `mass` the
        probability on the digits."""
        states = self.states(examples)
        rows = torch.arange(len(examples))
        start = torch.stack([example["answer"] for example in examples])
        grades = torch.stack([example["grade"] for example in examples]).to(states.device, torch.float32)
        logits = self.model.lm_head(states[rows, start - 1]).float()
        log_probs = logits.log_softmax(-1)[:, self.digits.to(logits.device)]  # [B, digits]
        losses = -(between(grades, *self.scale) * log_probs).sum(-1)
        metrics = _agreement(log_probs, grades, self.scale)
        metrics["digit_loss"] = float(losses.detach().mean())
        told, owner, labels = [], [], []
        for k, example in enumerate(examples):
            first, last = int(example["answer"]), len(example["ids"])
            if last - first > 1:
                told.append(states[k, first : last - 1])
                labels.append(example["ids"][first + 1 :])
                owner.append(torch.full((last - first - 1,), k))
        if told and self.reasons:
            of = torch.cat(owner).to(states.device)
            wanted = torch.cat(labels).to(states.device)
            said = self.model.lm_head(torch.cat(told)).float()
            each = F.cross_entropy(said, wanted, reduction="none")
            count = torch.bincount(of, minlength=len(examples)).clamp(min=1)
            losses = losses + self.reasons * torch.zeros_like(losses).index_add(0, of, each) / count
            metrics["reasons_right"] = float((said.argmax(-1) == wanted).float().mean())
        return Loss(losses, metrics)

    def save(self, folder: Path) -> None:
        """Write a judge's folder, which `weft.reward.judge.Judge` reads as it is."""
        self.saved(Path(folder))


class CriticTrainable(_Graded):
    """Trains a VLM with a head on its last state to give the grade: `kind` "regression" (one number, Huber loss on the
    scale of 0 to 1) or "logit" (a logit for each whole number of `scale`, cross-entropy, read as an expectation).

    The other arguments are those of `JudgeTrainable`; the result is read by `weft.reward.scorers.critic.Critic`.
    """

    name = "critic"

    def __init__(
        self,
        path: str | Path,
        *,
        kind: str = "regression",
        template: str | None = None,
        quote: bool = True,
        scale: Sequence[int] = (0, 5),
        grade: str = "grade",
        vision: bool = True,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        attention: Literal["sdpa", "eager"] = "sdpa",
    ) -> None:
        if kind not in KINDS:
            raise WeftError(f"kind {kind!r} is unknown: use {' or '.join(KINDS)}")
        super().__init__(path, template, quote, scale, grade, vision, min_pixels, max_pixels, attention)
        self.kind = kind
        self.model.lm_head.requires_grad_(False)
        self.head = head_of(self.model, kind, self.scale)

    def modules(self) -> dict[str, nn.Module]:
        """The VLM and the head."""
        return {"vlm": self.model, "head": self.head}

    def examples(self, records: Sequence[Record]) -> list[Example]:
        """`ids` [L], `bytes`, `grids` and `grade` [] of each record."""
        return [self.asked(record) for record in records]

    def loss(self, examples: Sequence[Example], draw: Draw) -> Loss:
        """Per-sample losses [B] and `mae`, the mean distance to the grade on the scale."""
        states = self.states(examples)
        last = torch.tensor([len(example["ids"]) - 1 for example in examples])
        out = self.head(states[torch.arange(len(examples)), last].float())
        grades = torch.stack([example["grade"] for example in examples]).to(out.device, torch.float32)
        low, high = self.scale
        if self.kind == "logit":
            log_probs = out.log_softmax(-1)
            losses = -(between(grades, low, high) * log_probs).sum(-1)
            return Loss(losses, _agreement(log_probs, grades, self.scale))
        value, wanted = out[:, 0], (grades - low) / (high - low)
        losses = F.huber_loss(value, wanted, reduction="none", delta=0.5)
        return Loss(losses, {"mae": float((value - wanted).detach().abs().mean()) * (high - low)})

    def save(self, folder: Path) -> None:
        """Write the VLM folder with the head beside it."""
        self.saved(Path(folder))
        save_head(self.head, self.kind, self.scale, Path(folder))


def _agreement(log_probs: Tensor, grades: Tensor, scale: tuple[int, int]) -> dict[str, float]:
    probs = log_probs.detach().exp()
    mass = probs.sum(-1)
    numbers = torch.arange(scale[0], scale[1] + 1, device=probs.device, dtype=probs.dtype)
    expected = (probs * numbers).sum(-1) / mass
    return {"mae": float((expected - grades).abs().mean()), "mass": float(mass.mean())}
