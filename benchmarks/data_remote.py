"""How fast a split in a store streams, side by side with bare fsspec, which fetches the same ranges.

    python -m benchmarks.data_remote

The store is aiohttp's own file server on the loopback, which hands out ranges with sendfile: a process held to one
core, while readers are processes held to another. (Moto's S3 server, which the tests use, makes 14 MiB/s of such
ranges: it would hide what is measured here.) It answers as fast as it can, or after as long as the bytes take at
--store-mib-per-second in all. In turns, as often as --rounds says:

    fsspec      `cat_ranges`, 16 at a time: the ranges of all samples, shuffled; what comes is dropped
    kept        the same, and each range is written to a file: what no cache on a disk gets around
    llmscale    a pass of the `Loader` in batches of 64 with an empty cache: fetched, checked, kept on the disk, cut

Caches stay until the end: where files were removed a moment ago, ext4 takes longer to make new ones. The last reader
stands for a training loop: it computes on each batch for twice the time that fsspec needs for its
bytes, and says how long it waited for batches after the first shuffle window, and how many reads had to wait for the
store then. Rates are MiB of shards a second. Prints medians as JSON, and writes them to
benchmarks/results/data_remote-<date>.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch  # noqa: F401  # what is imported late is not to be timed

from benchmarks.record import record
from llmscale.data.cache import Cache
from llmscale.data.loader import Loader
from llmscale.data.shards import SAMPLE_TOKENS, SplitWriter
from llmscale.data.split import Split
from llmscale.data.stream import Reading, Stream

LENGTH, BATCH = 4096, 64
WINDOW = 64
"""Samples; a pass has many shuffle windows then, as one over a large source has with the default one."""
LEAD = WINDOW * SAMPLE_TOKENS // LENGTH // BATCH
"""Batches of the first window."""
VOCAB_SIZE = 50_257
Figures = dict[str, float]


def serve(folder: str, ready: Any, core: int, rate: float) -> None:
    """The file server, until this process is ended. rate: bytes a second, 0 for all that it can."""
    from aiohttp import web

    os.sched_setaffinity(0, [core])
    free = 0.0
    """When all bytes are out that were asked for so far."""

    @web.middleware
    async def slow(request: Any, handler: Any) -> Any:
        nonlocal free
        span = request.http_range
        if rate and span.stop:
            free = max(free, time.monotonic()) + (span.stop - span.start) / rate
            await asyncio.sleep(free - time.monotonic())
        return await handler(request)

    async def run() -> None:
        application = web.Application(middlewares=[slow])
        application.router.add_static("/", folder)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        ready.put(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(run())


def fsspec_rate(url: str, folder: Path, keep: bool) -> Figures:
    """The ranges of all samples, shuffled. keep: each is written to a file in the folder."""
    import fsspec

    split = Split(url, Cache(folder / "index"))
    system = fsspec.filesystem("http", skip_instance_cache=True)
    ranges = [
        (f"{url}/{shard.name}", *split.region(shard, number))
        for shard in split.shards
        for number in range(len(shard.offsets))
    ]
    order = np.random.default_rng(0).permutation(len(ranges)).tolist()

    def run() -> int:
        total = 0
        for first in range(0, len(order), 64):
            numbers = order[first : first + 64]
            paths, starts, ends = zip(*(ranges[number] for number in numbers), strict=True)
            parts = system.cat_ranges(list(paths), list(starts), list(ends), batch_size=16)
            for number, part in zip(numbers, parts, strict=True):
                total += len(part)
                if keep:
                    (folder / str(number)).write_bytes(part)
        return total

    return timed(run)


def llmscale_rate(url: str, folder: Path) -> Figures:
    stream = stream_of(url, folder)
    batches = batches_of(stream)

    def run() -> int:
        with Loader(stream, BATCH, batches=batches) as loader:
            for _ in loader:
                pass
        return int(stream.counters()["bytes_fetched"])

    found = timed(run)
    stream.close()
    return found


def waited(url: str, folder: Path, seconds_a_batch: float) -> Figures:
    """What a loop waits that computes for so long on each batch."""
    stream = stream_of(url, folder)
    batches = batches_of(stream)
    waits, before = [], 0.0
    with Loader(stream, BATCH, batches=batches) as loader:
        for number in range(batches):
            if number == LEAD:
                before = stream.counters()["waits"]
            begin = time.perf_counter()
            next(loader)
            waits.append(time.perf_counter() - begin)
            time.sleep(seconds_a_batch)
    late_reads = stream.counters()["waits"] - before
    stream.close()
    late = waits[LEAD:]
    return {
        "seconds_a_batch": seconds_a_batch,
        "first_batch_seconds": waits[0],
        "waited_share": sum(late) / (len(late) * seconds_a_batch),
        "longest_wait_seconds": max(late),
        "reads_that_waited_for_the_store": late_reads,
    }


def stream_of(url: str, folder: Path) -> Stream:
    return Stream([(url, 1.0)], LENGTH, seed=1, reading=Reading(cache=folder, shuffle_window=WINDOW))


def batches_of(stream: Stream) -> int:
    """Whole batches of one pass."""
    (share,) = stream.epochs(1)
    return round(1 / share) // BATCH if share else 0


def timed(run: Callable[[], int]) -> Figures:
    """run: gives the bytes that it moved."""
    begin, cpu = time.perf_counter(), time.process_time()
    mib = run() / 2**20
    seconds = time.perf_counter() - begin
    return {"mib_per_second": mib / seconds, "cpu_seconds_per_gib": (time.process_time() - cpu) / mib * 1024}


def alone(core: int, job: Callable[..., Figures], *arguments: Any) -> Figures:
    """A measurement in a process of its own, on this core."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=os.sched_setaffinity, initargs=(0, [core])) as pool:
        return pool.submit(job, *arguments).result()


