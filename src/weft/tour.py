"""The tour: what weft does, done on this machine with the tiny models, in one HTML report.

Four stages, each a plain function: generate, edit, measure, teach; refer (`weft.tour_omni`) where a model for reference
pictures ships, and move (`weft.tour_motion`) where one for movements does. A probe first times the machine, so that the
tour takes about three minutes anywhere; on a slower machine it measures fewer pictures and trains fewer steps, and says
so.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import weft
from weft.api import Model, Options, Output
from weft.media import atomic_write, save_image
from weft.record import Record, Turn, image_part, make_record, text_part
from weft.rng import numpy_rng
from weft.types import Draw

if TYPE_CHECKING:
    from weft.evals.world import WorldReport
    from weft.tour_motion import Moved
    from weft.world.oracle import Verdict

WORK = "tour-work"  # inside the output folder; removed at the start of the next tour
TONE = "held-out kind"
KNOWN = "edit/recolour"
SENTENCES, CHAINS = 6, (("recolour", "add", "background"), ("move", "repattern", "remove"))
Say = Callable[[str], None]


@dataclass(slots=True)
class Pace:
    """What one unit of work takes here, in seconds, and the amounts of work that follow from it."""

    step: float  # one sampling step of one picture, in a batch
    judge: float  # one verdict of the oracle
    example: float  # drawing and encoding one training record
    train: float  # forward and backward of one training sample
    steps: int = 28
    guidance: float = 1.0

    @property
    def picture(self) -> float:
        """One picture with guidance, sampled and judged."""
        return self.step * self.steps * (2 if self.guidance > 1 else 1) + self.judge

    def measured(self, seconds: float = 30.0, groups: int = 11) -> int:
        """Records per group of the evaluation (baselines and the VAE cost about as much as one picture again)."""
        return _between(seconds / groups / (self.picture + 2 * self.judge), 4, 32)

    def held_out(self, seconds: float = 12.0) -> int:
        """Test records of the held-out kind, measured before and after the training."""
        return _between(seconds / (2 * self.picture), 8, 64)

    def examples(self, seconds: float = 16.0) -> int:
        """Training records, each drawn and encoded once."""
        return _between(seconds / self.example, 96, 704)

    def train_steps(self, batch: int, seconds: float = 60.0) -> int:
        """Steps of the fine-tuning."""
        return _between(seconds / (self.train * batch), 20, 500)


@dataclass
class Findings:
    """What the stages leave for the report."""

    pace: Pace
    generated: list[tuple[Record, list[Output], Verdict]] = field(default_factory=list)
    edited: list[tuple[Record, Output, Verdict]] = field(default_factory=list)
    referred: list[tuple[Record, Output, Verdict]] = field(default_factory=list)
    moved: list[Moved] = field(default_factory=list)
    chains: list[list[tuple[Record, Output, Verdict]]] = field(default_factory=list)
    world: WorldReport | None = None
    before: WorldReport | None = None
    after: WorldReport | None = None
    train: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def run_tour(folder: Path, *, model: str = "tiny-kontext", seed: int = 0, say: Say = print) -> Path:
    """Run all stages with `model` and write `folder`/report.html, pictures/ and tour.json; returns the report's path.

    Raises:
        WeftError: no such model, or the disk refuses.
    """
    from weft import tour_motion, tour_omni
    from weft.api_motion import DEFAULT
    from weft.cli.shipped import picture_model, zoo_models
    from weft.tour_page import tour_page

    start = time.perf_counter()
    shutil.rmtree(folder / WORK, ignore_errors=True)
    loaded = weft.load(model)
    found = Findings(probe(loaded))
    say(f"{model} loaded in {time.perf_counter() - start:.0f} s; here a picture takes {found.pace.picture:.2f} s")
    stages = dict(STAGES)
    if picture_model(references=True) != picture_model(references=False):
        stages[tour_omni.STAGE] = tour_omni.refer
    if DEFAULT in zoo_models():
        stages[tour_motion.STAGE] = tour_motion.move
    for k, (name, stage) in enumerate(stages.items(), 1):
        say(f"[{k}/{len(stages)}] {name}")
        with _timed(found.seconds, name):
            stage(loaded, found, folder, seed, lambda line: say(f"      {line}"))
    found.seconds["all"] = time.perf_counter() - start
    page = tour_page(loaded, found, folder, seed).write(folder / "report.html")
    _write_numbers(found, folder / "tour.json")
    say(f"done in {found.seconds['all']:.0f} s; open {page} in a browser")
    return page


def probe(model: Model) -> Pace:
    """Time a few units of each kind of work."""
    from weft.world import records
    from weft.world.oracle import judge

    tries = records("train", count=8, seed=11, tasks=["edit"])
    steps, guidance = model.resolve(Options())
    list(model.run(tries[:2], options=Options(steps=1, guidance=1)))  # the first call pays for set-up
    step = _seconds(lambda: list(model.run(tries[:], options=Options(steps=6, guidance=1)))) / (6 * 8)
    verdict = _seconds(lambda: [judge(record, record.load(record.target)) for record in tries[:3] if record.target]) / 3
    fresh = records("train", count=8, seed=12, tasks=["edit"])
    example = _seconds(lambda: model.flow.examples(fresh)) / 8
    examples = model.flow.examples(tries[:])
    draw = Draw(0, 0, [record.id for record in tries])
    network = model.flow.modules()["transformer"].requires_grad_(True)

    def learn() -> None:
        model.flow.loss(examples, draw).per_sample.mean().backward()

    learn()  # the first pass backwards pays for set-up, too
    train = _seconds(learn) / 8
    network.zero_grad(set_to_none=True)
    network.requires_grad_(False)
    return Pace(step, verdict, example, 1.3 * train, steps, guidance)  # the optimiser's share


def generate(model: Model, found: Findings, folder: Path, seed: int, say: Say) -> None:
    """Two pictures for each of several sentences about scenes that no training picture shows."""
    from weft.world import records
    from weft.world.oracle import judge

    sentences = records("test", count=SENTENCES, seed=100 + seed, tasks=["generate"])[:]
    outputs = list(model.run(sentences, n=2, seeds=[seed, seed + 1] * len(sentences)))
    for k, record in enumerate(sentences):
        pair = outputs[2 * k : 2 * k + 2]
        found.generated.append((record, pair, judge(record, pair[0].image)))
        for j, output in enumerate(pair):
            output.save(folder / "pictures" / f"generate-{k + 1}{'ab'[j]}.png")
        say(f'"{record.instruction}"')


def edit(model: Model, found: Findings, folder: Path, seed: int, say: Say) -> None:
    """One edit for each of several instructions, then edits of edits, three in a row."""
    from weft.world import records
    from weft.world.edits import HELD_OUT_KIND, KINDS
    from weft.world.oracle import judge

    kinds = [kind for kind in KINDS if kind != HELD_OUT_KIND]
    tasks = [records("test", count=1, seed=200 + seed, tasks=["edit"], kinds=[kind])[0] for kind in kinds]
    outputs = model.run(tasks, seeds=[seed] * len(tasks))
    for k, (record, output) in enumerate(zip(tasks, outputs, strict=True), 1):
        output.save(folder / "pictures" / f"edit-{k}.png")
        if record.source:
            save_image(record.load(record.source), folder / "pictures" / f"edit-{k}-source.png")
        found.edited.append((record, output, judge(record, output.image)))
        say(f'"{record.instruction}"')
    overview(found.edited[:8], folder / "pictures" / "overview.png")
    for c, names in enumerate(CHAINS):
        chain: list[tuple[Record, Output, Verdict]] = []
        for k, record in enumerate(chain_records(names, seed + c)):
            source = chain[-1][1].image if chain else record.source
            request = make_record(record.instruction, source, size=tuple(record.meta["size"]), id=record.id)
            output = next(model.run([request], seeds=[seed]))
            output.save(folder / "pictures" / f"chain-{c + 1}-step-{k + 1}.png")
            chain.append((record, output, judge(record, output.image)))
        found.chains.append(chain)
        say("then: ".join(f'"{record.instruction}" ' for record, _, _ in chain).strip())


def overview(edited: Sequence[tuple[Record, Output, Verdict]], path: Path) -> None:
    """One sheet of sources and outputs, two edits a row, as they came."""
    from weft.report.sheet import contact_sheet

    pairs = [edited[i : i + 2] for i in range(0, len(edited), 2)]
    rows: list[list[Any]] = [
        [image for r, o, _ in pair for image in (r.load(r.source) if r.source else None, o.image)] for pair in pairs
    ]
    contact_sheet(
        rows,
        columns=["source", "output"] * 2,
        captions=["     |     ".join(f"\u201c{r.instruction}\u201d" for r, _, _ in pair) for pair in pairs],
        path=path,
    )


def chain_records(kinds: Sequence[str], seed: int) -> list[Record]:
    """Edits in a row: the exact target of one is the exact source of the next; from a scene of the test split."""
    from weft.world import records
    from weft.world.edits import apply, propose
    from weft.world.oracle import scenes
    from weft.world.phrases import Speaker
    from weft.world.records import Picture

    for index in range(1000):
        rng = numpy_rng(seed, "tour/chain", index)
        scene = scenes(records("test", count=1, seed=300 + seed, start=index, tasks=["generate"])[0])[1]
        chain: list[Record] = []
        for kind in kinds:
            plan = propose(rng, scene, kind)
            if not plan:
                break
            source, scene = scene, apply(scene, plan)
            text, canonical = Speaker(rng).edit(source, plan)
            size = [Picture(scene).height, Picture(scene).width]
            world = {
                "source": source.to_json(),
                "target": scene.to_json(),
                "plan": plan,
                "references": [],
                "size": size,
            }
            turns = [
                Turn("user", [image_part(Picture(source), "source"), text_part(text)]),
                Turn("assistant", [image_part(Picture(scene))]),
            ]
            meta = {"kind": kind, "canonical": canonical, "size": size, "world": world}
            chain.append(Record(f"tour-chain-{seed}-{len(chain) + 1}", "edit", turns, meta))
        if len(chain) == len(kinds) and not scene.held_out:
            return chain
    raise AssertionError(f"no scene of the test split allows {', '.join(kinds)} in a row")


def measure(model: Model, found: Findings, folder: Path, seed: int, say: Say) -> None:
    """A small sample of the benchmark: success by the oracle, beside copying the source, a blank and chance."""
    from weft.evals.world import EDIT_MEAN, evaluate_world

    count = found.pace.measured()
    say(f"{count} test records of each of 11 groups")
    found.world = evaluate_world(
        model.flow, groups=("generate", "edit"), count=count, steps=found.pace.steps, guidance=found.pace.guidance,
        seed=seed, baseline_count=min(8, count), out=folder / WORK / "world", shown=4,
    )  # fmt: skip
    for name in ("generate", EDIT_MEAN):
        say(f"{name}: {describe(found.world.groups[name].rate)}")


def teach(model: Model, found: Findings, folder: Path, seed: int, say: Say) -> None:
    """Fine-tune on the edit kind that the model has never seen, and measure it before and after."""
    from weft.cli.shipped import find_recipe
    from weft.evals.world import evaluate_world
    from weft.models.load import find_model
    from weft.train import read_recipe, run

    def success(flow: Any, groups: tuple[str, ...], count: int, name: str) -> WorldReport:
        return evaluate_world(
            flow, groups=groups, count=count, steps=found.pace.steps, guidance=found.pace.guidance, seed=seed,
            baseline_count=min(8, count), vae=False, out=folder / WORK / name,
        )  # fmt: skip

    count = found.pace.held_out()
    found.before = success(model.flow, (TONE,), count, "tone-before")
    group = next(iter(found.before.groups))
    say(f"before: {describe(found.before.groups[group].rate)} on {count} test records")
    path = find_recipe("tiny/tour_tone")
    batch = read_recipe(path).run.batch_size
    steps, examples = found.pace.train_steps(batch), found.pace.examples()
    tone, known = round(examples * 0.6), round(examples * 0.4)
    say(f"training {steps} steps of {batch} samples on {tone} records of the new kind and {known} of the known ones")
    start = time.perf_counter()
    result = run(
        path,
        [
            f"model.path={json.dumps(str(find_model(model.name).resolve()))}",
            f"run.folder={json.dumps(str((folder / WORK / 'tone').resolve()))}",
            f"run.steps={steps}",
            f"run.seed={seed}",
            f"data.0.source.args.count={tone}",
            f"data.1.source.args.count={known}",
        ],
        say=say,
    )
    assert result.export is not None
    seconds = time.perf_counter() - start
    found.train = {"steps": steps, "batch": batch, "tone": tone, "known": known, "seconds": seconds}
    taught = weft.load(result.export)
    assert found.world is not None
    found.after = success(taught.flow, (TONE,), count, "tone-after")
    say(f"after: {describe(found.after.groups[group].rate)}")
    found.train["known_before"] = found.world.groups[KNOWN].rate
    again = success(taught.flow, (KNOWN,), found.pace.measured(), "known-after")
    found.train["known_after"] = again.groups[KNOWN].rate


STAGES: dict[str, Callable[[Model, Findings, Path, int, Say], None]] = {
    "generate: pictures of sentences": generate,
    "edit: pictures changed by sentences": edit,
    "measure: what the oracle says": measure,
    "teach: a new kind of edit in about a minute": teach,
}


def describe(interval: Any) -> str:
    """'62.5 % [50.1, 74.3]' of a success rate."""
    return f"{100 * interval.value:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _between(value: float, low: int, high: int) -> int:
    return max(low, min(high, int(value)))


def _write_numbers(found: Findings, path: Path) -> None:
    """Everything measured, for programs."""
    reports = {"world": found.world, "tone_before": found.before, "tone_after": found.after}
    train = {key: value.dict() if hasattr(value, "dict") else value for key, value in found.train.items()}
    numbers = {
        "weft": weft.__version__,
        "seconds": found.seconds,
        "pace": asdict(found.pace),
        "generated": [bool(verdict.success) for _, _, verdict in found.generated],
        "edited": [bool(verdict.success) for _, _, verdict in found.edited],
        "moved": [bool(moved.verdict.success) for moved in found.moved],
        "referred": [bool(verdict.success) for _, _, verdict in found.referred],
        "chains": [[bool(verdict.success) for _, _, verdict in chain] for chain in found.chains],
        "train": train,
        **{name: report.dict() for name, report in reports.items() if report},
    }
    with atomic_write(path) as file:
        file.write((json.dumps(numbers, indent=2) + "\n").encode())
