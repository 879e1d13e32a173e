"""Training critics: a small head on a VLM's last state (EditReward, arXiv 2509.26346; EditScore, arXiv 2509.23909).

On graded edits (`weft.reward.graded`), each by itself, or on comparisons of attempts at one request
(`weft.reward.preferences`), by the losses of `weft.reward.ranking`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.errors import WeftError
from weft.record import Record
from weft.reward.judge import Judge
from weft.reward.judge_training import GradedTrainable, agreement, between, packed
from weft.reward.preferences import candidates
from weft.reward.ranking import COMBINE, LOSSES, TIES, combined, ordered_pairs, ranking_loss, right_order
from weft.reward.scorers.critic import KINDS, CriticForm
from weft.types import Draw, Example, Loss


class CriticTrainable(GradedTrainable):
    """Trains a VLM with a head on its last state to give the grade: `kind` "regression" (one number, Huber loss on the
    scale of 0 to 1), "logit" (a logit for each whole number of `scale`, cross-entropy, read as an expectation), or
    "ranking" (a mean, mostly with a log sigma, learned from which of a request's attempts are better).

    A ranking critic reads comparisons (`weft.reward.preferences`), one request a record with any number of attempts;
    `grade` names the list of their grades. `loss`: a form of `weft.reward.ranking.ranking_loss` ("uncertainty", the
    default; "bradley_terry"; "uncertainty_released"). `ties`: "both" orders (the default) or "skip". `questions`: a
    template for each respect that is asked about on its own (fields as of `template`, which it replaces), with a head
    of its own, `combine`d ("mean", the default; "min", "sum") before the attempts are compared. `hidden`: the widths
    of the heads' layers before the last (none; EditReward has [1024, 16]).

    The other arguments are those of `JudgeTrainable`; the result is read by `weft.reward.scorers.critic.Critic`.
    """

    name = "critic"

    def __init__(
        self,
        path: str | Path,
        *,
        kind: str = "regression",
        loss: str | None = None,
        ties: str | None = None,
        questions: Mapping[str, str] | None = None,
        combine: str | None = None,
        hidden: Sequence[int] | None = None,
        template: str | None = None,
        quote: bool = True,
        scale: Sequence[int] = (0, 5),
        grade: str = "grade",
        vision: bool = True,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        attention: Literal["sdpa", "eager"] = "sdpa",
    ) -> None:
        own = {"loss": loss, "ties": ties, "questions": questions, "combine": combine, "hidden": hidden}
        _check_critic(kind, own, template)
        super().__init__(path, template, quote, scale, grade, vision, min_pixels, max_pixels, attention)
        self.kind, self.form_of_loss, self.ties = kind, loss or "uncertainty", ties or "both"
        self.form = CriticForm(kind, self.scale)
        self.judges = [self.judge]
        if kind == "ranking":
            self.form.uncertain = LOSSES[self.form_of_loss] == 2
            self.form.hidden, self.form.combine = list(hidden or ()), combine or "mean"
            if questions is not None:
                self.form.questions = dict(questions)
                self.judges = [
                    Judge(self.reader, template=text, quote=quote, scale=self.scale) for text in questions.values()
                ]
        self.model.lm_head.requires_grad_(False)
        self.head = self.form.head(self.model)

    def modules(self) -> dict[str, nn.Module]:
        """The VLM and the head."""
        return {"vlm": self.model, "head": self.head}

    def example_facts(self) -> dict[str, Any]:
        """As of any judge's training; every question counts."""
        return super().example_facts() | {"questions": [judge.version for judge in self.judges]}

    def examples(self, records: Sequence[Record]) -> list[Example]:
        """`ids` [L], `bytes`, `grids` and `grade` [] of each record. Of a comparison of n attempts in D questions:
        `grade` [n] (NaN: missing), `ids` one after the other with their `lengths` [n, D], `bytes` and `grids` with
        the number of each attempt's `patches` [n] and `pictures` [n]."""
        if self.kind != "ranking":
            return [self.asked(record) for record in records]
        return [self.compared(record) for record in records]

    def compared(self, record: Record) -> Example:
        """The example of a comparison. Raises WeftError for a record that is none."""
        parts, grades = candidates(record, self.grade)
        ids, lengths, patches, grids = [], [], [], []
        for part in parts:
            picture = record.load(part)
            prompts = [self.reader.encode(judge.question(record, picture)) for judge in self.judges]
            ids += [prompt.ids for prompt in prompts]
            lengths.append([len(prompt.ids) for prompt in prompts])
            patches.append(packed(torch.cat(prompts[0].patches), self.reader.processor.images))
            grids.append(prompts[0].grids)
        return {
            "ids": torch.cat(ids),
            "lengths": torch.tensor(lengths),
            "bytes": torch.cat(patches),
            "patches": torch.tensor([len(p) for p in patches]),
            "grids": torch.cat(grids),
            "pictures": torch.tensor([len(g) for g in grids]),
            "grade": torch.tensor(grades),
        }

    def loss(self, examples: Sequence[Example], draw: Draw) -> Loss:
        """Per-sample losses [B] and `mae`, the mean distance to the grade on the scale; of a ranking the mean over
        each request's pairs, `pairs` of a request, `pairs_right` (of those with unequal grades), the mean `sigma`, and
        the share of requests without any pair (`unpaired`), whose loss is none."""
        if self.kind == "ranking":
            return self._ranked(examples)
        out = self.scores(self.last_states(examples))
        grades = torch.stack([example["grade"] for example in examples]).to(out.device, torch.float32)
        low, high = self.scale
        if self.kind == "logit":
            log_probs = out.log_softmax(-1)
            losses = -(between(grades, low, high) * log_probs).sum(-1)
            return Loss(losses, agreement(log_probs, grades, self.scale))
        value, wanted = out[:, 0], (grades - low) / (high - low)
        losses = F.huber_loss(value, wanted, reduction="none", delta=0.5)
        return Loss(losses, {"mae": float((value - wanted).detach().abs().mean()) * (high - low)})

    def last_states(self, examples: Sequence[Example]) -> Tensor:
        """The states [B, C] in fp32 where each answer would begin."""
        last = torch.tensor([len(example["ids"]) - 1 for example in examples])
        return self.states(examples)[torch.arange(len(examples)), last].float()

    def scores(self, states: Tensor) -> Tensor:
        """What the head says of fp32 states, never in bf16: it has three digits, and attempts may differ by less."""
        with torch.autocast(states.device.type, enabled=False):
            return self.head(states)

    def _ranked(self, examples: Sequence[Example]) -> Loss:
        rows: list[Example] = []  # one for each attempt that is in a pair, and question
        better, worse, owner, decided = [], [], [], []
        each = len(self.judges)
        for k, example in enumerate(examples):
            grades = example["grade"].tolist()
            pairs = ordered_pairs(grades, self.ties)
            used = sorted({i for pair in pairs for i in pair})
            place = {i: len(rows) // each + n for n, i in enumerate(used)}
            rows += [row for i, asked in enumerate(_apart(example)) if i in place for row in asked]
            better += [place[i] for i, _ in pairs]
            worse += [place[j] for _, j in pairs]
            decided += [grades[i] > grades[j] for i, j in pairs]
            owner += [k] * len(pairs)
        count = torch.bincount(torch.tensor(owner, dtype=torch.long), minlength=len(examples))
        metrics = {"pairs": len(owner) / len(examples), "unpaired": float((count == 0).float().mean())}
        nothing = sum(parameter.sum() * 0 for parameter in self.head.parameters())  # so that there is a gradient
        losses = torch.zeros(len(examples), device=next(self.head.parameters()).device) + nothing
        if not owner:
            return Loss(losses, metrics)
        states = self.last_states(rows)
        scores = combined(self.scores(states.view(-1, each, states.shape[-1])), self.form.combine)
        of = torch.tensor(owner, device=scores.device)
        each_pair = ranking_loss(scores[better], scores[worse], self.form_of_loss)
        losses = losses.index_add(0, of, each_pair / count.to(of.device)[of])
        gaps = (scores[better, 0] - scores[worse, 0]).detach()[torch.tensor(decided, device=scores.device)]
        if len(gaps):
            metrics["pairs_right"] = right_order(gaps)
        if self.form.uncertain:
            metrics["sigma"] = float(scores[:, 1].detach().exp().mean())
        return Loss(losses, metrics)

    def save(self, folder: Path) -> None:
        """Write the VLM folder with the head beside it."""
        self.saved(Path(folder))
        self.form.save(self.head, Path(folder))


def _check_critic(kind: str, own: dict[str, Any], template: str | None) -> None:
    """Refuse what makes no critic: `own` are the arguments of a ranking one."""
    if kind not in KINDS:
        raise WeftError(f"kind {kind!r} is unknown: use {' or '.join(KINDS)}")
    if kind != "ranking":
        given = [name for name, value in own.items() if value is not None]
        if given:
            raise WeftError(f"{given[0]} is of a critic of kind ranking, this one's kind is {kind}: remove it")
        return
    for name, known in (("loss", tuple(LOSSES)), ("ties", TIES), ("combine", COMBINE)):
        if own[name] is not None and own[name] not in known:
            raise WeftError(f"{name} {own[name]!r} is unknown: use {' or '.join(known)}")
    if any(width < 1 for width in own["hidden"] or ()):
        raise WeftError(f"hidden {list(own['hidden'])}: a layer's width is 1 or more")
    questions = own["questions"]
    if questions is None:
        if own["combine"] is not None:
            raise WeftError("combine is for several questions: give questions, or remove it")
        return
    if template is not None:
        raise WeftError("template and questions are given: leave one out, each of the questions is a template")
    taken = {"score", "sigma"} & set(questions)
    if taken or not questions:
        raise WeftError(f"questions: {'give one or more' if not questions else f'the name {taken.pop()!r} is taken'}")


def _apart(example: Example) -> list[list[Example]]:
    """For each attempt of a comparison its examples, one for each question."""
    lengths = example["lengths"]
    ids = iter(example["ids"].split(lengths.flatten().tolist()))
    patches = example["bytes"].split(example["patches"].tolist())
    grids = example["grids"].split(example["pictures"].tolist())
    return [
        [{"ids": next(ids), "bytes": own, "grids": grid} for _ in row]
        for row, own, grid in zip(lengths, patches, grids, strict=True)
    ]
