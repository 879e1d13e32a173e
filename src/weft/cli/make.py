"""`weft generate` and `weft edit`: one sentence, or a file of records; the suffix of -o says what is made."""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from weft.cli.options import (
    QUIET,
    File,
    ModelOptions,
    MovementOptions,
    SamplingOptions,
    check_file,
    check_folder,
    is_movement,
    parse_size,
    refuse,
)
from weft.errors import WeftError

if TYPE_CHECKING:
    from weft.api import Output
    from weft.api_motion import MotionOutput
    from weft.record import Record


@dataclass(kw_only=True)
class _Make:
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The picture (.png, .jpg, .webp) or movement (.bvh, .glb, .npz, .npy, .gif, .mp4) to write; with several -0,
    -1 ... is added; with --records a folder."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """How many, each with its own seed."""
    records: File = None
    """A JSONL file of records to run in batches, instead of one instruction."""
    format: Literal["png", "jpg", "webp", "bvh", "glb", "npz", "npy", "gif", "mp4"] = "png"
    """What --records writes."""
    no_metadata: bool = False
    """Do not write seed, model and instruction into the files."""
    sampling: OmitArgPrefixes[SamplingOptions]
    loading: OmitArgPrefixes[ModelOptions]
    movement: OmitArgPrefixes[MovementOptions] = field(default_factory=MovementOptions)

    def _check_records(self, instruction: str | None) -> None:
        """Either an instruction or --records, and a place for the outputs."""
        if self.records is None:
            if instruction is None:
                raise WeftError("no instruction; write what you want in quotes, or give --records FILE")
            is_movement(self.out)
            if self.format != "png":
                raise WeftError("--format is for --records; name the file with -o as you want it")
            check_folder(self.out.parent)
            return
        if instruction is not None:
            raise WeftError("an instruction and --records exclude each other; leave one of them out")
        check_file(self.records, "records file")
        if self.out.suffix:
            raise WeftError(f"--records writes many files: -o must be a folder, not {self.out}")
        check_folder(self.out)

    def _outputs(
        self, records: Sequence[Record], moves: bool, seeds: Sequence[int] | None, progress: bool
    ) -> Iterator[Output | MotionOutput]:
        """What the model makes of the records; options that do nothing here are refused before it is loaded."""
        kind, other = ("motion", "image") if moves else ("image", "motion")
        for record in records:
            if any(part.type == other for turn in record.turns for part in turn.parts):
                made, found = ("movement", "picture") if moves else ("picture", "movement")
                raise WeftError(f"a {made} is asked for, but the request holds a {found}; say with -o which it is")
        seed = self.sampling.seed
        if kind == "motion":
            options = self.movement.options(self.sampling)
            return self.loading.load_motion().run(records, seed=seed, n=self.n, seeds=seeds, options=options)
        refuse(self.movement, (), "for pictures")
        sampling = self.sampling.options(progress)
        model = self.loading.load(references=any(record.references for record in records))
        return model.run(records, seed=seed, n=self.n, seeds=seeds, options=sampling)

    def _run(self, record: Record) -> int:
        """One record, n outputs."""
        return self._write(self._outputs([record], is_movement(self.out), self._seeds(), sys.stderr.isatty()))

    def _seeds(self) -> list[int]:
        return [self.sampling.seed + k for k in range(self.n)]

    def _only_for_movements(self, *names: str) -> bool:
        """Whether one of these options was given. Raises `WeftError` if it would do nothing."""
        given = [f"--{name}" for name in names if getattr(self, name)]
        if given and self.records is not None:
            raise WeftError(f"{given[0]} does nothing with --records; let the records say it")
        if given and not is_movement(self.out):
            raise WeftError(f"{given[0]} does nothing for pictures; leave it out")
        return bool(given)

    def _write(self, outputs: Iterator[Output | MotionOutput]) -> int:
        moves, begun = is_movement(self.out), time.perf_counter()
        for k, output in enumerate(outputs):
            path = self.out if self.n == 1 else self.out.with_stem(f"{self.out.stem}-{k}")
            print(output.save(path, metadata=not self.no_metadata))
            if text := getattr(output, "text", ""):  # what a motion model says before it moves
                print(text, file=sys.stderr)
        what = "movement" if moves else "picture"
        print(f"{self.n} {what}(s) in {time.perf_counter() - begun:.1f} s", file=sys.stderr)
        return 0

    def _run_records(self, found: Sequence[Record], other: str, ours: Callable[[Record], bool]) -> int:
        """Many records: out/<id>.png (or <id>-<k>.png), each written as soon as its batch is done. Those that are not
        `ours` are left to the `other` command."""
        records = [record for record in found if ours(record)]
        if not records:
            raise WeftError(f"{self.records}: no record of this task in it")
        if len(records) < len(found):
            print(f"left out: {len(found) - len(records)} records for weft {other}", file=sys.stderr)
        names = [re.sub(r"[^\w.-]", "_", record.id) for record in records]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise WeftError(f"{self.records}: two records would write {twice}.{self.format}; give them different ids")
        if long := next((name for name in names if len(name.encode()) > 200), None):
            raise WeftError(f"{self.records}: id {long[:30]}... has {len(long.encode())} bytes: 200 fit a file's name")
        size = parse_size(self.sampling.size)
        for record in records:
            record.meta |= {"size": list(size)} if size else {}
        moves = is_movement(Path(f"x.{self.format}"))
        outputs = self._outputs(records, moves, None, False)
        start = time.perf_counter()
        for i, output in enumerate(outputs):
            name = names[i // self.n] + ("" if self.n == 1 else f"-{i % self.n}")
            print(output.save(self.out / f"{name}.{self.format}", metadata=not self.no_metadata))
        what = "movements" if moves else "pictures"
        print(f"{len(records) * self.n} {what} in {time.perf_counter() - start:.1f} s", file=sys.stderr)
        return 0


@dataclass(kw_only=True)
class Generate(_Make):
    """Make a picture or a movement from a sentence. Braces weave a file into it: "the object of {a.png} with the
    pattern of {b.png}", "walk as in {zombie.bvh}" ({{ writes a brace). Seed, model and instruction are stored in the
    file."""

    instruction: Annotated[Positional[str | None], QUIET] = None
    """What the picture shows, or how one moves."""
    start: File = None
    """A movement to begin with: to its --end; without one, --seconds more are made that go on from it."""
    end: File = None
    """A movement to end with; what is made holds --start and --end and lasts --seconds."""
    then: Annotated[list[tuple[str, float]], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT SECONDS")] = field(
        default_factory=list
    )
    """What happens next, and for how long, after the --seconds of the instruction; can be repeated."""

    def run(self) -> int:
        from weft.record import make_record, read_records, weave

        self._check_records(self.instruction)
        if self._only_for_movements("start", "end", "then"):
            return self._run_movement()
        if self.records is not None:
            return self._run_records(list(read_records(self.records)), "edit", lambda record: record.source is None)
        assert self.instruction is not None
        return self._run(make_record(weave(self.instruction), size=parse_size(self.sampling.size)))

    def _run_movement(self) -> int:
        """A movement between two, one that goes on from another, or several in a row."""
        from weft.record import make_record, weave

        assert self.instruction is not None
        for name, path in (("start", self.start), ("end", self.end)):
            if path is not None:
                check_file(path, name)
        if self.end is not None:
            if self.start is None or self.then:
                raise WeftError("--end needs a --start and no --then; what comes after an end is another movement")
            return self._run(make_record(weave(self.instruction), start=self.start, end=self.end))
        if self.movement.seconds is None:
            raise WeftError("--seconds is missing: how long the instruction's own part of the movement lasts")
        refuse(self.movement, ("seconds", "temperature", "top_k", "top_p"), "in a row of movements")
        scenes = [(weave(text), seconds) for text, seconds in [(self.instruction, self.movement.seconds), *self.then]]
        options = dataclasses.replace(self.movement.options(self.sampling), seconds=None)
        model = self.loading.load_motion()
        return self._write(model.timelines(scenes, seeds=self._seeds(), options=options, start=self.start))


@dataclass(kw_only=True)
class Edit(_Make):
    """Change a picture or a movement as a sentence says. Braces weave references into it: "give the star the material
    of {cloth.png}", "take the style of {zombie.bvh}"; the source is number 1, references are 2, 3 ..."""

    source: Annotated[Positional[Path | None], QUIET] = None
    """The picture or movement to change."""
    instruction: Annotated[Positional[str | None], QUIET] = None
    """What to change."""
    mask: File = None
    """A picture of the source's size, white where it may change; the rest keeps its pixels."""
    replace: Annotated[tuple[float, float] | None, tyro.conf.arg(metavar="FROM TO", help_behavior_hint="")] = None
    """Of a movement: the seconds that are made anew, as the instruction says, between what is before and after them."""

    def run(self) -> int:
        from weft.record import make_record, read_records, weave

        again = self._only_for_movements("replace")
        if self.records is not None:
            self._check_records(None if self.source is None else str(self.source))
            return self._run_records(
                list(read_records(self.records)), "generate", lambda record: record.source is not None
            )
        if self.source is None:
            raise WeftError("no source; weft edit SOURCE INSTRUCTION -o OUT, or --records FILE")
        self._check_records(self.instruction)
        check_file(self.source, "source")
        if self.mask is not None:
            check_file(self.mask, "mask")
        assert self.instruction is not None
        if again:
            return self._run(self._replaced(self.source, self.instruction))
        size = parse_size(self.sampling.size)
        return self._run(make_record(weave(self.instruction), source=self.source, mask=self.mask, size=size))

    def _replaced(self, source: Path, instruction: str) -> Record:
        """The request for a movement between the source's beginning and end, as long as the source by default."""
        from weft.motion import read_motion
        from weft.record import make_record, weave

        if self.mask is not None:
            raise WeftError("--mask does nothing for movements; leave it out")
        assert self.replace is not None
        clip = read_motion(source, fps=20)
        first, last = (round(20 * seconds) for seconds in self.replace)
        if not 8 <= first < last <= len(clip) - 8:
            raise WeftError(
                f"--replace {self.replace[0]:g} {self.replace[1]:g}: of {clip.seconds:.3g} s, at least 0.4 must stay "
                "before and after the part that is made anew"
            )
        if self.movement.seconds is None:
            self.movement.seconds = clip.seconds
        return make_record(weave(instruction), start=clip.crop(0, first), end=clip.crop(last))
