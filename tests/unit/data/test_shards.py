from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmscale.data.shards import SplitWriter
from llmscale.data.split import Split, splits
from llmscale.errors import DataError, UsageError

from .conftest import WriteSplit, row_of_tokens


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    sample_tokens=st.integers(1, 50),
    shard_samples=st.integers(1, 4),
    piece=st.integers(1, 40),
)
def test_tokens_and_boundaries_come_back_however_samples_cut_them(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], sample_tokens: int, shard_samples: int, piece: int
) -> None:
    folder = tmp_path_factory.mktemp("split")
    writer = SplitWriter(folder, "uint16", 0, sample_tokens, shard_samples)
    first = 1
    for length in lengths:
        tokens = np.arange(first, first + length, dtype=np.uint16)
        cuts = list(range(0, max(length, 1), piece))
        for cut in cuts:
            writer.add(tokens[cut : cut + piece], cut == 0, cut == cuts[-1])
        first += length
    card = writer.finish(b"{}", 2**16)
    split = Split(folder)
    row: list[int] = []
    starts: list[int] = []
    sample = 0
    for shard in split.shards:
        assert 1 <= len(shard.offsets) <= shard_samples
        for number in range(len(shard.offsets)):
            tokens, places = split.read_sample(shard, number, split.sample_length(sample))
            starts += (len(row) + places.astype(np.int64)).tolist()
            row += tokens.tolist()
            sample += 1
    assert row == row_of_tokens(lengths).tolist()
    assert starts == [sum(length + 1 for length in lengths[:number]) for number in range(len(lengths))]
    assert (card.tokens, card.documents, card.samples) == (len(row), len(lengths), sample)
    assert (card.shortest_document, card.longest_document) == (min(lengths) + 1, max(lengths) + 1)


def test_tokens_lie_aligned_where_the_index_says(write_split: WriteSplit) -> None:
    folder = write_split("a", [100] * 20)
    split = Split(folder)
    shard = split.shards[1]
    data = np.fromfile(folder / shard.name, dtype=np.uint32)
    with tarfile.open(folder / shard.name) as tar:
        for offset, member in zip(shard.offsets, tar.getmembers()[::2], strict=True):
            file = tar.extractfile(member)
            assert file
            tokens = np.load(io.BytesIO(file.read()))
            assert offset % 128 == 0
            assert np.array_equal(data[offset // 4 : offset // 4 + len(tokens)], tokens)


def test_a_folder_that_is_no_split_is_refused_with_a_hint(write_split: WriteSplit, tmp_path: Path) -> None:
    write_split("train", [10])
    write_split("validation", [10])
    with pytest.raises(UsageError, match=r"gone: no such folder; build one"):
        Split(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"holds the splits train and validation; name one .*, such as .*/train$"):
        Split(tmp_path)
    assert splits(tmp_path) == [tmp_path / "train", tmp_path / "validation"]
    assert splits(tmp_path / "train") == [tmp_path / "train"]
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match=r"other: not a dataset, it has no card\.json"):
        splits(tmp_path / "other")


def test_a_broken_card_or_index_is_named(write_split: WriteSplit) -> None:
    folder = write_split("a", [10])
    card = json.loads((folder / "card.json").read_text())
    for change, message in (
        ({"version": 2}, r"card\.json: version: Input should be 1"),
        ({"dtype": "int8"}, r"card\.json: dtype: "),
        ({"tokens": 100}, r"index\.json: 1 samples, card\.json says"),
        ({"format": "other"}, r"card\.json: format: "),
    ):
        (folder / "card.json").write_text(json.dumps({**card, **change}))
        with pytest.raises(DataError, match=message) as caught:
            Split(folder)
        assert "\n" not in str(caught.value)
    (folder / "card.json").write_text(json.dumps(card)[:50])
    with pytest.raises(DataError, match=r"card\.json: the whole file: Invalid JSON"):
        Split(folder)
    (folder / "card.json").write_text(json.dumps(card))
    (folder / "index.json").write_text((folder / "index.json").read_text().replace("00000", "00001"))
    with pytest.raises(DataError, match=r"index\.json: not the one that card\.json was written for"):
        Split(folder)
    (folder / "index.json").unlink()
    with pytest.raises(DataError, match=r"index\.json: cannot be read: No such file"):
        Split(folder)
