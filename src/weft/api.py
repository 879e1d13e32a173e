"""The Python face of weft: a loaded model that generates, edits and runs batches of records.

model = weft.load("tiny-kontext")
scene = model.generate("a red star at the top left on a white background", seed=7)
three = model.edit(scene, "make the star green", seed=7, n=3)
model.edit("scene.png", weft.weave("give the star the material of {cloth.png}"))
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from PIL import Image

import weft
from weft import media
from weft.errors import WeftError
from weft.record import Part, Record, make_record
from weft.rng import seed_of

if TYPE_CHECKING:
    from weft.models.rewriter import Rewriter
    from weft.sample.rollout import Callback
    from weft.types import FlowModel, SkipLayers

Picture = Image.Image | str | Path
Instruction = str | Sequence[Part]


@dataclass(slots=True, frozen=True)
class Defaults:
    """What a model is sampled with where nothing else is said: its `weft.json`, else what its family uses."""

    steps: int = 28
    guidance: float = 3.5


@dataclass(slots=True)
class Options:
    """How to sample; None is the model's own default. `guidance` 1 switches classifier-free guidance off and halves
    the work; `batch` changes the speed and the memory, never the pictures. `solver` is one of
    `weft.sample.solvers.SOLVERS`; `callback_on_step_end` has diffusers' signature and is called for every batch
    (`weft.sample.rollout.sample_flow`); `skip_layers` is skip-layer guidance."""

    steps: int | None = None
    guidance: float | None = None
    negative: str = ""
    batch: int = 8
    progress: bool = False
    solver: str = "euler"
    callback_on_step_end: Callback | None = None
    skip_layers: SkipLayers | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise WeftError(f"steps is {self.steps}; it must be at least 1")
        if self.guidance is not None and not 1 <= self.guidance < float("inf"):
            raise WeftError(f"guidance is {self.guidance:g}; it must be at least 1 (1: no guidance)")
        if self.batch < 1:
            raise WeftError(f"batch is {self.batch}; it must be at least 1")


@dataclass(slots=True)
class Output:
    """One picture, what was asked, and everything needed to make it again."""

    record: Record
    image: Image.Image
    seed: int
    metadata: dict[str, Any]

    def save(self, path: str | Path, *, metadata: bool = True) -> Path:
        """Write the picture atomically; its seed, model and instruction travel in the file unless `metadata` is off."""
        path = Path(path)
        media.save_image(self.image, path, self.metadata if metadata else None)
        return path


class Model:
    """A flow model with its name: sentences and pictures in, pictures out.

    Every picture is a function of (model, instruction, pictures, options, its own seed) and not of its batch.
    """

    def __init__(
        self,
        flow: FlowModel,
        name: str | None = None,
        defaults: Defaults | None = None,
        rewriter: Rewriter | None = None,
    ) -> None:
        self.flow = flow
        self.rewriter = rewriter
        self.name = name or flow.name
        self.defaults = defaults or Defaults()

    def __repr__(self) -> str:
        return f"weft.Model({self.name!r})"

    def resolve(self, options: Options) -> tuple[int, float]:
        """Steps and guidance: as asked, else the model's defaults. Raises WeftError for a negative that nothing reads
        because guidance is off."""
        steps = self.defaults.steps if options.steps is None else options.steps
        guidance = self.defaults.guidance if options.guidance is None else options.guidance
        if options.negative and guidance <= 1:
            raise WeftError(f"negative does nothing at guidance {guidance:g}; give a guidance above 1, or leave it out")
        return steps, guidance

    @overload
    def generate(
        self, instruction: Instruction, *, seed: int = ..., n: None = ..., references: Sequence[Picture] = ...,
        steps: int | None = ..., guidance: float | None = ..., negative: str = ..., size: tuple[int, int] | None = ...,
    ) -> Image.Image: ...  # fmt: skip

    @overload
    def generate(
        self, instruction: Instruction, *, seed: int = ..., n: int, references: Sequence[Picture] = ...,
        steps: int | None = ..., guidance: float | None = ..., negative: str = ..., size: tuple[int, int] | None = ...,
    ) -> list[Image.Image]: ...  # fmt: skip

    def generate(
        self,
        instruction: Instruction,
        *,
        seed: int = 0,
        n: int | None = None,
        references: Sequence[Picture] = (),
        steps: int | None = None,
        guidance: float | None = None,
        negative: str = "",
        size: tuple[int, int] | None = None,
    ) -> Image.Image | list[Image.Image]:
        """Pictures of a sentence, or of a sentence with pictures woven in (`weft.weave`).

        `references` are attached before the text as picture 1, 2 ...; `size` is (height, width) in pixels. One
        picture, or with `n` a list of n whose k-th has the seed `seed + k`. Each picture's `info["weft"]` holds its
        seed, model and instruction.

        Raises:
            WeftError: empty instruction, a picture that cannot be read, a size that the model cannot make.
        """
        record = make_record(instruction, references=references, size=size)
        return self._pictures(record, seed, n, Options(steps, guidance, negative))

    @overload
    def edit(
        self, source: Picture, instruction: Instruction, *, seed: int = ..., n: None = ...,
        references: Sequence[Picture] = ..., mask: Picture | None = ..., steps: int | None = ...,
        guidance: float | None = ..., negative: str = ..., size: tuple[int, int] | None = ...,
    ) -> Image.Image: ...  # fmt: skip

    @overload
    def edit(
        self, source: Picture, instruction: Instruction, *, seed: int = ..., n: int,
        references: Sequence[Picture] = ..., mask: Picture | None = ..., steps: int | None = ...,
        guidance: float | None = ..., negative: str = ..., size: tuple[int, int] | None = ...,
    ) -> list[Image.Image]: ...  # fmt: skip

    def edit(
        self,
        source: Picture,
        instruction: Instruction,
        *,
        seed: int = 0,
        n: int | None = None,
        references: Sequence[Picture] = (),
        mask: Picture | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        negative: str = "",
        size: tuple[int, int] | None = None,
    ) -> Image.Image | list[Image.Image]:
        """`source` changed as the instruction says; the rest as in `generate`.

        The source is picture 1, references are picture 2, 3 ... With a `mask` (white: may change) the pixels outside
        it are the source's own, at the output's size.
        """
        record = make_record(instruction, source, references=references, mask=mask, size=size)
        return self._pictures(record, seed, n, Options(steps, guidance, negative))

    def run(
        self, records: Sequence[Record], *, seed: int = 0, n: int = 1, seeds: Sequence[int] | None = None,
        options: Options | None = None,
    ) -> Iterator[Output]:  # fmt: skip
        """Run records in batches; yields n outputs per record, in order, as each batch is done.

        Sample k of a record has its own seed, derived from (`seed`, the record's id, k), so it depends neither on
        the order nor on the batch; `seeds`, n per record, overrule. A batch may mix tasks, sizes and reference counts.

        Raises:
            WeftError: as `generate`; as many seeds as not outputs.
        """
        options = options or Options()
        records = self.rewriter.rewrite(records) if self.rewriter is not None else records
        if n < 1:
            raise WeftError(f"n is {n}; it must be at least 1")
        if seeds is None:
            seeds = [seed_of(seed, "output", record=record.id, sample=k) for record in records for k in range(n)]
        if len(seeds) != len(records) * n:
            raise WeftError(f"{len(seeds)} seeds for {len(records) * n} outputs; give one for each output")
        jobs = [(record, seeds[i * n + k]) for i, record in enumerate(records) for k in range(n)]
        for start in range(0, len(jobs), options.batch):
            yield from self._batch(jobs[start : start + options.batch], options)

    def _batch(self, jobs: Sequence[tuple[Record, int]], options: Options) -> Iterator[Output]:
        from weft.sample.rollout import sample_flow

        # A record's condition is computed once however many samples it has in the batch.
        unique = list({id(record): record for record, _ in jobs}.values())
        for record in unique:
            _check_mask(record)
        place = {id(record): i for i, record in enumerate(unique)}
        steps, guidance = self.resolve(options)
        positive = self.flow.encode(unique)
        negative = self.flow.encode(unique, negative=options.negative) if guidance > 1 else None
        pick = [place[id(record)] for record, _ in jobs]
        rollout = sample_flow(
            self.flow,
            [positive[i] for i in pick],
            steps=steps,
            guidance=guidance,
            negative=[negative[i] for i in pick] if negative else None,
            seeds=[seed for _, seed in jobs],
            progress=options.progress,
            solver=options.solver,
            callback_on_step_end=options.callback_on_step_end,
            skip_layers=options.skip_layers,
        )
        images = self.flow.decode(rollout.latents, rollout.sizes)
        for (record, seed), image in zip(jobs, images, strict=True):
            if record.mask is not None and record.source is not None:
                image = _keep_outside(image, record)
            facts = {
                "weft": weft.__version__, "model": self.name, "instruction": record.instruction, "seed": seed,
                "steps": steps, "guidance": guidance, "negative": options.negative,
            }  # fmt: skip
            if options.solver != "euler":
                facts["solver"] = options.solver
            if options.skip_layers is not None:
                facts["skip_layers"] = asdict(options.skip_layers)
            if "asked" in record.meta:  # the instruction is the rewriter's
                facts["asked"] = record.meta["asked"]
            image.info["weft"] = facts
            yield Output(record, image, seed, facts)

    def _pictures(self, record: Record, seed: int, n: int | None, options: Options) -> Any:
        count = 1 if n is None else n
        outputs = self.run([record], n=count, seeds=[seed + k for k in range(count)], options=options)
        images = [output.image for output in outputs]
        return images[0] if n is None else images


def load(
    model: str | Path = "tiny-kontext",
    *,
    device: str | None = None,
    dtype: str | None = None,
    lora: Sequence[str | tuple[str, float]] = (),
    adapters: str | Path | Mapping[str, str] | None = None,
    attention_backend: str | None = None,
    tiling: bool = False,
    slicing: bool = False,
    offload: str = "none",
    quantization: str | dict[str, str] | None = None,
    resolution: int | None = None,
    options: Mapping[str, Any] | None = None,
    vram: int | None = None,
    files: Mapping[str, str | Path] | None = None,
    rewriter: Rewriter | None = None,
) -> Model:
    """Load a zoo name, a folder in diffusers layout, or a hub id; the options are those of `weft.models.load.load`.

    `rewriter` (`weft.models.rewriter.open_rewriter`) puts instructions with pictures into the form that the model's
    adapters were trained on.

    Raises:
        WeftError: unknown name (the known ones are listed), a folder that is broken or of an unknown family.
    """
    from weft.models.load import find_model, makes_motion
    from weft.models.load import load as load_flow

    folder = find_model(str(model))
    if makes_motion(folder):
        raise WeftError(f"{model} makes movements, not pictures: open it with weft.load_motion")
    flow = load_flow(
        folder, device=device, dtype=dtype, lora=lora, adapters=adapters, attention_backend=attention_backend,
        tiling=tiling, slicing=slicing, offload=offload, quantization=quantization, resolution=resolution,
        options=options, vram=vram, files=files,
    )  # fmt: skip
    flow.name = str(model)  # in results and reports, the model rather than its family
    return Model(flow, str(model), read_defaults(folder, Defaults(flow.steps, flow.guidance)), rewriter)


def read_defaults(folder: Path, family: Defaults) -> Defaults:
    """The sampling defaults in a model folder's `weft.json` ({"steps": 28, "guidance": 3.5}), else its family's."""
    path = folder / "weft.json"
    if not path.is_file():
        return family
    try:
        found = json.loads(path.read_text("utf-8"))
        return Defaults(int(found.get("steps", family.steps)), float(found.get("guidance", family.guidance)))
    except (ValueError, TypeError, AttributeError) as error:
        raise WeftError(f'{path}: not of the form {{"steps": 28, "guidance": 3.5}} ({error})') from error


def _check_mask(record: Record) -> None:
    """Raise WeftError for a mask of another shape than the source's: it would be squeezed to say something else."""
    if record.mask is not None and record.source is not None:
        (w, h), (width, height) = record.load(record.mask).size, record.load(record.source).size
        if abs(w * height / (h * width) - 1) > 0.02:
            raise WeftError(f"the mask has {w} x {h} pixels, the source {width} x {height}: draw it at that size")


def _keep_outside(image: Image.Image, record: Record) -> Image.Image:
    """The output inside the mask, the source's pixels outside it."""
    assert record.source is not None and record.mask is not None
    source = record.load(record.source).resize(image.size, Image.Resampling.LANCZOS)
    mask = record.load(record.mask).convert("L").resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(image, source, mask.point(lambda value: 255 if value > 127 else 0))
