"""Parts of networks: attention, windows, positions, conditioning, norms. No model, no schedule, no
file."""

import os

EPSILON = 1e-6  # of all norms
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on a CPU, for tests
