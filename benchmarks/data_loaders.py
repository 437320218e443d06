"""How fast loaders give the same shuffled sequences of tokens, side by side with llmscale's stream.

    python -m venv loaders && loaders/bin/pip install -r benchmarks/data_loaders.txt .
    loaders/bin/python -m benchmarks.data_loaders

The task: tokens drawn at random, uint16 on disk, in sequences of 4,096 + 1, given shuffled as int64 [batch, 4097].
Every contender has written the same tokens in its own format (`data_contenders.py` says how each is set up, and why):
24 shards of 8 MiB of tokens, so that two workers have equally many. One that is not installed is left out.

Each contender is imported in a process of its own, of which every measurement is a fork, held to the cores that it is
given. Contenders take turns, in an order that rotates by round; figures are medians of the rounds, in million tokens a
second (a sequence is 4,096), timed from the first batch to the last:

- first pass: all of the data, from the page cache, in batches of 64. llmscale checks every sample in it;
- warm: later passes, of at least a second or as much of one pass as lasts that long, in batches of 64 and of 8;
- cold: as the first pass, after the data was dropped from the page cache. mincore says how much of it was left there;
- first batch, seconds: from the imported library to a batch of 64, of 10,000 shards of 4 sequences of 256. Those that
  keep all in one file have one file here too;
- memory, MiB: how much more anonymous and shared memory the process holds at most in a pass over 16 thousand sequences
  of 128 tokens than before it opened them (mapped files do not count: they can be dropped at any time), and how much
  that grows with ten times the sequences and documents.

What counts is right: in a pass on one core and in one on two, the tokens of all sequences without their last must be,
each as often, those that were written.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import importlib.metadata
import mmap
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"

import numpy as np

from benchmarks.data_contenders import CONTENDERS, VOCABULARY, Batch, Corpus
from benchmarks.record import record

LENGTH = 4096
SHARD_SEQUENCES = 1024
SMALL_LENGTH, SMALL_SHARD_SEQUENCES = 256, 4
MEMORY_LENGTH, MEMORY_SEQUENCES = 128, 16_384
Found = dict[str, float]


def corpus(sequences: int, length: int, document: int, shard_sequences: int) -> Corpus:
    """Random tokens in documents that end with 0. The last token of all is 0 too, so that every contender leaves out
    the same one as no input, also one that shuffles documents before it cuts them."""
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, sequences * length + 1, dtype=np.uint16)
    tokens[document - 1 :: document] = 0
    tokens[-1] = 0
    return Corpus(tokens, length, document, shard_sequences)


# The measurements, each a process.


def census(name: str, folder: Path, length: int, batch: int, workers: int) -> Found:
    """Whether a pass holds the tokens that were written: their counts must be those in counts.npy beside the folder."""
    counts = np.zeros(1 << 16, dtype=np.int64)
    for rows in CONTENDERS[name].open(folder, length, workers)(batch):
        seen = np.asarray(rows)
        if seen.dtype != np.int64 or seen.shape[1] != length + 1:
            raise SystemExit(f"{name}: gives {seen.dtype} {seen.shape}")
        counts += np.bincount(seen[:, :-1].ravel(), minlength=len(counts))
    if wrong := int(np.abs(counts - np.load(folder.parent / "counts.npy")).sum()):
        raise SystemExit(f"{name}: a pass of batches of {batch} by {workers} workers has {wrong} tokens wrong")
    return {}


def rates(name: str, folder: Path, workers: int, seconds: float) -> Found:
    for path in files(folder):
        path.read_bytes()
    epoch = CONTENDERS[name].open(folder, LENGTH, workers)
    found = {"first pass 64": rate(epoch(64))}
    for batch in (64, 8):
        done, spent = 0, 0.0
        while spent < seconds:
            count, took = timed(epoch(batch), seconds - spent)
            done, spent = done + count, spent + took
        found[f"warm {batch}"] = done / spent
    return found


def cold(name: str, folder: Path, workers: int) -> Found:
    left = drop(folder)
    return {"cold 64": rate(CONTENDERS[name].open(folder, LENGTH, workers)(64)), "share left in the page cache": left}


def first_batch(name: str, folder: Path) -> Found:
    for path in files(folder):
        path.read_bytes()
    begin = time.perf_counter()
    batches = CONTENDERS[name].open(folder, SMALL_LENGTH, 0)(64)
    next(batches)
    return {"first batch": time.perf_counter() - begin}


def memory(name: str, folder: Path, least: Path) -> Found:
    """least: a little data of the same kind, read first, so that what is imported late is not counted."""
    for _ in CONTENDERS[name].open(least, MEMORY_LENGTH, 0)(64):
        pass
    gc.collect()
    before, most = resident_mib(), 0.0
    epoch = CONTENDERS[name].open(folder, MEMORY_LENGTH, 0)
    for number, _ in enumerate(epoch(64)):
        if number % 16 == 0:
            most = max(most, resident_mib())
    return {"memory": max(most, resident_mib()) - before}


def timed(batches: Iterator[Batch], limit: float = float("inf")) -> tuple[int, float]:
    """(sequences, seconds) after the first batch, until the end or the limit."""
    next(batches)
    begin, done = time.perf_counter(), 0
    for rows in batches:
        done += len(rows)
        if time.perf_counter() - begin > limit:
            break
    return done, time.perf_counter() - begin


def rate(batches: Iterator[Batch]) -> float:
    """Sequences a second."""
    done, seconds = timed(batches)
    return done / seconds


def resident_mib() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in status if line.startswith(("RssAnon:", "RssShmem:"))) / 1024


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def drop(folder: Path) -> float:
    """Take a folder's files out of the page cache; gives the share of their pages that stayed."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = left = 0
    for path in files(folder):
        with path.open("rb") as file:
            if not (size := os.fstat(file.fileno()).st_size):
                continue
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapped:
                there = np.zeros(-(-size // mmap.PAGESIZE), dtype=np.uint8)
                view = np.frombuffer(mapped, dtype=np.uint8)
                place = ctypes.c_void_p(view.ctypes.data)
                if libc.mincore(place, ctypes.c_size_t(size), there.ctypes.data_as(ctypes.c_void_p)):
                    raise OSError(ctypes.get_errno(), "mincore")
                del view
            pages, left = pages + len(there), left + int((there & 1).sum())
    return left / pages


# The processes.


class Process:
    """A contender's process: has its modules imported, and forks for each measurement."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_serve, args=(CONTENDERS[name].imports, theirs))
        self._process.start()
        theirs.close()
        self._pipe.recv()

    def run(self, cores: int, measurement: Callable[..., Found], *arguments: Any) -> Found:
        self._pipe.send((cores, measurement, arguments))
        found: Found | None = self._pipe.recv()
        if found is None:
            raise SystemExit(f"{self._name}: {measurement.__name__} failed; its error is above")
        return found

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def _serve(modules: tuple[str, ...], pipe: Connection) -> None:
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    pipe.send({})
    context = multiprocessing.get_context("fork")
    while (order := pipe.recv()) is not None:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_measure, args=(*order, theirs))
        child.start()
        theirs.close()
        try:
            pipe.send(ours.recv())
        except EOFError:
            pipe.send(None)
        child.join()


def _measure(cores: int, measurement: Callable[..., Found], arguments: tuple[Any, ...], pipe: Connection) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    os.dup2(2, 1)  # what contenders print is not part of the result
    pipe.send(measurement(*arguments))


def write(name: str, top: Path, shape: tuple[int, int, int, int]) -> Found:
    """A contender's files, in a folder of its own in top."""
    contender, made = CONTENDERS[name], corpus(*shape)
    folder = folder_of(name, top)
    if contender.reads and not folder.exists():
        CONTENDERS[contender.reads].write(folder, made)
    begin = time.perf_counter()
    contender.write(folder, made)
    return {"seconds": time.perf_counter() - begin}


def folder_of(name: str, top: Path) -> Path:
    return top / (CONTENDERS[name].reads or name).replace(" ", "-")


def installed(name: str) -> bool:
    try:
        importlib.metadata.version(CONTENDERS[name].distribution)
    except importlib.metadata.PackageNotFoundError:
        print(f"{name}: left out, {CONTENDERS[name].distribution} is not installed", file=sys.stderr)
        return False
    return True


def prepare(top: Path, processes: dict[str, Process], shapes: dict[str, tuple[int, int, int, int]]) -> None:
    """Write all data, as two contenders at a time; those that read another's after it."""

    def run(name: str) -> None:
        for kind, shape in shapes.items():
            found = processes[name].run(2, write, name, top / kind, shape)
            say(f"{name}: wrote {kind} in {found['seconds']:.1f} s")

    for kind, shape in shapes.items():
        (top / kind).mkdir()
        counts = np.bincount(corpus(*shape).tokens[:-1], minlength=1 << 16)
        np.save(top / kind / "counts.npy", counts)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, [name for name in processes if not CONTENDERS[name].reads]))
        list(pool.map(run, [name for name in processes if CONTENDERS[name].reads]))


