"""The loaders that `benchmarks/data_loaders.py` compares: how each writes its data and reads it back, shuffled.

Each is set up as its documentation recommends for speed, from local files:

- llmscale: on one core `Stream.read`, on more the `Loader`, which reads ahead in a thread. Samples are checked when
  they are first read, as always.
- streaming: mosaicml-streaming's StreamingDataset over MDS shards whose column has a static dtype and shape (no header
  a sample), told the batch size, shuffle py1e (its default), in torch's DataLoader.
- litdata: StreamingDataset with a TokensLoader over tensors of uint16, in its StreamingDataLoader.
- webdataset npy, webdataset pickle: one sequence a sample. Shards shuffled, then undecoded samples in a buffer of
  1,000; batched in the pipeline, so that a worker hands over batches, in WebLoader.
- megatron-core: GPTDataset over one .bin/.idx, mapped, in torch's DataLoader; no attention mask, no resets: nothing a
  sample but tokens, labels, loss mask and positions. Of these the batch is put together in one copy.
- megatron-energon: crude samples of the tars of webdataset npy, indexed by its own preparation; one cooker that decodes
  with `np.frombuffer`, shuffle buffer of 1,000, a batch the task encoder's, in its own loader.
- datasets: Hugging Face's memory-mapped Arrow table with lists of fixed length, in torch's DataLoader with a
  BatchSampler, which takes a batch's rows from the table at once; no index mapping, which its guide calls slow.
- limit: random reads of one memory-mapped flat file. It knows where to read, and checks nothing. On two cores two
  threads fill halves of a batch.

Where a loader lets the batch be put together by the user, rows are widened to int64 while they are copied into the
batch, once. On one core DataLoaders have no workers (one worker on the same core was slower for all), on two they have
two, which hand over torch tensors through shared memory.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

VOCABULARY = 50_257
SHUFFLE_BUFFER = 1000
Batch = Any
"""int64 [batch, length + 1], of numpy or torch."""
Epoch = Callable[[int], Iterator[Batch]]
"""Starts a shuffled pass over the data in batches of so many sequences."""


@dataclass(frozen=True)
class Corpus:
    """What is written: uint16 tokens in documents of `document` tokens whose last is 0, as sequences of length + 1.

    The sequences overlap by a token, so that each token is a label once.
    """

    tokens: npt.NDArray[np.uint16]
    length: int
    document: int
    shard_sequences: int

    @property
    def sequences(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def rows(self) -> Iterator[npt.NDArray[np.uint16]]:
        for start in range(0, self.sequences * self.length, self.length):
            yield self.tokens[start : start + self.length + 1]

    def documents(self) -> Iterator[npt.NDArray[np.uint16]]:
        for start in range(0, len(self.tokens), self.document):
            yield self.tokens[start : start + self.document]


@dataclass(frozen=True)
class Contender:
    """One loader. open: (folder, length, workers), gives passes, the next of which may have another batch size."""

    distribution: str
    """What has to be installed."""
    imports: tuple[str, ...]
    write: Callable[[Path, Corpus], None]
    open: Callable[[Path, int, int], Epoch]
    reads: str | None = None
    """The contender whose files it reads, where it has none of its own."""
    sharded: bool = True


def widen(rows: Sequence[Any]) -> npt.NDArray[np.int64]:
    """A batch of rows of uint16."""
    out = np.empty((len(rows), len(rows[0])), dtype=np.int64)
    for number, row in enumerate(rows):
        out[number] = row
    return out


def tensor(rows: Sequence[Any]) -> Batch:
    """A batch of rows of uint16, as DataLoader's workers hand it over fastest."""
    import torch

    return torch.from_numpy(widen(rows))


