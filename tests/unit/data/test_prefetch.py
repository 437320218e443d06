from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from llmscale.data.prefetch import Prefetch


def test_items_come_in_order_and_end() -> None:
    assert list(Prefetch(iter(range(100)), 3)) == list(range(100))


def test_the_producer_works_ahead_by_depth_and_no_further() -> None:
    produced: list[int] = []
    full = threading.Event()

    def produce() -> Iterator[int]:
        for number in range(100):
            produced.append(number)
            if number == 3:
                full.set()  # 3 are ready, the fourth waits in hand
            yield number

    items = Prefetch(produce(), 3)
    assert full.wait(10)
    assert len(produced) == 4
    assert next(items) == 0
    items.close()
    assert len(produced) <= 6


def test_what_the_producer_raises_arrives_after_the_items_before_it() -> None:
    def produce() -> Iterator[int]:
        yield 1
        raise KeyError("broken")

    items = Prefetch(produce(), 2)
    assert next(items) == 1
    for _ in range(2):  # once is easily caught with much else, and an end would look like that of the data
        with pytest.raises(KeyError, match="broken"):
            next(items)
    items.close()
    assert list(items) == []


def test_close_ends_the_thread_and_the_producer() -> None:
    closed = threading.Event()

    def produce() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    threads = threading.active_count()
    items = Prefetch(produce(), 1)
    next(items)
    items.close()
    items.close()
    assert closed.is_set()
    assert threading.active_count() == threads
    assert list(items) == []


def test_close_wakes_a_consumer_that_waits() -> None:
    go = threading.Event()

    def produce() -> Iterator[int]:
        go.wait(10)
        yield 1

    items = Prefetch(produce(), 1)
    got: list[list[int]] = []
    consumer = threading.Thread(target=lambda: got.append(list(items)))
    consumer.start()
    closer = threading.Thread(target=items.close)
    closer.start()
    consumer.join(10)
    assert got == [[]]
    go.set()
    closer.join(10)
    assert not closer.is_alive()


def test_a_depth_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Prefetch(iter([1]), 0)
