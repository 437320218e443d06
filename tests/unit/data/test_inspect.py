from __future__ import annotations

from pathlib import Path

from llmscale.data.build import build
from llmscale.data.inspect import describe, histogram


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
