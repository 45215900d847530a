"""Reward post-training: dynamics, storage, advantages and losses, checked against closed forms;
three short loops."""
