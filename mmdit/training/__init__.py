"""The training loop and its parts: learner, state, optimizer, EMA, checkpoints, metrics, previews,
process groups."""
