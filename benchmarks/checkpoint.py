"""Saving and loading a checkpoint, side by side with a plain copy of its bytes, and the pause of an asynchronous save.

    OMP_NUM_THREADS=1 python -m benchmarks.checkpoint

One rank's state (fp32 weights, exp_avg, exp_avg_sq) in tensors of 4 MiB. In turns:

    copy            the files of a checkpoint, read and written again by 4 MiB, with fsync: page cache to disk
    save            a synchronous save: checksums, one file, index and manifest, fsync, rename
    pause           how long an asynchronous save keeps training waiting; the first, which makes buffers, is apart
    asynchronous    until that save is whole on the disk
    load            all tensors read back, compared with their checksums, into fp32, from the page cache
    read            the file's bytes read into memory, from the page cache

Prints medians as JSON, and writes them to benchmarks/results/checkpoint-<date>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.record import record
from llmscale.checkpoint.format import WEIGHT, Checkpoint, Fragment
from llmscale.checkpoint.save import Saver
from llmscale.config.schema import Model
from llmscale.models.cut import local_shape
from llmscale.models.family import families

BLOCK = 4 << 20
STATES = (WEIGHT, "exp_avg", "exp_avg_sq")


def state_of(mib: int) -> tuple[Model, list[Fragment]]:
    """A Llama-like model whose state has about so many MiB."""
    layers = max(1, mib // 48)
    model = Model(
        family="llama", num_layers=layers, hidden_size=1024, num_attention_heads=8, ffn_hidden_size=1024,
        num_query_groups=8, vocab_size=1024, max_position_embeddings=128,
    )  # fmt: skip
    fragments = []
    for weight in families()["llama"].parameters(model, 1024):
        size = torch.Size(local_shape(weight, 1)).numel()
        fragments.append(Fragment(weight, 0, 1, 0, {name: torch.randn(size) for name in STATES}))
    return model, fragments


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        with path.open("rb") as reader, (target / path.name).open("wb") as writer:
            while data := reader.read(BLOCK):
                writer.write(data)
            writer.flush()
            os.fsync(writer.fileno())


def load(path: Path) -> None:
    checkpoint = Checkpoint(path)
    for name in checkpoint.index:
        for state in checkpoint.states:
            checkpoint.part(name, state, 0, 1)


def read(path: Path) -> None:
    buffer = bytearray(BLOCK)
    for file in path.iterdir():
        with file.open("rb", buffering=0) as reader:
            while reader.readinto(buffer):
                pass


def seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    model, fragments = state_of(options.mib)
    facts = {
        "tokens": 0, "data": None, "layout": {}, "versions": {},
        "config": {"model": model.model_dump(mode="json"), "training": {"precision": "fp32"}},
    }  # fmt: skip
    figures: dict[str, list[float]] = {
        name: [] for name in ("copy", "save", "first pause", "pause", "asynchronous", "load", "read")
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        savers = {kind: Saver(folder / kind, kind == "asynchronous") for kind in ("synchronous", "asynchronous")}

        def save(kind: str, step: int) -> float:
            return seconds(lambda: savers[kind].save(step, fragments, {}, facts))

        figures["first pause"].append(save("asynchronous", 1))
        savers["asynchronous"].wait()
        for step in range(2, 2 + options.rounds):
            figures["save"].append(save("synchronous", step))
            savers["synchronous"].wait()
            path = folder / "synchronous" / f"step_{step:08d}"
            figures["copy"].append(seconds(lambda path=path, step=step: copy(path, folder / f"copy-{step}")))
            figures["pause"].append(save("asynchronous", step))
            ended = savers["asynchronous"].wait()
            figures["asynchronous"].append(ended.seconds if ended else float("nan"))
            figures["load"].append(seconds(lambda path=path: load(path)))
            figures["read"].append(seconds(lambda path=path: read(path)))
        size = sum(file.stat().st_size for file in path.iterdir()) / 2**20
    medians = {name: statistics.median(values) for name, values in figures.items()}

    def ratio(one: str, other: str) -> float:
        return round(statistics.median(a / b for a, b in zip(figures[one], figures[other], strict=True)), 3)

    found = {
        "mib": round(size),
        "seconds": {name: round(value, 3) for name, value in medians.items()},
        "mib_per_second": {name: round(size / medians[name]) for name in ("copy", "save", "load", "read")},
        "save_rate_to_copy": ratio("copy", "save"),
        "load_rate_to_read": ratio("read", "load"),
        "pause_to_save": ratio("pause", "save"),
    }
    print(json.dumps(found))
    print(record("checkpoint", {**found, "raw": figures}, ["torch", "safetensors"], options.output))


if __name__ == "__main__":
    main()
