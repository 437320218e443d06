"""How fast a split in a store streams, side by side with bare fsspec, which fetches the same byte ranges and drops them.

    python -m benchmarks.data_remote

The store is moto's S3 server on the loopback, a process held to one core; readers are processes held to another. In
turns, as often as --rounds says:

    fsspec      `cat_ranges` of s3fs, 16 at a time: all samples' ranges, in the order in which the stream needs them
    llmscale    a pass of the `Loader` in batches of 64 with an empty cache: fetched, checked, kept on the disk, cut

A third reader stands for a training loop: it takes a batch in twice the time that fsspec needs for its bytes, and says
how long it waited for batches after the first LEAD. Rates are MiB of shards a second. Prints medians as JSON, and writes
them to benchmarks/results/data_remote-<date>.json.
"""

from __future__ import annotations

import argparse
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
os.environ |= {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}

import numpy as np

from benchmarks.record import record
from llmscale.data.cache import Cache
from llmscale.data.loader import Loader
from llmscale.data.shards import SAMPLE_TOKENS, SplitWriter
from llmscale.data.split import Split
from llmscale.data.stream import Reading, Stream

LENGTH, BATCH, LEAD = 4096, 64, 8
VOCAB_SIZE = 50_257
URL = "s3://data/split"
Figures = dict[str, float]


def serve(ready: Any, core: int) -> None:
    """Moto's server, until this process is ended."""
    from moto.server import ThreadedMotoServer

    os.sched_setaffinity(0, [core])
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    ready.put(server.get_host_and_port()[1])
    time.sleep(1e6)


def upload(folder: Path) -> None:
    import fsspec

    system = fsspec.filesystem("s3")
    system.mkdir("data")
    system.put(f"{folder}/", f"{URL}/", recursive=True)


def fsspec_rate() -> Figures:
    """The ranges of all samples, in the order of the stream."""
    import fsspec

    with tempfile.TemporaryDirectory() as folder:
        split = Split(URL, Cache(Path(folder)))
        system = fsspec.filesystem("s3", skip_instance_cache=True)
        ranges = [
            (f"{URL}/{shard.name}", *split.region(shard, number))
            for shard in split.shards
            for number in range(len(shard.offsets))
        ]
    order = np.random.default_rng(0).permutation(len(ranges)).tolist()

    def run() -> int:
        total = 0
        for first in range(0, len(order), 64):
            paths, starts, ends = zip(*(ranges[number] for number in order[first : first + 64]), strict=True)
            total += sum(map(len, system.cat_ranges(list(paths), list(starts), list(ends), batch_size=16)))
        return total

    return timed(run)


def llmscale_rate() -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        stream = Stream([(URL, 1.0)], LENGTH, seed=1, reading=Reading(cache=Path(folder)))
        batches = int(stream.epochs(1)[0] ** -1) // BATCH if stream.epochs(1)[0] else 0

        def run() -> int:
            with Loader(stream, BATCH, batches=batches) as loader:
                for _ in loader:
                    pass
            return int(stream.counters()["bytes_fetched"])

        found = timed(run)
        stream.close()
    return found


def waited(seconds_a_batch: float) -> Figures:
    """What a loop waits that computes for so long on each batch."""
    with tempfile.TemporaryDirectory() as folder:
        stream = Stream([(URL, 1.0)], LENGTH, seed=1, reading=Reading(cache=Path(folder)))
        batches = int(stream.epochs(1)[0] ** -1) // BATCH if stream.epochs(1)[0] else 0
        waits = []
        with Loader(stream, BATCH, batches=batches) as loader:
            for _ in range(batches):
                begin = time.perf_counter()
                next(loader)
                waits.append(time.perf_counter() - begin)
                time.sleep(seconds_a_batch)
        stream.close()
    late = waits[LEAD:]
    return {
        "seconds_a_batch": seconds_a_batch,
        "first_batch_seconds": waits[0],
        "waited_share": sum(late) / (len(late) * seconds_a_batch),
        "longest_wait_seconds": max(late),
    }


def timed(run: Callable[[], int]) -> Figures:
    """run: gives the bytes that it moved."""
    begin, cpu = time.perf_counter(), time.process_time()
    mib = run() / 2**20
    seconds = time.perf_counter() - begin
    return {"mib_per_second": mib / seconds, "cpu_seconds_per_gib": (time.process_time() - cpu) / mib * 1024}


def measure(job: Callable[..., Figures], port: int, core: int, *arguments: float) -> Figures:
    """A measurement in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_settle, initargs=(port, core)) as pool:
        return pool.submit(job, *arguments).result()


def _settle(port: int, core: int) -> None:
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
    os.sched_setaffinity(0, [core])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512, help="of tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    server = context.Process(target=serve, args=(ready, cores[-1]), daemon=True)
    server.start()
    port = ready.get()
    results: dict[str, list[Figures]] = {"fsspec": [], "llmscale": [], "loop": []}
    try:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "split").mkdir()
            tokens = np.random.default_rng(0).integers(1, VOCAB_SIZE, options.mib << 19, dtype=np.uint16)
            writer = SplitWriter(Path(folder, "split"), "uint16", 0, SAMPLE_TOKENS, 128)
            for place in range(0, len(tokens), 1000):
                writer.add(tokens[place : place + 999], True, True)
            writer.finish(b"{}", VOCAB_SIZE)
            _settle(port, cores[0])
            upload(Path(folder, "split"))
        for _ in range(options.rounds):
            results["fsspec"].append(measure(fsspec_rate, port, cores[0]))
            results["llmscale"].append(measure(llmscale_rate, port, cores[0]))
            seconds = 2 * BATCH * LENGTH * 2 / 2**20 / results["fsspec"][-1]["mib_per_second"]
            results["loop"].append(measure(waited, port, cores[0], seconds))
    finally:
        server.kill()
    for name, rounds in results.items():
        print(json.dumps({name: {key: round(statistics.median(one[key] for one in rounds), 3) for key in rounds[0]}}))
    pairs = zip(results["llmscale"], results["fsspec"], strict=True)
    ratio = statistics.median(one["mib_per_second"] / other["mib_per_second"] for one, other in pairs)
    print(json.dumps({"llmscale_to_fsspec": round(ratio, 2)}))
    print(record("data_remote", results, ["fsspec", "s3fs", "aiobotocore", "moto", "numpy"], options.output))


if __name__ == "__main__":
    main()
