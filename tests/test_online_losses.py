"""The losses of nft and grpo: equal to the public code on fixed inputs, and the gradient identities of the methods.

The golden numbers were made by executing the statements of the public training scripts; see `provenance` in the file.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from weft.errors import WeftError
from weft.reward.advantage import AdvantageConfig, optimality, reshape
from weft.sample import kernels
from weft.train.geometry import RolloutRecipe, WindowRecipe, window_at
from weft.train.grpo import Grpo, GrpoOptions, clipped_loss, guard_log_ratio, kl_divergence, levels
from weft.train.nft import NftOptions, policy_loss
from weft.train.policy import OLD_SCHEDULES, masked_mean, norm_excess

GOLDEN = json.loads((Path(__file__).parent / "golden" / "online.json").read_text())
NFT, GRPO = GOLDEN["nft"], GOLDEN["grpo"]
TOLERANCE = {"float64": 1e-9, "float32": 1e-6}


def close(found, expected, relative):
    found, expected = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    assert np.abs(found - expected).max() <= relative * max(1.0, np.abs(expected).max())


# -- DiffusionNFT -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", NFT["cases"], ids=lambda c: f"{c['dtype']}-{c['beta']}-{c['mode']}-{c['masked']}")
def test_nft_loss_and_gradient_are_those_of_the_public_code(case):
    dtype = getattr(torch, case["dtype"])
    x0, noise, v, v_old, v_ref = (
        torch.tensor(NFT["inputs"][k], dtype=dtype) for k in ("x0", "noise", "v", "v_old", "v_ref")
    )
    t = torch.tensor(NFT["inputs"]["t"], dtype=dtype)
    v.requires_grad_(True)
    clip = NFT["clip"]
    config = AdvantageConfig(mode=case["mode"])
    advantage = reshape(np.clip(np.array(NFT["inputs"]["advantages"]), -clip, clip), config)
    r = optimality(torch.from_numpy(advantage), clip)
    close(r, case["r"], TOLERANCE[case["dtype"]])
    s = t.view(-1, 1, 1, 1)
    x_t = (1 - s) * x0 + s * noise
    per_sample = policy_loss(v, v_old, x_t, x0, t, r, beta=case["beta"], clip=clip)
    per_sample = per_sample + case["kl"] * masked_mean((v - v_ref).square(), None)
    if case["masked"]:  # filtered samples are left out, and the mean is over what is left
        per_sample = per_sample[torch.tensor(NFT["inputs"]["mask"]).bool()]
    loss = per_sample.mean()
    loss.backward()
    close(float(loss.detach()), case["loss"], TOLERANCE[case["dtype"]])
    scale = np.abs(np.array(case["grad"])).max()
    close(v.grad.double().numpy() / scale, np.array(case["grad"]) / scale, TOLERANCE[case["dtype"]])


@pytest.mark.parametrize("kind", ["copy", "linear_to_0_5", "delayed_linear_to_0_999"])
def test_old_policy_schedules_are_those_of_the_public_code(kind):
    number = str(list(OLD_SCHEDULES).index(kind))
    found = [OLD_SCHEDULES[kind].at(step) for step in GOLDEN["decay"]["steps"]]
    assert found == GOLDEN["decay"][number]


def nft_case(seed=0):
    g = torch.Generator().manual_seed(seed)
    x0, noise, error = (torch.randn(4, 2, 3, 3, generator=g, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([1.0, 0.8, 0.4, 0.05], dtype=torch.float64)
    v_old = noise - x0 + error
    x_t = (1 - t.view(-1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1) * noise
    return x0, noise, t, v_old, x_t


def nft_gradient(advantage, beta, clip, seed=0):
    x0, noise, t, v_old, x_t = nft_case(seed)
    v = v_old.clone().requires_grad_(True)
    loss = policy_loss(v, v_old, x_t, x0, t, optimality(advantage, clip), beta=beta, clip=clip)
    loss.sum().backward()
    return v.grad, loss.detach()


def test_on_policy_the_nft_gradient_is_linear_in_the_advantage_and_free_of_beta_and_clip():
    x0, noise, t, v_old, _ = nft_case()
    a = torch.tensor([2.0, -1.5, 0.0, 0.3], dtype=torch.float64)
    grad, loss = nft_gradient(a, 1.0, 5.0)
    error = v_old - (noise - x0)
    weight = (t.view(-1, 1, 1, 1) * error).abs().flatten(1).mean(1).view(-1, 1, 1, 1)
    expected = 2 * t.view(-1, 1, 1, 1) ** 2 * a.view(-1, 1, 1, 1) * error / (error[0].numel() * weight)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-15)
    for beta, clip in ((0.1, 5.0), (1.0, 3.0), (0.5, 10.0)):
        torch.testing.assert_close(nft_gradient(a, beta, clip)[0], grad, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(nft_gradient(2 * a, 1.0, 5.0)[0], 2 * grad, rtol=1e-12, atol=1e-15)
    assert float(grad[2].abs().max()) < 1e-15  # r = 1/2 teaches nothing here
    zero, value = nft_gradient(0 * a, 1.0, 5.0)
    assert float(zero.abs().max()) < 1e-15
    torch.testing.assert_close(value, loss, rtol=1e-12, atol=0)  # the value does not depend on r


def test_beta_is_the_curvature_of_nft():
    x0, _, t, v_old, x_t = nft_case()

    def slope(beta):
        v = (v_old + 1e-4).requires_grad_(True)
        half = torch.full((4,), 0.5, dtype=torch.float64)
        policy_loss(v, v_old, x_t, x0, t, half, beta=beta, clip=5.0).sum().backward()
        return v.grad

    torch.testing.assert_close(slope(1.0), 10 * slope(0.1), rtol=2e-2, atol=1e-9)


def test_a_descent_step_of_nft_goes_towards_good_samples_and_away_from_bad_ones():
    x0, noise, _, v_old, _ = nft_case()
    for sign in (1.0, -1.0):
        grad, _ = nft_gradient(torch.full((4,), sign, dtype=torch.float64), 1.0, 5.0)
        before = (v_old - (noise - x0)).square().flatten(1).sum(1)
        after = (v_old - 0.01 * grad - (noise - x0)).square().flatten(1).sum(1)
        assert ((after < before) if sign > 0 else (after > before)).all()


def test_padding_changes_no_loss():
    x0, _, t, v_old, x_t = nft_case()
    v = v_old + 0.1
    r = torch.tensor([0.1, 0.9, 0.4, 0.7], dtype=torch.float64)
    plain = policy_loss(v, v_old, x_t, x0, t, r, beta=1.0, clip=5.0)
    valid = torch.zeros(4, 1, 5, 4, dtype=torch.bool)
    valid[:, :, :3, :3] = True
    big = [torch.nn.functional.pad(x, (0, 1, 0, 2)) for x in (v, v_old, x_t, x0)]
    masked = policy_loss(*big, t, r, beta=1.0, clip=5.0, valid=valid)
    torch.testing.assert_close(masked, plain, rtol=1e-12, atol=0)


# -- Flow-GRPO --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GRPO["cases"], ids=lambda c: f"clip{c['clip']}-kl{c['kl']}")
def test_grpo_loss_and_gradient_are_those_of_the_public_code(case):
    x, v, v_ref, x_next = (torch.tensor(GRPO[k], dtype=torch.float32) for k in ("x", "v", "v_ref", "x_next"))
    sigma, after = torch.tensor(GRPO["sigma"]), torch.tensor(GRPO["sigma_next"])
    v.requires_grad_(True)
    result = kernels.step(x, v, sigma, after, kind="flow_sde", eta=GRPO["eta"], x_next=x_next)
    given = kernels.step(x, v_ref, sigma, after, kind="flow_sde", eta=GRPO["eta"], x_next=x_next)
    close(result.log_prob.detach(), GRPO["log_prob"], 2e-6)
    # the public log-probs in, so that only the loss is compared: the ratio amplifies their last bits
    old = torch.tensor(GRPO["log_prob_old"]) + (result.log_prob.detach() - torch.tensor(GRPO["log_prob"]))
    ratio = (result.log_prob - old).exp()
    close(ratio.detach(), case["ratio"], 1e-6)
    advantage = torch.tensor(GRPO["advantages"]).clamp(-5, 5)
    policy = clipped_loss(ratio, advantage, case["clip"], case["clip"]).mean()
    close(float(policy.detach()), case["policy"], 1e-6)
    loss = policy
    if case["kl"]:
        kl = kl_divergence(result.mean, given.mean, result.diffusion).mean()
        close(float(kl.detach()), case["kl_loss"], 1e-6)
        loss = loss + case["kl"] * kl
    loss.backward()
    close(float(loss.detach()), case["loss"], 1e-6)
    scale = np.abs(np.array(case["grad"])).max()
    close(v.grad.double().numpy() / scale, np.array(case["grad"]) / scale, 2e-5)  # fp32 coefficients there


def sde_case(kind="flow_sde", seed=0):
    g = torch.Generator().manual_seed(seed)
    x, v, z, change = (torch.randn(3, 2, 3, 3, generator=g, dtype=torch.float64) for _ in range(4))
    sigma = torch.tensor([0.95, 0.7, 0.3], dtype=torch.float64)
    after = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    old = kernels.step(x, v, sigma, after, z, kind=kind, eta=0.7)
    return x, v, z, 0.01 * change, sigma, after, old


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde"])
def test_on_policy_the_grpo_gradient_is_the_advantage_times_the_score(kind):
    x, v, z, _, sigma, after, old = sde_case(kind)
    a = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    v = v.clone().requires_grad_(True)
    result = kernels.step(x, v, sigma, after, kind=kind, eta=0.7, x_next=old.x_next)
    ratio = (result.log_prob - old.log_prob).exp()
    torch.testing.assert_close(ratio.detach(), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
    clipped_loss(ratio, a, 1e-4, 1e-4).sum().backward()
    _, b, std, _ = kernels.coefficients(sigma, after, kind=kind, eta=0.7)
    count = v[0].numel()
    expected = -a.view(-1, 1, 1, 1) * b.view(-1, 1, 1, 1) * z / (std.view(-1, 1, 1, 1) * count)
    torch.testing.assert_close(v.grad, expected, rtol=1e-9, atol=1e-12)


def test_outside_the_clip_range_only_the_way_back_has_a_gradient():
    for advantage, ratio, moves in ((1.0, 1.1, False), (1.0, 0.9, True), (-1.0, 0.9, False), (-1.0, 1.1, True)):
        r = torch.tensor([ratio], requires_grad=True)
        clipped_loss(r, torch.tensor([advantage]), 0.05, 0.05).sum().backward()
        assert (float(r.grad.abs()) > 0) == moves, (advantage, ratio)


def test_guard_is_the_published_ratio_and_free_of_the_noise_level():
    x, v, z, change, sigma, after, old = sde_case()
    new = kernels.step(x, v + change, sigma, after, kind="flow_sde", eta=0.7, x_next=old.x_next)
    k = old.std
    shift = (new.mean - old.mean).square().flatten(1).mean(1)
    published = (new.log_prob - old.log_prob + shift / (2 * k**2)) * k
    found = guard_log_ratio(new.mean, old.x_next, k, z)
    torch.testing.assert_close(found, published, rtol=1e-9, atol=1e-12)


def test_kl_forms():
    x, v, _, change, sigma, after, old = sde_case()
    new = kernels.step(x, v + change, sigma, after, kind="flow_sde", eta=0.7, x_next=old.x_next)
    exact = kl_divergence(new.mean, old.mean, new.std)
    p, q = (torch.distributions.Normal(r.mean, r.std.view(-1, 1, 1, 1)) for r in (new, old))
    torch.testing.assert_close(exact, torch.distributions.kl_divergence(p, q).flatten(1).mean(1))
    torch.testing.assert_close(kl_divergence(new.mean, old.mean, new.diffusion), exact * (sigma - after))


def test_norm_guard_is_zero_below_the_reference_and_pushes_back_above():
    v_ref = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    assert float(norm_excess(0.9 * v_ref, v_ref).abs().max()) == 0
    v = (1.1 * v_ref).requires_grad_(True)
    value = norm_excess(v, v_ref)
    torch.testing.assert_close(value.detach(), torch.full((2,), 0.01), rtol=1e-3, atol=0)
    value.sum().backward()
    assert float((v.grad * v_ref).sum()) > 0


@pytest.mark.parametrize("steps", [4, 11, 16, 25, 50])
def test_dancegrpo_counts_its_random_steps_without_the_last(steps):
    """int((T - 1) x fraction) different ones of the T - 1 first: train_grpo_flux.py, `train_timesteps` and `perms`."""
    rollouts = [RolloutRecipe(steps=steps, kind="dance_sde", eta=0.3) for _ in range(2)]
    rollouts[1].window = WindowRecipe(steps - 1, move="fixed")  # the last step without noise, as there
    for rollout in rollouts:
        method = object.__new__(Grpo)
        method.options, method.rollout = GrpoOptions(timesteps="random", timestep_fraction=0.6), rollout
        assert levels(method.options, rollout) == int((steps - 1) * 0.6)
        drawn = [method.steps_of(1, seed, window_at(rollout, 1, 0, 0), 0, steps) for seed in range(200)]
        assert all(len(set(own)) == len(own) == int((steps - 1) * 0.6) for own in drawn)
        assert set().union(*drawn) == set(range(steps - 1))


@pytest.mark.parametrize("options", [GrpoOptions, NftOptions])
def test_a_part_of_the_steps_is_not_more_than_all(options):
    with pytest.raises(WeftError, match="timestep_fraction is 1.5; it must be above 0 and at most 1"):
        options(timestep_fraction=1.5)


# -- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["windows"], ids=lambda c: f"{c['strategy']}-{c['prog_overlap_step']}")
def test_windows_move_as_mixgrpos_do(case):
    """As long as theirs is whole: at the end the public code lets the window shrink to nothing, ours stays."""
    recipe = RolloutRecipe(steps=case["max"], kind="flow_sde", eta=0.7)
    recipe.window = WindowRecipe(
        case["size"], [0, case["max"]], case["strategy"], case["every"], case["prog_overlap_step"],
        k=case.get("exp_decay_k", 0.1), after=case.get("exp_decay_thre_timestep", 13), roll_back=False,
    )  # fmt: skip
    whole = [steps for steps in case["steps"]]
    end = next(i for i, steps in enumerate(whole) if len(steps) < case["size"])
    assert end >= 15
    for epoch in range(end):
        assert list(range(*window_at(recipe, 0, epoch, 0))) == whole[epoch]
    assert window_at(recipe, 0, 10_000, 0) == (case["max"] - case["size"], case["max"])


def test_random_windows_cover_their_range_and_are_reproducible():
    recipe = RolloutRecipe(steps=10, kind="cps", eta=0.8, window=WindowRecipe(3, [0, 5], "random"))
    drawn = [window_at(recipe, 1, epoch, batch) for epoch in range(20) for batch in range(3)]
    assert {start for start, _ in drawn} == {0, 1, 2} and all(b - a == 3 for a, b in drawn)
    assert drawn == [window_at(recipe, 1, epoch, batch) for epoch in range(20) for batch in range(3)]
    assert math.isclose(sum(a for a, _ in drawn) / 60, 1, abs_tol=0.35)
