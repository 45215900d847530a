"""Parts of networks: attention, windows, positions, conditioning, norms. No model, no schedule, no
file."""

import os

EPSILON = 1e-6  # of all norms
LARGEST = 448.0  # of the 8-bit floats e4m3
LEAST = 1e-30  # of what a row of them has as its largest: rows of zeros have a scale, too
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on a CPU, for tests
