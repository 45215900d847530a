"""Reward post-training: dynamics, storage, advantages and losses that are checked against closed forms, and three short loops."""
