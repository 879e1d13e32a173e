"""Step kernels: equal to the public code and tables, right as densities, and true to the flow's marginals.

Golden numbers: tests/golden/sample_steps.json; its "provenance" says which public functions made them and how.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.errors import WeftError
from weft.sample import kernels, schedules

GOLDEN = json.loads((Path(__file__).parent / "golden" / "sample_steps.json").read_text())
SDES = {"flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8}


def tensors(bits: int) -> dict[str, Tensor]:
    dtype = torch.float64 if bits == 64 else torch.float32
    return {name: torch.tensor(value, dtype=dtype) for name, value in GOLDEN["inputs"].items()}


def gap(ours: Tensor, theirs: object) -> float:
    """Largest difference, relative where the value exceeds 1."""
    want = torch.tensor(theirs, dtype=torch.float64)
    return float(((ours.double() - want).abs() / want.abs().clamp(min=1)).max())


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("kind", SDES)
def test_every_step_equals_the_public_code(kind: str, bits: int) -> None:
    given_ = tensors(bits)
    rows = [row for row in GOLDEN["steps"] if row["kind"] == kind and row["bits"] == bits]
    assert len(rows) >= 10
    worst = 0.0
    for row in rows:
        where, what = (given_["x"], given_["v"], row["sigma"], row["sigma_next"]), {"kind": kind, "eta": row["eta"]}
        ours = kernels.step(*where, given_["z"], **what)
        worst = max(worst, gap(ours.x_next, row["x_next"]))
        if "mean" in row:
            replay = kernels.step(*where, x_next=given_["target"], **what)
            pairs = [(ours.mean, "mean"), (ours.log_prob, "log_prob"), (replay.log_prob, "replay_log_prob")]
            worst = max([worst, gap(ours.diffusion, row["diffusion"])] + [gap(a, row[b]) for a, b in pairs])
    print(f"{kind} float{bits}: {len(rows)} steps, worst difference {worst:.1e}")
    assert worst < (1e-9 if bits == 64 else 1e-6)


def test_table_of_flow_sde_at_ten_steps() -> None:
    table = """-0.039871|3.505671|0.700000|0.755000|-0.039871   -0.046780|3.435073|0.742964|0.712541|-0.058242
    -0.055657|2.272634|0.536152|0.842635|-0.069293   -0.067324|1.718500|0.445897|0.884093|-0.083818
    -0.083090|1.359203|0.391794|0.902892|-0.103447   -0.105128|1.088093|0.352797|0.912011|-0.130884
    -0.137275|0.861175|0.319070|0.915465|-0.170907   -0.186827|0.652438|0.282007|0.914463|-0.232600
    -0.269120|0.434415|0.225360|0.908672|-0.335055   -0.008929|0.066441|0.006278|0.997793|-0.011116"""
    grid = schedules.flow_match_sigmas(10)
    for k, row in enumerate(table.split()):
        dt, g, std, a, b = (float(number) for number in row.split("|"))
        ours = kernels.coefficients(grid[k], grid[k + 1], kind="flow_sde", eta=0.7)
        assert [float(value) for value in ours] == pytest.approx([a, b, std, g], abs=2e-6)
        assert float(grid[k + 1] - grid[k]) == pytest.approx(dt, abs=1e-6)


def test_noise_at_sigma_one_is_eta_with_the_second_grid_value() -> None:
    _, _, std, g = kernels.coefficients(1.0, 0.96, kind="flow_sde", eta=0.7)
    assert float(std) == pytest.approx(0.7, abs=1e-12) and float(g) == pytest.approx(0.7 / math.sqrt(0.04))
    _, _, _, other = kernels.coefficients(1.0, 0.96, kind="flow_sde", eta=0.7, sigma_max=0.9)
    assert float(other) == pytest.approx(0.7 / math.sqrt(0.1))
    _, _, _, later = kernels.coefficients(0.96, 0.9, kind="flow_sde", eta=0.7, sigma_max=0.5)
    assert float(later) == pytest.approx(0.7 * math.sqrt(0.96 / 0.04))  # sigma_max matters at 1 only


def test_dance_sde_by_its_formula() -> None:
    given_ = tensors(64)
    x, v, z, s, t, eta = given_["x"], given_["v"], given_["z"], 0.7, 0.6, 0.3
    x0 = x - s * v
    score = -(x - (1 - s) * x0) / s**2
    mean = x + (v - 0.5 * eta**2 * score) * (t - s)
    ours = kernels.step(x, v, s, t, z, kind="dance_sde", eta=eta)
    assert torch.allclose(ours.mean, mean, atol=1e-14)
    assert torch.allclose(ours.x_next, mean + eta * math.sqrt(s - t) * z, atol=1e-14)


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde"])
def test_log_prob_is_the_mean_normal_density(kind: str) -> None:
    given_ = tensors(64)
    ours = kernels.step(given_["x"], given_["v"], 0.7, 0.6, given_["z"], kind=kind, eta=0.5)
    density = torch.distributions.Normal(ours.mean, ours.std).log_prob(ours.x_next)
    assert torch.allclose(ours.log_prob, density.flatten(1).mean(1), atol=1e-12)
    # The expectation over z is minus the entropy: the constants are there.
    z = torch.randn(1, 4, 100, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    big = kernels.step(z * 0, z * 0, 0.7, 0.6, z, kind=kind, eta=0.5)
    entropy = 0.5 * math.log(2 * math.pi * math.e * float(big.std) ** 2)
    assert float(big.log_prob) == pytest.approx(-entropy, abs=0.02)


@pytest.mark.parametrize(("kind", "eta"), [("ode", 0.0), ("flow_sde", 0.7), ("dance_sde", 0.3)])
def test_marginals_are_kept(kind: str, eta: float) -> None:
    """For data N(m, c^2) all is Gaussian and linear, so the chain's mean and variance can be followed exactly.

    Below sigma 0.5 only: next to sigma 1 Flow-SDE's noise grows nearly as fast as the steps shrink, and its variance
    is some percent too large there even with 1000 steps (what CPS was made against, arXiv 2509.05952).
    """
    m, c, errors = 0.7, 0.5, []
    for steps in (250, 500, 1000):
        grid = schedules.grid_from_config({"shift": 3.0}, sigmas=schedules.linear_sigmas(steps)).tolist()
        mean, var, worst = 0.0, 1.0, 0.0
        for k in range(steps - 1):
            s, t = grid[k], grid[k + 1]
            a, b, std, _ = (float(f) for f in kernels.coefficients(s, t, kind=kind, eta=eta))
            slope = (s - (1 - s) * c**2) / ((1 - s) ** 2 * c**2 + s**2)  # v = slope (x - (1 - s) m) - m
            mean = (a + b * slope) * mean - b * (slope * (1 - s) * m + m)
            var = (a + b * slope) ** 2 * var + std**2
            if t < 0.5:
                worst = max(worst, abs(mean - (1 - t) * m), abs(var - ((1 - t) ** 2 * c**2 + t**2)))
        errors.append(worst)
    print(kind, [f"{error:.1e}" for error in errors])
    assert errors[-1] < 0.003
    assert errors[2] < 0.75 * errors[1] < 0.75**2 * errors[0]  # and better with more steps


@pytest.mark.parametrize("eta", [0.2, 0.8, 1.0])
def test_cps_keeps_the_coefficients_of_the_flow(eta: float) -> None:
    """From x = (1 - s) x0 + s e, the mean is (1 - t) x0 + r e with r^2 + std^2 = t^2 (arXiv 2509.05952)."""
    given_, s, t = tensors(64), 0.8, 0.65
    x0, e = given_["x"], given_["z"]
    ours = kernels.step((1 - s) * x0 + s * e, e - x0, s, t, e * 0, kind="cps", eta=eta)
    rest = math.sqrt(t**2 - float(ours.std) ** 2)
    assert float(ours.std) == pytest.approx(t * math.sin(eta * math.pi / 2))
    assert torch.allclose(ours.mean, (1 - t) * x0 + rest * e, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([("ode", 0.0), *SDES.items()]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.floats(0.05, 1.0),
    st.floats(0.0, 0.95),
    st.integers(0, 999),
)
def test_padding_and_batch_do_not_matter(
    kind_eta: tuple[str, float], h: int, w: int, sigma: float, part: float, seed: int
) -> None:
    kind, eta = kind_eta
    g = torch.Generator().manual_seed(seed)
    x, v, z = (torch.randn(1, 3, h, w, generator=g) for _ in range(3))
    pad = (0, 5 - w, 0, 4 - h)
    x2, v2, z2 = (torch.cat([torch.randn(1, 3, 4, 5, generator=g), torch.nn.functional.pad(a, pad)]) for a in (x, v, z))
    valid = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    valid[1, :, h:] = False
    valid[1, :, :, w:] = False
    sigma_next = sigma * part
    one = kernels.step(x, v, sigma, sigma_next, None if kind == "ode" else z, kind=kind, eta=eta)
    first = 0.5  # the other sample may be at any other place of the grid
    both = kernels.step(
        x2,
        v2,
        torch.tensor([first, sigma], dtype=torch.float64),
        torch.tensor([first / 2, sigma_next], dtype=torch.float64),
        None if kind == "ode" else z2,
        kind=kind,
        eta=eta,
        valid=valid,
    )
    assert torch.equal(both.x_next[1:, :, :h, :w], one.x_next)
    assert not both.x_next[1:][~valid[1:].expand(1, 3, 4, 5)].any()
    if kind != "ode":
        assert torch.allclose(both.log_prob[1:], one.log_prob, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", SDES)
def test_little_noise_is_the_euler_step(kind: str) -> None:
    given_ = tensors(64)
    ours = kernels.step(given_["x"], given_["v"], 0.7, 0.6, given_["z"], kind=kind, eta=1e-9)
    ode = kernels.step(given_["x"], given_["v"], 0.7, 0.6)
    assert torch.allclose(ours.x_next, ode.x_next, atol=1e-8)
    assert torch.allclose(ode.x_next, given_["x"] - 0.1 * given_["v"], atol=1e-14)
    assert ode.log_prob is None and float(ode.std) == 0


@pytest.mark.parametrize("kind", SDES)
def test_replay_repeats_the_log_prob_bitwise_and_leads_gradients_to_v_only(kind: str) -> None:
    given_ = tensors(32)
    first = kernels.step(given_["x"], given_["v"], 0.8, 0.7, given_["z"], kind=kind, eta=SDES[kind])
    v = given_["v"].clone().requires_grad_()
    stored = first.x_next.clone().requires_grad_()
    again = kernels.step(given_["x"], v, 0.8, 0.7, x_next=stored, kind=kind, eta=SDES[kind])
    assert torch.equal(again.log_prob, first.log_prob)
    again.log_prob.sum().backward()
    assert v.grad is not None and float(v.grad.abs().sum()) > 0 and stored.grad is None


def test_half_precision_is_computed_in_fp32() -> None:
    given_ = tensors(32)
    half = {name: value.bfloat16() for name, value in given_.items()}
    ours = kernels.step(half["x"], half["v"], 1.0, 0.96, half["z"], kind="flow_sde", eta=0.7)
    want = kernels.step(*(half[n].float() for n in "xv"), 1.0, 0.96, half["z"].float(), kind="flow_sde", eta=0.7)
    assert ours.x_next.dtype == ours.log_prob.dtype == torch.float32
    assert torch.equal(ours.x_next, want.x_next)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "sde"}, "unknown"),
        ({"kind": "ode", "eta": 0.7}, "adds no noise"),
        ({"kind": "ode", "noise": True}, "deterministic"),
        ({"kind": "flow_sde", "noise": True}, "eta > 0"),
        ({"kind": "cps", "noise": True, "eta": 0.0}, "eta > 0"),
        ({"kind": "cps", "noise": True, "eta": 1.5}, "at most 1"),
        ({"kind": "flow_sde", "noise": True, "eta": float("nan")}, "eta > 0"),
        ({"kind": "flow_sde", "eta": 0.7}, "needs either noise"),
        ({"kind": "flow_sde", "eta": 0.7, "noise": True, "sigma_next": 0.8}, "go down"),
        ({"kind": "flow_sde", "eta": 0.7, "noise": True, "sigma_next": -0.1}, "go down"),
    ],
)
def test_impossible_steps_are_refused(options: dict, message: str) -> None:
    x = torch.zeros(1, 1, 2, 2)
    options = {"sigma_next": 0.4} | options | ({"noise": x} if options.get("noise") else {})
    with pytest.raises(WeftError, match=message):
        kernels.step(x, x, 0.5, **options)
