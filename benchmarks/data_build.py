"""How fast text becomes token shards, side by side with the bare tokenizer and with Megatron-LM's way to do it.

    OMP_NUM_THREADS=1 python -m benchmarks.data_build

The same documents (the sources of Python's standard library, once each as a line of a .jsonl file), the same
tokenizer.json (trained on a quarter of them) and the same cores, in turns, every one a process of its own:

    tokenizer   tokenizers' encode_batch_fast of all texts at once, from memory, with a thread a core; nothing else
    llmscale    `llmscale data build` with a worker a core: reads, tokenises, hashes, writes shards
    megatron    Megatron-LM's tools/preprocess_data.py: a pool with a worker a core calls encode for a line, the main
                process writes .bin and .idx with Megatron-core's IndexedDatasetBuilder

A round times what comes after the imports: for the last two the start of the workers too, and the whole output on the
way to the disk. Seconds are of the clock, cpu_seconds of the process and its workers: on a machine that others use as
well, the second says more. Prints the medians of the rounds, and of the rounds' ratios, as JSON, and writes them to
benchmarks/results/data_build-<date>.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.record import record

VOCAB_SIZE = 16_384
CONTENDERS = ("tokenizer", "llmscale", "megatron")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64, help="at most so much text")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.folder, options.workers[0])))
        return
    with tempfile.TemporaryDirectory() as folder:
        corpus = prepare(Path(folder), options.mib << 20)
        print(json.dumps(corpus), flush=True)
        results = [
            {"workers": workers, **compare(Path(folder), workers, options.rounds)} for workers in options.workers
        ]
    packages = ["llmscale", "megatron-core", "numpy", "tokenizers"]
    print(record("data_build", {"corpus": corpus, "rates": results}, packages))


def prepare(folder: Path, most: int) -> dict[str, int]:
    """Write texts.jsonl and tokenizer.json."""
    from llmscale.data import tokenizer

    texts: list[str] = []
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts or size > most:
            continue
        texts.append(path.read_bytes().decode(errors="replace"))
        size += len(texts[-1].encode())
    texts = [text for text in texts if text.strip()]
    with (folder / "texts.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    tokenizer.write(tokenizer.train(texts[::4], VOCAB_SIZE), folder / "tokenizer.json")
    return {"documents": len(texts), "bytes": size, "vocab_size": VOCAB_SIZE}


def compare(folder: Path, workers: int, rounds: int) -> dict[str, object]:
    """Medians of all contenders, in turns, after a round that warms up."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds + 1):
        for name in CONTENDERS:
            command = [sys.executable, "-m", "benchmarks.data_build", "--one", name, "--folder", str(folder)]
            environment = {**os.environ, "RAYON_NUM_THREADS": str(workers), "TOKENIZERS_PARALLELISM": "true"}
            process = subprocess.run(
                [*command, "--workers", str(workers)], env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            found[name].append(json.loads(process.stdout.splitlines()[-1]))
        print(json.dumps({name: rows[-1] for name, rows in found.items()}), flush=True)
    kept = {name: rows[1:] for name, rows in found.items()}
    assert len({rows[0]["tokens"] for rows in kept.values()}) == 1, "not the same tokens"
    result: dict[str, object] = {
        name: {key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]}
        for name, rows in kept.items()
    }
    for key in ("seconds", "cpu_seconds"):
        for other in ("tokenizer", "megatron"):
            pairs = zip(kept[other], kept["llmscale"], strict=True)
            result[f"llmscale_to_{other}_by_{key}"] = round(
                statistics.median(theirs[key] / ours[key] for theirs, ours in pairs), 2
            )
    print(json.dumps({"workers": workers, **result}), flush=True)
    return result


def measure(name: str, folder: Path, workers: int) -> dict[str, float]:
    """One contender, once, on as many cores as there are workers."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:workers])
    with tempfile.TemporaryDirectory(dir=folder) as output:
        run = {"tokenizer": bare_tokenizer, "llmscale": llmscale_build, "megatron": megatron_preprocess}[name](
            folder, Path(output), workers
        )
        cpu, start = cpu_seconds(), time.perf_counter()
        tokens = run()
        seconds = time.perf_counter() - start
        cpu = cpu_seconds() - cpu
    return {
        "tokens": tokens,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "mtokens_per_second": tokens / seconds / 1e6,
        "mib_per_second": (folder / "texts.jsonl").stat().st_size / seconds / (1 << 20),
    }


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    uses = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


def bare_tokenizer(folder: Path, output: Path, workers: int) -> Callable[[], int]:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    with (folder / "texts.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]

    def run() -> int:
        # One more a document: the end, which the others write.
        return sum(len(encoding) + 1 for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False))

    return run


def llmscale_build(folder: Path, output: Path, workers: int) -> Callable[[], int]:
    import tokenizers  # noqa: F401

    from llmscale.data.build import build

    def run() -> int:
        summary = build([str(folder / "texts.jsonl")], folder / "tokenizer.json", output / "shards", workers=workers)
        return sum(card.tokens for card in summary.splits.values())

    return run


def megatron_preprocess(folder: Path, output: Path, workers: int) -> Callable[[], int]:
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    end = 0

    def run() -> int:
        tokens = 0
        builder = IndexedDatasetBuilder(str(output / "texts.bin"), dtype=np.uint16)
        with (
            multiprocessing.Pool(workers, _load, (str(folder / "tokenizer.json"),)) as pool,
            (folder / "texts.jsonl").open(encoding="utf-8") as lines,
        ):
            for ids in pool.imap(_encode, lines, 32):
                ids.append(end)
                builder.add_document(torch.IntTensor(ids), [len(ids)])
                tokens += len(ids)
            pool.close()
            pool.join()
        builder.finalize(str(output / "texts.idx"))
        return tokens

    return run


def _load(path: str) -> None:
    """Starts a worker of Megatron's way."""
    import tokenizers

    global _tokenizer
    _tokenizer = tokenizers.Tokenizer.from_file(path)


def _encode(line: str) -> list[int]:
    return _tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids  # type: ignore[no-any-return,name-defined]


if __name__ == "__main__":
    main()