def measure(top: Path, processes: dict[str, Process], options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    results: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in processes}
    names = list(processes)
    for name, process in processes.items():
        say(f"{name}: checked")
        for batch, workers in ((8, 0), (64, 2)):
            process.run(2, census, name, folder_of(name, top / "large"), LENGTH, batch, workers)
        for kind in ("few", "many"):
            data, least = folder_of(name, top / kind), folder_of(name, top / "least")
            results[name][f"memory, {kind}"].append(process.run(1, memory, name, data, least)["memory"])
    for number in range(options.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            say(f"round {number + 1}: {name}")
            large, small = folder_of(name, top / "large"), folder_of(name, top / "small")
            found = {("", key): value for key, value in processes[name].run(1, first_batch, name, small).items()}
            for cores, workers in ((1, 0), (2, 2)):
                for part in (
                    processes[name].run(cores, rates, name, large, workers, options.seconds),
                    processes[name].run(cores, cold, name, large, workers),
                ):
                    found |= {(f", {cores} cores", key): value for key, value in part.items()}
            for (where, key), value in found.items():
                results[name][key + where].append(value)
    return results


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def table(results: dict[str, dict[str, list[float]]]) -> str:
    rated = [f"{what}, {cores} cores" for cores in (1, 2) for what in ("first pass 64", "warm 64", "warm 8", "cold 64")]
    titles = [*rated, "first batch, s", "memory, MiB", "with ten times the data, MiB"]
    lines = ["| million tokens/s | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(titles)]
    for name, found in results.items():
        cells = [f"{statistics.median(found[key]) * LENGTH / 1e6:.0f}" for key in rated]
        cells += [f"{statistics.median(found['first batch']):.3f}"]
        cells += [f"{statistics.median(found[f'memory, {kind}']):.1f}" for kind in ("few", "many")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if "llmscale" in results:
        lines += ["", "llmscale's rate is that of another, times (median of the rounds):", ""]
        lines += ["| | " + " | ".join(rated) + " |", "|---|" + "---:|" * len(rated)]
        for name in [name for name in results if name != "llmscale"]:
            pairs = [zip(results["llmscale"][key], results[name][key], strict=True) for key in rated]
            cells = [f"{statistics.median(ours / theirs for ours, theirs in pair):.2g}" for pair in pairs]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=24, help=f"of {SHARD_SEQUENCES} sequences of {LENGTH}; even")
    parser.add_argument("--small-shards", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a warm measurement")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    names = [name for name in options.contenders if installed(name)]
    shapes = {
        "large": (options.shards * SHARD_SEQUENCES, LENGTH, 1000, SHARD_SEQUENCES),
        "small": (options.small_shards * SMALL_SHARD_SEQUENCES, SMALL_LENGTH, 100, SMALL_SHARD_SEQUENCES),
        "least": (256, MEMORY_LENGTH, 100, 128),
        "few": (MEMORY_SEQUENCES, MEMORY_LENGTH, 100, MEMORY_SEQUENCES // 8),
        "many": (10 * MEMORY_SEQUENCES, MEMORY_LENGTH, 100, MEMORY_SEQUENCES // 8),
    }
    processes = {name: Process(name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), processes, shapes)
        results = measure(Path(folder), processes, options)
    for process in processes.values():
        process.close()
    print(table(results))
    packages = sorted({CONTENDERS[name].distribution for name in names})
    raw = {"sequence_length": LENGTH, "sequences": shapes["large"][0], "rates": "sequences/s", "contenders": results}
    print(record("data_loaders", raw, packages, options.output))


if __name__ == "__main__":
    main()
