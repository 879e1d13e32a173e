"""A run whose rewards come from the real service, over HTTP, through a line that loses, delays, garbles and shuffles:
it finishes, learns as much as without faults, and trains on no value that nobody gave."""

from __future__ import annotations

import json
import math
import random
import threading
import time
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from test_online import bright, grey, log, quiet, recipe, requests
from test_reward_chaos import server
from test_reward_service import served
from tiny import tiny_kontext_folder
from weft.evals.stats import bootstrap
from weft.reward.client import RewardClient
from weft.sample.rollout import sample_flow
from weft.train import read_recipe
from weft.train.loop import Trainer

STEPS = 7
FAULTS = (("slow", 0.10), ("500", 0.15), ("malformed", 0.18), ("nan", 0.20))  # cumulated: 10, 5, 3 and 2 %


class Line:
    """A relay before the service: faults by chance, an outage after `away` requests, short replies in any order."""

    def __init__(self, target: str, patience: float, seed: int, away: int = 12) -> None:
        self.target, self.patience, self.dice, self.away = target, patience, random.Random(seed), away
        self.count, self.back, self.lock = 0, 0.0, threading.Lock()
        self.faults: dict[str, int] = {}

    def __call__(self, body: Any) -> Any:
        with self.lock:
            roll, short, order = self.dice.random(), self.dice.random() < 0.1, self.dice.randrange(1 << 30)
            self.count += 1
            if self.count == self.away:
                self.back = time.monotonic() + 2 * self.patience
            kind = "outage" if time.monotonic() < self.back else next((k for k, p in FAULTS if roll < p), "fine")
            kind = "short" if kind == "fine" and short else kind
            self.faults[kind] = self.faults.get(kind, 0) + 1
        if kind == "outage":
            return None
        if kind == "slow":
            time.sleep(1.5 * self.patience)
        if kind == "500":
            return 500, b"Traceback (most recent call last)", {}
        reply = httpx.post(f"{self.target}/score", json=body, timeout=600).json()
        random.Random(order).shuffle(reply["scores"])
        if kind == "short":
            reply["scores"] = reply["scores"][: len(reply["scores"]) // 2]
        if kind == "nan":
            reply["scores"][0]["value"] = math.nan
        data = json.dumps(reply).encode()
        return 200, data[:-7] if kind == "malformed" else data, {"Content-Type": "application/json"}


def patience_for(address: str) -> float:
    """Seconds after which a request must have failed: far longer than one takes on this machine as it is now."""
    pairs = [(record, record.load(record.source)) for record in requests(4)]
    taken = []
    for _ in range(3):
        started = time.monotonic()
        assert all(score.value is not None for score in RewardClient(address, timeout=600)(pairs))
        taken.append(time.monotonic() - started)
    return max(0.5, 8 * max(taken))


def outcome(model: Any) -> list[float]:
    """The rewards of fixed requests with fixed seeds."""
    conditions = [c for c in model.encode(requests(4)) for _ in range(8)]
    rollout = sample_flow(model, conditions, seeds=list(range(32)), steps=3)
    return [s.value or 0.0 for s in bright([(None, picture) for picture in grey(rollout.latents, rollout.sizes)])]


def trained_with(folder: Any, out: Any, reward: Any) -> tuple[list[float], list[float]]:
    """The outcome before and after a short run."""
    tree = recipe(folder, out, "nft", {"old": "copy", "kl": 0}, model={"lora": None}, optim={"lr": 1e-3}, reward=None)
    tree["rollout"] |= {"groups": 2, "group_size": 12, "batch": 8, "updates": 1}
    tree["run"] |= {"steps": STEPS, "batch_size": 24, "export": False}
    trainer = Trainer(read_recipe(tree), {}, quiet, reward)
    trainer.model.decode = grey
    before = outcome(trainer.model)
    trainer.run()
    return before, outcome(trainer.model)


@pytest.mark.long
def test_a_run_through_faults_learns_what_a_run_without_them_learns(tmp_path):
    torch.set_num_threads(1)
    folder = tiny_kontext_folder(tmp_path / "tiny")
    before, after = trained_with(folder, tmp_path / "fine", bright)
    assert np.mean(after) - np.mean(before) > 0.1, "the fault-free run learns"

    given: list[tuple[float, float | None]] = []
    with served(bright) as (address, _):
        patience = patience_for(address)
        line = Line(address, patience, seed=5)
        with server(line) as url:
            client = RewardClient(
                url, chunk=4, concurrency=2, timeout=patience, retries=2, delay=0.02, cooldown=0.1, patience=600
            )

            def reward(batch: Any) -> Any:
                scores = client(batch)
                given.extend(zip((s.value for s in bright(batch)), (s.value for s in scores), strict=True))
                return scores

            _, through = trained_with(folder, tmp_path / "chaos", reward)
    assert sum(n for kind, n in line.faults.items() if kind != "fine") >= 10, line.faults
    assert {"outage", "500"} <= set(line.faults)
    # no fake value: whatever was trained on is what the service said of that very picture
    assert len(given) == STEPS * 24
    assert all(answer is None or answer == pytest.approx(truth, abs=1e-12) for truth, answer in given)
    rows = log(tmp_path / "chaos")
    masked = sum(answer is None for _, answer in given) / len(given)
    assert np.mean([row["reward_missing"] for row in rows]) == pytest.approx(masked) and masked < 0.2
    # the final reward lies within the fault-free run's interval
    interval = bootstrap(after, level=0.99)
    print(f"before {np.mean(before):.3f}, fault-free {interval}, through faults {np.mean(through):.3f}, "
          f"masked {masked:.1%}, {line.faults}")  # fmt: skip
    assert interval.low <= np.mean(through) <= interval.high
