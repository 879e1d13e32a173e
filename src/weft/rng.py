"""The only source of randomness.

Every draw is a function of (seed, purpose, step, record id, sample index) and of nothing else, so a sample
does not depend on its batch, its process or on what was drawn before, and exact resume needs no loader state.
Numbers are drawn on the CPU in fp32 and moved afterwards, so they are the same on every device.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def seed_of(seed: int, purpose: str, step: int = 0, record: str = "", sample: int = 0) -> int:
    """A 63-bit seed derived from the five coordinates of a draw (SHA-256, stable across platforms)."""
    key = json.dumps([int(seed), purpose, int(step), record, int(sample)]).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1


def numpy_rng(seed: int, purpose: str, step: int = 0, record: str = "", sample: int = 0) -> np.random.Generator:
    """A NumPy generator at the given coordinates."""
    return np.random.default_rng(seed_of(seed, purpose, step, record, sample))


def generator(seed: int, purpose: str, step: int = 0, record: str = "", sample: int = 0) -> torch.Generator:
    """A CPU torch generator at the given coordinates."""
    import torch

    return torch.Generator("cpu").manual_seed(seed_of(seed, purpose, step, record, sample))


def normal(
    shape: tuple[int, ...], seed: int, purpose: str, step: int = 0, record: str = "", sample: int = 0
) -> torch.Tensor:
    """Standard normal fp32 noise on the CPU, `shape`, at the given coordinates."""
    import torch

    return torch.randn(shape, generator=generator(seed, purpose, step, record, sample), dtype=torch.float32)
