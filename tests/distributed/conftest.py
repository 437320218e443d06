"""A corpus of token shards for the tests that train."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmscale.data.shards import SplitWriter
from tests.distributed.reference import END_OF_DOCUMENT

VOCAB = 100


def write_corpus(folder: Path, longest: int) -> Path:
    """Shards of 30,000 tokens in documents of 3 to `longest`; a token follows from the last two."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    writer = SplitWriter(folder, "uint16", END_OF_DOCUMENT, sample_tokens=4096, shard_samples=2)
    left = 30_000
    while left > 0:
        length = int(draw.integers(2, longest))
        tokens = [int(t) for t in draw.integers(1, VOCAB, 2)]
        while len(tokens) < length:
            noise = int(draw.integers(0, 3))
            tokens.append(1 + (tokens[-1] * 7 + tokens[-2] * 3 + noise) % (VOCAB - 1))
        writer.add(np.array(tokens, dtype=np.uint16), True, True)
        left -= length
    writer.finish(b"{}", VOCAB)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of all lengths."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "train", 400)


@pytest.fixture(scope="session")
def short_documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of which two or three fill a sequence of the layout matrix."""
    return write_corpus(tmp_path_factory.mktemp("short") / "train", 12)
