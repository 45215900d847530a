"""Ablation arms: ways to learn faster that are measured before they enter the product or are
deleted. One idea a file; `tests.drivers.gpu_arms` lets configs name them, `results/arms_*.yaml`
measure them. Those of the network are for pictures whose latents fit in one window of attention.

Axes: b sample · f frame (one) · n window (one) · k place · r row · c column · d width · t token."""
