"""Parts of networks: attention, windows, positions, conditioning, norms. No model, no schedule, no file."""
EPSILON = 1e-6  # of all norms