def write(folder: Path, count: int) -> None:
    """A split of so many random tokens, in documents of 1,000."""
    folder.mkdir()
    tokens = np.random.default_rng(0).integers(1, VOCAB_SIZE, count, dtype=np.uint16)
    writer = SplitWriter(folder, "uint16", 0, SAMPLE_TOKENS, 128)
    for place in range(0, len(tokens), 1000):
        writer.add(tokens[place : place + 999], True, True)
    writer.finish(b"{}", VOCAB_SIZE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512, help="of tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--store-mib-per-second", type=float, nargs="+", default=[0.0, 64.0], help="0: unlimited")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    raw = {}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "split"), options.mib << 19)
        for rate in options.store_mib_per_second:
            raw[f"{rate:g} MiB/s" if rate else "unlimited"] = found = measure(Path(folder), rate, options.rounds)
            medians = {
                name: {key: round(statistics.median(one[key] for one in rounds), 3) for key in rounds[0]}
                for name, rounds in found.items()
            }
            ratios = {
                f"llmscale_to_{other}": round(
                    statistics.median(
                        one["mib_per_second"] / theirs["mib_per_second"]
                        for one, theirs in zip(found["llmscale"], found[other], strict=True)
                    ),
                    2,
                )
                for other in ("fsspec", "kept")
            }
            print(json.dumps({"store": rate or "unlimited", **medians, **ratios}))
    print(record("data_remote", raw, ["fsspec", "aiohttp", "numpy", "torch"], options.output))


def measure(folder: Path, rate: float, rounds: int) -> dict[str, list[Figures]]:
    """All readers, in turns, of a server of this rate."""
    cores = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    server = context.Process(target=serve, args=(str(folder), ready, cores[-1], rate * 2**20), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{ready.get()}/split"
    found: dict[str, list[Figures]] = {"fsspec": [], "kept": [], "llmscale": [], "loop": []}

    def cache() -> Path:
        return Path(tempfile.mkdtemp(dir=folder))

    try:
        for _ in range(rounds):
            found["fsspec"].append(alone(cores[0], fsspec_rate, url, cache(), False))
            found["kept"].append(alone(cores[0], fsspec_rate, url, cache(), True))
            found["llmscale"].append(alone(cores[0], llmscale_rate, url, cache()))
            seconds = 2 * BATCH * LENGTH * 2 / 2**20 / found["fsspec"][-1]["mib_per_second"]
            found["loop"].append(alone(cores[0], waited, url, cache(), seconds))
    finally:
        server.kill()
    return found


if __name__ == "__main__":
    main()
