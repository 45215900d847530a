"""Work done by threads that nobody waits for: a request that hangs must not keep the process from
ending."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def done_in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Iterator[tuple[Item, Result | Exception]]:
    """Yield (item, `work(item)`), or the exception in place of the result, in the order in which
    items are done. At most twice as many items as `threads` are taken in advance; with 0 threads,
    the calling thread does the work."""
    if not threads:
        for item in items:
            yield item, _result(work, item)
        return
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    finished: queue.SimpleQueue = queue.SimpleQueue()

    def serve_queue() -> None:
        while (item := waiting.get()) is not None:
            finished.put((item, _result(work, item)))

    for number in range(threads):
        threading.Thread(target=serve_queue, name=f"captions {number}", daemon=True).start()
    source, ahead = iter(items), 0
    try:
        while True:
            while ahead < 2 * threads:
                try:
                    waiting.put(next(source))
                except StopIteration:
                    break
                ahead += 1
            if not ahead:
                return
            yield finished.get()
            ahead -= 1
    finally:
        with contextlib.suppress(queue.Empty):
            while True:  # items that no thread has begun
                waiting.get_nowait()
        for _ in range(threads):
            waiting.put(None)


def _result(work: Callable[[Item], Result], item: Item) -> Result | Exception:
    try:
        return work(item)
    except Exception as error:  # decoders raise almost anything on damaged files
        return error
