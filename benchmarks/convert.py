"""How fast checkpoints become Hugging Face's format and back, side by side with a plain copy, and the memory it takes.

    OMP_NUM_THREADS=1 python -m benchmarks.convert

A Llama of random bf16 weights (by default 24 layers of Llama 7B's shape but for the width of 2,048, 1.5 G parameters;
--layers 32 --hidden-size 4096 is Llama 7B, for which the disk needs 41 GB) goes from-hf, and then to-hf without its
proof, in turns with a copy of the model's files by 4 MiB. Each has its own process, reads from the disk what it reads,
and ends with fsync; the order rotates, for a disk may be fast for a while. Memory is what the process holds at most
beyond what it held before (anonymous pages). Prints medians as JSON, and writes them to
benchmarks/results/convert-<date>.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.record import record

BLOCK = 4 << 20
SHARD_BYTES = 10**9


def write_model(folder: Path, layers: int, hidden_size: int) -> int:
    """A model in Hugging Face's format, tensor by tensor; gives its parameters."""
    import torch

    from llmscale.checkpoint.tensor_file import Header, write
    from llmscale.config.schema import Model
    from llmscale.convert.transforms import pairs
    from llmscale.models.family import families

    model = Model(
        family="llama", num_layers=layers, hidden_size=hidden_size, num_attention_heads=hidden_size // 128,
        num_query_groups=hidden_size // 128, ffn_hidden_size=hidden_size * 43 // 16,
        vocab_size=32_000, max_position_embeddings=4096,
    )  # fmt: skip
    family = families()["llama"]
    table = list(pairs(family, model, 32_000))
    about = family.hugging_face
    config = {"model_type": about.model_type, "architectures": [about.architecture]}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, **about.to_config(family.settled(model))}))
    headers = [
        Header(name, torch.bfloat16, shape)
        for pair in table
        for name, shape in zip(pair.names, pair.shapes, strict=True)
    ]
    generator = torch.Generator().manual_seed(0)

    def tensors() -> Iterator[Any]:
        for header in headers:
            yield torch.randn(header.shape, generator=generator).to(torch.bfloat16)

    write(folder / "model.safetensors", headers, tensors(), {"format": "pt"})
    return sum(pair.weight.numel for pair in table)


def copied(source: Path, target: Path) -> dict[str, float]:
    return watched(lambda: copy(source, target))


def imported(source: Path, target: Path) -> dict[str, float]:
    from llmscale.convert.from_hf import from_hf
    from llmscale.distributed.launch import huge_pages

    huge_pages()  # as `llmscale convert` does
    return watched(lambda: from_hf(source, target))


def exported(source: Path, target: Path) -> dict[str, float]:
    from llmscale.checkpoint.retention import open_checkpoint
    from llmscale.convert.to_hf import to_hf
    from llmscale.distributed.launch import huge_pages

    huge_pages()
    return watched(lambda: to_hf(open_checkpoint(source), target, verify=False, max_shard_bytes=SHARD_BYTES))


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        with path.open("rb") as reader, (target / path.name).open("wb") as writer:
            while data := reader.read(BLOCK):
                writer.write(data)
            writer.flush()
            os.fsync(writer.fileno())


def forget(folder: Path) -> None:
    """Have the files read from the disk: else the source of two jobs in turn would be in the page cache for one."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def watched(run: Any) -> dict[str, float]:
    """Seconds, and MiB of anonymous memory at most beyond what there was."""
    before, most, ended = anonymous_mib(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.02):
            most = max(most, anonymous_mib())

    thread = threading.Thread(target=watch)
    thread.start()
    begin = time.perf_counter()
    run()
    seconds = time.perf_counter() - begin
    ended.set()
    thread.join()
    return {"seconds": seconds, "memory_mib": max(0.0, most - before)}


def anonymous_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    figures: dict[str, list[dict[str, float]]] = {"copy": [], "from-hf": [], "to-hf": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = write_model(folder / "model", options.layers, options.hidden_size)
        size = sum(path.stat().st_size for path in (folder / "model").iterdir()) / 2**20
        jobs = [("copy", copied, "model"), ("from-hf", imported, "model"), ("to-hf", exported, "imported")]
        imported(folder / "model", folder / "imported")
        for number in range(options.rounds):
            turn = number % len(jobs)
            for kind, job, source in jobs[turn:] + jobs[:turn]:
                forget(folder / source)
                with ProcessPoolExecutor(1, mp_context=context) as pool:
                    figures[kind].append(pool.submit(job, folder / source, folder / kind).result())
                shutil.rmtree(folder / kind)
                os.sync()
    found = {
        "parameters": parameters,
        "mib": round(size),
        "shard_mib": round(SHARD_BYTES / 2**20),
        "mib_per_second": {k: round(size / statistics.median(one["seconds"] for one in v)) for k, v in figures.items()},
        "rate_to_copy": {
            kind: round(
                statistics.median(
                    a["seconds"] / b["seconds"] for a, b in zip(figures["copy"], figures[kind], strict=True)
                ),
                2,
            )
            for kind in ("from-hf", "to-hf")
        },
        "memory_mib": {kind: round(max(one["memory_mib"] for one in rounds)) for kind, rounds in figures.items()},
    }
    print(json.dumps(found))
    print(record("convert", {**found, "raw": figures}, ["torch", "safetensors"], options.output))


if __name__ == "__main__":
    main()
