"""What is left out is counted over the ranks and the restarts of a run, and limited so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from llmscale.data.split import Split
from llmscale.data.stream import Reading, Stream
from llmscale.errors import DataError

from .conftest import WriteSplit

BROKEN = (10, 20, 30, 40, 50, 60)
SAMPLES = 70


@pytest.fixture
def folder(write_split: WriteSplit) -> Path:
    """Samples of one sequence each, which are read in some order one after another; six of them are broken."""
    folder = write_split("split", [64 * SAMPLES])
    split = Split(folder)
    for sample in BROKEN:
        shard = split.shards[sample // 3]
        path = folder / shard.name
        data = bytearray(path.read_bytes())
        data[shard.offsets[sample % 3] + 9] ^= 1
        path.write_bytes(data)
    return folder


def stream_of(folder: Path, limit: int, report: Path | None = None) -> Stream:
    reading = Reading(on_error="skip", max_skipped=(limit + 0.5) / SAMPLES, shuffle_window=8, report=report)
    return Stream([(str(folder), 1.0)], 64, 1, reading)


def test_a_run_that_is_resumed_time_and_again_counts_on_and_lists_each_sample_once(
    folder: Path, tmp_path: Path
) -> None:
    whole, report = stream_of(folder, len(BROKEN)), tmp_path / "report"
    whole.read(range(SAMPLES))
    state = None
    for first in range(0, SAMPLES, 10):
        one = stream_of(folder, len(BROKEN), report)
        if state:
            one.resume(state)
        # As a loader does, which is ahead of the step that is saved: what it read beyond is read again.
        one.read(range(first, min(SAMPLES, first + 20)))
        state = json.loads(json.dumps(one.state(first + 10)))
    assert one.counters()["skipped_samples"] == len(BROKEN)
    assert one.counters()["replaced_sequences"] == whole.counters()["replaced_sequences"] >= len(BROKEN)
    lines = [json.loads(line)["sample"] for line in report.read_text().splitlines()]
    assert sorted(lines) == [f"{sample:09d}" for sample in BROKEN]


def test_each_sample_that_is_left_out_is_warned_of_once(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ranks = [stream_of(folder, len(BROKEN), tmp_path / "report") for _ in range(2)]
    for one in ranks:
        one.read(range(SAMPLES))
    assert len(caplog.messages) == len(BROKEN)
    for sample in BROKEN:
        (said,) = [message for message in caplog.messages if f"sample {sample:09d}: its checksum differs" in message]
        assert re.search(r"split/shard-\d+\.tar: .*; it is left out \(\d of at most 6\)$", said)


def test_the_limit_holds_over_restarts(folder: Path) -> None:
    state = None
    with pytest.raises(
        DataError, match=r"4 samples are broken, and of 71 at most 3 may be left out; .*data\.max_skipped"
    ):
        for position in range(SAMPLES):
            one = stream_of(folder, 3)
            if state:
                one.resume(state)
            one.read([position])
            state = one.state(position + 1)
    # A lower limit than what a run has behind it is said at once.
    with pytest.raises(DataError, match=r"split; \d samples are broken, and of 71 at most 1 may be left out"):
        stream_of(folder, 1).resume(state)


def test_the_limit_and_the_counts_are_those_of_all_ranks_together(folder: Path) -> None:
    ranks = [stream_of(folder, len(BROKEN)) for _ in range(4)]
    for rank, one in enumerate(ranks):
        one.read(range(rank, SAMPLES, 4))
    own = [one.left_out(SAMPLES) for one in ranks]
    assert max(left.units for left in own) < len(BROKEN)
    assert all(left.unshared == left.units for left in own)
    states = [one.state(SAMPLES) for one in ranks]
    merged = [one.merge(states) for one in ranks]
    assert all(one == merged[0] for one in merged)
    assert merged[0]["sources"][0]["left_out"] == {
        "units": list(BROKEN), "replaced": sum(left.replaced for left in own)
    }  # fmt: skip
    assert [one.left_out(SAMPLES).units for one in ranks] == [len(BROKEN)] * 4
    assert [one.left_out(SAMPLES).unshared for one in ranks] == [0] * 4
    strict = stream_of(folder, len(BROKEN) - 1)
    with pytest.raises(DataError, match=r"split; 6 samples are broken, and of 71 at most 5 may be left out"):
        strict.merge(states)


def test_what_another_rank_found_broken_is_judged_by_its_bytes_all_the_same(folder: Path) -> None:
    """Else the stream would depend on when ranks told each other."""
    told = stream_of(folder, len(BROKEN) + 1)
    alone = stream_of(folder, len(BROKEN) + 1)
    state = told.state(0)
    state["sources"][0]["left_out"]["units"] = [1]
    told.merge([state])
    assert (told.read(range(SAMPLES)) == alone.read(range(SAMPLES))).all()
