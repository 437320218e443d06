"""No whole model in one process: saving, loading on another layout and converting take a few tensors' memory."""

from __future__ import annotations

import ctypes
import json
import math
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llmscale.checkpoint.format import WEIGHT, Checkpoint, Fragment
from llmscale.config.schema import Model
from llmscale.convert.from_hf import from_hf
from llmscale.convert.parity import compare as compare_parity
from llmscale.convert.to_hf import to_hf
from llmscale.models.cut import local_shape
from llmscale.models.family import families
from tests.unit.checkpoint.saving import save

M_MMAP_THRESHOLD = -3
STATES = (WEIGHT, "exp_avg", "exp_avg_sq")
MODEL = Model(
    family="llama", num_layers=6, hidden_size=1024, num_attention_heads=8, ffn_hidden_size=2048, num_query_groups=8,
    vocab_size=2048, max_position_embeddings=128,
)  # fmt: skip
WEIGHTS = list(families()["llama"].parameters(MODEL, 2048))
LARGEST = max(weight.numel for weight in WEIGHTS) * 4
HELD = sum(weight.numel for weight in WEIGHTS) * 4 * len(STATES)
"""Bytes of weights and optimizer state."""
NOISE = 6 << 20
"""Bytes that Python, threads and JSON may take."""


def fragments(size: int) -> list[Fragment]:
    return [
        Fragment(weight, rank, size, 0, {name: torch.randn(math.prod(local_shape(weight, size))) for name in STATES})
        for weight in WEIGHTS
        for rank in range(1 if weight.cut == "replicated" else size)
    ]


def most_beyond(run: Callable[[], Any]) -> int:
    """Bytes of anonymous memory at most beyond what there was."""
    before, most, ended = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.001):
            most = max(most, anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        run()
    finally:
        ended.set()
        thread.join()
    return max(0, most - before)


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


def saved_and_loaded(folder: Path) -> dict[str, int]:
    """Bytes beyond the state while it is saved as tensor size 2, and while ranks of others load what is theirs."""
    # glibc would keep what was freed: every tensor has pages of its own instead, given back at once.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    config = {"model": MODEL.model_dump(mode="json"), "training": {"precision": "fp32"}}
    facts = {"tokens": 0, "data": None, "layout": {}, "versions": {}, "config": config}
    state = fragments(2)
    save(folder, 1, state[:1], {}, facts)  # what Python and torch need once
    found = {"save": most_beyond(lambda: save(folder, 2, state, {}, facts))}
    del state
    for size in (1, 2, 4):
        checkpoint = Checkpoint(folder / "step_00000002")
        checkpoint.index  # noqa: B018
        state = [one for one in fragments(size) if one.tensor_rank == 0]

        def load(checkpoint: Checkpoint = checkpoint, state: list[Fragment] = state, size: int = size) -> None:
            for one in state:
                for name, target in one.tensors.items():
                    target.copy_(checkpoint.read(one.weight.name, name, 0, size, 0, one.numel))

        found[f"load {size}"] = most_beyond(load)
    (folder / "step_00000002").rename(folder / "last")
    checkpoint = Checkpoint(folder / "last")
    found["to-hf"] = most_beyond(
        lambda: to_hf(checkpoint, folder / "export", dtype="fp32", verify=False, max_shard_bytes=LARGEST * 2)
    )
    found["from-hf"] = most_beyond(lambda: from_hf(folder / "export", folder / "imported"))
    return found


def proven(folder: Path) -> int:
    """Bytes that the proof of an export takes where it may take half of the model."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    torch.set_num_threads(1)
    checkpoint = Checkpoint(folder / "last")

    def compare() -> None:
        found = compare_parity(checkpoint, folder / "export", torch.float32, most_bytes=HELD // len(STATES) // 2)
        assert found.equal

    compare()  # what Python, torch and transformers need once
    return most_beyond(compare)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    context = multiprocessing.get_context("spawn")
    folder = tmp_path_factory.mktemp("memory")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        return {**pool.submit(saved_and_loaded, folder).result(), "proof": pool.submit(proven, folder).result()}


def test_memory_is_that_of_a_few_tensors(found: dict[str, int]) -> None:
    print(json.dumps({name: round(most / 2**20, 1) for name, most in found.items()}))
    assert 3 * LARGEST < HELD / 10, "the model is too small to tell"
    proof = found.pop("proof")
    assert proof < HELD // len(STATES) * 3 / 4, "the whole model was in memory"
    for name, most in found.items():
        # Converting, two at most wait or are written, and the parts of a third are put together.
        tensors = {"save": 1, "to-hf": 3, "from-hf": 3}.get(name, 2)
        assert most <= tensors * LARGEST + NOISE, f"{name}: {most / LARGEST:.1f} times the largest tensor"
