"""The fused kernels compute what the plain path does: interpreted on a CPU, whole models, outputs and all gradients."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("case", [1, 4])  # the others: tests/fused_kernels.py, also for GPUs
def test_whole_models_agree_with_the_plain_path(case):
    pytest.importorskip("triton")
    script = Path(__file__).with_name("fused_kernels.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script, "--cases", str(case)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["fused_to_plain"] < 2e-5