def write_llmscale(folder: Path, corpus: Corpus) -> None:
    from llmscale.data.shards import SAMPLE_TOKENS, SplitWriter

    folder.mkdir()
    shard_tokens = corpus.shard_sequences * corpus.length
    sample_tokens = min(SAMPLE_TOKENS, shard_tokens)
    writer = SplitWriter(folder, "uint16", 0, sample_tokens, shard_tokens // sample_tokens)
    for document in corpus.documents():
        writer.add(document[:-1], True, True)
    writer.finish(b"{}", VOCABULARY)


def open_llmscale(folder: Path, length: int, workers: int) -> Epoch:
    from llmscale.data.loader import Loader
    from llmscale.data.stream import Stream

    stream = Stream([(str(folder), 1.0)], length, seed=1)
    sequences = (json.loads((folder / "card.json").read_bytes())["tokens"] - 1) // length
    passes = 0

    def epoch(batch: int) -> Iterator[Batch]:
        nonlocal passes
        first, passes = passes * sequences, passes + 1
        if workers:
            with Loader(stream, batch, position=first, batches=sequences // batch, collate=_as_it_is) as loader:
                yield from loader
            first, end = first + sequences // batch * batch, first + sequences
        else:
            end = first + sequences
        for position in range(first, end, batch):
            yield stream.read(np.arange(position, min(position + batch, end)))

    return epoch


def _as_it_is(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return rows


def write_streaming(folder: Path, corpus: Corpus) -> None:
    from streaming import MDSWriter

    column = f"ndarray:uint16:{corpus.length + 1}"
    # A shard holds its samples, an offset of 4 bytes for each, and a header that says the columns.
    limit = corpus.shard_sequences * (2 * corpus.length + 6) + 400
    with MDSWriter(out=str(folder), columns={"tokens": column}, size_limit=limit) as out:
        for row in corpus.rows():
            out.write({"tokens": row})


def open_streaming(folder: Path, length: int, workers: int) -> Epoch:
    def epoch(batch: int) -> Iterator[Batch]:
        import torch
        from streaming import StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
        dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=batch, shuffle_seed=1)
        yield from torch.utils.data.DataLoader(dataset, batch, num_workers=workers, collate_fn=_stack_column)

    return epoch


def _stack_column(rows: Sequence[dict[str, Any]]) -> Batch:
    return tensor([row["tokens"] for row in rows])


def write_litdata(folder: Path, corpus: Corpus) -> None:
    import litdata
    from litdata.streaming.item_loader import TokensLoader

    block = corpus.length + 1
    litdata.optimize(
        fn=_Tensors(corpus), inputs=[0], output_dir=str(folder), chunk_size=corpus.shard_sequences * block,
        item_loader=TokensLoader(block_size=block), num_workers=1, verbose=False,
    )  # fmt: skip


class _Tensors:
    """litdata looks whether what it calls is a generator function."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus

    def __call__(self, _: int) -> Iterator[Any]:
        import torch

        for row in self._corpus.rows():
            yield torch.from_numpy(row.copy())


def open_litdata(folder: Path, length: int, workers: int) -> Epoch:
    def epoch(batch: int) -> Iterator[Batch]:
        from litdata import StreamingDataLoader, StreamingDataset
        from litdata.streaming.item_loader import TokensLoader

        dataset = StreamingDataset(str(folder), item_loader=TokensLoader(block_size=length + 1), shuffle=True, seed=1)
        yield from StreamingDataLoader(dataset, batch_size=batch, num_workers=workers, collate_fn=_stack_tensors)

    return epoch


def _stack_tensors(rows: Sequence[Any]) -> Batch:
    return tensor([row.numpy() for row in rows])


def write_webdataset(member: str, folder: Path, corpus: Corpus) -> None:
    import webdataset

    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "%06d.tar"), maxcount=corpus.shard_sequences, verbose=0) as out:
        for number, row in enumerate(corpus.rows()):
            out.write({"__key__": f"{number:09d}", member: row})


def open_webdataset(member: str, folder: Path, length: int, workers: int) -> Epoch:
    shards = sorted(str(path) for path in folder.glob("*.tar"))

    def epoch(batch: int) -> Iterator[Batch]:
        import webdataset

        dataset = webdataset.WebDataset(shards, shardshuffle=100, seed=1, empty_check=False)
        dataset = dataset.shuffle(SHUFFLE_BUFFER).decode().to_tuple(member).batched(batch, collation_fn=_stack_tuples)
        yield from webdataset.WebLoader(dataset, batch_size=None, num_workers=workers)

    return epoch


def _stack_tuples(rows: Sequence[tuple[Any]]) -> Batch:
    return tensor([row for (row,) in rows])


def write_megatron(folder: Path, corpus: Corpus) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        from megatron.core.datasets.utils import compile_helpers

        compile_helpers()
    folder.mkdir()
    builder = IndexedDatasetBuilder(str(folder / "data.bin"), dtype=np.uint16)
    for document in corpus.documents():
        builder.add_document(torch.from_numpy(document.astype(np.int32)), [len(document)])
    builder.finalize(str(folder / "data.idx"))


class _Tokenizer:
    """What GPTDataset asks of a tokenizer."""

    eod, pad, vocab_size = 0, 0, VOCABULARY

    def __init__(self) -> None:
        self.unique_identifiers = {"class": "none"}


def open_megatron(folder: Path, length: int, workers: int) -> Epoch:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    logging.disable(logging.WARNING)
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=length, blend=None, split="1", path_to_cache=str(folder / f"cache-{length}"),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        tokenizer=_Tokenizer(),
    )  # fmt: skip
    indexed = IndexedDataset(str(folder / "data"), multimodal=False, mmap=True)
    documents = np.arange(len(indexed.document_indices) - 1, dtype=np.int32)
    dataset = GPTDataset(indexed, str(folder / "data"), documents, None, Split.train, config)

    def epoch(batch: int) -> Iterator[Batch]:
        import torch

        yield from torch.utils.data.DataLoader(dataset, batch, num_workers=workers, collate_fn=_stack_megatron)

    return epoch


def _stack_megatron(rows: Sequence[dict[str, Any]]) -> Batch:
    """The tokens and the last label, which is what the other contenders give."""
    import torch

    out = torch.empty((len(rows), len(rows[0]["tokens"]) + 1), dtype=torch.int64)
    for number, row in enumerate(rows):
        out[number, :-1] = row["tokens"]
        out[number, -1] = row["labels"][-1]
    return out


def write_energon(folder: Path, corpus: Corpus) -> None:
    """Indexes a folder of tars, and says that its samples are crude."""
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    shards = sorted(path.name for path in folder.glob("*.tar"))
    WebdatasetPreparator.prepare_dataset(folder, shards, split_parts_ratio=[("train", 1.0)], workers=1)
    (folder / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")


def open_energon(folder: Path, length: int, workers: int) -> Epoch:
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        Sample,
        SampleDecoder,
        WorkerConfig,
        basic_sample_keys,
        edataclass,
        get_loader,
        get_train_dataset,
        stateless,
    )  # fmt: skip

    @edataclass
    class Sequence_(Sample):
        tokens: Any

    @stateless
    def cook(sample: dict[str, Any]) -> Sequence_:
        # Its last 2 × (length + 1) bytes are the array: the .npy header needs no parsing.
        data = sample["npy"]
        return Sequence_(
            **basic_sample_keys(sample), tokens=np.frombuffer(data, np.uint16, offset=len(data) - 2 * (length + 1))
        )

    class Encoder(DefaultTaskEncoder[Any, Any, Any, Any]):
        cookers = (Cooker(cook),)
        decoder: SampleDecoder | None = None

        @stateless
        def batch(self, samples: list[Any]) -> Batch:
            return tensor([sample.tokens for sample in samples])

    def epoch(batch: int) -> Iterator[Batch]:
        dataset = get_train_dataset(
            folder, batch_size=batch, shuffle_buffer_size=SHUFFLE_BUFFER, max_samples_per_sequence=None, repeat=False,
            worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers), task_encoder=Encoder(),
        )  # fmt: skip
        yield from get_loader(dataset)

    return epoch


def write_datasets(folder: Path, corpus: Corpus) -> None:
    from datasets import Dataset, Features, List, Value, disable_progress_bars

    disable_progress_bars()
    features = Features({"tokens": List(Value("uint16"), length=corpus.length + 1)})
    made = Dataset.from_generator(
        _records, gen_kwargs={"corpus": corpus}, features=features, cache_dir=f"{folder}-made"
    )
    made.save_to_disk(str(folder), num_shards=-(-corpus.sequences // corpus.shard_sequences))


def _records(corpus: Corpus) -> Iterator[dict[str, Any]]:
    return ({"tokens": row} for row in corpus.rows())


def open_datasets(folder: Path, length: int, workers: int) -> Epoch:
    from datasets import load_from_disk

    dataset = load_from_disk(str(folder)).with_format("numpy")

    def epoch(batch: int) -> Iterator[Batch]:
        import torch
        from torch.utils.data import BatchSampler, DataLoader, RandomSampler

        torch.manual_seed(1)
        sampler = BatchSampler(RandomSampler(dataset), batch, drop_last=False)
        yield from DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=workers, collate_fn=_widen_table)

    return epoch


def _widen_table(columns: dict[str, Any]) -> Batch:
    import torch

    return torch.from_numpy(np.asarray(columns["tokens"]).astype(np.int64))


def write_limit(folder: Path, corpus: Corpus) -> None:
    folder.mkdir()
    np.asarray(corpus.tokens).tofile(folder / "flat")


def open_limit(folder: Path, length: int, workers: int) -> Epoch:
    flat = np.memmap(folder / "flat", dtype=np.uint16, mode="r").view(np.ndarray)
    sequences = (len(flat) - 1) // length

    def fill(out: npt.NDArray[np.int64], places: Iterable[int]) -> None:
        for row, place in enumerate(places):
            out[row] = flat[place : place + length + 1]

    def epoch(batch: int) -> Iterator[Batch]:
        places = (np.random.default_rng(1).permutation(sequences) * length).tolist()
        pool = ThreadPoolExecutor(workers) if workers else None
        for start in range(0, sequences, batch):
            some = places[start : start + batch]
            out = np.empty((len(some), length + 1), dtype=np.int64)
            if pool is None:
                fill(out, some)
            else:
                list(pool.map(fill, np.array_split(out, workers), _split(some, workers)))
            yield out

    return epoch


def _split(places: list[int], parts: int) -> list[list[int]]:
    """As numpy.array_split does."""
    return [part.tolist() for part in np.array_split(np.array(places), parts)]


CONTENDERS: dict[str, Contender] = {
    "llmscale": Contender("numpy", ("llmscale.data.stream", "llmscale.data.loader"), write_llmscale, open_llmscale),
    "streaming": Contender("mosaicml-streaming", ("torch", "streaming"), write_streaming, open_streaming),
    "litdata": Contender("litdata", ("torch", "litdata"), write_litdata, open_litdata),
    "webdataset npy": Contender(
        "webdataset", ("torch", "webdataset"), partial(write_webdataset, "npy"), partial(open_webdataset, "npy")
    ),
    "webdataset pickle": Contender(
        "webdataset", ("torch", "webdataset"), partial(write_webdataset, "pyd"), partial(open_webdataset, "pyd")
    ),
    "megatron-core": Contender(
        "megatron-core", ("torch", "megatron.core.datasets.gpt_dataset"), write_megatron, open_megatron, sharded=False
    ),
    "megatron-energon": Contender(
        "megatron-energon", ("torch", "megatron.energon"), write_energon, open_energon, reads="webdataset npy"
    ),
    "datasets": Contender("datasets", ("torch", "datasets"), write_datasets, open_datasets),
    "limit": Contender("numpy", (), write_limit, open_limit, sharded=False),
}
