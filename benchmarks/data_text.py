"""How fast text shards are tokenised while they stream, side by side with the bare tokenizer.

    python -m benchmarks.data_text

The same documents (the sources of Python's standard library, in four webdataset tars), the same tokenizer.json, the
same cores, in turns, every one a process of its own:

    tokenizer   tokenizers' encode_batch_fast of all texts at once, from memory, with a thread a core; nothing else
    llmscale    a pass of the `Loader` over the described tars, in batches of 16, with a tokenising thread a core: reads
                and checks the pieces, tokenises, shuffles, cuts sequences of 2,048

Prints million tokens a second, medians of the rounds and of their ratios, and the memory that the stream took, as JSON,
and writes the figures to benchmarks/results/data_text-<date>.json.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import statistics
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.record import record

LENGTH, BATCH = 2048, 16
Figures = dict[str, float]


def texts(mib: int) -> list[str]:
    found, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        text = path.read_text(errors="replace")
        found.append(text)
        size += len(text)
        if size > mib << 20:
            break
    return found


def prepare(folder: Path, mib: int) -> int:
    """The tars, their description and the tokenizer; gives the number of tokens."""
    from llmscale.data import tokenizer
    from llmscale.data.describe import describe
    from llmscale.data.tokenizer import Tokenizer

    documents = texts(mib)
    for shard in range(4):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number, text in enumerate(documents[shard::4]):
                data = text.encode()
                info = tarfile.TarInfo(f"{number:06d}.txt")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    tokenizer.write(tokenizer.train(documents[::4], 16_384), folder / "tokenizer.json")
    describe([str(folder / "*.tar")], folder / "tokenizer.json", folder / "described", streams=8)
    return sum(len(Tokenizer(folder / "tokenizer.json").encode(text)) + 1 for text in documents)


def bare(folder: Path, mib: int, cores: int, tokens: int) -> Figures:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["RAYON_NUM_THREADS"] = str(cores)
    import tokenizers

    loaded = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    documents = texts(mib)
    begin = time.perf_counter()
    count = sum(len(one) + 1 for one in loaded.encode_batch_fast(documents, add_special_tokens=False))
    return {"mtokens_per_second": count / (time.perf_counter() - begin) / 1e6}


def streamed(folder: Path, mib: int, cores: int, tokens: int) -> Figures:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from llmscale.data.loader import Loader
    from llmscale.data.stream import Reading, Stream

    before = anonymous_mib()
    begin = time.perf_counter()
    stream = Stream([(str(folder / "described"), 1.0)], LENGTH, seed=1, reading=Reading(workers=cores))
    batches, most = tokens // LENGTH // BATCH, 0.0
    with Loader(stream, BATCH, batches=batches, collate=lambda rows: rows) as loader:
        for _ in loader:
            most = max(most, anonymous_mib())
    seconds = time.perf_counter() - begin
    stream.close()
    return {"mtokens_per_second": batches * BATCH * LENGTH / seconds / 1e6, "memory_mib": most - before}


def anonymous_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


def alone(cores: int, job: Callable[..., Figures], *arguments: Any) -> Figures:
    """A measurement in a process of its own, on so many cores."""
    context = multiprocessing.get_context("spawn")
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    with ProcessPoolExecutor(1, mp_context=context, initializer=os.sched_setaffinity, initargs=(0, allowed)) as pool:
        return pool.submit(job, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    raw: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = prepare(folder, options.mib)
        for cores in (1, 2):
            found: dict[str, list[Figures]] = {"tokenizer": [], "llmscale": []}
            for _ in range(options.rounds):
                found["tokenizer"].append(alone(cores, bare, folder, options.mib, cores, tokens))
                found["llmscale"].append(alone(cores, streamed, folder, options.mib, cores, tokens))
            raw[f"{cores} cores"] = found
            rates = {
                name: round(statistics.median(one["mtokens_per_second"] for one in rounds), 3)
                for name, rounds in found.items()
            }
            pairs = zip(found["llmscale"], found["tokenizer"], strict=True)
            ratios = [one["mtokens_per_second"] / other["mtokens_per_second"] for one, other in pairs]
            memory = round(max(one["memory_mib"] for one in found["llmscale"]))
            print(
                json.dumps({
                    "cores": cores, "mtokens_per_second": rates, "memory_mib": memory,
                    "llmscale_to_tokenizer": round(statistics.median(ratios), 2),
                })
            )  # fmt: skip
    print(record("data_text", {"tokens": tokens, **raw}, ["tokenizers", "numpy"], options.output))


if __name__ == "__main__":
    main()
