"""Reward post-training: dynamics, storage, advantages and losses, all checked against closed forms,
and three short training loops."""
