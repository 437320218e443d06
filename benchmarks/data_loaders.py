"""How fast other loaders give the same shuffled sequences of tokens, side by side with llmscale's.

    python -m venv /tmp/loaders && /tmp/loaders/bin/pip install -r benchmarks/data_loaders.txt .
    OMP_NUM_THREADS=1 /tmp/loaders/bin/python -m benchmarks.data_loaders

The task: random tokens, uint16 on disk, in sequences of 4,096 + 1, shuffled, handed over as int64 [batch, 4097]. Every
contender has the same tokens, in its own format, written as its documentation recommends, and each reads them in a
process of its own; the processes take turns, round by round. Figures are medians of the rounds:

- warm: million tokens a second from the page cache, in batches of 8 and of 64, on one core and on two. On two cores
  llmscale reads ahead in its thread, the others in two DataLoader workers;
- cold: the same, batches of 64, after the files were dropped from the page cache (posix_fadvise);
- first batch: from an open interpreter with everything imported to the first batch of 64, for 10,000 small shards;
- memory: how much the process has grown after the warm measurements, in MiB, file mappings not counted.

Before it counts, a contender must deliver right: the sum of all tokens of an epoch is compared with what was written.

- llmscale: `Stream.read`, samples checked at their first reading as always (warm: they are checked already);
- streaming: mosaicml-streaming's StreamingDataset over MDS shards of 64 MiB with ndarray columns, shuffle py1e (its
  default), in torch's DataLoader;
- litdata: StreamingDataset with a TokensLoader over chunks of 64 MiB, in its StreamingDataLoader;
- webdataset npy, webdataset pickle: tars of 64 MiB with one sequence a sample, shuffle buffer of 1,000;
- megatron: megatron-core's GPTDataset over one .bin/.idx of documents of 1,000 tokens, in torch's DataLoader; no masks;
- datasets: Hugging Face datasets' memory-mapped Arrow table, rows by a shuffled list;
- limit: random reads of one memory-mapped flat file, which knows where to read and checks nothing.

megatron-energon is not here: its datasets are prepared in a dialogue and give samples through a task encoder of the
user's own, which is what would be measured.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np

from benchmarks.record import record

LENGTH = 4096
VOCABULARY = 50_257
SHARD_BYTES = 64 << 20
SMALL_SHARDS, SMALL_SEQUENCES, SMALL_LENGTH = 10_000, 4, 255
PACKAGES = {
    "llmscale": "llmscale", "llmscale loader": "llmscale", "streaming": "streaming", "litdata": "litdata",
    "webdataset npy": "webdataset", "webdataset pickle": "webdataset", "megatron": "megatron.core",
    "datasets": "datasets", "limit": "numpy",
}  # fmt: skip
SHARDED = ("llmscale", "streaming", "litdata", "webdataset npy", "webdataset pickle")
Batches = Iterator[np.ndarray]


def rows_of(tokens: np.ndarray, length: int) -> Iterator[np.ndarray]:
    """Sequences of length + 1, which overlap by one token."""
    for start in range(0, len(tokens) - length, length):
        yield tokens[start : start + length + 1]


# What each contender writes. shard_rows: sequences of a shard, by which small shards are asked for.


def write_llmscale(folder: Path, tokens: np.ndarray, length: int, shard_rows: int | None) -> None:
    from llmscale.data.shards import SAMPLE_TOKENS, SplitWriter

    folder.mkdir()
    size = SAMPLE_TOKENS if shard_rows is None else shard_rows * length
    shard_samples = max(1, SHARD_BYTES // (2 * size)) if shard_rows is None else 1
    writer = SplitWriter(folder, "uint16", 0, size, shard_samples)
    for place in range(0, len(tokens), 1000):
        writer.add(tokens[place : place + 999], True, True)
    writer.finish(b"{}", VOCABULARY)


def write_streaming(folder: Path, tokens: np.ndarray, length: int, shard_rows: int | None) -> None:
    from streaming import MDSWriter

    limit = SHARD_BYTES if shard_rows is None else shard_rows * (2 * length + 60)
    with MDSWriter(out=str(folder), columns={"tokens": "ndarray:uint16"}, size_limit=limit) as out:
        for row in rows_of(tokens, length):
            out.write({"tokens": row})


def write_litdata(folder: Path, tokens: np.ndarray, length: int, shard_rows: int | None) -> None:
    import litdata
    from litdata.streaming import TokensLoader

    rows = SHARD_BYTES // 2 // (length + 1) if shard_rows is None else shard_rows
    litdata.optimize(
        fn=partial(tensors_of, tokens, length), inputs=[0], output_dir=str(folder), chunk_size=rows * (length + 1),
        item_loader=TokensLoader(block_size=length + 1), num_workers=1,
    )  # fmt: skip


def tensors_of(tokens: np.ndarray, length: int, _: int) -> Iterator[Any]:
    import torch

    # litdata asks whether this is a generator function: a returned generator would be one item.
    for row in rows_of(tokens, length):
        yield torch.from_numpy(row.copy())


def write_webdataset(ending: str) -> Callable[[Path, np.ndarray, int, int | None], None]:
    def write(folder: Path, tokens: np.ndarray, length: int, shard_rows: int | None) -> None:
        import webdataset

        folder.mkdir()
        count = shard_rows or SHARD_BYTES // (2 * length)
        with webdataset.ShardWriter(str(folder / "%06d.tar"), maxcount=count, verbose=0) as out:
            for number, row in enumerate(rows_of(tokens, length)):
                out.write({"__key__": f"{number:09d}", f"tokens.{ending}": row})

    return write


def write_megatron(folder: Path, tokens: np.ndarray, length: int, shard_rows: int | None) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder.mkdir()
    builder = IndexedDatasetBuilder(str(folder / "data.bin"), dtype=np.uint16)
    for place in range(0, len(tokens), 1000):
        part = tokens[place : place + 1000]
        builder.add_document(torch.from_numpy(part.astype(np.int32)), [len(part)])
    builder.finalize(str(folder / "data.idx"))


def write_datasets(folder: Path, tokens: np.ndarray, length: int, shard_rows: int | None) -> None:
    from datasets import Dataset, Features, List, Value

    features = Features({"tokens": List(Value("uint16"), length=length + 1)})
    made = Dataset.from_generator(lambda: ({"tokens": row} for row in rows_of(tokens, length)), features=features)
    made.save_to_disk(str(folder))


def write_limit(folder: Path, tokens: np.ndarray, length: int, shard_rows: int | None) -> None:
    folder.mkdir()
    tokens.tofile(folder / "flat")


# What each contender reads with: an endless or one-epoch iterator of int64 [batch, length + 1].


def read_llmscale(folder: Path, length: int, batch: int, workers: int) -> Batches:
    from llmscale.data.stream import Stream

    stream = Stream([(str(folder), 1.0)], length, seed=1)
    sequences = stream._sources[0].sequences or 0
    for position in range(0, sequences - batch + 1, batch):
        yield stream.read(np.arange(position, position + batch))


def read_llmscale_loader(folder: Path, length: int, batch: int, workers: int) -> Batches:
    from llmscale.data.loader import Loader
    from llmscale.data.stream import Stream

    stream = Stream([(str(folder), 1.0)], length, seed=1)
    sequences = stream._sources[0].sequences or 0
    with Loader(stream, batch, batches=sequences // batch, prefetch=4, collate=lambda rows: rows) as loader:
        yield from loader


def torch_loader(dataset: Any, batch: int, workers: int, **options: Any) -> Batches:
    import torch

    loader = torch.utils.data.DataLoader(dataset, batch, num_workers=workers, drop_last=True, **options)
    for rows in loader:
        yield rows.numpy()


def stack(rows: Iterable[Any]) -> Any:
    """Sequences of uint16 as one int64 tensor."""
    import torch

    return torch.from_numpy(np.stack([np.asarray(row) for row in rows]).astype(np.int64))


def stack_streaming(rows: Iterable[dict[str, Any]]) -> Any:
    return stack(row["tokens"] for row in rows)


def read_streaming(folder: Path, length: int, batch: int, workers: int) -> Batches:
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=batch, shuffle_seed=1)
    yield from torch_loader(dataset, batch, workers, collate_fn=stack_streaming)


def read_litdata(folder: Path, length: int, batch: int, workers: int) -> Batches:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import TokensLoader

    dataset = StreamingDataset(str(folder), item_loader=TokensLoader(block_size=length + 1), shuffle=True, seed=1)
    for rows in StreamingDataLoader(dataset, batch_size=batch, num_workers=workers, collate_fn=stack, drop_last=True):
        yield rows.numpy()


def read_webdataset(folder: Path, length: int, batch: int, workers: int) -> Batches:
    import webdataset

    shards = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = webdataset.WebDataset(shards, shardshuffle=100, seed=1, empty_check=False).shuffle(1000).decode()
    dataset = dataset.map(first_array).batched(batch, collation_fn=stack, partial=False)
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=workers)
    for rows in loader:
        yield rows.numpy()


def first_array(sample: dict[str, Any]) -> Any:
    return next(value for key, value in sample.items() if key.startswith("tokens"))


class _NoTokenizer:
    """What GPTDataset asks of a tokenizer."""

    eod, pad, vocab_size = 0, 0, VOCABULARY
    unique_identifiers: dict[str, str] = {"class": "none"}  # noqa: RUF012


def read_megatron(folder: Path, length: int, batch: int, workers: int) -> Batches:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split, compile_helpers

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        compile_helpers()
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=length, blend=None, split="1", path_to_cache=str(folder / "cache"),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        tokenizer=_NoTokenizer(),
    )  # fmt: skip
    indexed = IndexedDataset(str(folder / "data"), multimodal=False, mmap=True)
    documents = np.arange(len(indexed.document_indices) - 1, dtype=np.int32)
    dataset = GPTDataset(indexed, str(folder / "data"), documents, None, Split.train, config)
    yield from torch_loader(dataset, batch, workers, collate_fn=stack_megatron)


def stack_megatron(rows: Iterable[dict[str, Any]]) -> Any:
    """tokens and the last label: what the other contenders give."""
    import torch

    rows = list(rows)
    tokens, labels = (torch.stack([row[name] for row in rows]) for name in ("tokens", "labels"))
    return torch.cat([tokens, labels[:, -1:]], 1)


def read_datasets(folder: Path, length: int, batch: int, workers: int) -> Batches:
    from datasets import load_from_disk

    dataset = load_from_disk(str(folder)).with_format("numpy").shuffle(seed=1)
    yield from torch_loader(dataset, batch, workers, collate_fn=stack_streaming)


def read_limit(folder: Path, length: int, batch: int, workers: int) -> Batches:
    flat = np.memmap(folder / "flat", dtype=np.uint16, mode="r")
    count = (len(flat) - 1) // length
    places = (np.random.default_rng(1).permutation(count) * length).tolist()
    for start in range(0, count - batch + 1, batch):
        out = np.empty((batch, length + 1), dtype=np.int64)
        for row, place in enumerate(places[start : start + batch]):
            out[row] = flat[place : place + length + 1]
        yield out


WRITERS = {
    "llmscale": write_llmscale, "llmscale loader": write_llmscale, "streaming": write_streaming,
    "litdata": write_litdata, "webdataset npy": write_webdataset("npy"), "webdataset pickle": write_webdataset("pyd"),
    "megatron": write_megatron, "datasets": write_datasets, "limit": write_limit,
}  # fmt: skip
READERS = {
    "llmscale": read_llmscale, "llmscale loader": read_llmscale_loader, "streaming": read_streaming,
    "litdata": read_litdata, "webdataset npy": read_webdataset, "webdataset pickle": read_webdataset,
    "megatron": read_megatron, "datasets": read_datasets, "limit": read_limit,
}  # fmt: skip


def resident_mib() -> float:
    """Memory of this process that is its own: mapped files can be dropped at any time."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    return 0.0


