"""`weft eval world` and `weft eval motion-world`: what the oracles say of a model, with intervals and baselines."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes

from weft.cli.options import ModelOptions, MovementOptions, SamplingOptions, check_folder, refuse
from weft.errors import WeftError


@dataclass(kw_only=True)
class EvalWorld:
    """Success on the embedded world, measured by its oracle: by task, with bootstrap intervals, collateral change,
    PSNR outside the edit mask, and copy-the-source, blank and chance beside it. Writes results and an HTML report;
    an interrupted run goes on where it stopped."""

    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FOLDER", help_behavior_hint="")] = None
    """The folder of the results; default: out/eval-world-MODEL."""
    groups: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[GROUP ...]", help_behavior_hint="")] = ()
    """generate, edit, edit/KIND, unseen, held-out pair, held-out kind, references (1 to 4 of them), concepts; default:
    all without references."""
    count: int = 64
    """Records in each group; the intervals shrink with its root (published numbers use 512)."""
    split: Literal["test", "val", "train"] = "test"
    """Which part of the world; the parts share no scene."""
    data_seed: int = 0
    """Draws the records, as --seed draws the pictures."""
    shown: int = 8
    """Records of each group that the report shows."""
    rescore: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Judge the pictures of a results folder again, without a model."""
    sampling: OmitArgPrefixes[SamplingOptions] = field(default_factory=lambda: SamplingOptions(batch=32))
    loading: OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)

    def run(self) -> int:
        from weft.evals.world import evaluate_world, rescore_world
        from weft.evals.world_groups import DEFAULT, expand

        if self.rescore is not None:
            refuse(self, ("rescore", "shown"), "with --rescore")
            rescore_world(self.rescore, shown=self.shown, show=True)
            print(self.rescore / "report.html")
            return 0
        if self.sampling.size is not None:
            raise WeftError("the world's records have their own size; leave out --size")
        if self.loading.rewriter is not None:
            raise WeftError("the world's requests are judged as they are asked; leave out --rewriter")
        groups = expand(self.groups or DEFAULT)
        options = self.sampling.options()
        references = any(
            group in expand(["multi_edit", "multi_generate", "references", "concepts"]) for group in groups
        )
        name = Path(self.loading.name(references)).name
        out = self.out or Path("out") / f"eval-world-{name}"
        check_folder(out)
        model = self.loading.load(references)
        steps, guidance = model.resolve(options)
        evaluate_world(
            model.flow,
            split=self.split,
            groups=groups,
            count=self.count,
            steps=steps,
            guidance=guidance,
            negative=options.negative,
            solver=options.solver,
            seed=self.sampling.seed,
            data_seed=self.data_seed,
            batch_size=options.batch,
            baseline_count=min(64, self.count),
            out=out,
            shown=self.shown,
            progress=sys.stderr.isatty(),
            show=True,
        )
        print(out / "report.html")
        return 0


@dataclass(kw_only=True)
class EvalMotionWorld:
    """Movements and captions of a motion model on the embedded motion world, measured by its oracle: full success and
    attribute accuracy by task, with bootstrap intervals, and what the exact target, its copy through the model's
    quantiser, the source as it was and chance score. Turns of a chain are played. Writes results, an HTML report and a
    page that plays the movements; an interrupted run goes on where it stopped."""

    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FOLDER", help_behavior_hint="")] = None
    """The folder of the results; default: out/eval-motion-world-MODEL."""
    groups: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[GROUP ...]", help_behavior_hint="")] = ()
    """generate, edit, edit/KIND, in_context, chain, between, knowledge, reflect, describe, unseen, held-out pair,
    held-out kind; default: all that are not held out."""
    count: int = 64
    """Records in each group; the intervals shrink with its root (published numbers use 512)."""
    split: Literal["test", "val", "train"] = "test"
    """Which part of the world; the parts share no clip."""
    data_seed: int = 0
    """Draws the records, as --seed draws the movements."""
    shown: int = 4
    """Records of each group that the report shows."""
    rescore: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Judge the movements of a results folder again, without a model."""
    sampling: OmitArgPrefixes[SamplingOptions] = field(default_factory=lambda: SamplingOptions(batch=32))
    movement: OmitArgPrefixes[MovementOptions] = field(default_factory=MovementOptions)
    loading: OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)

    def run(self) -> int:
        from weft.evals.motion_groups import DEFAULT, MOTIONS
        from weft.evals.motion_world import evaluate_motion_world, rescore_motion_world

        if self.rescore is not None:
            refuse(self, ("rescore", "shown"), "with --rescore")
            rescore_motion_world(self.rescore, shown=self.shown, show=True)
            print(self.rescore / "report.html")
            return 0
        options = self.movement.options(self.sampling)
        if options.seconds is not None:
            raise WeftError("the world's movements have their own lengths; leave out --seconds")
        groups = MOTIONS.expand(self.groups or DEFAULT)
        model = self.loading.load_motion()
        out = self.out or Path("out") / f"eval-motion-world-{Path(model.name).name}"
        check_folder(out)
        chosen = model.model.sampling(options)
        evaluate_motion_world(
            model.model,
            name=model.name,
            split=self.split,
            groups=groups,
            count=self.count,
            temperature=chosen.temperature,
            top_k=chosen.top_k,
            top_p=chosen.top_p,
            guidance=chosen.guidance,
            captions=options.temperature or 0.0,
            rounds=options.rounds,
            seed=self.sampling.seed,
            data_seed=self.data_seed,
            batch_size=options.batch,
            baseline_count=min(64, self.count),
            out=out,
            shown=self.shown,
            progress=sys.stderr.isatty(),
            show=True,
        )
        print(out / "report.html")
        return 0
