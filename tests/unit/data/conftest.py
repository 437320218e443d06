"""A small corpus, a tokenizer of it, and splits whose tokens say where they stand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from llmscale.data import tokenizer as tokenizers
from llmscale.data.shards import SplitWriter

TEXT = "the stream gives every token of a shard once an epoch and no rank reads what another one has read"
WORDS = TEXT.split()


def sentence(number: int) -> str:
    """Some text that only this number gives."""
    return (
        f"Document {number}: "
        + " ".join(WORDS[(number * step) % len(WORDS)] for step in range(5 + number % 40))
        + ".\n"
    )


def content(folder: Path) -> dict[str, str]:
    """The checksum of every file under a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of 120 text files in three folders, with file names in no order of creation."""
    folder = tmp_path / "corpus"
    for number in range(120):
        path = folder / f"part{number % 3}" / f"{(number * 37) % 120:03d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(sentence(number) * (1 + number % 9), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 400 ids."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizers.write(tokenizers.train([sentence(number) for number in range(300)], 400), path)
    return path


def tokenizer_of(vocab_size: int) -> bytes:
    """A tokenizer.json of two words, the id of the first being 0 and that of the other the last."""
    end = "<|endoftext|>"
    marks = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    words = {end: 0, "word": vocab_size - 1}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "word"}
    return json.dumps({"added_tokens": [{"id": 0, "content": end, "special": True, **marks}], "model": model}).encode()


WriteSplit = Callable[..., Path]


@pytest.fixture
def write_split(tmp_path: Path) -> WriteSplit:
    """Writes a split whose tokens count from `first`, 0 being the end of each document."""

    def write(
        name: str, lengths: Sequence[int], sample_tokens: int = 64, shard_samples: int = 3, first: int = 1,
        dtype: str = "uint32", vocab_size: int = 1 << 20, tokenizer: bytes = b"{}",
    ) -> Path:  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        writer = SplitWriter(folder, dtype, 0, sample_tokens, shard_samples)
        for length in lengths:
            writer.add(np.arange(first, first + length, dtype=dtype), True, True)
            first += length
        writer.finish(tokenizer, vocab_size)
        return folder

    return write


def row_of_tokens(lengths: Sequence[int], first: int = 1) -> np.ndarray:
    """What `write_split` wrote, as one row."""
    pieces = []
    for length in lengths:
        pieces += [np.arange(first, first + length), [0]]
        first += length
    return np.concatenate(pieces)
