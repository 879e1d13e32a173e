"""Sampling from flow models: sigma grids, step kernels, ODE solvers and the rollout that ties them together."""
