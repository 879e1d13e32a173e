"""`weft eval world`: what the oracle says of a model, with intervals and baselines."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes

from weft.cli.options import ModelOptions, SamplingOptions, check_folder
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
            rescore_world(self.rescore, shown=self.shown, show=True)
            print(self.rescore / "report.html")
            return 0
        if self.sampling.size is not None:
            raise WeftError("the world's records have their own size; leave out --size")
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
