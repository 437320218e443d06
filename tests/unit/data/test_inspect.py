"""Totals, lengths as text and as a picture, and documents that can be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmscale.data import tokenizer as tokenizers
from llmscale.data.build import build
from llmscale.data.inspect import describe, histogram, plot_histogram
from llmscale.errors import DataError, UsageError

from .conftest import TEXT


def test_totals_histogram_and_documents(corpus: Path, tokenizer_json: Path, tmp_path: Path) -> None:
    build([str(corpus)], tokenizer_json, tmp_path / "out", validation_fraction=0.2, shard_bytes=4096)
    train, validation = describe(tmp_path / "out", documents=5)
    assert train.card.documents + validation.card.documents == 120
    texts = [path.read_text() for path in corpus.rglob("*.txt")]
    assert len(train.documents) == 5
    for shown in train.documents:
        assert any(text.startswith(shown.removesuffix(" …").removesuffix("<|endoftext|>")) for text in texts)
    lines = histogram(train.card)
    assert sum(int(line.split()[3].replace(",", "")) for line in lines) == train.card.documents
    assert max(line.count("█") for line in lines) == 40
    assert int(lines[0].split()[0]) <= train.card.shortest_document
    assert int(lines[-1].split()[2].replace(",", "")) >= train.card.longest_document


def test_more_documents_than_there_are_shows_them_all(corpus: Path, tokenizer_json: Path, tmp_path: Path) -> None:
    build([str(corpus / "part0/000.txt")], tokenizer_json, tmp_path / "out", validation_fraction=0.0)
    (only,) = describe(tmp_path / "out", documents=9)
    assert len(only.documents) == 1
    (none,) = describe(tmp_path / "out/train", documents=0)
    assert none.documents == []


def test_the_lengths_are_drawn_for_every_split_and_an_empty_one(
    corpus: Path, tokenizer_json: Path, tmp_path: Path
) -> None:
    from matplotlib.image import imread

    build([str(corpus)], tokenizer_json, tmp_path / "out", validation_fraction=0.2)
    build([str(corpus / "part0")], tokenizer_json, tmp_path / "few", validation_fraction=1e-9)
    heights = []
    for name in ("out", "out/train", "few"):
        plot_histogram(describe(tmp_path / name, 0), picture := tmp_path / "pictures" / "lengths.png")
        pixels = imread(picture)
        blue = pixels[..., 2] - pixels[..., 0] > 0.4
        assert blue.mean() > 0.02
        heights.append(pixels.shape[0])
    assert heights[0] == heights[2] > heights[1]
    assert [path.name for path in picture.parent.iterdir()] == ["lengths.png"]


def test_a_picture_that_cannot_be_is_refused(corpus: Path, tokenizer_json: Path, tmp_path: Path) -> None:
    build([str(corpus / "part0")], tokenizer_json, tmp_path / "out")
    found = describe(tmp_path / "out", 0)
    with pytest.raises(UsageError, match=r"--plot .*lengths: a picture is a PNG; name a file such as .*lengths\.png"):
        plot_histogram(found, tmp_path / "lengths")
    with pytest.raises(DataError, match=r"lengths\.png: cannot be written: .*; name another --plot"):
        plot_histogram(found, tokenizer_json / "lengths.png")


def test_documents_that_end_with_an_unusual_token_are_decoded(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizers.write(tokenizers.train([TEXT] * 9, 270, ["<|stop|>"]), path)
    build([str(corpus)], path, tmp_path / "data", end_of_document="<|stop|>")
    assert all(one.documents for one in describe(tmp_path / "data"))


def test_a_tokenizer_that_is_not_the_dataset_s_is_named(corpus: Path, tokenizer_json: Path, tmp_path: Path) -> None:
    build([str(corpus)], tokenizer_json, tmp_path / "out", validation_fraction=0)
    path = tmp_path / "out/train/tokenizer.json"
    path.write_text(path.read_text().replace("the", "teh"))
    with pytest.raises(DataError, match=r"tokenizer\.json: not the tokenizer that made the shards"):
        describe(tmp_path / "out")
    path.unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: is missing"):
        describe(tmp_path / "out")
    assert describe(tmp_path / "out", 0)


def test_parts_are_described_each(corpus: Path, tokenizer_json: Path, tmp_path: Path) -> None:
    for number in range(2):
        build([str(corpus)], tokenizer_json, tmp_path / "out", validation_fraction=0, part=(number, 2))
    for place in ("out", "out/part-*", "out/part-*/train"):
        assert [one.card.documents for one in describe(str(tmp_path / place), 1)] == [60, 60]
