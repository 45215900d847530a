"""What stops a run although nobody wrote anything wrong: a full disk, a loss that is no number."""


class RunError(RuntimeError):
    """The message says what happened, what is safe on disk and how to go on; commands print it without a stack trace."""
