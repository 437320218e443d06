"""Every format gives the same documents; what is broken is named by file and place."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmscale.data import documents
from llmscale.data.documents import PIECE_BYTES, Part, Reader, pieces
from llmscale.data.inputs import find
from llmscale.data.tokenizer import Tokenizer
from llmscale.errors import DataError


def read(path: Path, key: str = "text") -> list[Part]:
    return list(Reader(find([str(path)]), key))


def texts(path: Path, key: str = "text") -> list[str]:
    """The documents, whole."""
    found: list[str] = []
    for part in read(path, key):
        for piece in pieces(part, key):
            if piece.first:
                found.append("")
            found[-1] += piece.text
    return found


def test_a_file_is_a_document_and_a_line_of_jsonl_is_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    rows = "\n".join(json.dumps({"text": text, "id": 1}) for text in ("x\ny", "", "ä")) + "\n\n"
    (tmp_path / "b.jsonl").write_text(rows)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    assert texts(tmp_path / "a.txt") == ["one\ntwo\n"]
    assert texts(tmp_path / "b.jsonl") == texts(tmp_path / "c.jsonl.gz") == ["x\ny", "", "ä"]


DOCUMENTS = ["x\ny", "", "ä" * 40, "long line\n" * 150_000, "🙂"]


def write(path: Path, documents_: list[str] = DOCUMENTS, key: str = "text") -> None:
    """The documents in the format that the name says."""
    name = path.name
    rows = "".join(json.dumps({"id": 1, key: text}) + "\n" for text in documents_).encode()
    if ".parquet" in name:
        from pyarrow import parquet

        table = pyarrow.table({"id": range(len(documents_)), key: documents_})
        parquet.write_table(table, path, row_group_size=2)
        return
    if ".tar" in name or name.endswith(".tgz"):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for number, text in enumerate(documents_):
                json_too = {"txt": text.encode(), "json": json.dumps({key: text}).encode()}
                members = {"cls": b"1", **(json_too if number % 2 else {"json": json_too["json"]})}
                for ending, data in members.items():
                    info = tarfile.TarInfo(f"./part/{number}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        rows = packed.getvalue()
    path.write_bytes(compressed(name, rows))


@pytest.mark.parametrize("name", ["A.JSONL", "a.JSON", "a.json", "a.json.gz", "a.json.ZST", "A.Parquet", "A.TAR.GZ"])
def test_a_format_is_told_by_the_ending_in_any_case_and_lines_of_json_by_the_first(name: str, tmp_path: Path) -> None:
    write(tmp_path / "plain", DOCUMENTS)
    lower = name.lower()
    if lower.endswith((".parquet", ".gz")) and "json" not in lower:
        write(tmp_path / lower)
        (tmp_path / lower).rename(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(compressed(lower, (tmp_path / "plain").read_bytes()))
    assert texts(tmp_path / name) == DOCUMENTS


@pytest.mark.parametrize(
    "text", ['{\n "text": "one"\n}\n', '{"name": "x"}\n', '["text"]', "", '{"text": 1}\n', "long line\n" * 150_000]
)
def test_json_that_is_no_lines_of_text_is_a_text_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    assert texts(tmp_path / "a.json") == [text]
    reader = Reader(find([str(tmp_path)]))
    assert list(reader)
    assert (reader.seen.json_as_text, reader.seen.json_of_lines) == (1, 0)


def test_null_is_a_document_without_text_in_every_format(tmp_path: Path) -> None:
    from pyarrow import parquet

    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "x"}\n')
    parquet.write_table(pyarrow.table({"text": [None, "x"]}), tmp_path / "a.parquet")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        members = (("0.json", b'{"text": null}'), ("1.json", b'{"text": null}'), ("1.txt", b"x"))
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for name in ("a.jsonl", "a.parquet", "a.tar"):
        assert texts(tmp_path / name) == ["", "x"], name


def test_a_byte_order_mark_is_no_text_in_any_format(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ["\ufeffone"])
    write(tmp_path / "a.tar", ["\ufeffone"])
    (tmp_path / "a.txt").write_text("\ufeffone")
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "\ufeffone"}\n')
    for name in ("a.parquet", "a.tar", "a.txt", "a.jsonl"):
        assert texts(tmp_path / name) == ["one"], name
    assert list(documents.texts("\ufeffone".encode())) == [("one", False)]


def test_long_rows_of_parquet_are_held_by_the_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow import parquet

    asked = []
    iter_batches = parquet.ParquetFile.iter_batches

    def noted(self: object, batch_size: int, **options: object) -> object:
        asked.append(batch_size)
        return iter_batches(self, batch_size, **options)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", noted)
    monkeypatch.setattr("llmscale.data.documents._ROWS_BYTES", 1 << 20)
    rows = [f"{number} " * 20_000 for number in range(40)] + ["short"] * 40 + ["x" * (2 << 20)] * 40
    parquet.write_table(pyarrow.table({"id": range(120), "text": rows}), tmp_path / "a.parquet", row_group_size=40,
                        use_dictionary=False)  # fmt: skip
    assert texts(tmp_path / "a.parquet") == rows
    assert (5 < asked[0] < 30, asked[1:]) == (True, [256, 1])


def compressed(name: str, data: bytes) -> bytes:
    if name.endswith((".gz", ".tgz")):
        return gzip.compress(data)
    # Two frames: files that were put one after another are one file.
    half = len(data) // 2
    return (
        b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in (data[:half], data[half:]))
        if name.endswith(".zst")
        else data
    )


FORMATS = [
    "a.jsonl", "a.ndjson", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.tar", "a.tar.gz", "a.tgz", "a.tar.zst",
]  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, key="content")
    assert texts(tmp_path / name, "content") == DOCUMENTS


@pytest.mark.parametrize("name", ["a.txt", "a.py.gz", "a.txt.zst"])
def test_a_text_file_may_be_compressed(name: str, tmp_path: Path) -> None:
    text = "one\ntwo\n" * 300_000
    (tmp_path / name).write_bytes(compressed(name, text.encode()))
    assert texts(tmp_path / name) == [text]


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_is_cut_short_is_named(name: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(DataError, match=rf"{name}[: ]") as caught:
        texts(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.parquet", "a.tar", "a.tar.gz", "a.jsonl.zst", "a.jsonl.gz"])
def test_a_file_that_is_something_else_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(DataError, match=rf"{name}: "):
        texts(tmp_path / name)


def test_a_parquet_file_without_the_column_says_which_there_are(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", key="body")
    with pytest.raises(DataError, match=r"no column 'text', there is id, body; .*--text-key"):
        texts(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"the column 'id' holds int64, not text"):
        texts(tmp_path / "a.parquet", "id")


@pytest.mark.parametrize("name", FORMATS)
def test_progress_ends_at_the_size_of_the_files(name: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    reader = Reader(find([str(tmp_path)]))
    last = 0
    for _ in reader:
        assert last <= reader.bytes_read <= reader.total_bytes or name.endswith(".parquet")
        last = reader.bytes_read
    assert reader.bytes_read == reader.total_bytes == (tmp_path / name).stat().st_size


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    import tracemalloc

    peaks = []
    for count in (2_000, 20_000):
        write(tmp_path / "a.jsonl.zst", ["some words of text " * 20] * count)
        tracemalloc.start()
        for part in Reader(find([str(tmp_path)])):
            for _ in pieces(part, "text"):
                pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_binary_files_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"text\0text")
    reader = Reader(find([str(tmp_path / "a.bin")]))
    assert list(reader) == []
    assert (reader.seen.binary_files, reader.seen.binary_names) == (1, (str(tmp_path / "a.bin"),))


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
    for name, data, reason in (
        ("cut.jsonl.gz", whole[:-20], "ended"), ("not.jsonl.gz", b"plain", "gzip"),
        ("none.jsonl.gz", b"", "empty"), ("none.tgz", b"", "empty"), ("none.txt.zst", b"", "empty"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=rf"{name}: cannot be read: .*{reason}"):
            read(tmp_path / name)
    (tmp_path / "gone.txt").touch()
    gone = Reader(find([str(tmp_path / "gone.txt")]))
    (tmp_path / "gone.txt").unlink()
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read: No such file"):
        list(gone)
    with pytest.raises(DataError, match=r"/proc/self/mem: cannot be read: Input/output error"):
        read(Path("/proc/self/mem"))


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
    found = [piece for part in read(tmp_path / "a.txt") for piece in pieces(part, "text")]
    assert [(piece.first, piece.last) for piece in found] == [(True, False), (False, True)]
    joined = [token for piece in found for token in tokenizer.encode(piece.text, not piece.first).tolist()]
    assert joined == tokenizer.encode(text).tolist()


def test_no_cut_is_made_beside_a_blank_or_before_a_slash() -> None:
    text = "x" * (PIECE_BYTES // 2) + "a\nb" + "!\n/c\n\u3000d\u00a0\n" * (PIECE_BYTES // 8)
    assert next(documents._pieces(io.BytesIO(text.encode())))[0].endswith(b"xxa\n")


def tar(*members: tuple[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return packed.getvalue()


TWO = tar(("a.txt", b"one"), ("b.txt", b"two"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TWO[:1124] + b"\xff" * 20 + TWO[1144:], r"not a whole tar file \(bad checksum near 'a'\)"),
        (TWO[:1024], r"not a whole tar file \(empty header near 'a'\)"),
        (TWO[:1300], r"not a whole tar file \(truncated header near 'a'\)"),
        (TWO[:1540], r"not a whole tar file \(unexpected end of data near 'b'\)"),
        (b"", r"not a whole tar file \(empty header\)"),
    ],
)
def test_a_tar_that_is_damaged_behind_its_first_member_is_not_taken_for_a_shorter_one(
    data: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match=message):
        texts(tmp_path / "a.tar")


def test_what_no_honest_shard_holds_is_refused(tmp_path: Path) -> None:
    link, huge, header = tarfile.TarInfo("a.txt"), tarfile.TarInfo("a.txt"), tarfile.TarInfo("././@LongLink")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    huge.size = 1 << 40
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    for data, message in (
        (link.tobuf(), "member 'a.txt' is a link or a device"),
        (huge.tobuf(), "member 'a.txt' says it has 1099511627776 bytes"),
        (header.tobuf() + bytes(4096), "a header of 1073741824 bytes"),
        (tar(("../a.txt", b"x")), r"member '\.\./a.txt' leaves its folder"),
        (tar(("/a.txt", b"x")), "member '/a.txt' leaves its folder"),
        (tar(("a.json", b'{"body": 1}')), "sample 'a' has no .txt and no .json with the text"),
        (tar(("a.json", b"{")), "member 'a.json' is not JSON"),
    ):
        (tmp_path / "a.tar").write_bytes(data)
        with pytest.raises(DataError, match=message):
            texts(tmp_path / "a.tar")


def test_what_writers_of_text_do_is_read(tmp_path: Path) -> None:
    row = b'{"text": "a"}\r\n'
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + row + row)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(row) + gzip.compress(row) + bytes(512))
    for name in ("a.jsonl", "b.jsonl.gz"):
        assert texts(tmp_path / name) == ["a", "a"]
    about = b'{"text": "about"}'
    (tmp_path / "c.tar").write_bytes(tar(("a.json", about), ("a.txt", b"one"), ("b.json", about), ("b.txt", b"")))
    assert texts(tmp_path / "c.tar") == ["one", "about"]


def test_a_line_that_has_no_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MOST_BYTES", 1000)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + b" " * 2000)
    with pytest.raises(DataError, match=r"a\.jsonl:2: a line of over 1000 bytes; is this a \.jsonl file\?"):
        texts(tmp_path / "a.jsonl")


def test_strings_of_parquet_come_in_any_encoding(tmp_path: Path) -> None:
    from pyarrow import parquet

    for column, wanted in (
        (pyarrow.array(["a", None, "a"]).dictionary_encode(), ["a", "", "a"]),
        (pyarrow.array(["a", "b"], pyarrow.large_string()), ["a", "b"]),
        (pyarrow.array(["a", "b"], pyarrow.string_view()), ["a", "b"]),
        (pyarrow.array([b"a\xff", b"b"]).view(pyarrow.string()), ["a\ufffd", "b"]),
    ):
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
        assert texts(tmp_path / "a.parquet") == wanted


def test_a_row_group_of_any_size_is_read_in_little_memory(tmp_path: Path) -> None:
    from random import Random

    from pyarrow import parquet

    random = Random(0)
    rows = [random.randbytes(1000).hex() for _ in range(20_000)]
    table = pyarrow.table({"text": rows})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=len(rows), use_dictionary=False)
    del table
    begun, most = pyarrow.total_allocated_bytes(), 0
    for _ in Reader(find([str(tmp_path)])):
        most = max(most, pyarrow.total_allocated_bytes() - begun)
    assert most < (tmp_path / "a.parquet").stat().st_size / 4
