"""How fast the stream reads tokens, side by side with the limit: random reads of one memory-mapped file.

    OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.data_stream

Writes random uint16 tokens twice, as shards and as one flat file, into a temporary folder, and reads shuffled
sequences of both into int64, in turns, warm (from the page cache), one thread. Prints the median of the rounds as
JSON, and writes it to benchmarks/results/data_stream-<date>.json. The limit knows where to read and checks nothing;
the stream also computes the order and finds the shard. `first_touch` is the rate of a first pass over the data, in
which the stream compares every sample with the index: checksum, type, ids.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.record import record
from llmscale.data.order import permute
from llmscale.data.shards import SAMPLE_TOKENS, SplitWriter
from llmscale.data.stream import Stream

VOCAB_SIZE = 50_257


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000_000)
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 64, 512], help="sequences of one read")
    parser.add_argument("--sample-tokens", type=int, nargs="+", default=[SAMPLE_TOKENS])
    parser.add_argument("--shard-mib", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=16_384, help="sequences of one round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    results = []
    tokens = np.random.default_rng(0).integers(1, VOCAB_SIZE, options.tokens, dtype=np.uint16)
    with tempfile.TemporaryDirectory() as folder:
        tokens.tofile(Path(folder, "flat"))
        flat = np.memmap(Path(folder, "flat"), dtype=np.uint16, mode="r")
        for sample_tokens in options.sample_tokens:
            split = Path(folder, str(sample_tokens))
            written = write(split, tokens, sample_tokens, options.shard_mib << 20)
            stream = Stream([(str(split), 1.0)], options.sequence_length, seed=1)
            written["first_touch_mtokens_per_second"] = first_touch(stream, options)
            for batch in options.batch:
                readers = {"stream": stream.read, "limit": flat_reader(flat, options.sequence_length)}
                rates = measure(readers, batch, options)
                results.append({"sample_tokens": sample_tokens, "batch": batch, **written, **rates})
                print(json.dumps(results[-1]), flush=True)
    print(record("data_stream", results, ["numpy"]))


def write(folder: Path, tokens: np.ndarray, sample_tokens: int, shard_bytes: int) -> dict[str, float]:
    """Write documents of 1,000 tokens; gives the size of the tars relative to their tokens, and the rate."""
    folder.mkdir()
    writer = SplitWriter(folder, "uint16", 0, sample_tokens, max(1, shard_bytes // (2 * sample_tokens)))
    start = time.perf_counter()
    for place in range(0, len(tokens), 1000):
        writer.add(tokens[place : place + 999], True, True)
    card = writer.finish(b"{}", VOCAB_SIZE)
    return {
        "tar_bytes_per_token_byte": round(card.bytes / (2 * card.tokens), 4),
        "write_mtokens_per_second": round(card.tokens / (time.perf_counter() - start) / 1e6),
    }


def first_touch(stream: Stream, options: argparse.Namespace) -> int:
    """The rate at which a new stream reads, which compares each sample with the index when it first meets it."""
    count = (options.tokens - 1) // options.sequence_length
    start = time.perf_counter()
    for position in range(0, count, 512):
        stream.read(np.arange(position, min(position + 512, count)))
    return round(count * options.sequence_length / (time.perf_counter() - start) / 1e6)


def flat_reader(flat: np.ndarray, sequence_length: int) -> Callable[[np.ndarray], np.ndarray]:
    """Reads sequences of the flat file, at places that are drawn before."""
    count = (len(flat) - 1) // sequence_length
    places = (permute(np.arange(count), count, 1, 0) * sequence_length).tolist()

    def read(positions: np.ndarray) -> np.ndarray:
        out = np.empty((len(positions), sequence_length + 1), dtype=np.int64)
        for row, position in enumerate(positions.tolist()):
            place = places[position % count]
            out[row] = flat[place : place + sequence_length + 1]
        return out

    return read


def measure(
    readers: dict[str, Callable[[np.ndarray], np.ndarray]], batch: int, options: argparse.Namespace
) -> dict[str, float]:
    """Median rates of all readers, in turns, after one round that warms up."""
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(options.rounds + 1):
        for name, read in readers.items():
            start = time.perf_counter()
            for position in range(0, options.sequences, batch):
                read(np.arange(position, position + batch))
            rates[name].append(options.sequences * options.sequence_length / (time.perf_counter() - start) / 1e6)
    medians = {f"{name}_mtokens_per_second": round(statistics.median(values[1:])) for name, values in rates.items()}
    ratios = [one / other for one, other in zip(rates["stream"][1:], rates["limit"][1:], strict=True)]
    return {**medians, "stream_to_limit": round(statistics.median(ratios), 2)}


if __name__ == "__main__":
    main()
