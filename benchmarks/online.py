"""An epoch of post-training: weft against a loop in the manner of the public scripts, on one tiny model.

    python benchmarks/online.py                          # NFT and GRPO-Fast on zoo/tiny-kontext
    python benchmarks/online.py --model random           # on a random model of 2 layers: fixed costs dominate
    python benchmarks/online.py --upstream CHECKOUT      # also writes down the commit that the loop was read from

The other loop is written here, after flow_grpo's scripts/train_*.py and scripts/train_nft_*.py of DiffusionNFT and
UniWorld-V2: every sample is encoded, also the twelve of one request; rollouts and updates share one small batch, as
released for editing models (NFT: 3, groups of 12, UniWorld-V2 config/kontext_nft.py; GRPO with a window: 4, groups of
16, flow_grpo config/grpo.py, counting_qwenimage_edit); rewards are asked for when all rollouts are done. It calls the
same network, step kernels and losses on the same requests, seeds and noise levels, so that the gradients of both agree;
their relative distance is printed. Two ways to be kinder to it: `--equal` gives it weft's batches, `--threads-reward`
lets threads ask for rewards meanwhile, as most of the public scripts do.

Both run in this process in turn, on one thread. Times are what an idle core would take: the process's CPU seconds and
the seconds for which a loop waits for rewards, so that a busy machine counts little (where it counts, against weft: its
wait is the wall's); medians over `--repeat` epochs.
The reward is a service of one worker that needs half of the rollout's time (`--latency`) for all samples, asleep.
Prints one JSON line for each method; `ratio_without_reward` leaves all waiting out on both sides.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from tiny import tiny_kontext_folder  # noqa: E402
from weft import rng  # noqa: E402
from weft.reward.advantage import AdvantageConfig, advantages, optimality  # noqa: E402
from weft.sample import kernels  # noqa: E402
from weft.sample.rollout import sample_flow  # noqa: E402
from weft.train import read_recipe  # noqa: E402
from weft.train.grpo import clipped_loss  # noqa: E402
from weft.train.loop import Trainer  # noqa: E402
from weft.train.nft import policy_loss  # noqa: E402
from weft.train.policy import masked_mean  # noqa: E402
from weft.train.rollouts import Sample, plan_epoch  # noqa: E402
from weft.types import Score  # noqa: E402

IMAGES, BATCH, MICRO = 48, 12, 24  # of an epoch; at once in weft's rollouts and in its updates
GROUP = {"nft": 12, "grpo": 16}
RELEASED = {"nft": 3, "grpo": 4}  # samples at once in the public configurations
TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
           "attn.add_v_proj", "attn.to_add_out"]  # fmt: skip


class Service:
    """The mean colour as the reward, from one worker that takes `seconds` for each picture."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.lock = threading.Lock()

    def __call__(self, batch: Any) -> list[Score]:
        with self.lock:
            time.sleep(self.seconds * len(batch))
        return [Score(float(np.asarray(picture).mean()) / 255) for _, picture in batch]


