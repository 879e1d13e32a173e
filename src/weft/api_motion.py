"""The Python face of motion models: sentences and movements in, movements and sentences out.

model = weft.load_motion("tiny-motion")
walk = model.generate("a person walks in a circle, then waves", seed=7, seconds=6)
walk.save("walk.bvh")
model.edit("walk.bvh", weft.weave("keep the action, take the style of {zombie.bvh}"))
model.generate("a person waves", start="a.bvh", end="b.bvh", seconds=4)
model.timeline([("a person walks", 4), ("the person sits down", 3)])
model.describe("walk.bvh")

One request is one record, whatever its task: a model only answers records
(`weft.types.TokenModel`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import weft
from weft.errors import WeftError
from weft.motion.captions import QUESTION
from weft.motion.files import load_part
from weft.record import Part, Record, make_record, motion_part
from weft.rng import seed_of

if TYPE_CHECKING:
    from weft.motion import Motion
    from weft.types import TokenModel

DEFAULT = "tiny-motion"
FAMILIES = {"OmniMoGenPipeline": "weft.models.motion.load"}
"""The class that a motion model's `model_index.json` declares -> the module whose `load(folder, device=, dtype=,
lora=)` opens it as a `weft.types.TokenModel`."""

Movement = Any  # a path, a weft.motion.Motion, or a motion part
Scene = tuple[str | Sequence[Part], float]  # what happens, and for how many seconds


@dataclass(slots=True)
class MotionOptions:
    """How movements and their texts are sampled; None is the model's own default.

    `seconds` fixes the length of a movement, `temperature` 0 always takes the likeliest token, `guidance` 1 switches
    guidance off; with `rounds` the model judges its movement in words and makes it again, at most so often; `batch`
    changes the speed and the memory, never the outputs. Raises `WeftError` for numbers out of
    range.
    """

    seconds: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    guidance: float | None = None
    batch: int = 8
    rounds: int = 0

    def __post_init__(self) -> None:
        for name, least, most, what in (
            ("seconds", 0.2, 600.0, "from 0.2 to 600 (ten minutes)"),
            ("temperature", 0.0, 10.0, "from 0 (the likeliest) to 10"),
            ("top_k", 1, 1 << 20, "at least 1"),
            ("top_p", 1e-6, 1.0, "above 0 and at most 1"),
            ("guidance", 1.0, 100.0, "at least 1 (1: no guidance)"),
            ("batch", 1, 1 << 20, "at least 1"),
            ("rounds", 0, 10, "from 0 (no reflection) to 10"),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise WeftError(f"{name} is {value:g}; it must be {what}")


@dataclass(slots=True)
class MotionOutput:
    """One answer: its movement (None where the model only wrote), its text, and what is needed to make it again."""

    record: Record
    parts: list[Part]
    seed: int
    metadata: dict[str, Any]

    @property
    def motion(self) -> Motion | None:
        """The last movement of the answer: of a reflection, the one that it ends with."""
        return next((p.value for p in reversed(self.parts) if p.type == "motion"), None)

    @property
    def text(self) -> str:
        """All that was written, such as a plan or a judgement."""
        return "\n".join(p.text.strip() for p in self.parts if p.type == "text" and p.text and p.text.strip())

    def save(self, path: str | Path, *, metadata: bool = True) -> Path:
        """Write the movement by the suffix of `path`, with seed, model and instruction unless `metadata` is off.

        Raises `WeftError` for an answer without a movement, and as `weft.motion.write_motion`.
        """
        from weft.motion import write_motion

        if self.motion is None:
            raise WeftError(f"{self.metadata['model']} answered without a movement: {self.text[:200] or 'nothing'}")
        write_motion(self.motion, path, metadata=self.metadata if metadata else None)
        return Path(path)


class MotionModel:
    """A motion model with its name. Every output is a function of (model, record, options, its own seed)."""

    def __init__(self, model: TokenModel, name: str | None = None) -> None:
        self.model, self.name = model, name or model.name

    def __repr__(self) -> str:
        return f"weft.MotionModel({self.name!r})"

    def generate(
        self, instruction: str | Sequence[Part], *, seed: int = 0, references: Sequence[Movement] = (),
        options: MotionOptions | None = None, seconds: float | None = None,
        start: Movement | None = None, end: Movement | None = None,
    ) -> Motion:  # fmt: skip
        """A movement of a sentence, or of a sentence with movements woven in (`weft.weave`).

        With `start` and `end`, one that begins and ends as they do, both included (in-betweening); `timeline` goes on
        from a start alone. `seconds` is short for `options`. Raises `WeftError` for one of the two alone, if they leave
        no room in `seconds`, and if the model answers without a movement.
        """
        if (start is None) != (end is None):
            raise WeftError("start and end belong together; to go on from a start, use timeline(..., start=)")
        record = make_record(instruction, references=references, start=start, end=end)
        return self._movement(record, seed, _options(options, seconds))

    def edit(
        self, source: Movement, instruction: str | Sequence[Part], *, seed: int = 0,
        references: Sequence[Movement] = (), options: MotionOptions | None = None, seconds: float | None = None,
    ) -> Motion:  # fmt: skip
        """`source` changed as the instruction says; the source is motion 1. The rest as in `generate`."""
        record = make_record(instruction, source, references=references)
        return self._movement(record, seed, _options(options, seconds))

    def timeline(
        self, scenes: Sequence[Scene], *, seed: int = 0, options: MotionOptions | None = None,
        start: Movement | None = None,
    ) -> Motion:  # fmt: skip
        """One movement of several instructions, (text, seconds) each, that goes from one to the next without a jump.

        With `start` it begins with that movement and goes on from it. Raises `WeftError` for no scenes, one without
        words or below 0.2 s, and for `seconds` or `rounds` in the options: each scene has its own length, and none is
        judged.
        """
        (output,) = self.timelines(scenes, seeds=[seed], options=options, start=start)
        assert output.motion is not None
        return output.motion

    def timelines(
        self, scenes: Sequence[Scene], *, seeds: Sequence[int], options: MotionOptions | None = None,
        start: Movement | None = None,
    ) -> Iterator[MotionOutput]:  # fmt: skip
        """`timeline` once a seed, with what is needed to make it again."""
        options = options or MotionOptions()
        if options.seconds is not None or options.rounds:
            raise WeftError("timeline: seconds and rounds mean nothing here; give every scene its length")
        if not scenes:
            raise WeftError("timeline: no scenes; give at least one (text, seconds)")
        for k, (said, seconds) in enumerate(scenes):
            MotionOptions(seconds=seconds)  # its limits
            if not (said if isinstance(said, str) else "".join(p.text or p.type for p in said)).strip():
                raise WeftError(f"timeline: scene {k} is empty; say what happens")
        model: Any = self.model
        if not hasattr(model, "timeline"):
            raise WeftError(f"{self.name} makes one movement at a time; it has no timeline")
        told = [f"{make_record(said).instruction} ({seconds:g} s)" for said, seconds in scenes]
        record = make_record(", ".join(told), start=start)
        clip = load_part(record.request.parts[0], fps=None) if start is not None else None
        for seed in seeds:
            motion = model.timeline(scenes, seed=seed, options=options, start=clip)
            yield MotionOutput(record, [motion_part(motion)], seed, self._facts(record, seed, options))

    def describe(self, source: Movement, question: str = QUESTION, *, options: MotionOptions | None = None) -> str:
        """What the model writes about a movement. Raises `WeftError` if it writes nothing."""
        record = make_record(question, source, task="describe")
        (output,) = self.run([record], seeds=[0], options=options or MotionOptions(temperature=0))
        if not output.text:
            raise WeftError(f"{self.name} wrote nothing about the movement; ask another question")
        return output.text

    def run(
        self, records: Sequence[Record], *, seed: int = 0, n: int = 1, seeds: Sequence[int] | None = None,
        options: MotionOptions | None = None,
    ) -> Iterator[MotionOutput]:  # fmt: skip
        """Answer records in batches: n outputs per record, in order, each batch as soon as it is done.

        Sample k of a record has its own seed, derived from (`seed`, the record's id, k); `seeds`, n per record,
        overrule. Raises `WeftError` for an `n` below 1 or another number of seeds.
        """
        options = options or MotionOptions()
        if n < 1:
            raise WeftError(f"n is {n}; it must be at least 1")
        if seeds is None:
            seeds = [seed_of(seed, "output", record=record.id, sample=k) for record in records for k in range(n)]
        if len(seeds) != len(records) * n:
            raise WeftError(f"{len(seeds)} seeds for {len(records) * n} outputs; give one for each output")
        jobs = [(record, seeds[i * n + k]) for i, record in enumerate(records) for k in range(n)]
        for start in range(0, len(jobs), options.batch):
            part = jobs[start : start + options.batch]
            answers = self._answers([r for r, _ in part], [s for _, s in part], options)
            for (record, one), parts in zip(part, answers, strict=True):
                yield MotionOutput(record, parts, one, self._facts(record, one, options))

    def _facts(self, record: Record, seed: int, options: MotionOptions) -> dict[str, Any]:
        facts = {"weft": weft.__version__, "model": self.name, "instruction": record.instruction, "seed": seed}
        asked = {k: getattr(options, k) for k in ("seconds", "temperature", "top_k", "top_p", "guidance")}
        asked["rounds"] = options.rounds or None
        return facts | {k: v for k, v in asked.items() if v is not None}

    def _answers(
        self, records: Sequence[Record], seeds: Sequence[int], options: MotionOptions
    ) -> list[list[Part]]:  # fmt: skip
        if not options.rounds:
            return self.model.respond(records, seeds=seeds, options=options)
        from weft.models.motion.think import think

        return think(self.model, records, seeds=seeds, rounds=options.rounds, options=options)

    def _movement(self, record: Record, seed: int, options: MotionOptions) -> Motion:
        (output,) = self.run([record], seeds=[seed], options=options)
        if output.motion is None:
            raise WeftError(f"{self.name} answered without a movement: {output.text[:200] or 'nothing'}")
        return output.motion


def _options(options: MotionOptions | None, seconds: float | None) -> MotionOptions:
    if options is not None and seconds is not None:
        raise WeftError("seconds stands in the options, too: give it once")
    return options or MotionOptions(seconds=seconds)


def load_motion(
    model: str | Path = DEFAULT,
    *,
    device: str | None = None,
    dtype: str | None = None,
    lora: Sequence[str | tuple[str, float]] = (),
) -> MotionModel:
    """Load a motion model: a zoo name or a folder.

    Raises:
        WeftError: no such model (the known ones are listed), or one that does not make movements.
    """
    folder = find_motion(str(model))
    opener = import_module(FAMILIES[_declared(folder)])
    return MotionModel(opener.load(folder, device=device, dtype=dtype, lora=lora), str(model))


def find_motion(name: str) -> Path:
    """The folder of a motion model. Raises `WeftError` if there is none of this name, or it is one of pictures."""
    zoo = Path(weft.__file__).parent / "zoo"
    for folder in (Path(name), zoo / name):
        if folder.is_dir() and name:
            if (declared := _declared(folder)) not in FAMILIES:
                raise WeftError(f"{name} is {declared or 'no model folder'}: it does not make movements")
            return folder
    known = sorted(p.parent.name for p in zoo.glob("*/model_index.json") if _declared(p.parent) in FAMILIES)
    raise WeftError(
        f"no motion model {name!r}: not a folder and not in the zoo (motion models there: {', '.join(known) or 'none'})"
    )


def _declared(folder: Path) -> str:
    import json

    try:
        return str(json.loads((folder / "model_index.json").read_text("utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
