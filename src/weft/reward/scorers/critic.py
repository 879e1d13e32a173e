"""Edit critics: a head on the last state of a Qwen-VL model, trained on graded edits.

After EditReward (arXiv 2509.26346, a regression head on Qwen2.5-VL) and EditScore (arXiv 2509.23909, whose scores are
read as an expectation). They are asked what the judge is asked (`weft.reward.judge`), answer with one number, and are
trained by `weft.reward.judge_training.CriticTrainable` (recipes/edit_r1/critic.yaml).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.reward.judge import Judge, judge_folder, trained_on
from weft.reward.mix import Pair
from weft.types import Score
from weft.vlm.local import load_vlm

KINDS = ("regression", "logit")


def head_of(model: Any, kind: str, scale: tuple[int, int]) -> nn.Linear:
    """A new head for a VLM: the answer to everything is the middle of the scale at first."""
    width = model.config.get_text_config().hidden_size
    head = nn.Linear(width, 1 if kind == "regression" else scale[1] - scale[0] + 1)
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, 0.5 if kind == "regression" else 0.0)
    return head


def save_head(head: nn.Linear, kind: str, scale: tuple[int, int], folder: Path) -> None:
    """Write critic.json and critic.safetensors into a VLM folder."""
    from safetensors.torch import save_file

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    save_file(state, folder / "critic.safetensors")
    (folder / "critic.json").write_text(json.dumps({"kind": kind, "scale": list(scale)}) + "\n", encoding="utf-8")


class Critic:
    """A scorer: `Score.value` in 0..1, cut to it where a regression leaves it; `score` on the critic's scale is a part.

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
        if not (path / "critic.json").is_file():
            raise WeftError(f"{folder}: no critic.json: give the export of a critic's training")
        facts = json.loads((path / "critic.json").read_text(encoding="utf-8"))
        self.kind, self.scale = facts["kind"], (int(facts["scale"][0]), int(facts["scale"][1]))
        if self.kind not in KINDS:
            raise WeftError(f"{folder}: a critic of kind {self.kind!r} is unknown: {' or '.join(KINDS)}")
        self.reader = load_vlm(
            path, device=device, dtype=dtype, min_pixels=min_pixels, max_pixels=max_pixels, batch_size=batch_size
        )
        self.judge = Judge(self.reader, template=trained_on(path), scale=self.scale)
        self.head = head_of(self.reader.model, self.kind, self.scale)
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
                questions.append(self.judge.question(record, picture))
                asked.append(k)
            except WeftError as error:
                scores[k] = Score(None, reason=str(error))
        states = self.reader.states(questions) if questions else []
        for k, state in zip(asked, states, strict=True):
            scores[k] = self._score(self.head(state.float()))
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