class Clock:
    """Seconds by part: CPU of the process, or for waiting the wall's."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str, now: Callable[[], float] = time.process_time) -> Iterator[None]:
        started = now()
        yield
        self.parts[part] = self.parts.get(part, 0.0) + now() - started


def recipe(method: str, model: str, folder: str) -> dict[str, Any]:
    """The settings of both, with fewer groups."""
    nft = method == "nft"
    rollout = {"groups": IMAGES // GROUP[method], "group_size": GROUP[method], "batch": BATCH}
    rollout |= {"steps": 6, "solver": "dpmpp_2m_release"} if nft else {"steps": 10, "kind": "cps", "eta": 0.8}
    if not nft:
        rollout["window"] = {"size": 2, "range": [0, 5]}
    return {
        "model": {"path": model, "lora": {"rank": 32, "alpha": 64, "targets": TARGETS}},
        "method": {"name": method, "options": {"kl": 1e-4} if nft else {"kl": 0.0, "clip": 1e-5}},
        "rollout": rollout,
        "data": [{"source": {"call": "weft.world:records", "args": {"count": 64, "tasks": ["edit"]}}}],
        "optim": {"lr": 3e-4, "weight_decay": 1e-4},
        "run": {"folder": folder, "steps": 1000, "batch_size": MICRO, "threads": 1, "ema": {"decay": 0.9},
                "device": "cpu"},
    }  # fmt: skip


class Public:
    """The other loop; it borrows a trainer's network, adapters, optimiser and requests, and none of its order."""

    def __init__(self, trainer: Trainer, service: Service, batch: int, threads: bool) -> None:
        self.trainer, self.service, self.batch, self.threads = trainer, service, batch, threads
        self.online: Any = trainer.method
        self.objective = self.online.objective

    def epoch(self, number: int) -> tuple[dict[str, float], float]:
        """Seconds by part of one epoch with one update, and the update's gradient norm."""
        t, online, clock, settings = self.trainer, self.online, Clock(), self.online.rollout
        model: Any = t.model
        plan = plan_epoch(t.feed, settings, t.processes, online.seed, number, ())
        cuts = [plan.samples[i : i + self.batch] for i in range(0, len(plan.samples), self.batch)]
        pool = ThreadPoolExecutor(8)
        pictures, waiting = [], []
        for module in t.trained.values():
            module.eval()
        with torch.no_grad(), self.objective.policies.using(self.objective.rollout_policy):
            for cut in cuts:
                with clock("encode"):
                    conditions = model.encode([s.record for s in cut])
                with clock("rollout"):
                    found = sample_flow(
                        model, conditions, seeds=[s.seed for s in cut], steps=settings.steps, solver=settings.solver,
                        kind=settings.kind, eta=settings.eta, keep=self.objective.keep,
                        window=cut[0].window if settings.window is not None else None,
                    )  # fmt: skip
                for i, (sample, condition) in enumerate(zip(cut, conditions, strict=True)):
                    sample.condition, sample.sigmas, sample.x0 = condition, found.sigmas, found.latents[i]
                    if found.trajectory is not None:
                        sample.states, sample.log_probs = found.trajectory[i], found.log_probs[i]
                with clock("decode"):
                    images = model.decode(found.latents, [c.size for c in conditions])
                pictures.append([(s.record, image) for s, image in zip(cut, images, strict=True)])
                if self.threads:
                    waiting.append(pool.submit(self.service, pictures[-1]))
        for module in t.trained.values():
            module.train()
        if self.threads:
            with clock("reward wait", time.perf_counter):
                answers = [job.result() for job in waiting]
        else:
            with clock("reward wait"):
                answers = [self.service(p) for p in pictures]
            clock.parts["reward wait"] += self.service.seconds * len(plan.samples)  # asleep for all of it
        with clock("update"):
            rewards = [score.value for answer in answers for score in answer]
            values = advantages(rewards, [s.group for s in plan.samples], AdvantageConfig())  # type: ignore[arg-type]
            for sample, value in zip(plan.samples, values, strict=True):
                sample.advantage = float(value)
            norm = self.update(number, plan.samples)
        return clock.parts, norm

    def update(self, step: int, samples: list[Sample]) -> float:
        """One optimiser step: micro-batches of the rollouts' size, each noise level a forward and backward pass."""
        t, settings = self.trainer, self.online.rollout
        count = self.objective.count(settings) * len(samples)
        order = rng.numpy_rng(self.online.seed, "any order", step).permutation(len(samples))
        for start in range(0, len(samples), self.batch):
            cut = [samples[i] for i in order[start : start + self.batch]]
            levels = [self.objective.steps_of(self.online.seed, s.seed, s.window, step, settings.steps) for s in cut]
            batch = t.model.prepare([s.condition for s in cut])
            for column in zip(*levels, strict=True):
                loss = self.nft if self.objective.rollout_policy == "old" else self.grpo
                (loss(cut, column, batch, step).sum() / count).backward()
        norm = float(t.optimizers.clip(1.0))
        t.optimizers.step(step)
        t.ema.update(step)
        self.online.stepped(step + 1)
        return norm

    def nft(self, cut: list[Sample], ks: tuple[int, ...], batch: Any, step: int) -> torch.Tensor:
        model, policies, options = self.trainer.model, self.objective.policies, self.objective.options
        x0 = torch.stack([s.x0 for s in cut])
        noise = torch.stack([
            rng.normal(tuple(s.x0.shape), s.seed, "nft", step, sample=k) for s, k in zip(cut, ks, strict=True)
        ])  # fmt: skip
        sigma = torch.stack([s.sigmas[k] for s, k in zip(cut, ks, strict=True)])
        level = sigma.reshape(-1, 1, 1, 1)
        x = (1 - level) * x0 + level * noise
        with torch.no_grad(), policies.using("old"):
            v_old = model.velocity(x, sigma, batch)
        with torch.no_grad(), policies.using("off"):
            v_ref = model.velocity(x, sigma, batch)
        v = model.velocity(x, sigma, batch)
        r = optimality(torch.tensor([s.advantage for s in cut], dtype=torch.float64), 5.0)
        loss = policy_loss(v, v_old, x, x0, sigma, r, beta=1.0, clip=5.0)
        return (loss + options.kl * masked_mean((v - v_ref).square(), None)).float()

    def grpo(self, cut: list[Sample], ks: tuple[int, ...], batch: Any, step: int) -> torch.Tensor:
        settings, clip = self.online.rollout, self.objective.options.clip
        pairs = list(zip(cut, ks, strict=True))
        x, after = (torch.stack([s.states[k + d] for s, k in pairs]) for d in (0, 1))
        now, then = (torch.stack([s.sigmas[k + d] for s, k in pairs]) for d in (0, 1))
        v = self.trainer.model.velocity(x, now, batch).float()
        found = kernels.step(x, v, now, then, kind=settings.kind, eta=settings.eta, x_next=after)
        ratio = (found.log_prob - torch.stack([s.log_probs[k] for s, k in pairs])).exp()
        return clipped_loss(ratio, torch.tensor([s.advantage for s in cut]), clip, clip)


