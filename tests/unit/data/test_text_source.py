"""Raw-text shards: each document once an epoch, whoever reads; stop, go on; broken shards named or left out."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from llmscale.cli.data import command
from llmscale.data import tokenizer
from llmscale.data.describe import describe
from llmscale.data.inspect import describe as look_into
from llmscale.data.loader import Loader
from llmscale.data.source import Integers
from llmscale.data.split import Split
from llmscale.data.stream import Stream
from llmscale.data.text_shards import TextSplit, is_text
from llmscale.data.text_source import WINDOW, TextSource
from llmscale.data.tokenizer import Tokenizer
from llmscale.data.verify import verify
from llmscale.errors import DataError, UsageError

from .conftest import sentence

DOCUMENTS = 400


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmscale.data.describe.PIECE_BYTES", 6000)


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def text_of(number: int) -> str:
    return sentence(number) * (1 + number % 3)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five tars of DOCUMENTS samples, .txt and .json."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(5):
        members = []
        for number in range(shard, DOCUMENTS, 5):
            text = text_of(number)
            if number % 2:
                members.append((f"{number:05d}.txt", text.encode()))
            else:
                members.append((f"{number:05d}.json", json.dumps({"text": text, "url": "x"}).encode()))
            members.append((f"{number:05d}.cls", b"3"))
        write_shard(folder / f"part-{shard}.tar", members)
    return folder


Described = Callable[..., Path]


@pytest.fixture
def described(shards: Path, tokenizer_json: Path, tmp_path: Path) -> Described:
    def make(name: str = "text", streams: int = 4, source: Path = shards) -> Path:
        describe([str(source / "*.tar")], tokenizer_json, tmp_path / name, streams=streams)
        return tmp_path / name

    return make


def test_each_document_is_read_once_an_epoch_with_the_tokens_that_build_gives(
    described: Described, tokenizer_json: Path
) -> None:
    tokenizer = Tokenizer(tokenizer_json)
    stream = Stream([(str(described()), 1.0)], 32, seed=3)
    wanted = Counter(tuple(tokenizer.encode(text_of(number)).tolist()) for number in range(DOCUMENTS))
    total = sum(len(tokens) + 1 for tokens in wanted.elements())
    # Streams end their epochs at different sequences: read beyond all, and take each stream's first epoch.
    rows = stream.read(range(2 * total // 32))
    seen: Counter[tuple[int, ...]] = Counter()
    source = stream._sources[0]
    assert isinstance(source, TextSource)
    for number in range(4):
        own = rows[number::4]
        row = np.concatenate([own[:, :-1].ravel(), own[-1:, -1]])
        length = sum(
            sum(len(part) for part in _window(source, number, window)) for window in range(source.windows(number))
        )
        ends = np.flatnonzero(row[:length] == tokenizer.end_of_document)
        assert ends[-1] == length - 1
        begins = [0, *(ends[:-1] + 1)]
        seen.update(tuple(row[begin:stop].tolist()) for begin, stop in zip(begins, ends, strict=True))
        # The second epoch begins with the very next token, in another order.
        assert not np.array_equal(row[length : length + 200], row[:200])
    assert seen == wanted
    stream.close()


def test_a_long_document_is_tokenised_in_pieces_as_data_build_does(
    tokenizer_json: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmscale.data import documents
    from llmscale.data.build import build

    monkeypatch.setattr(documents, "PIECE_BYTES", 500)
    # Without line breaks the cut falls into words, and shows in the tokens.
    text = " ".join(sentence(number).strip() for number in range(200))
    (tmp_path / "one.txt").write_text(text)
    write_shard(tmp_path / "one.tar", [("1.txt", text.encode())])
    build([str(tmp_path / "one.txt")], tokenizer_json, tmp_path / "built", validation_fraction=0.0)
    describe([str(tmp_path / "one.tar")], tokenizer_json, tmp_path / "text")
    source = TextSource(TextSplit(tmp_path / "text"), 16, 1)
    (tokens,) = _window(source, 0, 0)
    source.close()
    split = Split(tmp_path / "built" / "train")
    built, _ = split.read_sample(split.shards[0], 0, split.sample_length(0))
    assert np.array_equal(tokens, built)
    assert not np.array_equal(tokens[:-1], Tokenizer(tokenizer_json).encode(text))


def _window(source: TextSource, stream: int, window: int) -> list[np.ndarray]:
    return [source.encode(chunk).result() for chunk in source.load(stream, window).result().chunks]


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_ranks_workers_batches_and_stops_read_the_same_sequences(
    shards: Path, tokenizer_json: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("text")
    describe([str(shards / "*.tar")], tokenizer_json, folder, streams=data.draw(st.sampled_from([1, 3, 4])))
    with_one = Stream([(str(folder), 1.0)], 16, seed=5)
    reference = with_one.read(range(360))
    with_one.close()
    position, state = 0, None
    while position < 300:
        ranks = data.draw(st.sampled_from([1, 2, 3, 4]), label="ranks")
        batch = ranks * data.draw(st.integers(1, 4), label="sequences of a rank")
        steps = data.draw(st.integers(1, min(12, (360 - position) // batch)), label="steps")
        parts, states, last = [], [], None
        for rank in range(ranks):
            last = stream = Stream([(str(folder), 1.0)], 16, seed=5)
            if state is not None:
                assert stream.resume(json.loads(json.dumps(state))) == []
            with Loader(stream, batch, rank=rank, world_size=ranks, position=position, collate=keep) as loader:
                parts.append(np.stack([next(loader) for _ in range(steps)]))
                states.append(loader.state())
            stream.close()
        assert last is not None
        read = np.stack(parts, axis=2).reshape(-1, 17)
        assert np.array_equal(read, reference[position : position + steps * batch])
        state, position = last.merge(states), position + steps * batch
        # Every stream is known to its next sequence: nothing has to be read again from the beginning.
        places = state["sources"][0]["state"]["streams"]
        assert [place[0] for place in places] == [
            -((number - position) // len(places)) if number < position else 0 for number in range(len(places))
        ]


def keep(rows: Integers) -> Integers:
    return rows


def test_a_resumed_reader_does_not_read_what_came_before(described: Described, shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    folder = described(source=copy)
    stream = Stream([(str(folder), 1.0)], 32, seed=3)
    reference = stream.read(range(400))
    state = stream.state(300)
    stream.close()
    opened: list[int] = []
    again = Stream([(str(folder), 1.0)], 32, seed=3)
    again.resume(state)
    split = again._sources[0]._split  # type: ignore[attr-defined]
    documents = split.documents
    split.documents = lambda number: opened.append(number) or documents(number)
    assert np.array_equal(again.read(range(300, 316)), reference[300:316])
    again.close()
    # At most two windows of each of the four streams, of all the pieces of the epochs before.
    assert len(opened) <= 4 * 2 * WINDOW


def test_going_back_and_far_ahead_is_slow_and_right(described: Described) -> None:
    folder = described()
    reference = Stream([(str(folder), 1.0)], 16, seed=1).read(range(900))
    stream = Stream([(str(folder), 1.0)], 16, seed=1)
    for position in (800, 5, 899, 0, 433):
        assert np.array_equal(stream.read([position])[0], reference[position])
    resumed = Stream([(str(folder), 1.0)], 16, seed=1)
    resumed.resume(stream.state(600))
    assert np.array_equal(resumed.read([899, 3, 600]), reference[[899, 3, 600]])


def test_reading_the_same_again_and_again_keeps_no_more_text_in_memory(described: Described) -> None:
    """As validation does: what lies behind is known by then, and is read anew."""
    stream = Stream([(str(described()), 1.0)], 16, seed=1)
    source = stream._sources[0]
    assert isinstance(source, TextSource)
    passes = []
    for _ in range(3):
        with Loader(stream, 8, batches=240, collate=keep) as loader:
            passes.append(np.concatenate(list(loader)))
        assert max(len(track._windows) for track in source._tracks) <= 3
    assert np.array_equal(passes[0], passes[1]) and np.array_equal(passes[0], passes[2])
    assert len(source._tracks[0]._ends) > 6
    stream.close()


def test_two_runs_are_equal_and_seeds_are_not(described: Described) -> None:
    folder = str(described())
    one, two, other = (Stream([(folder, 1.0)], 16, seed).read(range(200)) for seed in (1, 1, 2))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


def test_a_process_that_is_killed_goes_on_with_the_very_same_sequences(described: Described, tmp_path: Path) -> None:
    """SIGKILL in the middle: what was saved last leads on to the sequences of the run that never stopped."""
    folder = described()
    reference = Stream([(str(folder), 1.0)], 16, seed=1).read(range(400))
    saved = tmp_path / "state.json"
    program = f"""
