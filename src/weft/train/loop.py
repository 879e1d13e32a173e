"""The training loop. One counter, `step`; everything random or ordered is a function of it, so a resumed run is the
uninterrupted one, bit for bit on a CPU. The loop does not know which method it runs."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from weft.errors import WeftError
from weft.models.adapt import Ema
from weft.rng import seed_of
from weft.train.checkpoint import differences, newest, read_checkpoint, write_checkpoint
from weft.train.config import Recipe
from weft.train.exports import write_export
from weft.train.fed import Fed
from weft.train.feed import Feed, open_source
from weft.train.method import Method, Setting, make_method
from weft.train.optim import Optimizers
from weft.train.parallel import Processes
from weft.train.preempt import Preempted, watched
from weft.train.reading import plain, read_recipe
from weft.train.setup import Buffers, choose_modules, make_trainable, pick_device, trained_parameters
from weft.train.track import Tracker, open_trackers
from weft.types import Draw, Example, FlowModel, Trainable

Evaluator = Callable[[Trainable, int], dict[str, float]]


@dataclass(slots=True)
class RunResult:
    """What a run left behind: its folder, the exported model (None if none), and the last logged numbers."""

    folder: Path
    step: int
    export: Path | None
    last: dict[str, Any] = field(default_factory=dict)


def run(
    recipe: str | Path | dict[str, Any] | Recipe,
    overrides: Sequence[str] = (),
    *,
    evaluators: dict[str, Evaluator] | None = None,
    reward: Any = None,
    say: Callable[[str], None] = print,
) -> RunResult:
    """Train as the recipe says; continue by itself where the run folder holds a checkpoint.

    `evaluators` are called as f(model, step) -> {name: number} every `run.evaluate_every` steps, with EMA weights.
    `reward` is for methods that sample (nft, grpo), in place of the recipe's: a function from a list of (record,
    picture) pairs to one `weft.types.Score` each, or a `weft.reward.Mixture` of several. Raises WeftError for what a
    user can mend, Preempted (a SystemExit) after SIGTERM.
    """
    config = read_recipe(recipe, overrides)
    if evaluators and not config.run.evaluate_every:
        raise WeftError(f"{', '.join(evaluators)} would never be measured: run.evaluate_every is 0")
    return Trainer(config, evaluators or {}, say, reward).run()


class Trainer:
    """The state of a run. `Trainer(recipe).run()` is all there is to call."""

    def __init__(
        self,
        recipe: Recipe,
        evaluators: dict[str, Evaluator],
        say: Callable[[str], None] = print,
        reward: Any = None,
    ) -> None:
        self.processes = Processes()
        self.recipe, self.evaluators = recipe, evaluators
        self.say = say if self.processes.first else lambda line: None
        settings = recipe.run
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.folder = Path(settings.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device = self.processes.device(pick_device(settings.device))
        self.model = make_trainable(recipe, self.device)
        self.trained = choose_modules(recipe, self.model)
        self.parameters = trained_parameters(self.trained)
        if settings.grid_every and not isinstance(self.model, FlowModel):
            raise WeftError(f"run.grid_every: {type(self.model).__name__} draws no pictures; set it to 0")
        self.buffers = Buffers(self.trained)
        self.optimizers = Optimizers(self.trained, recipe.optim, settings.steps)
        ema = settings.ema
        self.ema = Ema(self.parameters, ema.decay, warmup=ema.warmup, every=ema.every) if ema is not None else None
        self.ema_start = ema.start if ema is not None else 0
        self.feed = Feed(recipe, self.model, self.trained, self.processes, self.say)
        setting = Setting(
            recipe, self.model, self.trained, self.parameters, self.feed, self.processes, self.device, reward,
            autocast=self.autocast, stopped=lambda: self.stop is not None, say=self.say,
        )  # fmt: skip
        self.method: Method = make_method(setting)
        self.step = 0
        self.saved: int | None = None
        self.stop: int | None = None  # the signal that asked to stop
        self.trackers: list[Tracker] = []
        self.last: dict[str, Any] = {}
        self.fixed: tuple[list[Example], list[str]] | None = None
        self.worker = ThreadPoolExecutor(1)
        self.ahead: tuple[int, Future[Fed] | None] = (-1, None)
        if settings.compile:
            for module in self.trained.values():
                module.compile()

    # -- state ---------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of this step (LoRA: adapters only). All processes call it, the first one writes."""
        if self.feed.cache is not None:
            self.feed.cache.flush()  # what a continued run finds must be what this one would find
        own = self.method.tensors()
        if self.processes.first:
            self._write(own)
        self.saved = self.step
        self.processes.wait()

    def _write(self, own: dict[str, dict[str, torch.Tensor]]) -> None:
        tensors: dict[str, dict[str, torch.Tensor]] = {
            "model": dict(self.parameters),
            "optimizer": self.optimizers.state(),
        }
        if self.ema is not None:
            tensors["ema"] = self.ema.shadow
        if buffers := self.buffers.changed():
            if self.processes.size > 1 and not getattr(self.model, "synchronised", False):
                raise WeftError(f"{next(iter(buffers))} changes while training: such a module trains on one process")
            tensors["buffers"] = buffers
        tensors |= {name: group for name, group in own.items() if group}
        state = {"recipe": plain(self.recipe), "torch": torch.__version__, "method": self.method.state()}
        write_checkpoint(self.folder, self.step, tensors, state, self.recipe.run.keep)

    def resume(self) -> None:
        """Continue from the newest complete checkpoint of the run folder, if there is one."""
        path = newest(self.folder, complain=lambda line: self.say(f"skipped a checkpoint: {line}"))
        if path is None:
            return
        checkpoint = read_checkpoint(path)
        changes = differences(checkpoint.state["recipe"], plain(self.recipe))
        if changes and not self.recipe.run.allow_changes:
            raise WeftError(
                f"{path} was made by another recipe ({'; '.join(changes)}): choose a new run.folder, or continue "
                f"all the same with run.allow_changes=true"
            )
        saved = checkpoint.tensors["model"]
        if set(saved) != set(self.parameters):
            odd = sorted(set(saved) ^ set(self.parameters))[0]
            raise WeftError(f"{path} holds other parameters than the model trains, for example {odd}")
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                parameter.copy_(saved[key])
            self.buffers.load(checkpoint.tensors.get("buffers", {}))
        self.optimizers.load(checkpoint.tensors.get("optimizer", {}))
        if self.ema is not None:
            if "ema" not in checkpoint.tensors:
                raise WeftError(f"{path} has no EMA weights, but run.ema is set: start anew or unset it")
            self.ema.load(checkpoint.tensors["ema"])
        self.method.load(checkpoint.step, checkpoint.tensors, checkpoint.state.get("method", {}))
        self.step = self.saved = checkpoint.step
        self.say(f"resumed {path}")

    # -- one step ------------------------------------------------------------------------------------------------

    def autocast(self) -> Any:
        if self.recipe.run.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def train_step(self) -> dict[str, Any]:
        """One optimiser step. Raises WeftError on a non-finite loss or gradient, the weights still unchanged."""
        fed = self.next_batch()
        if fed is None:  # asked to stop, here or in another process
            return {}
        self.agree(fed)
        if fed.count == 0:  # nothing to learn from: the weights stay, the step is counted
            return self._stepped({"loss": 0.0, "group": fed.group, "samples": 0, "lr": 0.0, "grad_norm": 0.0}, fed)
        # for dropout inside modules
        torch.manual_seed(seed_of(self.recipe.run.seed, "modules", self.step, sample=self.processes.rank))
        total, metrics = self.backward(fed)
        self.processes.sum_gradients(list(self.parameters.values()))
        norm = float(self.optimizers.clip(self.recipe.optim.clip))
        if not math.isfinite(norm):
            self.optimizers.zero()
            raise WeftError(
                f"step {self.step}: the gradient is not finite (norm {norm}), the weights are unchanged; "
                f"samples {', '.join(fed.ids)}"
            )
        factor = self.optimizers.factor(self.step)
        self.optimizers.step(self.step)
        if self.ema is not None:
            self.ema.update(self.step + self.ema_start)
        lr = self.optimizers.base[0] * factor
        values = {"loss": total, "group": fed.group, "samples": fed.count, "lr": lr, "grad_norm": norm}
        return self._stepped(values | metrics, fed)

    def agree(self, fed: Fed) -> None:
        """All processes know what this step leaves out. If one of them cannot go on, all save and raise: what was
        learned so far is kept, and a WeftError (its own error where it happened) says why."""
        news, problem = self.feed.unusable.agree(fed, self.processes)
        if news:
            self.log({"skipped": len(self.feed.unusable.met), "skipped_records": news})
        if problem is None:
            return
        if self.saved != self.step:
            self.save()
        raise fed.error or WeftError(problem)

    def _stepped(self, values: dict[str, Any], fed: Fed) -> dict[str, Any]:
        self.step += 1
        return {**values, **fed.metrics, **self.method.stepped(self.step)}

    def next_batch(self) -> Fed | None:
        """This step's batch; with `run.prefetch` the next one is begun in a thread (it depends on the step alone)."""
        if not self.recipe.run.prefetch or self.feed.cache is not None:
            return self.method.batch(self.step)
        step, future = self.ahead
        fed = future.result() if future is not None and step == self.step else self.feed.batch(self.step)
        self.ahead = (self.step + 1, None)
        if self.step + 1 < self.recipe.run.steps:
            self.ahead = (self.step + 1, self.worker.submit(self.feed.batch, self.step + 1))
        return fed

    def backward(self, fed: Fed) -> tuple[float, dict[str, float]]:
        """Gradients of this process's part of the mean loss over the whole batch, micro-batch by micro-batch.

        Returns the whole batch's loss. Raises WeftError in every process if one sample's loss is not finite.
        """
        total, sums, bad = 0.0, dict[str, tuple[float, int]](), list[str]()
        for examples, ids in fed.cut():
            draw = Draw(self.recipe.run.seed, self.step, ids)
            with self.autocast():
                result = self.method.loss(examples, draw)
            losses = result.per_sample
            finite = torch.isfinite(losses).tolist()
            total += float(losses.detach().sum()) / fed.count
            if not all(finite):
                bad += [name for name, ok in zip(ids, finite, strict=True) if not ok]
                continue
            (losses.sum() / fed.count).backward()
            for key, value in result.metrics.items():
                before, count = sums.get(key, (0.0, 0))
                sums[key] = (before + float(value) * len(ids), count + len(ids))
        (total,) = self.processes.sum(total)
        if not math.isfinite(total):
            self.optimizers.zero()
            bad = self.processes.gather(bad)
            raise WeftError(
                f"step {self.step}: the loss is not finite, the weights are unchanged; samples {', '.join(bad)}"
            )
        return total, {key: value / count for key, (value, count) in sums.items()}

    # -- looking at it -------------------------------------------------------------------------------------------

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Eval mode with EMA weights."""
        with self.ema.swapped() if self.ema is not None else nullcontext():
            for module in self.trained.values():
                module.eval()
            try:
                yield
            finally:
                for module in self.trained.values():
                    module.train()

    def validate(self) -> dict[str, float]:
        """Held-out losses, prefixed `val/`."""
        config = self.recipe.validate
        assert config is not None  # checked with the recipe
        if self.fixed is None:
            source = open_source(config.source)
            records = [source[i] for i in range(min(config.count, len(source)))]
            self.fixed = self.feed.fixed(records, config.batch_size)
        with self.averaged(), self.autocast():
            values = self.method.held_out(*self.fixed, config.sigmas, self.recipe.run.seed, config.batch_size)
        return {f"val/{k}": v for k, v in values.items()}

    def look(self, last: bool) -> None:
        """Whatever is due after this step: validation, evaluators, picture grid."""
        settings = self.recipe.run

        def due(every: int) -> bool:
            return every > 0 and (self.step % every == 0 or last)

        if self.ahead[1] is not None and any(
            map(due, (settings.validate_every, settings.evaluate_every, settings.grid_every))
        ):
            wait([self.ahead[1]])  # it uses the encoders, and so do these

        values: dict[str, Any] = {}
        if due(settings.validate_every):
            values |= self.validate()
        if due(settings.evaluate_every):
            with self.averaged():
                for name, evaluator in self.evaluators.items():
                    values |= {f"{name}/{k}": v for k, v in evaluator(self.model, self.step).items()}
        if due(settings.grid_every):
            from weft.train.grid import draw_grid

            with self.averaged():
                draw_grid(
                    self.model, self.recipe.grid, self.feed, self.folder / "samples" / f"step-{self.step:06d}.png"
                )
        if values:
            self.log(values)
            self.say(f"step {self.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))

    def log(self, values: dict[str, Any]) -> None:
        self.last |= values
        for tracker in self.trackers:
            tracker.log(self.step, values)

    # -- the run -------------------------------------------------------------------------------------------------

    def run(self) -> RunResult:
        """From the newest checkpoint (or step 0) to `run.steps`, then export."""
        settings = self.recipe.run
        self.resume()
        if self.processes.first:
            recipe_file = self.folder / "recipe.yaml"
            recipe_file.write_text(yaml.safe_dump(plain(self.recipe), sort_keys=False), encoding="utf-8")
            self.trackers = open_trackers(settings.trackers, self.folder, self.step, plain(self.recipe))
        count = sum(p.numel() for p in self.parameters.values())
        self.say(f"training {count:,} parameters of {', '.join(self.trained)} on {self.device}, step {self.step}")
        for note in self.feed.notes() if self.processes.first else ():
            self.say(f"note: {note}")
        try:
            with watched(self._ask):
                self.prepare_data()
                self.loop()
        finally:
            self.worker.shutdown(cancel_futures=True)
            for tracker in self.trackers:
                tracker.close()
        if settings.export and self.processes.first:
            self.export()
        self.processes.wait()
        return RunResult(self.folder, self.step, self.folder / "export" if settings.export else None, self.last)

    def prepare_data(self) -> None:
        cache = self.recipe.cache
        if cache is None or not cache.ahead:
            return
        if not self.feed.ahead(lambda: self.stop is not None):
            return
        if cache.drop_encoders:
            if self.recipe.run.validate_every:
                self.validate()  # encodes the held-out examples while there is an encoder
            if hasattr(self.model, "empty_text"):
                self.model.empty_text()
            needed = {*self.trained, *getattr(self.model, "step_modules", lambda: ())()}
            for name, module in self.model.modules().items():
                if name not in needed:
                    module.to("meta")

    def loop(self) -> None:
        settings = self.recipe.run
        started, since, samples = time.perf_counter(), self.step, 0
        sums, held = dict[str, list[float]](), dict[str, Any]()  # held: the newest of what steps have reported
        while self.step < settings.steps:
            self.halt_if_asked()
            values = self.train_step()
            if not values:
                continue  # asked to stop before the batch was there
            group = values.pop("group")
            samples += values.pop("samples")
            held |= values  # rewards come with the first step of an epoch, which need not be one that is logged
            for key in (f"loss/{group}", "loss"):
                sums.setdefault(key, []).append(values["loss"])
            last = self.step == settings.steps
            if self.step % settings.log_every == 0 or last:
                seconds = time.perf_counter() - started
                means = {k: sum(v) / len(v) for k, v in sums.items()}
                rates = {"steps_per_s": (self.step - since) / seconds, "samples_per_s": samples / seconds}
                self.log({**held, **means, **rates})
                self.say(
                    f"step {self.step}/{settings.steps}: loss {means['loss']:.4f}, lr {values['lr']:.3g}, "
                    f"grad {values['grad_norm']:.3g}, {rates['steps_per_s']:.2f} steps/s"
                )
                started, since, samples, sums, held = time.perf_counter(), self.step, 0, {}, {}
            looked = time.perf_counter()
            if self.processes.first:
                self.look(last)
            if self.step % settings.checkpoint_every == 0 or last:
                self.save()
            started += time.perf_counter() - looked  # rates are of training alone
        self.halt_if_asked()

    def _ask(self, number: int) -> None:
        self.stop = number

    def halt_if_asked(self) -> None:
        """Save and leave if a signal asked for it, here or in another process: all of them leave at the same step."""
        if not self.processes.sum(float(self.stop is not None))[0]:
            return
        self.stop = self.stop or int(signal.SIGTERM)
        if self.saved != self.step:
            self.save()
        self.say(f"stopped by signal {self.stop} at step {self.step}, state saved")
        raise Preempted(128 + self.stop)

    def export(self) -> Path:
        """The trained model (EMA weights if there are any) in `<run folder>/export`; LoRA: the adapter file."""
        facts = {"step": self.step, "weights": "ema" if self.ema is not None else "raw", "recipe": plain(self.recipe)}
        with self.averaged():
            final = write_export(self.folder, self.recipe, self.model, self.trained, facts)
        self.say(f"exported {final}")
        return final