def weft_epoch(trainer: Trainer, clock: Clock) -> tuple[dict[str, float], float]:
    """The same of one `train_step`. Its log is in wall-clock seconds; here the parts are CPU seconds, by patches of the
    functions that make them."""
    started = time.process_time()
    values = trainer.train_step()
    total = time.process_time() - started
    parts = dict(clock.parts)
    clock.parts.clear()
    parts["reward wait"] = values["seconds/reward_wait"]
    parts["update"] = total - sum(parts[k] for k in ("encode", "rollout", "decode"))
    return parts, values["grad_norm"]


def watched(trainer: Trainer) -> Clock:
    """Measure a trainer's encoders, sampler and decoder from outside."""
    from weft.train import rollouts

    clock, model, feed = Clock(), trainer.model, trainer.feed
    encode, sample, decode = feed.conditions, rollouts._sample, model.decode  # type: ignore[attr-defined]

    def around(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with clock(part):
                return function(*args, **kwargs)

        return timed

    feed.conditions = around("encode", encode)  # type: ignore[method-assign]
    rollouts._sample = around("rollout", sample)
    model.decode = around("decode", decode)  # type: ignore[attr-defined]
    return clock


def measure(method: str, options: argparse.Namespace, model: str) -> dict[str, Any]:
    """Alternating epochs of both; the first of each warms up and must have equal gradients."""
    with tempfile.TemporaryDirectory() as folder:
        service = Service()
        ours, theirs = (
            Trainer(read_recipe(recipe(method, model, f"{folder}/{who}")), {}, lambda line: None, service)
            for who in ("weft", "public")
        )
        clock = watched(ours)
        public = Public(theirs, service, BATCH if options.equal else RELEASED[method], options.threads_reward)
        found: dict[str, list[dict[str, float]]] = {"weft": [], "public": []}
        difference = 0.0
        for number in range(options.repeat + 1):
            a, norm = weft_epoch(ours, clock)
            b, other = public.epoch(number)
            if number:
                found["weft"].append(a)
                found["public"].append(b)
            else:
                difference = abs(norm - other) / other
            service.seconds = options.latency * a["rollout"] / IMAGES
    totals = {who: [sum(row.values()) for row in rows] for who, rows in found.items()}
    free = {who: [sum(row.values()) - row["reward wait"] for row in rows] for who, rows in found.items()}
    return {
        "method": method,
        "model": options.model,
        "ratio": ratio(totals),
        "ratio_without_reward": ratio(free),
        "images_per_s": {who: round(IMAGES / median(values), 2) for who, values in totals.items()},
        "seconds": {who: {k: round(median(r[k] for r in rows), 4) for k in rows[0]} for who, rows in found.items()},
        "latency": {"all": round(service.seconds * IMAGES, 4), "one batch": round(service.seconds * BATCH, 4)},
        "images": IMAGES,
        "rollout_batch": {"weft": BATCH, "public": public.batch},
        "update_batch": {"weft": MICRO, "public": public.batch},
        "reward_in_threads": options.threads_reward,
        "gradient_difference": float(f"{difference:.2g}"),
        "repeat": options.repeat,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "upstream": options.upstream and commit(options.upstream),
    }


def ratio(totals: dict[str, list[float]]) -> float:
    """Median over pairs of epochs of the other loop's seconds over weft's."""
    return round(median(b / a for a, b in zip(totals["weft"], totals["public"], strict=True)), 2)


def commit(path: Path) -> str | None:
    """The commit of a checkout or a bare repository."""
    git = ["git", "-C", str(path), "rev-parse", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["nft", "grpo"], choices=list(RELEASED))
    parser.add_argument("--model", default="tiny-kontext", choices=["tiny-kontext", "random"])
    parser.add_argument("--latency", type=float, default=0.5)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--equal", action="store_true")
    parser.add_argument("--threads-reward", action="store_true")
    parser.add_argument("--upstream", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if model == "random":
            model = str(tiny_kontext_folder(Path(folder) / "model"))
        for method in options.methods:
            print(json.dumps(measure(method, options, model)), flush=True)


if __name__ == "__main__":
    main()
