"""Edit critics: a head on the last state of a Qwen-VL model, trained on graded or compared edits.

After EditReward (arXiv 2509.26346: heads on Qwen2.5-VL that give a mean and a spread, one for each question, learned
from comparisons) and EditScore (arXiv 2509.23909, whose scores are read as an expectation). They are asked what the
judge is asked (`weft.reward.judge`), answer with one number, and are trained by
`weft.reward.critic_training.CriticTrainable` (recipes/edit_r1/critic.yaml, recipes/edit_r1/critic_ranking.yaml).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.reward.judge import Judge, judge_folder, trained_on
from weft.reward.mix import Pair
from weft.reward.ranking import COMBINE, combined
from weft.rng import generator
from weft.types import Score
from weft.vlm.local import load_vlm

KINDS = ("regression", "logit", "ranking")


@dataclass(slots=True)
class CriticForm:
    """What a critic's head is, as critic.json holds it. The fields after `scale` are those of a `ranking` critic:
    `uncertain` (a log sigma beside each mean), the widths of the `hidden` layers, `questions` (templates by name, one
    head each; None: the one question of judge.json), and how their scores are combined. `token`: read the state at this
    token, put where the question ends; `flat`: positions that count tokens, without the rows and columns of pictures;
    `quote`: instructions are quoted. These three are for critics of other makes (`weft.reward.scorers.editreward`)."""

    kind: str
    scale: tuple[int, int]
    uncertain: bool = False
    hidden: list[int] = field(default_factory=list)
    questions: dict[str, str] | None = None
    combine: str = "mean"
    token: str | None = None
    flat: bool = False
    quote: bool = True

    @classmethod
    def read(cls, folder: Path) -> CriticForm:
        """Of a folder with a critic.json. Raises WeftError for one without, and for an unknown kind."""
        if not (folder / "critic.json").is_file():
            raise WeftError(f"{folder}: no critic.json: give the export of a critic's training")
        facts = json.loads((folder / "critic.json").read_text(encoding="utf-8"))
        if facts["kind"] not in KINDS:
            raise WeftError(f"{folder}: a critic of kind {facts['kind']!r} is unknown: {' or '.join(KINDS)}")
        form = cls(**facts | {"scale": (int(facts["scale"][0]), int(facts["scale"][1]))})
        if form.combine not in COMBINE:
            raise WeftError(f"{folder}: combine {form.combine!r} is unknown: {' or '.join(COMBINE)}")
        return form

    def head(self, model: Any) -> nn.Module:
        """A new head for a VLM: the answer to everything is the middle of the scale (a ranking: about 0, sigma 1).

        States [N, C] in, [N, 1 or numbers of the scale] out; of a ranking critic [N, D, C] in, [N, D, 1 or 2] out.
        """
        width = model.config.get_text_config().hidden_size
        if self.kind == "ranking":
            return RankingHead(width, len(self.questions or "1"), self.hidden, 1 + self.uncertain)
        low, high = self.scale
        head = nn.Linear(width, 1 if self.kind == "regression" else high - low + 1)
        nn.init.zeros_(head.weight)
        nn.init.constant_(head.bias, 0.5 if self.kind == "regression" else 0.0)
        return head

    def save(self, head: nn.Module, folder: Path) -> None:
        """Write critic.json and critic.safetensors into a VLM folder."""
        from safetensors.torch import save_file

        state = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
        save_file(state, folder / "critic.safetensors")
        (folder / "critic.json").write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


class RankingHead(nn.Module):
    """For each of D questions an own head: layers of the widths `hidden` with ReLU between, then 1 number (a mean) or 2
    (mean, log sigma). EditReward has [1024, 16]."""

    def __init__(self, width: int, questions: int, hidden: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.questions = nn.ModuleList()
        for k in range(questions):
            draw = generator(0, "critic head", sample=k)
            layers: list[nn.Module] = []
            for before, after in zip([width, *hidden], [*hidden, outputs], strict=True):
                linear = nn.Linear(before, after)
                layers += [linear, nn.ReLU()]
                # not zero: where neither head nor states tell attempts apart yet, pairs would have no gradient at all
                size = 1.0 if len(layers) <= 2 * len(hidden) else 0.1
                nn.init.normal_(linear.weight, std=size * before**-0.5, generator=draw)
                nn.init.zeros_(linear.bias)
            self.questions.append(nn.Sequential(*layers[:-1]))

    def forward(self, states: Tensor) -> Tensor:
        """States [N, D, C] of the last tokens to scores [N, D, 1 or 2]."""
        return torch.stack([head(states[:, k]) for k, head in enumerate(self.questions)], 1)

    def gradient_checkpointing_enable(self) -> None:
        """A few small layers: nothing is worth computing again."""


class Critic:
    """A scorer: `Score.value` in 0..1, cut to it where a regression leaves it; `score` on the critic's scale is a part.

    Of a ranking critic the value is the mean, as it is: comparisons teach only differences within one request, so it
    has no scale, and no zero that would be common to two requests. Parts: `score` (the same), `sigma` if the critic
    has one, and each question's mean by its name.
    Missing scores, never numbers: no instruction, no picture, a value that is not finite.
    """

    def __init__(
        self,
        folder: str,
        *,
        device: str | None = None,
        dtype: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        batch_size: int = 16,
    ) -> None:
        """`folder` as `CriticTrainable` writes it; the other arguments are those of `weft.vlm.local.load_vlm`.

        Raises WeftError for a folder without a critic's head, or with one that does not fit.
        """
        from safetensors.torch import load_file

        path = judge_folder(folder)
        self.form = CriticForm.read(path)
        self.kind, self.scale = self.form.kind, self.form.scale
        self.reader = load_vlm(
            path, device=device, dtype=dtype, min_pixels=min_pixels, max_pixels=max_pixels, batch_size=batch_size
        )
        templates = list(self.form.questions.values()) if self.form.questions else [trained_on(path).get("template")]
        self.judges = [
            Judge(self.reader, template=template, scale=self.scale, quote=self.form.quote) for template in templates
        ]
        self.head = self.form.head(self.reader.model)
        try:
            self.head.load_state_dict(load_file(path / "critic.safetensors"))
        except (OSError, RuntimeError) as error:
            line = " ".join(str(error).split())
            raise WeftError(f"{folder}: critic.safetensors does not fit this model ({line})") from error
        self.head.to(self.reader.model.device).requires_grad_(False)

    def __call__(self, batch: Sequence[Pair]) -> list[Score]:
        """One score for each (record, picture), in order."""
        scores: list[Score | None] = [None] * len(batch)
        asked, questions = [], []
        for k, (record, picture) in enumerate(batch):
            try:
                questions += [judge.question(record, picture) for judge in self.judges]
                asked.append(k)
            except WeftError as error:
                scores[k] = Score(None, reason=str(error))
        states = self.reader.states(questions, self.form.token, flat=self.form.flat) if questions else []
        each = len(self.judges)
        for row, k in enumerate(asked):
            own = torch.stack(states[row * each : (row + 1) * each]).float()  # [D, C]
            scores[k] = self._ranked(self.head(own[None])) if self.kind == "ranking" else self._score(self.head(own[0]))
        return [score for score in scores if score is not None]

    def _score(self, out: Tensor) -> Score:
        low, high = self.scale
        if self.kind == "logit":
            numbers = torch.arange(low, high + 1, dtype=torch.float32, device=out.device)
            value = (float((out.softmax(-1) * numbers).sum()) - low) / (high - low)
        else:
            value = float(out[0])
        if not torch.isfinite(out).all():
            return Score(None, reason="the critic's value is not finite")
        return Score(min(1.0, max(0.0, value)), {"score": low + value * (high - low)})

    def _ranked(self, out: Tensor) -> Score:
        """The score of [1, D, 1 or 2] of one picture."""
        final = combined(out, self.form.combine)[0]
        if not torch.isfinite(out).all():
            return Score(None, reason="the critic's value is not finite")
        parts = {"score": float(final[0])}
        if self.form.uncertain:
            parts["sigma"] = float(final[1].exp())
        return Score(parts["score"], parts | dict(zip(self.form.questions or (), out[0, :, 0].tolist(), strict=False)))
