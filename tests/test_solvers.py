"""ODE solvers: order of convergence on flows with known solutions, and parity of the release's variant.

Golden numbers: tests/golden/sample_steps.json (see its "provenance").
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from weft.sample import schedules
from weft.sample.solvers import SOLVERS, Past, log_ratio

GOLDEN = json.loads((Path(__file__).parent / "golden" / "sample_steps.json").read_text())
SECOND_ORDER = ["ab2", "dpmpp_2m", "dpmpp_2m_heun", "dpmpp_2m_release"]
Z = torch.special.ndtri((torch.arange(32, dtype=torch.float64) + 0.5) / 32)


def run(name: str, x: Tensor, velocity: Callable[[Tensor, float], Tensor], grid: Sequence[float]) -> list[Tensor]:
    states, past = [x], None
    for s, t in zip(grid, grid[1:], strict=False):
        v = velocity(x, s)
        x, past = SOLVERS[name](x, v, s, t, past), Past(s, v, x - s * v)
        states.append(x)
    return states


def gaussian(
    m: float | Tensor, c: float
) -> tuple[Callable[[Tensor, float], Tensor], Callable[[Tensor, float], Tensor]]:
    """Velocity and exact trajectory (from x = z at sigma 1) of the flow to N(m, c^2)."""

    def scale(s: float) -> float:
        return math.sqrt((1 - s) ** 2 * c**2 + s**2)

    def velocity(x: Tensor, s: float) -> Tensor:
        return (s - (1 - s) * c**2) / scale(s) ** 2 * (x - (1 - s) * m) - m

    return velocity, lambda z, s: (1 - s) * m + scale(s) * z


def error(name: str, grid: Sequence[float]) -> float:
    """Root mean square error at the grid's end, from the exact state at its start."""
    velocity, exact = gaussian(0.7, 0.5)
    end = run(name, exact(Z, grid[0]), velocity, grid)[-1]
    return float((end - exact(Z, grid[-1])).square().mean().sqrt())


def order(errors: Sequence[float]) -> list[float]:
    return [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]


@pytest.mark.parametrize("name", SOLVERS)
def test_order_of_convergence(name: str) -> None:
    """On (0.95, 0.05) with uniform steps in lambda, where nothing is singular."""
    top, end = log_ratio(0.95), log_ratio(0.05)

    def grid(steps: int) -> list[float]:
        return [1 / (1 + math.exp(top + (end - top) * k / steps)) for k in range(steps + 1)]

    errors = [error(name, grid(steps)) for steps in (40, 80, 160, 320)]
    print(name, [f"{e:.1e}" for e in errors], [f"{o:.2f}" for o in order(errors)])
    want = 1.0 if name == "euler" else 2.0
    assert order(errors)[-1] == pytest.approx(want, abs=0.08)


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_second_order_from_pure_noise_to_the_clean_latent(name: str) -> None:
    def grid(steps: int) -> list[float]:
        return [1 - k / steps for k in range(steps)] + [0.0]

    first, last = error(name, grid(40)), error(name, grid(640))
    assert math.log2(first / last) / 4 > 1.7
    assert last < 0.03 * error("euler", grid(640))


MEANS = torch.tensor([-1.0, 1.2], dtype=torch.float64)
WEIGHTS = torch.tensor([0.4, 0.6], dtype=torch.float64)


def mixture(x: Tensor, s: float) -> Tensor:
    """Velocity of the flow to a mixture of two Gaussians of width 0.3: not linear in x."""
    var = (1 - s) ** 2 * 0.09 + s**2
    off = x[:, None] - (1 - s) * MEANS
    share = torch.softmax(WEIGHTS.log() - 0.5 * off**2 / var, 1)
    return (x - (share * (MEANS + (1 - s) * 0.09 / var * off)).sum(1)) / s


@pytest.mark.parametrize("steps", [10, 14, 20, 28, 50])
@pytest.mark.parametrize("name", ["ab2", "dpmpp_2m", "dpmpp_2m_heun"])
def test_better_than_euler_on_the_grid_of_sd3(name: str, steps: int) -> None:
    grid = schedules.flow_match_sigmas(steps).tolist()
    assert error(name, grid) < 0.85 * error("euler", grid)
    truth = run("ab2", Z, mixture, schedules.flow_match_sigmas(1000).tolist())[-1]
    far = {n: float((run(n, Z, mixture, grid)[-1] - truth).square().mean().sqrt()) for n in (name, "euler")}
    assert far[name] < 1.02 * far["euler"] and (steps < 14 or far[name] < 0.9 * far["euler"])


def test_the_releases_variant_overshoots_on_the_grid_of_sd3() -> None:
    """Why it is not the default: the long step before the last costs more than the order gains."""
    grid = schedules.flow_match_sigmas(20).tolist()
    assert error("dpmpp_2m_release", grid) > error("euler", grid) > 3 * error("dpmpp_2m", grid)


@pytest.mark.parametrize("row", GOLDEN["solvers"], ids=lambda r: f"{r['name']}-{r['steps']}-{r['bits']}")
def test_the_releases_variant_equals_the_public_code(row: dict) -> None:
    dtype = torch.float64 if row["bits"] == 64 else torch.float32
    x, m = (torch.tensor(GOLDEN["inputs"][name], dtype=dtype) for name in ("x", "target"))
    velocity, _ = gaussian(m, 0.5)
    ours = run("dpmpp_2m_release", x, velocity, schedules.flow_match_sigmas(row["steps"]).tolist())
    theirs = torch.tensor(row["trajectory"], dtype=torch.float64)
    gap = float(((torch.stack(ours).double() - theirs).abs() / theirs.abs().clamp(min=1)).max())
    print(f"{row['name']} {row['steps']} steps float{row['bits']}: worst difference {gap:.1e}")
    assert gap < (1e-9 if row["bits"] == 64 else 1e-6)


@pytest.mark.parametrize(("name", "kind"), [("dpmpp_2m", "midpoint"), ("dpmpp_2m_heun", "heun")])
def test_multistep_equals_diffusers_where_its_grid_is_regular(name: str, kind: str) -> None:
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_type=kind, euler_at_final=True
    )
    scheduler.set_timesteps(20)
    grid = [float(s) for s in scheduler.sigmas]
    assert grid[0] < 1  # so nothing but the plain formula is compared
    velocity, exact = gaussian(0.7, 0.5)
    x = exact(Z, grid[0])[None]
    ours = run(name, x, velocity, grid)
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(velocity(x, grid[k]), t, x).prev_sample
        assert torch.allclose(x, ours[k + 1], atol=2e-6), k