def rate(batches: Batches, batch: int, sequences: int) -> float:
    """Million tokens a second over so many sequences, after one batch."""
    next(batches)
    begin, done = time.perf_counter(), 0
    for rows in batches:
        done += len(rows)
        if done >= sequences:
            break
    seconds = time.perf_counter() - begin
    gc.collect()
    return done * LENGTH / seconds / 1e6


def run(task: str, name: str, folder: str, cores: int, sequences: int, pipe: Any) -> None:
    """One measurement, in a process of its own."""
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:cores]))
    read, place = READERS[name], Path(folder)
    result: dict[str, float] = {}
    workers = cores if cores > 1 else 0
    if task == "import":
        for _ in read(place, LENGTH, 8, 0):
            break
    elif task == "sum":
        total = count = 0
        for rows in read(place, LENGTH, 8, 0):
            total, count = total + int(rows[:, :-1].sum()), count + len(rows)
        result = {"sum": total, "count": count}
    elif task == "warm":
        for _ in read(place, LENGTH, 64, 0):  # imports, and the page cache
            pass
        before = resident_mib()
        result = {f"warm{batch}": rate(read(place, LENGTH, batch, workers), batch, sequences) for batch in (8, 64)}
        result["memory"] = resident_mib() - before
    elif task == "cold":
        next(read(place, LENGTH, 64, 0))
        drop(place)
        result = {"cold64": rate(read(place, LENGTH, 64, workers), 64, sequences)}
    elif task == "first":
        next(read(place.with_name(place.name + "-few"), SMALL_LENGTH, 64, 0))
        begin = time.perf_counter()
        next(read(place, SMALL_LENGTH, 64, 0))
        result = {"first": time.perf_counter() - begin}
    pipe.send(result)
    pipe.close()
    os._exit(0)


