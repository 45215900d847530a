"""Real runs of the training command: killed, preempted, out of disk space (`kill_training.py`,
`kill_caching.py`), on several processes, with one of them lost (`rank_training.py`), and those that
GPUs are measured with (`gpu_checks.py`)."""

import json

import pytest

from tests.helpers import warm
from tests.helpers.thorough import thorough


def drive(script: str, *words: str, seconds: int) -> dict:
    """Run a driver in a process of its own (it forks); its last line is its result."""
    done = warm.run("-m", f"tests.drivers.{script}", *words, timeout=seconds)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_survives_kills():
    words = ["--kills", "3", "--seed", "3", "--only_kills"]
    result = drive("kill_training", *words, seconds=200)["kills"]
    assert result["kills"] >= 3 and result["distinct_last_steps"] > 1


@pytest.mark.parametrize(
    "kills",
    [
        *thorough(6),
        pytest.param(50, marks=pytest.mark.slow),
    ],
)
def test_a_run_survives_kills_preemption_and_a_full_disk(kills):
    result = drive("kill_training", "--kills", str(kills), "--seed", str(kills), seconds=900)
    assert result["kills"]["kills"] >= kills and result["kills"]["distinct_last_steps"] > 1
    assert result["sigterm"]["exit_code"] == 0 and result["full_disk"]["exit_code"] == 2


@pytest.mark.parametrize("kills", [6, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("words", [[], pytest.param(["--generated"], marks=pytest.mark.slow)])
def test_a_cache_killed_again_and_again_is_byte_identical_to_an_undisturbed_one(kills, words):
    counts = ["--kills", str(kills), "--seed", str(kills)]
    result = drive("kill_caching", *counts, *words, seconds=600)
    assert result["kills"] == kills and result["finished"] >= 1 and result["distinct_moments"] > 1


@pytest.mark.slow
@pytest.mark.parametrize("only", ["resume,large,offloaded", "scaling,reduced,sharded,memory"])
def test_the_script_for_gpus_works_on_a_cpu(only):
    result = drive("gpu_checks", "--tiny", "--only", only, seconds=300)
    assert not any("failed" in result[name] or name not in result for name in only.split(",")), (
        result
    )


@pytest.mark.thorough
def test_a_process_that_hangs_or_dies_is_named():
    result = drive("rank_training", "--only_lost", seconds=200)
    assert result["hangs"]["seconds"] < 20 and result["dies"]["seconds"] < 20


@pytest.mark.parametrize(
    "words",
    [
        *thorough(["--quick"]),
        pytest.param([], marks=pytest.mark.slow),
    ],
)
def test_the_number_of_processes_changes_nothing_and_a_lost_one_is_named(words):
    """On 1, 2 and 4 processes, copied or sharded, and moved from 2 to 4 to 1, weights, EMA, moments
    and metrics of 6 steps agree within rounding (quick: 1 and 2 processes, and one move)."""
    result = drive("rank_training", *words, seconds=400)
    assert max(result["worlds"].values()) < 1e-6, result["worlds"]
    assert (
        result["preempted"]["stopped_at"] < 1000 and result["preempted"]["difference"] == 0.0
    )  # the same split: exactly
    assert result["hangs"]["seconds"] < 20 and result["dies"]["seconds"] < 20
