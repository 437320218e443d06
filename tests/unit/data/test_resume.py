"""A build that is killed goes on, and nobody can tell from the result."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from llmscale.data import journal
from llmscale.data.build import Progress, build
from llmscale.data.verify import verify
from llmscale.errors import DataError, UsageError
from tests.unit.data.conftest import content, sentence

KILLED_AT_EVERY_TURN = """
import json, os, random, signal, sys
from pathlib import Path
from llmscale.data import documents, encode
from llmscale.data import build as module
from llmscale.data.build import build
from llmscale.errors import UsageError

encode._JOB_BYTES, module.SAMPLE_TOKENS, documents.PIECE_BYTES = 1 << 12, 1024, 1 << 12
arguments, options, turns = json.loads(sys.argv[1])
rng = random.Random(turns)
kills = resumed = 0
while True:
    child = os.fork()
    if child == 0:
        left = rng.randrange(1, turns)
        for name in ("fsync", "rename", "replace", "unlink"):
            def killed(*args, real=getattr(os, name), **kwargs):
                global left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)
            setattr(os, name, killed)
        try:
            summary = build([arguments[0]], Path(arguments[1]), arguments[2], **options)
        except UsageError as error:  # killed when everything was in its place
            assert "is not empty" in str(error)
            os._exit(10)
        os._exit(10 if summary.resumed_documents else 0)
    rng.random()
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        print(json.dumps([kills, os.WEXITSTATUS(status)]))
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    kills += 1
    assert kills < 60
"""


def written(folder: Path) -> Path:
    """Rows enough for many small shards, with copies near and far, and one of several pieces."""
    path = folder / "in/rows.jsonl"
    path.parent.mkdir()
    rows = [sentence(number) * (1 + number % 6) for number in range(300)]
    rows += [rows[7], rows[250] + " and a little more", rows[8], *map(sentence, range(900, 990))]
    rows.insert(250, "a long row\n" * 3_000)
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of a few documents, several samples a shard, and pieces of a few KiB."""
    monkeypatch.setattr("llmscale.data.encode._JOB_BYTES", 1 << 12)
    monkeypatch.setattr("llmscale.data.build.SAMPLE_TOKENS", 1024)
    monkeypatch.setattr("llmscale.data.documents.PIECE_BYTES", 1 << 12)


@pytest.mark.parametrize(
    ("options", "turns"),
    [
        ({"shard_bytes": 1 << 13, "validation_fraction": 0.2}, 40),
        ({"shard_bytes": 1 << 13, "validation_fraction": 0.2, "dedup": "near"}, 60),
        ({"shard_bytes": 1 << 13, "max_skipped": 130}, 40),
    ],
)
def test_a_build_killed_at_any_moment_goes_on_to_the_same_bytes(
    tokenizer_json: Path, tmp_path: Path, small: None, options: dict[str, object], turns: int
) -> None:
    rows = written(tmp_path)
    if "max_skipped" in options:
        rows.write_text(rows.read_text().replace('"Document 2', '"Document 2"'))
    build([str(rows)], tokenizer_json, tmp_path / "whole", **options)  # type: ignore[arg-type]
    arguments = [[str(rows), str(tokenizer_json), str(tmp_path / "out")], options, turns]
    result = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EVERY_TURN, json.dumps(arguments)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    kills, code = json.loads(result.stdout)
    assert (kills > 3, code) == (True, 10), result.stderr
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]


