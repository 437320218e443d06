"""A few threads that fetch what is wanted now before what will be wanted later, and nothing twice.

Threads and no processes: fetching is waiting for a store, and checking what came (CRC-32) lets go of the interpreter
lock. They start with the first thing to fetch, in the process that asks: a fork has none of its parent's.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future

from llmscale.errors import DataError

CLOSED = "the stream was closed while it was read"


class Fetcher:
    """Fetches units by number."""

    def __init__(self, fetch: Callable[[int], None], threads: int, ahead: int) -> None:
        """ahead: so many units at most are fetched that nobody has read yet."""
        self._fetch = fetch
        self._threads = threads
        self._ahead = ahead
        self._pid = 0
        self._closed = False
        self._change = threading.Condition()
        self._futures: dict[int, Future[None]] = {}
        self._urgent: deque[int] = deque()
        self._later: deque[int] = deque()
        self._unread: dict[int, None] = {}
        self._workers: list[threading.Thread] = []

    def look_ahead(self, units: Iterable[int]) -> None:
        """Fetch these later, in this order, as far as there is room; returns at once."""
        self._start()
        with self._change:
            before = len(self._later)
            for unit in units:
                if unit not in self._futures and unit not in self._unread:
                    self._futures[unit] = Future()
                    self._later.append(unit)
            self._wake(len(self._later) - before)

    def fetch(self, units: Iterable[int]) -> dict[int, BaseException]:
        """Fetch these now, and wait; gives what went wrong."""
        waited: dict[int, Future[None]] = {}
        self._start()
        with self._change:
            if self._closed:
                raise DataError(CLOSED)
            for unit in units:
                if unit not in self._futures:
                    self._futures[unit] = Future()
                    if len(self._unread) >= self._ahead:  # what was announced and is not read after all gives way
                        self._unread.pop(next(iter(self._unread)), None)
                waited[unit] = self._futures[unit]
                self._unread.pop(unit, None)
                self._urgent.append(unit)
            self._wake(len(waited))
        try:
            found = {unit: future.exception() for unit, future in waited.items()}
        except CancelledError:
            raise DataError(CLOSED) from None
        return {unit: error for unit, error in found.items() if error is not None}

    def seen(self, units: Iterable[int]) -> None:
        """Told what has been read, which makes room to look further ahead."""
        self._start()
        with self._change:
            before = len(self._unread)
            for unit in units:
                self._unread.pop(unit, None)
            self._wake(min(before - len(self._unread), len(self._later)))

    def _wake(self, threads: int) -> None:
        """Wake no more threads than there is work for: each takes the interpreter lock to look."""
        if threads:
            self._change.notify(threads)

    def close(self) -> None:
        """End the threads: those that wait at once, the others after the unit in hand."""
        with self._change:
            self._closed = True
            for future in self._futures.values():
                future.cancel()
            self._change.notify_all()
        if self._pid == os.getpid():
            for thread in self._workers:
                thread.join(1.0)

    def _start(self) -> None:
        """Start the threads of this process, once."""
        if self._pid == os.getpid():
            return
        if self._pid:  # forked: what the parent's threads do is no business of this process, its lock included
            self._change = threading.Condition()
            self._futures, self._unread, self._workers = {}, {}, []
            self._urgent.clear()
            self._later.clear()
        self._pid = os.getpid()
        for _ in range(self._threads):
            thread = threading.Thread(target=self._run, name="fetch", daemon=True)
            thread.start()
            self._workers.append(thread)

    def _next(self) -> int | None:
        """The unit to fetch now, if there is one; called with the lock held."""
        while self._urgent:
            if self._claim(unit := self._urgent.popleft()):
                return unit
        while self._later and len(self._unread) < self._ahead:
            if self._claim(unit := self._later.popleft()):
                self._unread[unit] = None
                return unit
        return None

    def _claim(self, unit: int) -> bool:
        """Whether nobody has begun with this."""
        future = self._futures.get(unit)
        return future is not None and not future.running() and future.set_running_or_notify_cancel()

    def _run(self) -> None:
        while True:
            with self._change:
                unit = self._next()
                while unit is None and not self._closed:
                    self._change.wait()
                    unit = self._next()
                if unit is None:
                    return
            error: BaseException | None = None
            try:
                self._fetch(unit)
            except BaseException as caught:  # whoever waits for the unit raises it
                error = caught
            with self._change:
                future = self._futures.pop(unit)
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)