import json, os
from llmscale.data.loader import Loader
from llmscale.data.stream import Stream
with Loader(Stream([({str(folder)!r}, 1.0)], 16, seed=1), 4) as batches:
    for number, batch in enumerate(batches):
        with open({str(saved)!r} + ".tmp", "w") as file:
            json.dump(batches.state(), file)
        os.replace({str(saved)!r} + ".tmp", {str(saved)!r})
        if number == 40:
            os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    state = json.loads(saved.read_text())
    assert state["position"] == 164
    stream = Stream([(str(folder), 1.0)], 16, seed=1)
    stream.resume(state)
    assert np.array_equal(stream.read(range(164, 400)), reference[164:])


def test_text_and_token_shards_mix(described: Described, corpus: Path, tokenizer_json: Path, tmp_path: Path) -> None:
    from llmscale.data.build import build

    build([str(corpus)], tokenizer_json, tmp_path / "tokens", validation_fraction=0.0)
    sources = [(str(described()), 1.0), (str(tmp_path / "tokens" / "train"), 3.0)]
    stream = Stream(sources, 32, seed=2)
    stream.read(range(200))
    assert stream.counts(200) == (50, 150)
    assert stream.epochs(200)[0] == stream._sources[0].epochs(50) is not None
    again = Stream(list(reversed(sources)), 32, seed=2)
    assert again.resume(stream.state(80)) == []
    assert again.counts(80) == (60, 20)
    # Known by content, not by their place in the list: with the same weights each goes on from its own count.
    numbers, ordinals = again._locate(range(80, 120))
    alone = [Stream([source], 32, seed=2) for source in reversed(sources)]
    for row, number, ordinal in zip(again.read(range(80, 120)), numbers.tolist(), ordinals.tolist(), strict=True):
        assert np.array_equal(row, alone[number].read([ordinal])[0])