def test_finished_shards_are_not_made_again_by_any_number_of_workers(tokenizer_json: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "endless.txt"
    os.mkfifo(pipe)  # the build waits for ever when it comes to it
    (tmp_path / "a.txt").write_text("the stream\n" * 300_000)
    out = tmp_path / "out"
    program = (
        "from pathlib import Path; from llmscale.data.build import build;"
        f"build([{str(tmp_path / 'a.txt')!r}, {str(pipe)!r}], Path({str(tokenizer_json)!r}), Path({str(out)!r}),"
        " shard_bytes=1 << 16, report=lambda progress: print(progress.tokens, flush=True))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    while int(process.stdout.readline()) < 1 << 16:
        pass
    with pytest.raises(UsageError, match="another build is writing it"):
        build([str(tmp_path / "a.txt")], tokenizer_json, out)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    pipe.unlink()
    pipe.write_text("the end\n")
    saved = journal.Journal.model_validate_json((tmp_path / "out.partial/journal.json").read_bytes())
    shards = list((tmp_path / "out.partial/dataset/train").glob("*.tar"))
    before = {path.name: path.stat().st_ino for path in shards}
    assert len(before) > 2
    seen: list[Progress] = []
    build([str(tmp_path / "a.txt"), str(pipe)], tokenizer_json, out, shard_bytes=1 << 16, workers=2, report=seen.append)
    assert seen[0].tokens >= 1 << 16
    kept = range(saved.writers["train"].shards)
    assert all((out / f"train/shard-{n:05d}.tar").stat().st_ino == before[f"shard-{n:05d}.tar"] for n in kept)
    build([str(tmp_path / "a.txt"), str(pipe)], tokenizer_json, tmp_path / "whole", shard_bytes=1 << 16)
    assert content(out) == content(tmp_path / "whole")


@pytest.fixture
def stopped(corpus: Path, tokenizer_json: Path, tmp_path: Path, small: None) -> Path:
    """The output of a build that a bad line has stopped."""
    (corpus / "z.jsonl").write_text('{"text": "good"}\n{"text": bad}\n')
    with pytest.raises(DataError, match=r"z\.jsonl:2: not a line of JSON .*; what was built is kept: the same command"):
        build([str(corpus)], tokenizer_json, tmp_path / "out", shard_bytes=8192)
    return tmp_path / "out"


def test_a_bad_line_can_be_mended(corpus: Path, tokenizer_json: Path, tmp_path: Path, stopped: Path) -> None:
    (corpus / "z.jsonl").write_text('{"text": "good"}\n{"text": "good as well"}\n')
    build([str(corpus)], tokenizer_json, stopped, shard_bytes=8192)
    build([str(corpus)], tokenizer_json, tmp_path / "whole", shard_bytes=8192)
    assert content(stopped) == content(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_what_was_read_must_not_have_changed(corpus: Path, tokenizer_json: Path, tmp_path: Path, small: None) -> None:
    rows = tmp_path / "rows.jsonl"
    good = "".join(json.dumps({"text": sentence(number)}) + "\n" for number in range(99))
    rows.write_text(good + "bad\n")
    inputs, out = [str(corpus), str(rows)], tmp_path / "out"
    with pytest.raises(DataError, match=r"rows\.jsonl:100: not a line"):
        build(inputs, tokenizer_json, out, shard_bytes=4096)
    rows.write_text(good.replace("Document 3:", "Document 4:"))
    with pytest.raises(UsageError, match=r"rows\.jsonl has changed .* put it back, or .* --restart"):
        build(inputs, tokenizer_json, out, shard_bytes=4096)
    rows.write_text(good)
    next(corpus.rglob("*.txt")).write_text("something else")
    with pytest.raises(UsageError, match=r"--input: a file has changed that the unfinished build had read"):
        build(inputs, tokenizer_json, out, shard_bytes=4096)
    summary = build(inputs, tokenizer_json, out, shard_bytes=4096, restart=True)
    assert summary.resumed_documents == 0
    assert verify(out) == []


def test_a_file_that_came_before_the_one_being_read_is_not_called_a_change_of_it(
    tokenizer_json: Path, tmp_path: Path, small: None
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    good = "".join(json.dumps({"text": sentence(number)}) + "\n" for number in range(99))
    (folder / "b.jsonl").write_text(good + "bad\n")
    with pytest.raises(DataError, match="what was built is kept"):
        build([str(folder)], tokenizer_json, out, shard_bytes=4096)
    (folder / "a.txt").write_text("new")
    with pytest.raises(
        UsageError, match=r"in/a\.txt stands where the unfinished build was reading .*in/b\.jsonl; a file"
    ):
        build([str(folder)], tokenizer_json, out, shard_bytes=4096)
    (folder / "a.txt").unlink()
    (folder / "b.jsonl").write_text(good)
    assert build([str(folder)], tokenizer_json, out, shard_bytes=4096).resumed_documents


def test_a_lock_that_was_let_go_in_the_same_moment_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.flock

    def flock(file: io.TextIOBase, how: int) -> None:
        next(tmp_path.glob(".*")).unlink()  # by a build that ends just now; a third one may make the file anew
        real(file.fileno(), how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UsageError, match="another build is writing it"), journal.held(tmp_path / "out.partial", "out"):
        pass


def test_other_options_are_refused_and_the_unfinished_build_stays(
    corpus: Path, tokenizer_json: Path, stopped: Path
) -> None:
    with pytest.raises(UsageError, match=r"with --shard-size 8192 is there, and now --shard-size is 4096; .*--restart"):
        build([str(corpus)], tokenizer_json, stopped, shard_bytes=4096)
    with pytest.raises(UsageError, match=r"--dedup none is there, and now --dedup is near 0\.8"):
        build([str(corpus)], tokenizer_json, stopped, shard_bytes=8192, dedup="near")
    assert stopped.with_name("out.partial").is_dir()


@pytest.mark.parametrize("name", ["journal.json", "dataset/train/index.json.partial", "dataset/train/shard-*.partial"])
def test_a_damaged_unfinished_build_says_so(corpus: Path, tokenizer_json: Path, stopped: Path, name: str) -> None:
    path = next(stopped.with_name("out.partial").glob(name))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"out\.partial.*; .*--restart"):
        build([str(corpus)], tokenizer_json, stopped, shard_bytes=8192)


def broken(folder: Path) -> list[str]:
    """Inputs with five records that are no documents, among 120 that are."""
    (folder / "a.jsonl").write_text(
        "".join(f"{{bad {number}\n" if number % 40 == 9 else json.dumps({"text": sentence(number)}) + "\n"
                for number in range(120))
    )  # fmt: skip
    with tarfile.open(folder / "b.tar", "w") as tar:
        for name, data in (("0.txt", b"zero"), ("1.json", b"{"), ("2.cls", b"2"), ("3.txt", b"three")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return [str(folder / "a.jsonl"), str(folder / "b.tar")]


def test_bad_records_are_passed_over_where_asked_named_and_counted(
    tokenizer_json: Path, tmp_path: Path, small: None
) -> None:
    inputs = broken(tmp_path)
    with pytest.raises(DataError, match=r"a\.jsonl:10: not a line .*; or pass such records over with --on-error skip"):
        build(inputs, tokenizer_json, tmp_path / "out")
    for workers in (1, 2):
        summary = build(inputs, tokenizer_json, tmp_path / f"out{workers}", workers=workers, max_skipped=5)
    assert content(tmp_path / "out1") == content(tmp_path / "out2")
    assert verify(tmp_path / "out1") == []
    train = summary.splits["train"]
    assert (summary.skipped_records, train.skipped_records) == (5, 5)
    assert sum(card.documents for card in summary.splits.values()) == 117 + 2
    named = [json.loads(line)["problem"] for line in (tmp_path / "out1/skipped.jsonl").read_text().splitlines()]
    places = ["a.jsonl:10: ", "a.jsonl:50: ", "a.jsonl:90: ", "b.tar: member '1.json' is not JSON", "b.tar: sample '2'"]
    assert all(place in problem for place, problem in zip(places, named, strict=True))
    whole = build(inputs[1:], tokenizer_json, tmp_path / "out1", max_skipped=2, overwrite=True, validation_fraction=0)
    assert whole.splits["train"].documents == 2


def test_more_bad_records_than_are_allowed_stop_a_build_which_goes_on(
    tokenizer_json: Path, tmp_path: Path, small: None
) -> None:
    inputs = broken(tmp_path)
    out, options = tmp_path / "out", {"shard_bytes": 4096, "validation_fraction": 0}
    with pytest.raises(DataError, match=r"a\.jsonl:90: not .*; more than the 2 that --max-skipped .* goes on"):
        build(inputs, tokenizer_json, out, max_skipped=2, **options)  # type: ignore[arg-type]
    summary = build(inputs, tokenizer_json, out, max_skipped=9, **options)  # type: ignore[arg-type]
    assert (summary.resumed_documents > 0, summary.skipped_records) == (True, 5)
    build(inputs, tokenizer_json, tmp_path / "whole", max_skipped=9, **options)  # type: ignore[arg-type]
    assert content(out) == content(tmp_path / "whole")


def test_a_full_disk_loses_nothing_and_the_advice_keeps_what_there_is(
    corpus: Path, tokenizer_json: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, fsync = 12, os.fsync

    def full(file: int) -> None:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / "out"
    kept = r"out: cannot be written: No space left on device; free some space: what was built is kept: the same command"
    with pytest.raises(DataError, match=kept):
        build([str(corpus)], tokenizer_json, out, shard_bytes=8192)
    with pytest.raises(
        DataError, match=r"other: cannot be written: No space .*; free some space, or name another --ou"
    ):
        build([str(corpus)], tokenizer_json, tmp_path / "other", shard_bytes=8192)
    room = 1 << 30
    assert build([str(corpus)], tokenizer_json, out, shard_bytes=8192).resumed_documents
    build([str(corpus)], tokenizer_json, tmp_path / "whole", shard_bytes=8192)
    assert content(out) == content(tmp_path / "whole")
