"""The stream: every sequence once an epoch, whoever reads it; sources mixed; stop, change something, go on."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmscale.data import stream as streams
from llmscale.data.split import Split
from llmscale.data.stream import Reading, Stream
from llmscale.errors import DataError, UsageError

from .conftest import WriteSplit, row_of_tokens

LENGTHS = [(number * 7) % 50 for number in range(80)]


@pytest.mark.parametrize("sequence_length", [1, 7, 63, 64, 65, 300])
def test_an_epoch_is_every_sequence_of_the_source_once(write_split: WriteSplit, sequence_length: int) -> None:
    """300 is longer than the 64 tokens of a sample and the 192 of a shard."""
    stream = Stream([(str(write_split("a", LENGTHS)), 1.0)], sequence_length, seed=5)
    row = row_of_tokens(LENGTHS)
    count = (len(row) - 1) // sequence_length
    wanted = [row[i * sequence_length : (i + 1) * sequence_length + 1].tolist() for i in range(count)]
    epochs = [stream.read(range(epoch * count, (epoch + 1) * count)) for epoch in range(3)]
    for epoch in epochs:
        assert epoch.shape == (count, sequence_length + 1)
        assert epoch.dtype == np.int64
        assert sorted(epoch.tolist()) == sorted(wanted)
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])


def test_every_token_is_a_label_once_an_epoch_but_for_the_tail(write_split: WriteSplit) -> None:
    stream = Stream([(str(write_split("a", LENGTHS)), 1.0)], 16, seed=5)
    row = row_of_tokens(LENGTHS)
    count = (len(row) - 1) // 16
    labels = stream.read(range(count))[:, 1:].ravel()
    tail = len(row) - 1 - count * 16
    assert tail < 16
    assert sorted(labels.tolist()) == sorted(row[1 : len(row) - tail].tolist())


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_the_stream_does_not_depend_on_ranks_batches_or_what_was_read_before(
    tmp_path_factory: pytest.TempPathFactory, built: list[tuple[str, float]], data: st.DataObject
) -> None:
    reference = Stream(built, 16, seed=9).read(range(200))
    ranks = data.draw(st.sampled_from([1, 2, 3, 5, 8]))
    start = data.draw(st.integers(0, 150))
    seen = np.empty_like(reference[start:])
    for rank in range(ranks):
        stream = Stream(built, 16, seed=9)
        positions = list(range(start + rank, 200, ranks))
        while positions:
            count = data.draw(st.integers(1, 40))
            taken, positions = positions[:count], positions[count:]
            seen[np.array(taken) - start] = stream.read(taken)
    assert np.array_equal(seen, reference[start:])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, float]]:
    """Three sources of different sizes."""
    from llmscale.data.shards import SplitWriter

    sources = []
    for number, (documents, weight) in enumerate([(40, 5.0), (9, 1.0), (100, 2.5)]):
        folder = tmp_path_factory.mktemp(f"source{number}")
        writer = SplitWriter(folder, "uint16", 0, 64, 3)
        for length in range(documents):
            writer.add(np.full(length, number + 1, dtype=np.uint16), True, True)
        writer.finish(b"{}", 10)
        sources.append((str(folder), weight))
    return sources


def test_sources_are_mixed_by_weight_and_each_has_its_own_epochs(built: list[tuple[str, float]]) -> None:
    stream = Stream(built, 16, seed=1)
    sequences = stream.read(range(10_000))
    source = sequences.max(axis=1) - 1
    counts = np.bincount(source, minlength=3)
    assert np.abs(counts / 10_000 - np.array([5.0, 1.0, 2.5]) / 8.5).max() <= 0.001
    sizes = [(sum(range(documents)) + documents - 1) // 16 for documents in (40, 9, 100)]
    assert np.allclose(stream.epochs(10_000), counts / np.array(sizes))
    for number, size in enumerate(sizes):
        own = sequences[source == number]
        for epoch in range(min(3, len(own) // size)):
            part = own[epoch * size : (epoch + 1) * size].tolist()
            assert sorted(part) == sorted(own[:size].tolist())


def test_seeds_give_different_orders_and_the_same_seed_the_same(built: list[tuple[str, float]]) -> None:
    one, same, other = (Stream(built, 8, seed).read(range(100)) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_what_a_stream_says_of_itself(built: list[tuple[str, float]]) -> None:
    stream = Stream(built, 16, seed=1)
    assert (stream.vocab_size, stream.sequence_length) == (10, 16)
    assert stream.read_tokenizer() == Path(built[0][0], "tokenizer.json").read_bytes()
    assert stream.read([]).shape == (0, 17)
    with pytest.raises(ValueError, match="positions count from 0"):
        stream.read([-1])


def test_the_state_of_a_stream_does_not_grow_with_the_data_or_the_position(write_split: WriteSplit) -> None:
    small, large = (Stream([(str(write_split(name, [50] * n)), 1.0)], 16, 1) for name, n in (("a", 4), ("b", 400)))
    sizes = [len(json.dumps(stream.state(position))) for stream in (small, large) for position in (10, 10**6)]
    assert max(sizes) - min(sizes) < 40


def test_unchanged_sources_go_on_as_if_never_stopped(built: list[tuple[str, float]], tmp_path: Path) -> None:
    reference = Stream(built, 16, seed=9).read(range(300))
    # Copies elsewhere are the same sources.
    moved = [(str(shutil.copytree(path, tmp_path / str(n))), weight) for n, (path, weight) in enumerate(built)]
    stream = Stream(built, 16, seed=9)
    for position, sources in ((100, built), (180, moved), (250, built)):
        state = json.loads(json.dumps(stream.state(position)))
        stream = Stream(sources, 16, seed=9)
        assert stream.resume(state) == []
        assert np.array_equal(stream.read(range(position, 300)), reference[position:])


def test_reweighted_and_added_sources_leave_the_others_where_they_were(
    built: list[tuple[str, float]], write_split: WriteSplit
) -> None:
    first = Stream(built, 16, seed=9)
    position = 120
    counts = first.counts(position)
    added = str(write_split("added", [40] * 30, first=4, dtype="uint16"))
    # The order of the list does not matter either.
    changed = [(added, 2.0), (built[2][0], 1.0), (built[0][0], 5.0)]
    second = Stream(changed, 16, seed=9)
    notes = second.resume(first.state(position))
    assert notes == [
        f"{added} is new: it begins at its first sequence",
        f"{built[2][0]}: weight 2.5 -> 1, goes on at {counts[2]}",
        f"{built[1][0]} is left out, after {counts[1]} sequences",
    ]
    assert second.counts(position) == (0, counts[2], counts[0])
    read = second.read(range(position, position + 80))
    after = np.array(second.counts(position + 80)) - second.counts(position)
    assert np.abs(after / 80 - np.array([2.0, 1.0, 5.0]) / 8).max() < 2 / 80
    # Each source's own sequences follow on each other, with none twice and none left out.
    alone = Stream([built[0]], 16, seed=9).read(range(counts[0], counts[0] + after[2]))
    assert np.array_equal(read[(read.max(axis=1) == 1)], alone)
    # And the changed stream is stopped and goes on like any other.
    third = Stream(changed, 16, seed=9)
    assert third.resume(second.state(position + 30)) == []
    assert np.array_equal(third.read(range(position + 30, position + 80)), read[30:])


def test_a_stream_that_falls_back_to_an_older_state_keeps_nothing_of_the_newer(
    built: list[tuple[str, float]],
) -> None:
    older = Stream(built[:1], 16, seed=9).state(40)
    newer = Stream(built, 16, seed=9)
    newer.resume(older)
    state = newer.state(100)
    state["sources"][1]["left_out"] = {"units": [3], "replaced": 5}
    both, direct = Stream(built, 16, seed=9), Stream(built, 16, seed=9)
    both.resume(state)
    assert both.resume(older) == direct.resume(older)
    assert both.counts(40) == direct.counts(40) == (40, 0, 0)
    assert both.left_out(40) == direct.left_out(40)
    assert np.array_equal(both.read(range(40, 100)), direct.read(range(40, 100)))


def test_a_source_that_was_built_anew_begins_at_its_first_sequence(write_split: WriteSplit) -> None:
    folder = write_split("a", [50] * 40)
    stream = Stream([(str(folder), 1.0)], 16, seed=1)
    state = stream.state(30)
    shutil.rmtree(folder)
    write_split("a", [50] * 60)
    again = Stream([(str(folder), 1.0)], 16, seed=1)
    assert again.resume(state) == [f"{folder} has changed: it begins at its first sequence"]
    assert again.counts(30) == (0,)


@pytest.mark.parametrize(("length", "seed", "key"), [(16, 2, "run.seed: is 2"), (8, 1, "data.sequence_length: is 8")])
def test_another_order_cannot_go_on(built: list[tuple[str, float]], length: int, seed: int, key: str) -> None:
    with pytest.raises(UsageError, match=key):
        Stream(built, length, seed).resume(Stream(built, 16, seed=1).state(5))


def test_more_shards_than_may_be_mapped_at_once(write_split: WriteSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_split("a", [100] * 40, sample_tokens=64, shard_samples=1)
    wanted = Stream([(str(folder), 1.0)], 100, seed=3).read(range(80))
    monkeypatch.setattr(streams, "_OPEN_SHARDS", 8)
    assert len(Split(folder).shards) > 60
    stream = Stream([(str(folder), 1.0)], 100, seed=3)
    assert np.array_equal(stream.read(range(80)), wanted)
    assert len(stream._sources[0]._samples.files) <= 8


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_share_is_refused_by_source(weight: float, write_split: WriteSplit) -> None:
    good, bad = str(write_split("good", [30] * 40)), str(write_split("bad", [30] * 40))
    with pytest.raises(UsageError, match=rf"bad: the weight {weight} is no share of a mixture; give a positive number"):
        Stream([(good, 1.0), (bad, weight)], 16, seed=1)


def test_lengths_and_counts_below_one_are_refused_by_name(write_split: WriteSplit) -> None:
    sources = [(str(write_split("a", [30] * 40)), 1.0)]
    with pytest.raises(UsageError, match="sequence_length 0: give at least 1"):
        Stream(sources, 0, seed=1)
    for reading in (Reading(shuffle_window=0), Reading(workers=0), Reading(readers=0), Reading(cache_bytes=-1)):
        with pytest.raises(UsageError, match=r"(shuffle_window|workers|readers|cache_bytes) -?\d: give at least 1"):
            Stream(sources, 16, seed=1, reading=reading)


@pytest.mark.parametrize("count", [3, 12])
def test_any_number_of_sources_keeps_within_the_limit_on_open_files(
    count: int, write_split: WriteSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [(str(write_split(f"{n}", [64 * 20], shard_samples=1, first=2000 * n + 1)), 1.0) for n in range(count)]
    wanted = Stream(sources, 32, seed=3).read(range(30 * count))
    monkeypatch.setattr(streams, "_OPEN_SHARDS", 8)
    stream = Stream(sources, 32, 3, Reading(on_error="skip", max_skipped=1.0))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1 + 10, hard))
    try:
        found = [stream.read(range(first, first + 10)) for first in range(0, 30 * count, 10)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert np.array_equal(np.concatenate(found), wanted)
    assert stream.counters()["skipped_samples"] == 0
    stream.close()


def test_too_little_text_for_one_sequence_is_refused(write_split: WriteSplit) -> None:
    folder = write_split("a", [9])
    assert Stream([(str(folder), 1.0)], 9, seed=0).read([0]).shape == (1, 10)
    with pytest.raises(DataError, match=r"a: holds 10 tokens, and one sequence needs 11; .*data\.sequence_length"):
        Stream([(str(folder), 1.0)], 10, seed=0)
    with pytest.raises(DataError, match=r"empty: holds 0 tokens"):
        Stream([(str(write_split("empty", [])), 1.0)], 10, seed=0)
    with pytest.raises(DataError, match="no source of data"):
        Stream([], 10, seed=0)


def test_sources_of_two_tokenizers_are_refused(write_split: WriteSplit) -> None:
    one, other = write_split("a", [90], tokenizer=b"{}"), write_split("b", [90], tokenizer=b"[]")
    with pytest.raises(DataError, match=r"b: has another tokenizer than .*a;"):
        Stream([(str(one), 1.0), (str(other), 1.0)], 8, seed=0)


def test_a_missing_or_changed_shard_is_named(write_split: WriteSplit) -> None:
    folder = write_split("a", LENGTHS)
    shard = folder / "shard-00002.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-512])
    with pytest.raises(
        DataError, match=r"shard-00002\.tar: sample \d+: the shard has \d+ bytes, index\.json says \d+; .*--overwrite"
    ):
        Stream([(str(folder), 1.0)], 16, seed=0).read(range(100))
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-00002\.tar: shard is missing \(1 in all\); "):
        Stream([(str(folder), 1.0)], 16, seed=0)
    shard.mkdir()
    with pytest.raises(DataError, match=r"shard-00002\.tar: sample \d+: the shard has \d+ bytes"):
        Stream([(str(folder), 1.0)], 16, seed=0).read(range(100))


def test_an_id_beyond_the_vocabulary_is_named_by_shard_and_sample(write_split: WriteSplit) -> None:
    folder = write_split("a", LENGTHS, vocab_size=1970)  # ids go up to 1969
    Stream([(str(folder), 1.0)], 16, seed=0).read(range(100))
    other = write_split("b", LENGTHS, vocab_size=1900)
    with pytest.raises(DataError, match=r"shard-00010\.tar: sample 00000003\d: holds the id 19\d\d, .* has 1900;"):
        Stream([(str(other), 1.0)], 16, seed=0).read(range(120))


def test_sources_whose_documents_end_differently_are_refused(write_split: WriteSplit) -> None:
    """Which tokens begin a document must not depend on the source they came from."""
    one, other = write_split("a", [90]), write_split("b", [90])
    assert Stream([(str(one), 1.0), (str(other), 1.0)], 8, seed=0).end_of_document == 0
    card = json.loads((other / "card.json").read_text())
    (other / "card.json").write_text(json.dumps({**card, "end_of_document": 3}))
    with pytest.raises(DataError, match=r"b: documents end with the id 3, those of .*a with 0; .*--end-of-document"):
        Stream([(str(one), 1.0), (str(other), 1.0)], 8, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "Skip"}, "on_error 'Skip': give 'stop' or 'skip'"),
        ({"verify": "always"}, "verify 'always': give 'first' or 'never'"),
        ({"max_skipped": 1.5}, "max_skipped 1.5: give a share from 0 to 1"),
        ({"max_skipped": float("nan")}, "max_skipped nan: give a share from 0 to 1"),
    ],
)
def test_a_mistyped_way_to_read_is_refused(options: dict[str, Any], message: str, write_split: WriteSplit) -> None:
    with pytest.raises(UsageError, match=f"^{message}$"):
        Stream([(str(write_split("a", [90])), 1.0)], 8, 1, Reading(**options))


def test_the_tokenizer_that_a_run_takes_along_is_the_one_that_made_the_data(write_split: WriteSplit) -> None:
    folder = write_split("a", [90], tokenizer=b"{}")
    stream = Stream([(str(folder), 1.0)], 8, seed=1)
    assert stream.read_tokenizer() == b"{}"
    (folder / "tokenizer.json").write_bytes(b"[]")
    with pytest.raises(DataError, match=r"a/tokenizer\.json: not the tokenizer that made the shards"):
        stream.read_tokenizer()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"a/tokenizer\.json: is missing; copy the folder again"):
        stream.read_tokenizer()
