"""Learning a reward from comparisons: which of two attempts at one request is better.

Bradley-Terry, and the uncertainty-aware form of PURM (arXiv 2503.22480), HPSv3 (arXiv 2508.03789) and EditReward
(arXiv 2509.26346, section 3.2): a score is a Gaussian N(mu, sigma^2), and the better one wins with probability
P = E[sigmoid(z)], z ~ N(mu_better - mu_worse, sigma_better^2 + sigma_worse^2). Scores are [..., 1] (mu) or [..., 2]
(mu, log sigma; the log-variance is twice that).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = {"bradley_terry": 1, "uncertainty": 2, "uncertainty_released": 2}
"""The forms of the loss, and how many numbers a head gives for each."""
TIES = ("both", "skip")
COMBINE = ("mean", "min", "sum")


def ordered_pairs(grades: Sequence[float], ties: str = "both") -> list[tuple[int, int]]:
    """All (better, worse) of a request's attempts by their grades; a NaN is a missing grade and in no pair.

    A tie is a pair in both orders (EditReward, section 3.3: attempts that are level as a whole but not in every
    respect stand twice, once each way), which draws their probability to one half; `ties="skip"` leaves it out.
    """
    found = []
    for i, a in enumerate(grades):
        for j, b in enumerate(grades):
            if a > b or (ties == "both" and i != j and a == b):
                found.append((i, j))
    return found


def normal_grid(like: Tensor, reach: float = 10.0, steps: int = 320) -> tuple[Tensor, Tensor]:
    """Nodes and log-weights [steps + 1] of the trapezoidal rule under a standard normal, in the type of `like`.

    For what is expected here the error falls as exp(-2 pi^2 / (s h)) with the spread s and h = 1/16: below 1e-9 up
    to s = 15, where sampling 1,000 values is off by some per cent.
    """
    z = torch.linspace(-reach, reach, steps + 1, dtype=like.dtype, device=like.device)
    return z, (-z.square() / 2).log_softmax(0)


def ranking_loss(better: Tensor, worse: Tensor, form: str, grid: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The loss [P] of pairs of scores, `better` and `worse` [P, 1 or 2].

    `bradley_terry`: -log sigmoid(mu_better - mu_worse). `uncertainty`: -log P as the papers have it: a pair in the
    wrong order raises sigma, one in the right order lowers it. `uncertainty_released`: E[-log sigmoid(z)], which the
    public trainers of all three compute (TIGER-AI-Lab/EditReward, EditReward/model/qwen2_5_vl_trainer.py, loss_type
    "uncertainty", with 1,000 draws in fp16). It lies above -log P (Jensen), and as -log sigmoid is convex its
    gradient lowers sigma always: sigma learns nothing but to vanish. `grid` are other nodes and log-weights ([K], or
    [P, K] for nodes of each pair) in the place of `normal_grid`.
    """
    gap = better[:, 0] - worse[:, 0]
    if form == "bradley_terry":
        return F.softplus(-gap)
    spread = (torch.logaddexp(2 * better[:, 1], 2 * worse[:, 1]) / 2).exp()  # no 0 / 0 where both sigmas vanish
    nodes, weights = normal_grid(gap) if grid is None else grid
    wins = F.logsigmoid(gap[:, None] + spread[:, None] * nodes)  # [P, K]
    if form == "uncertainty":
        return -(wins + weights).logsumexp(-1)
    return -(wins * weights.exp()).sum(-1)


def combined(scores: Tensor, how: str) -> Tensor:
    """One score [N, 1 or 2] of those of D questions [N, D, 1 or 2], as EditReward's heads are pooled.

    `mean` of mu and of log sigma (what its published model uses); `sum` of mu and of the variances; `min`: the score
    of the question with the lowest mu (its code takes the lowest sigma beside it, of whichever question).
    """
    if how == "mean":
        return scores.mean(1)
    if how == "min":
        lowest = scores[..., :1].argmin(1, keepdim=True)
        return scores.gather(1, lowest.expand(-1, -1, scores.shape[-1]))[:, 0]
    return torch.cat([scores[..., :1].sum(1), (2 * scores[..., 1:]).logsumexp(1) / 2], -1)


def right_order(gaps: Tensor) -> float:
    """The share of gaps (better minus worse) [P] above 0, equal scores counting one half; NaN without pairs."""
    return float(((gaps.sign() + 1) / 2).mean()) if len(gaps) else math.nan
