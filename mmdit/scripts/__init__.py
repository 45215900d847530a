"""Commands. Each turns arguments into a call; what a person can mend is told in one line, without a stack trace."""

import contextlib
import sys


@contextlib.contextmanager
def friendly():
    """Print a ValueError (ConfigError included), RuntimeError we raised or a file error as one line and exit with 2; anything else
    is a bug of ours and keeps its trace. `MMDIT_TRACE=1` shows every trace."""
    import os

    try:
        yield
    except (ValueError, FileNotFoundError, PermissionError) as error:
        if os.environ.get("MMDIT_TRACE"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