def test_shards_that_moved_and_were_described_again_go_on(
    described: Described, shards: Path, tokenizer_json: Path, tmp_path: Path
) -> None:
    stream = Stream([(str(described()), 1.0)], 16, seed=1)
    reference = stream.read(range(130))
    state = stream.state(100)
    elsewhere = Path(shutil.copytree(shards, tmp_path / "far" / "away"))
    describe([str(elsewhere)], tokenizer_json, tmp_path / "far" / "text", streams=4)
    moved = Stream([(str(tmp_path / "far" / "text"), 1.0)], 16, seed=1)
    assert moved.resume(state) == []
    assert np.array_equal(moved.read(range(100, 130)), reference[100:])
    stream.close()
    moved.close()


@pytest.mark.parametrize("change", ["streams", "tokenizer", "text key", "end of document", "a shard"])
def test_what_is_read_otherwise_is_another_source_and_begins_anew(change: str, shards: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(shards, tmp_path / "source"))
    for path in source.iterdir():  # .txt alone, which any text key leaves as it is
        write_shard(path, [(f"{path.stem}-{number}.txt", text_of(number).encode()) for number in range(40)])
    texts = [text_of(number) for number in range(40)]
    tokenizers = [tmp_path / f"{size}.json" for size in (300, 320)]
    for size, path in zip((300, 320), tokenizers, strict=True):
        tokenizer.write(tokenizer.train(texts, size, ("<|end|>", "<|stop|>")), path)
    folder, inputs = tmp_path / "text", [str(source / "*.tar")]
    describe(inputs, tokenizers[0], folder, streams=4, end_of_document="<|end|>")
    stream = Stream([(str(folder), 1.0)], 16, seed=1)
    stream.read(range(100))
    state = stream.state(100)
    stream.close()
    if change == "a shard":
        write_shard(source / "part-2.tar", [("1.txt", text_of(7).encode())])
    describe(
        inputs, tokenizers[change == "tokenizer"], folder,
        streams=3 if change == "streams" else 4,
        text_key="other" if change == "text key" else "text",
        end_of_document="<|stop|>" if change == "end of document" else "<|end|>",
    )  # fmt: skip
    other = Stream([(str(folder), 1.0)], 16, seed=1)
    assert other.resume(state) == [f"{folder} has changed: it begins at its first sequence"]
    assert other.counts(100) == (0,)
    other.close()


