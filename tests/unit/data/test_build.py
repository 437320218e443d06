from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmscale.data.build import Progress, build
from llmscale.data.documents import PIECE_BYTES
from llmscale.data.shards import Card
from llmscale.data.split import Split
from llmscale.data.tokenizer import Tokenizer
from llmscale.data.verify import verify
from llmscale.errors import DataError, UsageError
from tests.unit.data.conftest import content, sentence


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of a few documents."""
    monkeypatch.setattr("llmscale.data.encode._JOB_BYTES", 1 << 12)


def documents(folder: Path) -> list[str]:
    """All documents of a split, decoded."""
    split = Split(folder)
    tokenizer = Tokenizer(split.tokenizer)
    row: list[int] = []
    starts: list[int] = []
    sample = 0
    for shard in split.shards:
        for number in range(len(shard.offsets)):
            tokens, places = split.read_sample(shard, number, split.sample_length(sample))
            starts += (len(row) + places.astype(np.int64)).tolist()
            row += tokens.tolist()
            sample += 1
    assert all(row[end - 1] == tokenizer.end_of_document for end in [*starts[1:], len(row)] if starts)
    return [tokenizer.decode(row[start : end - 1]) for start, end in zip(starts, [*starts[1:], len(row)], strict=False)]


def test_every_document_is_there_once_in_order_and_comes_back(
    corpus: Path, tokenizer_json: Path, tmp_path: Path
) -> None:
    summary = build([str(corpus)], tokenizer_json, tmp_path / "out", validation_fraction=0.0, shard_bytes=8192)
    texts = [path.read_text() for path in sorted(corpus.rglob("*.txt"))]
    assert documents(tmp_path / "out/train") == texts
    card = summary.splits["train"]
    assert (card.documents, summary.files, list(summary.splits)) == (120, 120, ["train"])
    assert card.shards > 3
    assert card.tokens == sum(len(Tokenizer(tokenizer_json).encode(text)) + 1 for text in texts)
    assert sum(card.document_lengths) == 120
    assert not (tmp_path / "out/validation").exists()


def test_any_number_of_workers_writes_the_same_bytes(corpus: Path, tokenizer_json: Path, tmp_path: Path) -> None:
    long = "".join(f"line {number} of a long document\n" for number in range(60_000))
    assert len(long) > PIECE_BYTES
    (corpus / "long.txt").write_text(long)
    (corpus / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {n} " * n}) + "\n" for n in range(700)))
    for name, workers in (("one", 1), ("two", 2), ("again", 1)):
        build([str(corpus)], tokenizer_json, tmp_path / name, workers=workers, shard_bytes=1 << 18)
    one = content(tmp_path / "one")
    assert len(one) > 8
    assert one == content(tmp_path / "two") == content(tmp_path / "again")


def test_validation_never_overlaps_training_and_copies_fall_on_one_side(
    corpus: Path, tokenizer_json: Path, tmp_path: Path
) -> None:
    (corpus / "copies.jsonl").write_text(
        "".join(json.dumps({"text": path.read_text()}) + "\n" for path in sorted(corpus.rglob("*.txt")))
    )
    build([str(corpus)], tokenizer_json, tmp_path / "out", validation_fraction=0.2)
    train, validation = documents(tmp_path / "out/train"), documents(tmp_path / "out/validation")
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == 240
    assert all(train.count(text) == 2 for text in train)
    assert 24 <= len(validation) <= 72


def test_webdataset_reads_the_shards(corpus: Path, tokenizer_json: Path, tmp_path: Path) -> None:
    import webdataset

    build([str(corpus)], tokenizer_json, tmp_path / "out", validation_fraction=0.0, shard_bytes=4096)
    folder = tmp_path / "out/train"
    split = Split(folder)
    urls = [str(folder / shard.name) for shard in split.shards]
    rows = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [row["__key__"] for row in rows] == [f"{sample:09d}" for sample in range(split.card.samples)]
    assert sum(len(row["tokens.npy"]) for row in rows) == split.card.tokens
    assert sum(len(row["documents.npy"]) for row in rows) == split.card.documents == 120
    assert rows[0]["tokens.npy"].dtype == np.uint16
    assert int(sum(np.sum(row["tokens.npy"] == split.card.end_of_document) for row in rows)) == 120


def test_tar_headers_hold_no_time_and_no_owner(corpus: Path, tokenizer_json: Path, tmp_path: Path) -> None:
    import tarfile

    build([str(corpus)], tokenizer_json, tmp_path / "out")
    with tarfile.open(tmp_path / "out/train/shard-00000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar.getmembers()} == {(0, 0, 0, "", "")}


def test_the_card_says_what_it_is(corpus: Path, tokenizer_json: Path, tmp_path: Path) -> None:
    build([str(corpus)], tokenizer_json, tmp_path / "out")
    card = Card.model_validate_json((tmp_path / "out/train/card.json").read_bytes())
    assert card.tokenizer_sha256 == hashlib.sha256(tokenizer_json.read_bytes()).hexdigest()
    assert (card.vocab_size, card.dtype, card.end_of_document, card.version) == (400, "uint16", 0, 1)
    assert (tmp_path / "out/validation/tokenizer.json").read_bytes() == tokenizer_json.read_bytes()


def test_what_is_left_out_or_replaced_is_counted(corpus: Path, tokenizer_json: Path, tmp_path: Path) -> None:
    (corpus / "empty.txt").write_text("")
    (corpus / "blank.txt").write_text(" \n\t\n")
    (corpus / "binary.dat").write_bytes(bytes(100))
    (corpus / "rows.json").write_text('{"text": "row"}\n{"text": null}\n')
    (corpus / "package.json").write_text('{"name": "x"}')
    (corpus / "latin.txt").write_bytes("überall".encode("latin-1"))
    summary = build([str(corpus)], tokenizer_json, tmp_path / "out", validation_fraction=0.0)
    assert (summary.empty_documents, summary.binary_files, summary.replaced_characters) == (3, 1, 1)
    seen = summary.seen
    assert (seen.binary_names, seen.json_of_lines, seen.json_as_text) == ((str(corpus / "binary.dat"),), 1, 1)
    assert summary.splits["train"].documents == 123
    assert "\ufffdberall" in documents(tmp_path / "out/train")


def test_progress_ends_with_all_bytes_and_documents(corpus: Path, tokenizer_json: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    build([str(corpus)], tokenizer_json, tmp_path / "out", report=seen.append)
    assert seen[-1].bytes_read == seen[-1].total_bytes == sum(path.stat().st_size for path in corpus.rglob("*.txt"))
    assert seen[-1].documents == 120


def test_input_without_text_is_refused(tokenizer_json: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ")
    (tmp_path / "b.bin").write_bytes(bytes(10))
    with pytest.raises(DataError, match=r"no document to train on in --input: 1 empty, 1 binary file"):
        build([str(tmp_path / "a.txt"), str(tmp_path / "b.bin")], tokenizer_json, tmp_path / "out")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"all 1 document\(s\) fell into the validation split; use a smaller"):
        build([str(tmp_path / "a.txt")], tokenizer_json, tmp_path / "out", validation_fraction=0.999999)


def test_an_output_is_replaced_only_when_asked_and_only_when_a_build_wrote_it(
    corpus: Path, tokenizer_json: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    build([str(corpus)], tokenizer_json, out)
    before = content(out)
    with pytest.raises(UsageError, match=r"--output .*out: is not empty; .*--overwrite"):
        build([str(corpus)], tokenizer_json, out)
    build([str(corpus / "part0")], tokenizer_json, out, overwrite=True)
    assert content(out) != before
    assert verify(out) == []
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"holds 'thesis.tex', which no build wrote"):
        build([str(corpus)], tokenizer_json, out, overwrite=True)
    (tmp_path / "home/train").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"holds 'train', which no build wrote"):
        build([str(corpus)], tokenizer_json, tmp_path / "home", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "home", "out"]


def test_what_the_user_has_beside_an_output_or_in_it_is_left_alone(
    corpus: Path, tokenizer_json: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for name in ("out.old", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keep.txt").write_text("mine")
    for restart in (False, True):
        with pytest.raises(UsageError, match=r"out\.partial: builds work there, and no build made it; move it away"):
            build([str(corpus)], tokenizer_json, out, restart=restart)
    (tmp_path / "out.partial").rename(tmp_path / "out.mine")
    for overwrite in (False, True):
        build([str(corpus)], tokenizer_json, out, overwrite=overwrite)
    assert [(tmp_path / name / "keep.txt").read_text() for name in ("out.old", "out.mine")] == ["mine", "mine"]
    (out / "train/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds 'train/notes\.txt', which no build wrote"):
        build([str(corpus)], tokenizer_json, out, overwrite=True)
    (out / "train/notes.txt").unlink()

    def come_meanwhile(progress: Progress) -> None:
        (out / "thesis.tex").write_text("mine")

    with pytest.raises(UsageError, match=r"holds 'thesis\.tex', which no build wrote"):
        build([str(corpus)], tokenizer_json, out, overwrite=True, report=come_meanwhile)
    (out / "thesis.tex").rename(tmp_path / "out.partial/thesis.tex")
    build([str(corpus)], tokenizer_json, out, overwrite=True)
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == ["thesis.tex"]
    assert verify(out) == []


def test_an_output_that_would_eat_its_input_is_refused(corpus: Path, tokenizer_json: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--input .*\.txt: lies inside --output"):
        build([str(corpus / "part0")], tokenizer_json, corpus, overwrite=True)
    with pytest.raises(UsageError, match=r"--output .*data: lies inside --input .*corpus"):
        build([str(corpus)], tokenizer_json, corpus / "data")
    with pytest.raises(UsageError, match=r"is a file; name a folder"):
        build([str(corpus)], tokenizer_json, next(corpus.rglob("*.txt")))
    with pytest.raises(DataError, match=r"out: cannot be written: .*; name another --output"):
        build([str(corpus)], tokenizer_json, tokenizer_json / "out")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_that_fails_leaves_the_old_dataset(
    corpus: Path, tokenizer_json: Path, tmp_path: Path, workers: int
) -> None:
    out = tmp_path / "out"
    build([str(corpus)], tokenizer_json, out)
    before = content(out)
    (corpus / "z.jsonl").write_text('{"text": "good"}\n{"text": bad}\n')
    with pytest.raises(DataError, match=r"z\.jsonl:2: not a line of JSON"):
        build([str(corpus)], tokenizer_json, out, workers=workers, overwrite=True)
    assert content(out) == before


def test_a_worker_tokenises_on_one_thread(tokenizer_json: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from llmscale.data import encode;"
        "from llmscale.data.documents import Part; from llmscale.data.tokenizer import Tokenizer;"
        "encode._start_worker(encode.Encoder(Tokenizer(Path(sys.argv[1])), 'text'));"
        "before = len(os.listdir('/proc/self/task'));"
        "assert encode._encode((Part('here', 'text', b'the stream'),)).lengths;"
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    environment["RAYON_NUM_THREADS"] = "4"
    command = [sys.executable, "-c", program, str(tokenizer_json)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, "0"), result.stderr


def test_file_names_that_are_no_text_are_read_and_named(tokenizer_json: Path, tmp_path: Path, small: None) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    rows = "".join(json.dumps({"text": sentence(number)}) + "\n" for number in range(99))
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jsonl")).write_text(rows)
    bad = Path(os.fsdecode(os.fsencode(folder) + b"/two\nlines\xe9.jsonl"))
    bad.write_text(rows + "bad\n")
    with pytest.raises(DataError, match=r"two\\nlines\\udce9\.jsonl:100: not a line .*; what was built is kept"):
        build([str(folder)], tokenizer_json, out, shard_bytes=8192, text_key="text")
    bad.write_text(rows)
    assert build([str(folder)], tokenizer_json, out, shard_bytes=8192, workers=2).resumed_documents
    with pytest.raises(UsageError, match=r"--input .*no\\n: matches no file"):
        build([str(folder / "no\n")], tokenizer_json, out)


def test_a_tokenizer_may_come_from_a_pipe(corpus: Path, tokenizer_json: Path, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(tokenizer_json.read_bytes())
    build([str(corpus)], Path(f"/dev/fd/{reading}"), tmp_path / "out", workers=2)
    os.close(reading)
    build([str(corpus)], tokenizer_json, tmp_path / "same")
    assert content(tmp_path / "out") == content(tmp_path / "same")


@pytest.mark.parametrize("output", ["/", "/proc"])
def test_an_output_that_cannot_be_renamed_is_refused_before_anything_is_read(
    corpus: Path, tokenizer_json: Path, output: str
) -> None:
    with pytest.raises(UsageError, match=rf"--output {output}: is a mount point, .*; name a folder in it"):
        build([str(corpus)], tokenizer_json, output)


def test_workers_that_do_not_start_are_not_said_to_want_memory(
    corpus: Path, tokenizer_json: Path, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom llmscale.data.build import build\n"
        f"build([{str(corpus)!r}], Path({str(tokenizer_json)!r}), {str(tmp_path / 'out')!r}, workers=2)\n"
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    last = result.stderr.splitlines()[-1]
    assert "no worker could be started" in last
    assert "__main__" in last
