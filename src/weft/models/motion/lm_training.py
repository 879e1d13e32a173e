"""Training the motion language model in the one loop: next-token likelihood over interleaved records.

OmniMoGen (arXiv 2512.19159) maximises the likelihood of the token sequence; here of the answers alone by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from weft import rng
from weft.errors import WeftError
from weft.models.motion.heads import DepthTransformer, ResidualPredictor
from weft.models.motion.lm import MotionLM
from weft.models.motion.load import load
from weft.models.motion.reading import learned, wordless
from weft.models.tokenizers import unknown_words
from weft.motion.files import load_part
from weft.record import Record
from weft.types import Draw, Example, Loss

LEARN = ("answers", "all")


class MotionLMTrainable:
    """Trains the `transformer` (and the `heads`, if there are any) of a motion model folder; the RVQ stays frozen.

    `learn`: "answers" (what the assistant says and does, and its end markers; rejected attempts are read, not
    learned), or "all" tokens. `text_dropout`: the chance that a record loses the user's words and those that an answer
    says before its movement, for guidance. `upper_weight`: the weight of a code above level 0 beside a word's or a
    level-0 code's; the upper levels hold what can hardly be foretold, and are most of the codes. With LoRA, name the
    transformer and the heads in `model.train`: the rows of the new tokens and the heads are trained whole beside it.
    """

    name = "motion_lm"
    whole = ("heads",)  # trained whole also where `model.lora` is set

    def __init__(
        self, path: str | Path, *, learn: str = "answers", text_dropout: float = 0.0, upper_weight: float = 1.0
    ) -> None:
        if learn not in LEARN:
            raise WeftError(f"learn {learn!r} is unknown; choose {' or '.join(LEARN)}")
        if not 0 <= text_dropout < 1:
            raise WeftError(f"text_dropout {text_dropout:g}: must be at least 0 and below 1")
        if upper_weight <= 0:
            raise WeftError(f"upper_weight {upper_weight:g}: must be above 0")
        self.model: MotionLM = load(path, device="cpu", dtype="fp32")
        self.learn, self.text_dropout, self.upper_weight = learn, text_dropout, upper_weight

    def modules(self) -> dict[str, nn.Module]:
        """The networks by their folders' names."""
        return self.model.modules()

    def new_rows(self) -> dict[str, list[int]]:
        """By module, the token rows that a LoRA trains whole: those that the vocabulary was extended by."""
        return {"transformer": list(range(self.model.vocabulary.text, len(self.model.tokenizer)))}

    def example_facts(self) -> dict[str, object]:
        """What decides about an example beside the frozen weights: for the cache's key."""
        stats = self.model.codec.stats
        tokens = sorted(self.model.tokenizer.get_vocab().items())
        return {"serialisation": self.model.options.serialisation, "heading": self.model.codec.heading,
                "stats": [stats.mean.tolist(), stats.std.tolist()], "tokens": tokens}  # fmt: skip

    def notes(self, records: Sequence[Record]) -> list[str]:
        """What one should know of a source before the first step: words that the vocabulary lacks, and how well the
        quantiser, which stays as it is, gives (32 of) its movements back."""
        notes = []
        parts = [(p, record.root) for record in records for turn in record.turns for p in turn.parts]
        unknown, words = unknown_words(self.model.tokenizer, [p.text for p, _ in parts if p.type == "text" and p.text])
        if unknown:
            most = ", ".join(f"{word} {n}" for word, n in unknown.most_common(12))
            notes.append(
                f"the vocabulary lacks {len(unknown)} words, {sum(unknown.values()) / words:.0%} of the {words:,} in "
                f"{len(records):,} records; they are read letter by letter: {most}{', ...' * (len(unknown) > 12)}"
            )
        moves = [(p, root) for p, root in parts if p.type == "motion"]
        clips = [load_part(p, root, fps=None) for p, root in moves[:: -(-len(moves) // 32) or 1]]
        if clips:
            notes.append(f"the quantiser gives {len(clips)} movements back within "
                         f"{self.model.codec.joint_error(clips):.0f} mm a joint on average")  # fmt: skip
        return notes

    def examples(self, records: Sequence[Record]) -> list[Example]:
        """`rows` [S, columns], `kind` [S] and `above` [S, L-1] of each record (`reading.Rows`)."""
        found = self.model.reader.encode(records, answers=True)
        for record, one in zip(records, found, strict=True):
            if not learned(one.kind).any():
                raise WeftError(f"record {record.id!r} has no answer to learn: add an assistant turn")
        return [{"rows": r.rows, "kind": r.kind, "above": r.above} for r in found]

    def loss(self, examples: Sequence[Example], draw: Draw) -> Loss:
        """Mean negative log-likelihood per sample [B] over all tokens that are learned, of all columns and levels,
        weighted (`upper_weight`).

        Metrics: `base` is the share of level-0 codes (and end markers) predicted right, `text` that of words.
        """
        network, serial = self.model.network, self.model.serial
        pairs = [self._kept(e, draw, i) for i, e in enumerate(examples)]
        rows = pad_sequence([r for r, _, _ in pairs], batch_first=True, padding_value=-1)  # [B, S, columns]
        kinds = pad_sequence([k for _, k, _ in pairs], batch_first=True)
        inside = pad_sequence([torch.ones(len(r), dtype=torch.long) for r, _, _ in pairs], batch_first=True)
        device = network.device
        hidden = network.hidden(rows, inside)  # [B, S, D]
        goals = learned(kinds) if self.learn == "answers" else inside.bool()
        goals = goals[:, 1:].to(device)
        state = hidden[:, :-1][goals]  # [N, D], each the state before the row that is to be predicted
        goal = rows[:, 1:].to(device)[goals]  # [N, columns]
        sample = torch.arange(len(examples), device=device)[:, None].expand(goals.shape)[goals]
        losses = _Sums(len(examples), device)

        first = goal[:, 0] >= 0
        logits = network.vocabulary_logits(state[first])
        start, stop = serial.vocabulary.block(0)[1], serial.vocabulary.block(serial.levels - 1)[1]
        upper = (goal[first, 0] >= start) & (goal[first, 0] < stop)  # flat writes all levels in its one column
        weights = torch.where(upper, self.upper_weight, 1.0)
        losses.add(sample[first], F.cross_entropy(logits, goal[first, 0], reduction="none"), weights)
        metrics = self._shares(logits, goal[first, 0])
        if serial.name == "delay":
            for level in range(1, serial.columns):
                here = goal[:, level] >= 0
                start, stop = serial.vocabulary.block(level)
                logits = network.vocabulary_logits(state[here], start, stop)
                losses.add(
                    sample[here],
                    F.cross_entropy(logits, goal[here, level] - start, reduction="none"),
                    self.upper_weight,
                )
        elif serial.name == "depth":
            assert isinstance(self.model.head, DepthTransformer)
            here = goal[:, -1] >= 0
            codes = network.level_codes(goal[here])  # [N', L]
            logits = self.model.head(state[here], codes[:, :-1]).float()  # [N', L-1, K]
            each = F.cross_entropy(logits.flatten(0, 1), codes[:, 1:].flatten(), reduction="none")
            losses.add(sample[here].repeat_interleave(serial.columns - 1), each, self.upper_weight)
        elif serial.name == "base_only":
            self._residual(losses, hidden, pairs, draw)
        return Loss(losses.mean(), metrics)

    def _kept(self, example: Example, draw: Draw, index: int) -> tuple[Tensor, Tensor, Tensor]:
        keep = torch.ones(len(example["rows"]), dtype=torch.bool)
        if self.text_dropout and torch.is_grad_enabled():
            chance = rng.numpy_rng(draw.seed, "text", draw.step, draw.record_ids[index], index).random()
            if chance < self.text_dropout:
                keep = wordless(example["kind"])
        return example["rows"][keep].long(), example["kind"][keep], example["above"][keep].long()

    def _shares(self, logits: Tensor, goal: Tensor) -> dict[str, float]:
        right = (logits.argmax(-1) == goal).float()
        v = self.model.vocabulary
        start, stop = v.block(0)
        moves = ((goal >= start) & (goal < stop)) | (goal == v.close)
        words = goal < v.text
        found = {"base": moves, "text": words}
        return {name: float(right[which].mean()) for name, which in found.items() if which.any()}

    def _residual(self, losses: _Sums, hidden: Tensor, pairs: list[tuple[Tensor, Tensor, Tensor]], draw: Draw) -> None:
        """The predictor's loss at one level, drawn for the step, of every learned movement."""
        head, v = self.model.head, self.model.vocabulary
        assert isinstance(head, ResidualPredictor)
        states, codes, owners = [], [], []
        for b, (rows, kind, above) in enumerate(pairs):
            inside = (above[:, 0] >= 0) & (learned(kind) | (self.learn == "all"))
            for start, stop in runs(inside):
                states.append(hidden[b, start:stop])
                codes.append(torch.cat([rows[start:stop] - v.first, above[start:stop]], -1))
                owners.append(b)
        if not states:
            return
        level = 1 + int(rng.numpy_rng(draw.seed, "level", draw.step).integers(0, head.config.levels - 1))
        mask = pad_sequence([torch.ones(len(c), dtype=torch.bool) for c in codes], batch_first=True).to(hidden.device)
        goal = pad_sequence(codes, batch_first=True).to(hidden.device)
        logits = head(pad_sequence(states, batch_first=True).float(), goal, level, mask)[mask].float()
        owner = torch.tensor(owners, device=hidden.device)[:, None].expand(mask.shape)[mask]
        losses.add(owner, F.cross_entropy(logits, goal[..., level][mask], reduction="none"), self.upper_weight)

    def save(self, folder: Path) -> None:
        """Write the whole model folder."""
        self.model.save(Path(folder))


class _Sums:
    """Per-sample weighted means of token losses."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.total = torch.zeros(count, device=device)
        self.weight = torch.zeros(count, device=device)

    def add(self, sample: Tensor, losses: Tensor, weights: Tensor | float) -> None:
        each = torch.as_tensor(weights, device=losses.device).expand(losses.shape).float()
        self.total = self.total.index_add(0, sample, losses.float() * each)
        self.weight = self.weight.index_add(0, sample, each)

    def mean(self) -> Tensor:
        return self.total / self.weight.clamp_min(1e-9)


def runs(inside: Tensor) -> list[tuple[int, int]]:
    """[start, stop) of the runs of True in a mask [S]."""
    edges = torch.diff(inside.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    starts, stops = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
    return list(zip(starts, stops, strict=True))
