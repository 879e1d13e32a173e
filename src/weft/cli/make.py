"""`weft generate` and `weft edit`: one sentence, or a file of records."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from weft.cli.options import (
    QUIET,
    File,
    ModelOptions,
    SamplingOptions,
    check_file,
    check_folder,
    check_picture_path,
    parse_size,
)
from weft.errors import WeftError

if TYPE_CHECKING:
    from weft.record import Record


@dataclass(kw_only=True)
class _Make:
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The picture to write (.png, .jpg, .webp); with several pictures -0, -1 ... is added; with --records a folder."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """How many pictures, each with its own seed."""
    records: File = None
    """A JSONL file of records to run in batches, instead of one instruction."""
    no_metadata: bool = False
    """Do not write seed, model and instruction into the files."""
    sampling: OmitArgPrefixes[SamplingOptions]
    loading: OmitArgPrefixes[ModelOptions]

    def _check_records(self, instruction: str | None) -> None:
        """Either an instruction or --records, and a place for the outputs."""
        if self.records is None:
            if instruction is None:
                raise WeftError("no instruction; write what you want in quotes, or give --records FILE")
            check_picture_path(self.out)
            return
        if instruction is not None:
            raise WeftError("an instruction and --records exclude each other; leave one of them out")
        check_file(self.records, "records file")
        if self.out.suffix:
            raise WeftError(f"--records writes many files: -o must be a folder, not {self.out}")
        check_folder(self.out)

    def _run(self, record: Record) -> int:
        """One record, n pictures."""
        options = self.sampling.options(progress=sys.stderr.isatty())
        model = self.loading.load()
        start = time.perf_counter()
        seeds = [self.sampling.seed + k for k in range(self.n)]
        for k, output in enumerate(model.run([record], n=self.n, seeds=seeds, options=options)):
            path = self.out if self.n == 1 else self.out.with_stem(f"{self.out.stem}-{k}")
            print(output.save(path, metadata=not self.no_metadata))
        print(f"{self.n} picture(s) in {time.perf_counter() - start:.1f} s", file=sys.stderr)
        return 0

    def _run_records(self, records: Sequence[Record]) -> int:
        """Many records: out/<id>.png (or <id>-<k>.png), each written as soon as its batch is done."""
        if not records:
            raise WeftError(f"{self.records}: no record of this task in it")
        names = [re.sub(r"[^\w.-]", "_", record.id) for record in records]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise WeftError(f"{self.records}: two records would write {twice}.png; give them different ids")
        options, size = self.sampling.options(), parse_size(self.sampling.size)
        for record in records:
            record.meta |= {"size": list(size)} if size else {}
        model = self.loading.load()
        start = time.perf_counter()
        for i, output in enumerate(model.run(records, seed=self.sampling.seed, n=self.n, options=options)):
            name = names[i // self.n] + ("" if self.n == 1 else f"-{i % self.n}")
            print(output.save(self.out / f"{name}.png", metadata=not self.no_metadata))
        print(f"{len(records) * self.n} pictures in {time.perf_counter() - start:.1f} s", file=sys.stderr)
        return 0


@dataclass(kw_only=True)
class Generate(_Make):
    """Make pictures from a sentence. Braces weave a file into it: "the object of {a.png} with the pattern of {b.png}"
    ({{ writes a brace). Seed, model and instruction are stored in the picture."""

    instruction: Annotated[Positional[str | None], QUIET] = None
    """What the picture shows."""

    def run(self) -> int:
        from weft.record import make_record, read_records, weave

        self._check_records(self.instruction)
        if self.records is not None:
            return self._run_records([record for record in read_records(self.records) if record.source is None])
        assert self.instruction is not None
        return self._run(make_record(weave(self.instruction), size=parse_size(self.sampling.size)))


@dataclass(kw_only=True)
class Edit(_Make):
    """Change a picture as a sentence says. Braces weave references into it: "give the star the material of
    {cloth.png}"; the source is picture 1, references are picture 2, 3 ..."""

    source: Annotated[Positional[Path | None], QUIET] = None
    """The picture to change."""
    instruction: Annotated[Positional[str | None], QUIET] = None
    """What to change."""
    mask: File = None
    """A picture of the source's size, white where it may change; the rest keeps its pixels."""

    def run(self) -> int:
        from weft.record import make_record, read_records, weave

        if self.records is not None:
            self._check_records(None if self.source is None else str(self.source))
            return self._run_records([record for record in read_records(self.records) if record.source is not None])
        if self.source is None:
            raise WeftError("no source picture; weft edit SOURCE INSTRUCTION -o OUT, or --records FILE")
        self._check_records(self.instruction)
        check_file(self.source, "source picture")
        if self.mask is not None:
            check_file(self.mask, "mask")
        assert self.instruction is not None
        size = parse_size(self.sampling.size)
        return self._run(make_record(weave(self.instruction), source=self.source, mask=self.mask, size=size))
