"""Work in a fork of the tests' process, which may be killed."""

import os
from collections.abc import Callable

import torch


def in_child(work: Callable[[], object]) -> int:
    """Return the process id of a fork that ends with 0 after `work()`, with 7 after an error."""
    child = os.fork()
    if child:
        return child
    code = 7
    try:
        # The threads of the tests' process are not in the fork. Torch makes others at its next
        # call, and fails where several threads make the first ("Invalid thread pool").
        torch.set_num_threads(1)
        work()
        code = 0
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """Wait for a child; return its exit code, or minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