def test_the_passes_over_text_are_the_windows_that_were_read(described: Described, tokenizer_json: Path) -> None:
    tokenizer = Tokenizer(tokenizer_json)
    total = sum(len(tokenizer.encode(text_of(number))) + 1 for number in range(DOCUMENTS))
    ranks = [Stream([(str(described()), 1.0)], 16, seed=1) for _ in range(2)]
    positions = range(0, 2 * total // 16, 20)
    for rank, stream in enumerate(ranks):
        assert stream.epochs(total // 16) == (None,)
        # A window is a ninth of a stream's epoch, and a count of whole ones up to that behind.
        assert stream._sources[0].windows(0) == 9  # type: ignore[attr-defined]
        passes = []
        for position in positions:
            with Loader(stream, 20, rank=rank, world_size=2, position=position, batches=1, collate=keep) as loader:
                next(loader)
            passes.append(stream.epochs(position)[0])
        wanted = np.array(positions) * 16 / total
        assert passes == sorted(passes)
        assert np.all(np.array(passes) > wanted - 0.3) and np.all(np.array(passes) < wanted + 0.1)
    resumed = Stream([(str(described()), 1.0)], 16, seed=1)
    resumed.resume(resumed.merge([stream.state(positions[-1]) for stream in ranks]))
    assert resumed.epochs(positions[-1])[0] == pytest.approx(passes[-1], abs=0.1)
    for stream in (*ranks, resumed):
        stream.close()


def test_the_state_does_not_grow_with_the_data(described: Described) -> None:
    stream = Stream([(str(described()), 1.0)], 16, seed=1)
    stream.read(range(2000))
    assert abs(len(json.dumps(stream.state(2000))) - len(json.dumps(stream.state(8)))) < 60


def test_webdataset_reads_the_same_shards(shards: Path) -> None:
    import webdataset

    read = webdataset.WebDataset(str(shards / "part-0.tar"), shardshuffle=False)
    assert sum(1 for _ in read) == DOCUMENTS // 5


def test_threads_end(described: Described) -> None:
    before = set(threading.enumerate())
    stream = Stream([(str(described()), 1.0)], 16, seed=1)
    stream.read(range(8))
    stream.close()
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_broken_shard_stops_the_run_by_name(damage: str, described: Described, shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    folder = described(source=copy)
    break_shard(copy / "part-2.tar", damage)
    stream = Stream([(str(folder), 1.0)], 16, seed=1)
    wanted = {"flip": "checksum differs", "cut": "bytes, had", "missing": "the shard is missing"}[damage]
    with pytest.raises(DataError, match=rf"part-2\.tar.*{wanted}.*describe"):
        stream.read(range(2000))
    stream.close()


def break_shard(path: Path, damage: str) -> None:
    if damage == "flip":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    elif damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()


def test_a_broken_piece_is_left_out_for_everyone_and_written_down(
    described: Described, shards: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    folder = described(source=copy)
    break_shard(copy / "part-2.tar", "flip")
    split, report = TextSplit(folder), tmp_path / "report.jsonl"
    sources = [TextSource(split, 16, 1, on_error="skip", report=report, workers=workers) for workers in (1, 3)]
    outs = [np.empty((900, 17), dtype=np.uint16) for _ in sources]
    order = np.arange(900)
    sources[0].read(order, order, outs[0])
    for rank in (1, 0):
        sources[1].read(order[rank::2], order[rank::2], outs[1])
    assert np.array_equal(*outs)
    assert sources[0].counters() == {"skipped_samples": 1}
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    assert len(rows) == 1
    assert rows[0]["shard"].endswith("part-2.tar") and "checksum differs" in rows[0]["reason"]
    break_shard(copy / "part-3.tar", "missing")
    third = TextSource(split, 16, 1, on_error="skip", report=report)
    with pytest.raises(DataError, match=r"at most 1 may be left out; .* or raise data\.max_skipped"):
        third.read(order, order, outs[0])
    for source in (*sources, third):
        source.close()


def test_a_shard_that_this_machine_cannot_read_stops_the_run_and_breaks_nothing(
    described: Described, shards: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    source = TextSource(TextSplit(described(source=copy)), 16, 1, on_error="skip", max_skipped=1.0)
    (copy / "part-2.tar").unlink()
    (copy / "part-2.tar").symlink_to("part-2.tar")
    with pytest.raises(DataError, match=r"part-2\.tar: cannot be read on this machine: Too many levels of symbolic"):
        source.read(np.arange(900), np.arange(900), np.empty((900, 17), dtype=np.uint16))
    assert source.counters()["skipped_samples"] == 0
    source.close()


def test_a_source_that_falls_back_to_before_it_was_added_begins_anew(described: Described) -> None:
    sources = [(str(described("a")), 1.0), (str(described("b", streams=3)), 1.0)]
    older = Stream(sources[:1], 16, seed=1).state(8)
    newer = Stream(sources, 16, seed=1)
    newer.resume(older)
    newer.read(range(8, 200))
    both, direct = [Stream([sources[0], (sources[1][0], 3.0)], 16, seed=1) for _ in range(2)]
    both.resume(newer.state(200))
    both.resume(older)
    direct.resume(older)
    assert both.state(8) == direct.state(8)
    assert np.array_equal(both.read(range(8, 80)), direct.read(range(8, 80)))
    for stream in (newer, both, direct):
        stream.close()


def test_verify_names_each_broken_shard(described: Described, shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    folder = described(source=copy)
    assert verify(folder) == []
    break_shard(copy / "part-1.tar", "flip")
    break_shard(copy / "part-4.tar", "missing")
    problems = verify(folder)
    assert len(problems) == 2
    assert "part-1.tar" in problems[0] and "part-4.tar" in problems[1]


def test_a_shard_without_any_text_does_not_hang(tmp_path: Path, tokenizer_json: Path) -> None:
    write_shard(tmp_path / "a.tar", [("1.txt", b" \n"), ("2.txt", b"")])
    describe([str(tmp_path / "a.tar")], tokenizer_json, tmp_path / "text")
    stream = Stream([(str(tmp_path / "text"), 1.0)], 16, seed=1)
    with pytest.raises(DataError, match="holds no text"):
        stream.read([0])
    stream.close()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("../up.txt", b"x")], "leaves its folder"),
        ([("/etc/x.txt", b"x")], "leaves its folder"),
        ([("1.png", b"x")], "no .txt and no .json with the text"),
        ([("1.json", b"{")], "is not JSON"),
        ([("1.json", b'{"other": 1}')], "no .txt and no .json with the text"),
        ([("1.json", b'{"text": 1}')], "no .txt and no .json with the text"),
    ],
)
def test_shards_that_are_not_text_are_refused_by_member(
    members: list[tuple[str, bytes]], message: str, tmp_path: Path, tokenizer_json: Path
) -> None:
    write_shard(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=rf"a\.tar: .*{message}"):
        describe([str(tmp_path / "a.tar")], tokenizer_json, tmp_path / "text")
    assert not (tmp_path / "text").exists()


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (0, {"bytes": 1 << 60}, r"index\.json: shards\.0: pieces beyond the shard, or out of order; copy the file"),
        (0, {"offset": 4096}, r"shards\.0: pieces beyond the shard, or out of order"),
        (-1, {"bytes": 1 << 20}, r"shards\.0: pieces beyond the shard, or out of order"),
        (0, {"bytes": 0}, r"shards\.0\.pieces\.0\.bytes: "),
        (0, {"offset": -512}, r"shards\.0\.pieces\.0\.offset: "),
        (None, {"bytes": 1 << 60}, r"shards\.0\.bytes: "),
    ],
)
def test_an_index_with_absurd_pieces_is_refused(
    part: int | None, change: dict[str, int], message: str, described: Described
) -> None:
    folder = described()
    index = json.loads((folder / "index.json").read_bytes())
    shard = index["shards"][0]
    (shard if part is None else shard["pieces"][part]).update(change)
    (folder / "index.json").write_text(json.dumps(index))
    card = json.loads((folder / "card.json").read_bytes())
    card["index_sha256"] = hashlib.sha256((folder / "index.json").read_bytes()).hexdigest()
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(DataError, match=message):
        TextSplit(folder)


