from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from llmscale.data.split import Split
from llmscale.data.verify import verify

from .conftest import WriteSplit, tokenizer_of

LENGTHS = [(number * 7) % 50 for number in range(80)]
SHARD = "shard-00001.tar"


@pytest.fixture
def write_split(write_split: WriteSplit) -> WriteSplit:
    """Writes splits with a tokenizer.json that is true."""
    return partial(write_split, tokenizer=tokenizer_of(1 << 20))


def test_a_whole_split_has_no_problems(write_split: WriteSplit) -> None:
    seen: list[tuple[int, int]] = []
    folder = write_split("a", LENGTHS)
    assert verify(folder, lambda done, total: seen.append((done, total))) == []
    assert seen[-1] == (Split(folder).card.bytes,) * 2


def test_a_flipped_bit_anywhere_names_the_shard_and_in_a_sample_the_sample(write_split: WriteSplit) -> None:
    folder = write_split("a", LENGTHS)
    whole = (folder / SHARD).read_bytes()
    offset = Split(folder).shards[1].offsets[1]
    for place in (0, 100, offset - 600, offset - 60, offset, offset + 255, offset + 256 + 400, len(whole) - 1):
        broken = bytearray(whole)
        broken[place] ^= 1
        (folder / SHARD).write_bytes(broken)
        problems = verify(folder)
        assert any(f"{SHARD}: its checksum differs from index.json" in problem for problem in problems)
        if offset <= place < offset + 256:
            assert any(f"{SHARD}: sample 000000004: its checksum differs" in problem for problem in problems)
        assert not any("sample 000000003" in problem for problem in problems if place >= offset)
    (folder / SHARD).write_bytes(whole)
    assert verify(folder) == []


def test_every_broken_thing_is_reported_at_once(write_split: WriteSplit, tmp_path: Path) -> None:
    folder = write_split("train", LENGTHS)
    write_split("validation", LENGTHS)
    (tmp_path / "validation/index.json").unlink()
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:1500])
    (folder / "shard-00002.tar").unlink()
    (folder / "shard-99999.tar").write_bytes(b"")
    (folder / "tokenizer.json").write_text("{ }")
    problems = "\n".join(verify(tmp_path))
    for message in (
        r"index.json: cannot be read",
        f"{SHARD}: has 1500 bytes, index.json says",
        f"{SHARD}: sample 000000005: cut short: 0 of 64 tokens are there",
        "shard-00002.tar: cannot be read: No such file",
        "shard-99999.tar: not in index.json; remove it",
        "tokenizer.json: not the tokenizer that made the shards",
    ):
        assert message in problems
    (folder / "tokenizer.json").unlink()
    assert any("tokenizer.json: is missing" in problem for problem in verify(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 50}, r"sample 000000000: the id 60 is beyond the vocabulary of 50"),
        ({"end_of_document": 3}, r"a document begins where none has ended"),
        ({"tokens": 2064}, r"tokens, card.json says 2064"),
        ({"documents": 7}, r"80 documents, card.json says 7"),
        ({"shards": 12}, r"shards, card.json says 12"),
        ({"vocab_size": 1 << 19}, r"vocab_size is 524288, that of tokenizer.json is 1048576"),
        ({"end_of_document": 3}, r"end_of_document 3 is no special token of tokenizer.json"),
        ({"shortest_document": 2}, r"shortest_document is 2, the shards give 1"),
        ({"longest_document": 51}, r"longest_document is 51, the shards give 50"),
        ({"document_lengths": [1, 2]}, r"document_lengths is [1, 2], the shards give [2, 2, 8, 13, 24, 31]"),
    ],
)
def test_a_card_that_does_not_fit_the_shards_is_noticed(
    write_split: WriteSplit, change: dict[str, object], message: str
) -> None:
    folder = write_split("a", LENGTHS)
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**card, **change}))
    assert any(message in problem for problem in verify(folder)), verify(folder)


@pytest.mark.parametrize("key", ["format", "version"])
def test_a_card_that_does_not_say_what_it_is_is_refused(write_split: WriteSplit, key: str) -> None:
    path = write_split("a", LENGTHS) / "card.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != key}))
    assert any(f"card.json: {key}: Field required" in problem for problem in verify(path.parent))


def test_a_split_whose_card_is_gone_is_not_passed_over(write_split: WriteSplit, tmp_path: Path) -> None:
    write_split("train", LENGTHS)
    write_split("validation", LENGTHS)
    assert verify(tmp_path) == []
    for name in ("validation", "train"):
        (tmp_path / name / "card.json").unlink()
        problems = verify(tmp_path)
        assert any(f"{name}: has shards, and no card.json; copy" in problem for problem in problems)


def test_all_parts_of_a_dataset_are_checked(write_split: WriteSplit, tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"part-{number:05d}").mkdir()
        write_split(f"part-{number:05d}/train", LENGTHS)
    size = Split(tmp_path / "part-00000/train").card.bytes
    seen: list[int] = []
    assert verify(tmp_path, lambda done, total: seen.append(total)) == []
    assert set(seen) == {3 * size}
    assert verify(str(tmp_path / "part-*" / "train")) == verify(str(tmp_path / "part-*")) == []
    (tmp_path / "part-00001").rename(tmp_path / "part-00001.partial")
    (problem,) = verify(tmp_path)
    assert "part-00001.partial: a build that has not ended; give its command again" in problem
    (tmp_path / "part-00001.partial").rename(tmp_path / "elsewhere")
    assert any("part-00001: is missing, and later parts are there" in problem for problem in verify(tmp_path))
    (tmp_path / "part-00002/train" / SHARD).unlink()
    assert any("part-00002" in problem and SHARD in problem for problem in verify(str(tmp_path / "part-*")))