def drop(folder: Path) -> None:
    """Take a folder's files out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def measure(task: str, name: str, folder: Path, cores: int, sequences: int) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(task, name, str(folder), cores, sequences, theirs))
    process.start()
    theirs.close()
    try:
        found: dict[str, float] = ours.recv()
    except EOFError:
        raise SystemExit(f"{name}: the measurement {task!r} failed; its error is above") from None
    finally:
        process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=6000, help="of one measurement")
    parser.add_argument("--contenders", nargs="+", choices=list(READERS), default=list(READERS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    names = []
    for name in options.contenders:
        if importlib.util.find_spec(PACKAGES[name].partition(".")[0]) is None:
            print(f"{name}: left out, {PACKAGES[name]} is not installed", file=sys.stderr)
        else:
            names.append(name)
    draw = np.random.default_rng(0)
    count = options.tokens // LENGTH // 64 * 64
    tokens = draw.integers(1, VOCABULARY, count * LENGTH + 1, dtype=np.uint16)
    tokens[999::1000] = 0  # the ends of documents, where there are documents
    small = draw.integers(1, VOCABULARY, SMALL_SHARDS * SMALL_SEQUENCES * SMALL_LENGTH + 1, dtype=np.uint16)
    results: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    with tempfile.TemporaryDirectory() as top:
        folders = {}
        for name in names:
            print(f"{name}: writing", file=sys.stderr)
            same = "llmscale" if name == "llmscale loader" and "llmscale" in names else name
            folders[name] = Path(top, same.replace(" ", "-"))
            if not folders[name].exists():
                WRITERS[name](folders[name], tokens, LENGTH, None)
            found = measure("sum", name, folders[name], 1, 0)
            wanted = int(tokens[: count * LENGTH].sum(dtype=np.int64))
            # Which one token is no input is not the same for all: megatron shuffles documents before it cuts.
            if found["count"] == count and abs(found["sum"] - wanted) > 2**16:
                raise SystemExit(f"{name}: an epoch's tokens add up to {found['sum']}, not {wanted}")
            if abs(found["count"] - count) > 64:
                raise SystemExit(f"{name}: an epoch has {found['count']} sequences, not {count}")
        for name in [name for name in SHARDED if name in names]:
            print(f"{name}: writing {SMALL_SHARDS} shards", file=sys.stderr)
            folder = Path(top, f"small-{name.replace(' ', '-')}")
            WRITERS[name](folder, small, SMALL_LENGTH, SMALL_SEQUENCES)
            few = small[: 40 * SMALL_SEQUENCES * SMALL_LENGTH + 1]
            WRITERS[name](folder.with_name(folder.name + "-few"), few, SMALL_LENGTH, SMALL_SEQUENCES)
        for number in range(options.rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                print(f"round {number + 1}: {name}", file=sys.stderr)
                for cores in (1, 2):
                    for task in ("warm", "cold"):
                        found = measure(task, name, folders[name], cores, options.sequences)
                        for key, value in found.items():
                            results[name].setdefault(f"{key}, {cores} core(s)", []).append(value)
                if name in SHARDED:
                    folder = Path(top, f"small-{name.replace(' ', '-')}")
                    results[name].setdefault("first", []).append(measure("first", name, folder, 1, 0)["first"])
    print(table(results))
    versions = [package for package in ("numpy", "torch", "mosaicml-streaming", "litdata", "webdataset",
                                        "megatron-core", "datasets") if _there(package)]  # fmt: skip
    print(record("data_loaders", {"tokens": count * LENGTH, "sequence_length": LENGTH, **results}, versions,
                 options.output))  # fmt: skip


def _there(package: str) -> bool:
    import importlib.metadata

    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def table(results: dict[str, dict[str, list[float]]]) -> str:
    columns = [
        ("warm, b 8", "warm8, 1 core(s)"), ("warm, b 64", "warm64, 1 core(s)"), ("cold", "cold64, 1 core(s)"),
        ("2 cores, b 8", "warm8, 2 core(s)"), ("2 cores, b 64", "warm64, 2 core(s)"), ("first batch, s", "first"),
        ("memory, MiB", "memory, 1 core(s)"),
    ]  # fmt: skip
    lines = ["| contender | " + " | ".join(title for title, _ in columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, found in results.items():
        cells = [f"{statistics.median(found[key]):.3g}" if key in found else "" for _, key in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
