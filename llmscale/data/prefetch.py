"""Work ahead in a background thread: the next batches are read while the model computes on this one.

A thread and no process: reading shards is copying memory, during which numpy lets go of the interpreter lock, and a
thread hands over arrays without a copy. Waiting uses a condition variable, so neither side ever polls."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
CLOSE_SECONDS = 5.0


class Prefetch(Iterator[T], Generic[T]):
    """The items of an iterator, up to `depth` (at least 1) of them produced ahead. Close it when done."""

    def __init__(self, produce: Iterator[T], depth: int) -> None:
        if depth < 1:
            raise ValueError(f"depth is at least 1, not {depth}")
        self._depth = depth
        self._ready: deque[T] = deque()
        self._change = threading.Condition()
        self._closed = False
        self._finished = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(produce,), name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Prefetch[T]:
        return self

    def __next__(self) -> T:
        """The next item. What the producer raised is raised here after the items that it gave before, each time."""
        with self._change:
            self._change.wait_for(lambda: self._ready or self._finished or self._closed)
            if self._ready and not self._closed:
                item = self._ready.popleft()
                self._change.notify_all()
                return item
            error = None if self._closed else self._error
        if error is not None:
            raise error
        raise StopIteration

    def close(self) -> None:
        """End the thread: it stops after the item in hand, and closes the producer. May be called twice.

        An item that takes longer than CLOSE_SECONDS is left to the thread, which ends with the process at the latest.
        """
        with self._change:
            self._closed = True
            self._ready.clear()
            self._change.notify_all()
        self._thread.join(CLOSE_SECONDS)

    def _run(self, produce: Iterator[T]) -> None:
        try:
            for item in produce:
                with self._change:
                    self._change.wait_for(lambda: len(self._ready) < self._depth or self._closed)
                    if self._closed:
                        break
                    self._ready.append(item)
                    self._change.notify_all()
            if close := getattr(produce, "close", None):
                close()
        except (
            BaseException
        ) as error:  # whatever ends the producer has to reach the consumer, or it would wait for ever
            self._error = error
        with self._change:
            self._finished = True
            self._change.notify_all()
