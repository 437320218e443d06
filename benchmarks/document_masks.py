"""What attention inside documents costs and saves on one CPU core: a layer's attention, and a whole training step.

    python -m benchmarks.document_masks

Attention: forward and backward of one layer's core attention over packed documents, in the three ways there are: a
call a document (llmscale's), one causal call that lets documents see each other, and one call with a dense mask.
Step: `Engine.train_step` of a Llama with and without `mask_documents` on the same tokens, which hold an
end-of-document id every MEAN tokens on average.

All in one process with one thread, taking turns; the figures are medians, the ratios medians of the rounds' ratios.
Prints tables, and writes the raw times to benchmarks/results/document_masks-<date>.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.nn.functional as F

from benchmarks.record import record
from benchmarks.train_step import SEED, WARM_UP, Tokens, megatron, run_config, stages
from llmscale.config.deepspeed import resolve
from llmscale.models.packing import Packing

END = 0
CPU = torch.device("cpu")
PACKAGES = ("torch", "megatron-core", "deepspeed")
Times = dict[str, list[float]]


def rounds(ways: dict[str, Callable[[int], Any]], count: int) -> Times:
    """Seconds of each way in each counted round; they take turns."""
    found: Times = {name: [] for name in ways}
    for number in range(count + WARM_UP):
        for name, way in ways.items():
            began = time.perf_counter()
            way(number)
            found[name].append(time.perf_counter() - began)
    return {name: times[WARM_UP:] for name, times in found.items()}


def with_documents(tokens: torch.Tensor, mean: int) -> torch.Tensor:
    """The tokens, none of them END but one in `mean`."""
    draw = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(SEED))
    return torch.where(draw < 1 / mean, END, tokens.clamp(min=1))


def attention(options: argparse.Namespace, mean: int, dtype: torch.dtype) -> Times:
    from llmscale.models.attention import _attend

    ids = with_documents(torch.ones(1, options.attention_sequence, dtype=torch.int64), mean)
    packing = Packing.of(ids, END, CPU)
    shape = (options.attention_sequence, 1, 8, 64)
    query, key, value = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    document = torch.repeat_interleave(torch.tensor(packing.lengths))

    def dense() -> torch.Tensor:
        mask = (document[:, None] == document[None, :]).tril()
        return F.scaled_dot_product_attention(*(part.permute(1, 2, 0, 3) for part in (query, key, value)), mask)

    def step(forward: Callable[[], torch.Tensor]) -> Callable[[int], None]:
        return lambda number: forward().sum().backward()

    ways = {
        "a call a document": step(lambda: _attend(query, key, value, 0.0, packing)),
        "plain causal": step(lambda: _attend(query, key, value, 0.0, None)),
        "dense mask": step(dense),
    }
    return rounds(ways, options.rounds)


def train_steps(options: argparse.Namespace, mean: int, precision: str) -> Times:
    from llmscale.training.batches import micro_batches
    from llmscale.training.engine import Engine
    from llmscale.training.optimizer import build_optimizer

    config = run_config(options, precision)
    tokens = Tokens(config)
    tokens.tokens = with_documents(tokens.tokens, mean)
    with megatron(config) as groups:
        engine = Engine(
            stages(config, groups),
            groups,
            resolve(config, None).settings,
            lambda parts: build_optimizer(config.optimizer, parts, CPU, False),
            config.optimizer.weight_decay,
            config.training.gradient_clipping,
        )

        def step(end: int | None) -> Callable[[int], Any]:
            return lambda number: engine.train_step(
                micro_batches(tokens.rows(number), config.training.micro_batch_size, CPU, end)
            )

        times = rounds({"masks": step(END), "no masks": step(None)}, options.rounds)
        engine.close()
    return times


def table(results: dict[str, Times]) -> str:
    lines = ["| case | way | ms (median) | of the first way |", "|---|---|---:|---:|"]
    for case, times in results.items():
        first = next(iter(times.values()))
        for name, seconds in times.items():
            ratio = statistics.median(own / base for own, base in zip(seconds, first, strict=True))
            lines.append(f"| {case} | {name} | {1000 * statistics.median(seconds):.1f} | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", nargs="+", type=int, default=[64, 512], help="mean lengths, in tokens")
    parser.add_argument("--attention-sequence", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7, help=f"counted rounds, after {WARM_UP} more")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/document_masks-<date>.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for mean in options.documents:
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            case = f"{precision}, documents of {mean}"
            results[f"attention over {options.attention_sequence}, {case}"] = attention(options, mean, dtype)
            results[f"step of {options.batch} × {options.sequence}, {case}"] = train_steps(options, mean, precision)
    print(table(dict(sorted(results.items()))))
    print(record("document_masks", results, PACKAGES, options.output))


if __name__ == "__main__":
    main()
