"""A multimodal LLM as the judge, read by its logits: the expectation over the score tokens where its answer begins.

Edit-R1 (arXiv 2510.16888, section 2.2; PKU-YuanGroup/UniWorld-V2, reward_server/reward_server.py): the pictures, then
the text; the first generated token is the score; softmax over the score tokens alone; expectation, scaled to 0..1.
Theirs has the original and the edited picture; here references stand between the two.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from weft.errors import WeftError
from weft.record import Record, Turn, image_part, text_part
from weft.reward import rubric
from weft.reward.mix import Pair
from weft.types import Score
from weft.vlm.ask import VLM, Ask, Reply, Token
from weft.vlm.replies import Recorded, ReplyStore

VARIANTS = ("logit", "yes_no", "sampled")
LONGEST_INSTRUCTION = 4000  # characters
MARK = "Score:"
MARKS = {"score": r"score\s*[:=]?[\s*\[(]*", "yes_no": r"answer\s*[:=]?[\s*\[(]*"}


class Judge:
    """A scorer. `Score.value` is in 0..1; its parts are `score` (on the judge's scale; P(Yes) for `yes_no`) and `mass`
    (the probability on the score tokens: what is missing to 1 went to other tokens).

    Missing scores, never numbers: no reply, no score where one was asked for, `mass` below `min_mass`, a record
    without an instruction, an instruction above 4,000 characters, an output that is no picture.
    """

    def __init__(
        self,
        model: VLM | str,
        *,
        url: str | None = None,
        key_env: str | None = None,
        variant: Literal["logit", "yes_no", "sampled"] = "logit",
        reasoning: bool | None = None,
        scale: tuple[int, int] = (0, 5),
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
        min_mass: float = 0.05,
        template: str | None = None,
        quote: bool = True,
        requirements: Mapping[str, str] | None = None,
        store: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        batch_size: int = 16,
    ) -> None:
        """`model`: a model, a folder (Qwen2.5-VL, Qwen3-VL), a zoo name, or with `url` the name on an OpenAI-compatible
        server whose API key is in the environment variable `key_env`. `store`: a JSONL file of replies.

        `variant`: "logit" (expectation over the numbers of `scale`), "yes_no" (P(Yes) of the two), "sampled" (the
        number that was said; `temperature` defaults to 1 here, else to 0). With `reasoning` the judge writes first
        (up to `max_tokens`, 512), and its last "Score:" is read; it agreed less with people (App. B.1 of the paper).
        `template` replaces our text (fields {instruction}, {requirement}). Where these two are None, a folder's own
        stand in its judge.json, if it was trained as a judge; else no reasoning, and our text. `quote=False` puts the
        instruction in as it is, as the public code does, which lets it talk to the judge. `requirements` add to or
        replace those of `weft.reward.rubric`. `device` to `batch_size` are those of `weft.vlm.local.load_vlm`.

        Raises WeftError for a combination that makes no sense, and for score tokens that the tokenizer lacks.
        """
        if variant not in VARIANTS:
            raise WeftError(f"variant {variant!r} is unknown: use one of {', '.join(VARIANTS)}")
        low, high = scale
        if not low < high or variant != "yes_no" and not 0 <= low < high <= 9:
            raise WeftError(f"scale {low} to {high}: use two digits from 0 to 9, the lower first: each is one token")
        if not 0 <= min_mass <= 1:
            raise WeftError(f"min_mass {min_mass} is not a probability: use 0 to 1")
        if isinstance(model, str) and url is None:
            model = str(judge_folder(model))
            taught = trained_on(model)
            template = taught.get("template") if template is None else template
            reasoning = taught.get("reasoning") if reasoning is None else reasoning
        reasoning = bool(reasoning)
        self.variant, self.reasoning, self.scale, self.min_mass = variant, reasoning, (low, high), min_mass
        self.kind = "yes_no" if variant == "yes_no" else "score"
        self.choices = ("Yes", "No") if self.kind == "yes_no" else tuple(map(str, range(low, high + 1)))
        self.template, self.quote, self.requirements = template, quote, dict(requirements or {})
        if template is not None:
            rubric.fill(template, {"instruction": "", "requirement": ""})  # refuses unknown fields
        warm = (1.0 if variant == "sampled" else 0.0) if temperature is None else temperature
        self.how = Ask(max_tokens or (512 if reasoning else 1), self.choices, warm, seed)
        self.vlm = _model(model, url, key_env, device, dtype, min_pixels, max_pixels, batch_size)
        if hasattr(self.vlm, "choice_ids"):
            self.vlm.choice_ids(self.choices)  # refused at start, not in the middle of a run
        if store is not None:
            self.vlm = Recorded(self.vlm, ReplyStore(store))
        settings = [variant, reasoning, list(self.scale), template, quote, sorted(self.requirements.items())]
        self.version = rubric.version(settings)

    @property
    def identity(self) -> dict[str, str]:
        """What must be equal for scores to be comparable: the model, and the version of the question."""
        return {"model": self.vlm.name, "question": self.version}

    def __call__(self, batch: Sequence[Pair]) -> list[Score]:
        """One score for each (record, picture), in order."""
        scores: list[Score | None] = [None] * len(batch)
        asked, questions = [], []
        for k, (record, picture) in enumerate(batch):
            try:
                questions.append(self.question(record, picture))
                asked.append(k)
            except WeftError as error:
                scores[k] = Score(None, reason=str(error))
        for k, reply in zip(asked, self.vlm.ask(questions, self.how) if questions else [], strict=True):
            scores[k] = self.read(reply)
        return [score for score in scores if score is not None]

    def question(self, record: Record, picture: object) -> list[Turn]:
        """One user turn: original, references, edited, text. Raises WeftError for what cannot be asked."""
        from PIL import Image

        if not isinstance(picture, Image.Image):
            raise WeftError(f"the output is a {type(picture).__name__}: this judge looks at pictures")
        said = " ".join(record.instruction.split())
        if not said:
            raise WeftError(f"record {record.id} has no instruction to judge by")
        if len(said) > LONGEST_INSTRUCTION:
            raise WeftError(f"an instruction of {len(said)} characters; the judge reads {LONGEST_INSTRUCTION}")
        text = rubric.question(
            record,
            json.dumps(said, ensure_ascii=False) if self.quote else record.instruction,
            rubric.requirement(record, self.requirements),
            kind=self.kind,
            reasoning=self.reasoning,
            scale=self.scale,
            template=self.template,
        )
        shown = [image_part(part.load(record.root)) for part in record.inputs]
        return [Turn("user", [*shown, image_part(picture), text_part(text)])]

    def read(self, reply: Reply) -> Score:
        """The score that a reply holds."""
        if reply.error is not None:
            return Score(None, reason=f"no reply: {reply.error}")
        if self.variant == "sampled":
            return self._said(reply.text)
        if not reply.tokens:
            return Score(None, reason="the reply has no token")
        token = self._place(reply.tokens) if self.reasoning else reply.tokens[0]
        if token is None:
            why = "cut off before it" if len(reply.tokens) >= self.how.max_tokens else "the reply ends without it"
            return Score(None, reason=f"no '{'Score' if self.kind == 'score' else 'Answer'}:' to read: {why}")
        blank = " " if token.text.startswith(" ") and token.text.strip() in self.choices else ""
        found = [token.top.get(blank + choice, -math.inf) for choice in self.choices]
        return self._expected(found)

    def _expected(self, log_probs: Sequence[float]) -> Score:
        mass = min(1.0, sum(map(math.exp, log_probs)))  # rounding may put it above
        if mass <= 0:
            return Score(None, reason="none of the score tokens is among the candidates of the reply")
        if mass < self.min_mass:
            why = f"the score tokens have {mass:.3g} of the probability, {self.min_mass:g} is asked for"
            return Score(None, {"mass": mass}, f"{why}: the judge does not answer with a score")
        best = max(log_probs)
        weights = [math.exp(value - best) for value in log_probs]
        if self.kind == "yes_no":
            value = weights[0] / sum(weights)
            return Score(value, {"score": value, "mass": mass})
        low, high = self.scale
        mean = sum(w * (low + k) for k, w in enumerate(weights)) / sum(weights)
        return Score((mean - low) / (high - low), {"score": mean, "mass": mass})

    def _place(self, tokens: Sequence[Token]) -> Token | None:
        """The token after the last mark ("Score:") that is one of the choices."""
        text, starts = "", []
        for token in tokens:
            starts.append(len(text))
            text += token.text
        for mark in reversed(list(re.finditer(MARKS[self.kind], text, re.IGNORECASE))):
            for start, token in zip(starts, tokens, strict=True):
                if start + len(token.text) > mark.end() and token.text.strip():
                    if token.text.strip() in self.choices:
                        return token
                    break
        return None

    def _said(self, text: str) -> Score:
        """The number in a text: the one after the last "Score:" with reasoning, else the text itself."""
        low, high = self.scale
        pattern = MARKS["score"] + r"(-?\d+(?:\.\d+)?)" if self.reasoning else r"^\s*(-?\d+(?:\.\d+)?)\s*\.?\s*$"
        found = re.findall(pattern, text, re.IGNORECASE)
        if not found:
            return Score(None, reason=f"no score in the reply {text[:60]!r}")
        number = float(found[-1])
        if not low <= number <= high:
            return Score(None, reason=f"the judge said {number:g}, which is not from {low} to {high}")
        return Score((number - low) / (high - low), {"score": number})


def judge_folder(name: str) -> Path:
    """The folder of a judge: a path, or a name of the zoo."""
    shipped = Path(__file__).parents[1] / "zoo" / name
    return shipped if not Path(name).exists() and (shipped / "config.json").is_file() else Path(name)


def trained_on(folder: str | Path) -> dict[str, Any]:
    """How the judge in a folder was taught (its judge.json): `template`, `reasoning`; empty for any other model."""
    file = Path(folder) / "judge.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _model(
    model: VLM | str,
    url: str | None,
    key_env: str | None,
    device: str | None,
    dtype: str | None,
    min_pixels: int | None,
    max_pixels: int | None,
    batch_size: int,
) -> VLM:
    if not isinstance(model, str):
        return model
    if url is not None:
        from weft.vlm.remote import RemoteVLM

        return RemoteVLM(url, model, key_env=key_env)
    from weft.vlm.local import load_vlm

    sizes = {"min_pixels": min_pixels, "max_pixels": max_pixels, "batch_size": batch_size}
    return load_vlm(model, device=device, dtype=dtype, **{k: v for k, v in sizes.items() if v is not None})
