"""Parts of networks: attention, windows, positions, conditioning, norms. No model, no schedule, no file."""
