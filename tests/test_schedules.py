"""Sigma grids against diffusers' scheduler and published tables; the training samplers against their densities."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import WeftError
from weft.sample import schedules

STEPS = (1, 2, 3, 4, 5, 8, 10, 16, 28, 40, 50, 100, 999, 1000)


def upstream(config: dict, steps: int, mu: float | None = None, sigmas: list[float] | None = None) -> torch.Tensor:
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(None if sigmas else steps, mu=mu, sigmas=sigmas)
    return scheduler.sigmas


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [0.5, 1.0, 1.5, 3.0, 5.0, 7.0])
def test_static_grid_is_the_schedulers(steps: int, shift: float) -> None:
    grid = schedules.flow_match_sigmas(steps, shift)
    assert grid.dtype == torch.float32 and grid.shape == (steps + 1,)
    assert torch.equal(grid, upstream({"shift": shift}, steps))


def test_published_values_of_the_doubly_shifted_grid() -> None:
    ten = [1, 0.960129, 0.913349, 0.857692, 0.790368, 0.707278, 0.602151, 0.464876, 0.278049, 0.008929, 0]
    assert schedules.flow_match_sigmas(10).tolist() == pytest.approx(ten, abs=1e-6)
    fifty = schedules.flow_match_sigmas(50).tolist()
    assert fifty[:3] + fifty[-3:] == pytest.approx([1, 0.993124, 0.986057, 0.066900, 0.008929, 0], abs=1e-6)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("mu", [0.3, 0.5, 0.8, 1.15, 2.0])
@pytest.mark.parametrize("terminal", [None, 0.02, 0.1])
def test_dynamic_grid_is_the_schedulers(kind: str, mu: float, terminal: float | None) -> None:
    config = {"use_dynamic_shifting": True, "time_shift_type": kind, "shift_terminal": terminal, "shift": 3.0}
    for steps in STEPS[1:]:
        assert torch.equal(schedules.grid_from_config(config, steps, mu=mu), upstream(config, steps, mu))
        own = schedules.linear_sigmas(steps)
        assert torch.equal(schedules.grid_from_config(config, sigmas=own, mu=mu), upstream(config, steps, mu, own))


@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_exponential_sigmas", None])
@pytest.mark.parametrize("terminal", [None, 0.02])
def test_other_grids_are_the_schedulers(option: str | None, terminal: float | None) -> None:
    config = {"shift": 3.0, "shift_terminal": terminal} | ({option: True} if option else {})
    for steps in STEPS[1:]:
        assert torch.equal(schedules.grid_from_config(config, steps), upstream(config, steps))
    custom = [1.0, 0.8, 0.33, 0.1]
    assert torch.equal(schedules.grid_from_config(config, sigmas=custom), upstream(config, 4, sigmas=custom))


def test_a_saved_scheduler_config_is_read(tmp_path) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert torch.equal(schedules.grid_from_config(dict(scheduler.config), 28), schedules.flow_match_sigmas(28))
    assert set(schedules.CONFIG_DEFAULTS) == {key for key in scheduler.config if not key.startswith("_")}
    plain = FlowMatchEulerDiscreteScheduler().config
    assert all(plain[key] == value for key, value in schedules.CONFIG_DEFAULTS.items())


def test_dynamic_mu_is_the_pipelines() -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    for tokens in (64, 256, 1024, 4096, 8100):
        assert schedules.dynamic_mu(tokens) == pytest.approx(calculate_shift(tokens), abs=1e-12)
    qwen = {"base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256, "max_image_seq_len": 8192}
    assert schedules.dynamic_mu(2048, qwen) == pytest.approx(calculate_shift(2048, 256, 8192, 0.5, 0.9), abs=1e-12)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({}, {"steps": 0}, "at least 1"),
        ({}, {"steps": 3, "sigmas": [1.0, 0.5]}, "2 sigmas for 3 steps"),
        ({}, {"steps": 3, "mu": 0.5}, "takes no mu"),
        ({"use_dynamic_shifting": True}, {"steps": 3}, "needs mu"),
        ({"use_dynamic_shifting": True, "time_shift_type": "cubic"}, {"steps": 3, "mu": 0.5}, "cubic"),
        ({"use_beta_sigmas": True}, {"steps": 3}, "use_beta_sigmas"),
        ({"invert_sigmas": True}, {"steps": 3}, "invert_sigmas"),
        ({"shfit": 3.0}, {"steps": 3}, "unknown key 'shfit'"),
        ({"_class_name": "DDIMScheduler"}, {"steps": 3}, "DDIMScheduler"),
    ],
)
def test_what_cannot_be_a_grid_is_refused(config: dict, options: dict, message: str) -> None:
    with pytest.raises(WeftError, match=message):
        schedules.grid_from_config(config, **options)


def kolmogorov(sample: torch.Tensor, cdf) -> float:
    """The largest gap between the empirical distribution and `cdf`, in units of its 1 % critical value."""
    ordered = sample.double().sort().values
    n = len(ordered)
    theory = torch.tensor([cdf(float(value)) for value in ordered], dtype=torch.float64)
    above = torch.arange(1, n + 1, dtype=torch.float64) / n - theory
    return float(torch.maximum(above, 1 / n - above).max()) * math.sqrt(n) / 1.63


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal_cdf(value: float) -> float:
    return 0.5 * (1 + math.erf(value / math.sqrt(2)))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.6, 0.8), (0.5, 1.4)])
def test_logit_normal_has_its_distribution(mean: float, std: float) -> None:
    sigma = schedules.logit_normal(8000, mean=mean, std=std, generator=generator())
    assert kolmogorov(sigma, lambda s: normal_cdf((math.log(s / (1 - s)) - mean) / std)) < 1
    assert kolmogorov(sigma, lambda s: normal_cdf((math.log(s / (1 - s)) - mean - 0.1) / std)) > 1


def mode_cdf(scale: float):
    def cdf(sigma: float) -> float:  # sigma falls in u: invert by bisection
        low, high = 0.0, 1.0
        for _ in range(50):
            u = (low + high) / 2
            value = 1 - u - scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u)
            low, high = (u, high) if value > sigma else (low, u)
        return 1 - low

    return cdf


@pytest.mark.parametrize("scale", [-0.9, 0.0, 0.81, 1.29, 1.75])
def test_mode_has_its_distribution(scale: float) -> None:
    sigma = schedules.mode(3000, scale=scale, generator=generator(1))
    assert 0 <= sigma.min() and sigma.max() <= 1
    assert kolmogorov(sigma, mode_cdf(scale)) < 1
    other = -0.9 if scale > 0 else 1.29
    assert kolmogorov(sigma, mode_cdf(other)) > 1


@pytest.mark.parametrize("scale", [1.29, 0.5, -0.7])
def test_mode_is_the_density_of_diffusers(scale: float) -> None:
    from diffusers.training_utils import compute_density_for_timestep_sampling

    theirs = compute_density_for_timestep_sampling(
        "mode", 500, mode_scale=scale, generator=torch.Generator().manual_seed(7)
    )
    u = torch.rand(500, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(schedules.mode(500, scale=scale, u=u), theirs, rtol=0, atol=1e-6)


def test_uniform_shifted_is_uniform_over_the_schedulers_table() -> None:
    table = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas
    assert torch.equal(schedules.training_sigmas(3.0), table)
    u = torch.tensor([0.0, 0.0009, 0.0011, 0.5, 0.9999, 1.0], dtype=torch.float64)
    assert torch.equal(schedules.uniform_shifted(6, u=u), table[[0, 0, 1, 500, 999, 999]])
    sigma = schedules.uniform_shifted(8000, generator=generator(2))
    assert set(sigma.tolist()) <= set(table.tolist())
    assert kolmogorov(sigma, lambda s: s / (3 - 2 * s)) < 1  # the inverse of the shift map
    assert kolmogorov(sigma, lambda s: s) > 1


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["uniform_shifted", "logit_normal", "mode"]), st.integers(1, 40))
def test_samplers_depend_on_their_generator_only(seed: int, name: str, count: int) -> None:
    draw = getattr(schedules, name)
    first = draw(count, generator=generator(seed))
    torch.rand(3)
    assert first.dtype == torch.float32 and first.shape == (count,)
    assert torch.equal(first, draw(count, generator=generator(seed)))
    assert bool(((first >= 0) & (first <= 1)).all())


def test_samplers_refuse_what_they_cannot_do() -> None:
    for draw in (schedules.uniform_shifted, schedules.logit_normal, schedules.mode):
        with pytest.raises(WeftError, match="generator or u"):
            draw(3)
        with pytest.raises(WeftError, match=r"shape \[3\]"):
            draw(3, u=torch.zeros(2))
    with pytest.raises(WeftError, match="positive"):
        schedules.logit_normal(3, std=0.0, generator=generator())
    with pytest.raises(WeftError, match="monotone"):
        schedules.mode(3, scale=1.76, generator=generator())