def test_links_absurd_sizes_and_cut_tars_are_refused(tmp_path: Path, tokenizer_json: Path) -> None:
    link, huge, cut = (tmp_path / f"{name}.tar" for name in ("link", "huge", "cut"))
    with tarfile.open(link, "w") as tar:
        info = tarfile.TarInfo("1.txt")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    info = tarfile.TarInfo("1.txt")
    info.size = 1 << 40
    huge.write_bytes(info.tobuf() + bytes(4096))
    write_shard(cut, [(f"{number}.txt", b"some text" * 200) for number in range(9)])
    os.truncate(cut, 9000)
    for path, message in ((link, "is a link"), (huge, "says it has"), (cut, "a whole tar|cut short")):
        with pytest.raises(DataError, match=rf"{path.name}.*({message})"):
            describe([str(path)], tokenizer_json, tmp_path / "text")


def test_the_command_describes_and_says_so(shards: Path, tokenizer_json: Path, tmp_path: Path) -> None:
    arguments = ["describe", "--input", str(shards), "--tokenizer", str(tokenizer_json), "--output"]
    result = CliRunner().invoke(command, [*arguments, str(tmp_path / "text"), "--streams", "9999"])
    assert result.exit_code == 0, result.output
    assert "400 documents in 5 shard(s)" in result.output
    assert "9999 streams were asked for" in result.output
    result = CliRunner().invoke(command, ["inspect", str(tmp_path / "text"), "--documents", "1"])
    assert result.exit_code == 0 and "400 documents in 5 shard(s)" in result.output
    assert "| Document 0: " in result.output
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").touch()
    result = CliRunner().invoke(command, [*arguments, str(tmp_path / "other")])
    assert isinstance(result.exception, UsageError)
    assert "holds 'notes'" in str(result.exception)
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(UsageError, match=r"not a \.tar file"):
        describe([str(tmp_path / "a.tar.gz")], tokenizer_json, tmp_path / "text2")


def test_a_description_is_named_by_itself_and_may_be_by_a_file_url(described: Described) -> None:
    folder = described()
    assert is_text(f"file://{folder}")
    assert verify(f"file://{folder}") == []
    for look in (verify, look_into):
        with pytest.raises(UsageError, match=rf"^{folder}: describes text, .*; name it by itself$"):
            look(folder.parent)
    stream, again = Stream([(str(folder), 1.0)], 16, 1), Stream([(f"file://{folder}", 1.0)], 16, 1)
    assert np.array_equal(stream.read([0, 5]), again.read([0, 5]))
    stream.close()
    again.close()
