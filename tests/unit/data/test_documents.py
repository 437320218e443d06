from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmscale.data import documents
from llmscale.data.documents import PIECE_BYTES, Part, Reader, find, pieces
from llmscale.data.tokenizer import Tokenizer
from llmscale.errors import DataError, UsageError


def texts(path: Path, key: str = "text") -> list[str]:
    return [piece.text for part in Reader([path]) for piece in pieces(part, key)]


def test_folders_are_read_in_order_of_path_and_each_file_once(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.txt", "a.txt", ".hidden/x.txt", "__pycache__/y.txt", "b/.z.txt", "c.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nothing")
    found = find([str(tmp_path / "b/2.txt"), str(tmp_path), str(tmp_path / "*.md")])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["b/2.txt", "a.txt", "b/1.txt", "c.md"]
    assert [path.name for path in find([str(tmp_path)], [".md"])] == ["c.md"]
    assert [path.name for path in find([str(tmp_path / "[ab]**/*.txt")])] == ["1.txt", "2.txt"]
    assert [path.name for path in find([str(tmp_path / "*.txt")])] == ["a.txt"]


def test_input_that_matches_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--input .*nothing.*: matches no file"):
        find([str(tmp_path / "nothing*")])
    with pytest.raises(UsageError, match=r"holds no file; give"):
        find([str(tmp_path)])
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UsageError, match=r"holds no file with suffix \.py"):
        find([str(tmp_path)], [".py"])


def test_a_file_is_a_document_and_a_line_of_jsonl_is_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    rows = "\n".join(json.dumps({"text": text, "id": 1}) for text in ("x\ny", "", "ä")) + "\n\n"
    (tmp_path / "b.jsonl").write_text(rows)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    assert texts(tmp_path / "a.txt") == ["one\ntwo\n"]
    assert texts(tmp_path / "b.jsonl") == texts(tmp_path / "c.jsonl.gz") == ["x\ny", "", "ä"]


def test_binary_files_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"text\0text")
    reader = Reader([tmp_path / "a.bin"])
    assert list(reader) == []
    assert reader.binary_files == 1


@pytest.mark.parametrize(
    ("data", "text", "replaced"),
    [
        (b"a\xffb\xfe", "a\ufffdb\ufffd", 2),
        ("a\ufffd".encode(), "a\ufffd", 0),
        ("ä".encode("latin-1"), "\ufffd", 1),
    ],
)
def test_bytes_that_are_not_utf_8_are_replaced_and_counted(data: bytes, text: str, replaced: int) -> None:
    (piece,) = pieces(Part("a", "text", data), "text")
    assert (piece.text, piece.replaced) == (text, replaced)
    (piece,) = pieces(Part("a:1", "json", b'{"text": "' + data + b'"}'), "text")
    assert (piece.text, piece.replaced) == (text, replaced)


def test_half_a_surrogate_pair_in_json_is_replaced() -> None:
    (piece,) = pieces(Part("a:1", "json", rb'{"text": "a\ud800b"}'), "text")
    assert (piece.text, piece.replaced) == ("a\ufffdb", 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', r"a\.jsonl:7: not a line of JSON"),
        (b"[" * 100_000, r"a\.jsonl:7: not a line of JSON"),
        (b"[1]", r"a\.jsonl:7: a JSON object is wanted, not list"),
        (b'{"content": "x", "id": 1}', r"a\.jsonl:7: no key 'text', there is content, id; .*--text-key"),
        (b'{"text": 5}', r"a\.jsonl:7: 'text' is not a string but int"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(line: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        list(pieces(Part("a.jsonl:7", "json", line), "text"))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    for name, data, reason in (("cut.jsonl.gz", whole[:-20], "ended"), ("not.jsonl.gz", b"plain", "gzip")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=rf"{name}: cannot be read: .*{reason}"):
            list(Reader([tmp_path / name]))
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read: No such file"):
        Reader([tmp_path / "gone.txt"])
    with pytest.raises(DataError, match=r"/proc/self/mem: cannot be read: Input/output error"):
        list(Reader([Path("/proc/self/mem")]))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(["ä" * 700_001, "x" * 1_000_003, "\n", "word\n\n", "🙂" * 300_000]), max_size=4))
def test_pieces_of_a_long_document_are_whole_characters_and_lose_nothing(parts: list[str]) -> None:
    data = "".join(parts).encode()
    blocks = list(documents._pieces(io.BytesIO(data)))
    assert b"".join(block for block, _ in blocks) == data
    assert [last for _, last in blocks] == [False] * (len(blocks) - 1) + [True]
    assert all(len(block) <= PIECE_BYTES and block.decode() is not None for block, _ in blocks)


def test_a_long_document_gets_the_tokens_that_it_gets_in_one_go(tmp_path: Path, tokenizer_json: Path) -> None:
    tokenizer = Tokenizer(tokenizer_json)
    text = "".join(f"  if line {n}:\n\n\tthe token = 'of {n * n}'\r\n" for n in range(40_000))
    assert len(text) > 1.5 * PIECE_BYTES
    (tmp_path / "a.txt").write_bytes(text.encode())
    found = [piece for part in Reader([tmp_path / "a.txt"]) for piece in pieces(part, "text")]
    assert [(piece.first, piece.last) for piece in found] == [(True, False), (False, True)]
    joined = [token for piece in found for token in tokenizer.encode(piece.text).tolist()]
    assert joined == tokenizer.encode(text).tolist()
