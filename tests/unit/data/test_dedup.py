from __future__ import annotations

import json
import random
import subprocess
import sys
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

from llmscale.data import dedup
from llmscale.data.build import build
from llmscale.data.dedup import PERMUTATIONS, SHINGLE_WORDS, Deduplicator, minima, rows_per_band
from llmscale.data.verify import verify
from tests.unit.data.conftest import content


def words(seed: int, count: int = 200) -> list[str]:
    rng = random.Random(seed)
    return [f"word{rng.randrange(3000)}" for _ in range(count)]


def edited(text: list[str], edits: int) -> list[str]:
    """A copy with some words replaced, spread evenly."""
    copy = list(text)
    for edit in range(edits):
        copy[(2 * edit + 1) * len(copy) // (2 * edits)] = "other"
    return copy


def jaccard(one: list[str], other: list[str]) -> float:
    sets = [{tuple(t[i : i + SHINGLE_WORDS]) for i in range(len(t) - SHINGLE_WORDS + 1)} for t in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def check(seen: Deduplicator, texts: list[str]) -> list[str]:
    digests = [blake2b(text.encode(), digest_size=16).digest() for text in texts]
    return seen.check(digests, np.stack([minima(text) for text in texts]))


def test_the_estimate_is_that_of_minhash() -> None:
    errors = []
    for seed in range(40):
        one = words(seed)
        for edits in (1, 4, 9, 20):
            other = edited(one, edits)
            agreeing = np.mean(minima(" ".join(one)) == minima(" ".join(other)))
            errors.append(agreeing - jaccard(one, other))
    assert abs(np.mean(errors)) < 0.01
    assert np.std(errors) < 0.06  # at most 0.044, at a similarity of a half


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95, 1.0])
def test_bands_find_a_pair_at_the_threshold(threshold: float) -> None:
    rows = rows_per_band(threshold)
    assert 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= 0.95
    assert rows == PERMUTATIONS or 1 - (1 - threshold ** (rows + 1)) ** (PERMUTATIONS // (rows + 1)) < 0.95


def test_near_copies_are_found_and_distinct_text_never_is(tmp_path: Path) -> None:
    seen = Deduplicator(tmp_path / "kept", 0.8)
    texts = [words(seed) for seed in range(2500)]  # more than the tables hold at first
    assert set(check(seen, [" ".join(text) for text in texts[:2000]])) == {""}
    assert set(check(seen, [" ".join(text) for text in texts[2000:]])) == {""}
    near = [edited(text, 1) for text in texts[:300]]
    assert all(jaccard(*pair) > 0.94 for pair in zip(near, texts, strict=False))
    assert check(seen, [" ".join(text).upper() for text in near]) == ["near"] * 300
    far = [edited(text, 25) for text in texts[:300]]
    assert all(jaccard(*pair) < 0.4 for pair in zip(far, texts, strict=False))
    assert check(seen, [" ".join(text) for text in far]) == [""] * 300


def test_exact_and_near_within_one_batch_keep_the_first(tmp_path: Path) -> None:
    one, other = words(1), words(2)
    texts = [" ".join(t) for t in (one, edited(one, 1), other, one, edited(other, 2), edited(one, 2))]
    assert check(Deduplicator(tmp_path / "kept", 0.8), texts) == ["", "near", "", "exact", "near", "near"]


def test_text_without_words_is_no_copy_but_of_itself(tmp_path: Path) -> None:
    assert check(Deduplicator(tmp_path / "kept", 0.8), ["!!", "??", "!!"]) == ["", "", "exact"]


def test_scripts_without_spaces_are_compared_by_their_characters(tmp_path: Path) -> None:
    rng = random.Random(0)
    text = "".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(400))
    other = "".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(400))
    assert check(Deduplicator(tmp_path / "kept", 0.8), [text, other, text[:200] + "中" + text[201:]]) == [
        "",
        "",
        "near",
    ]


def test_boilerplate_that_thousands_share_removes_nothing_and_fills_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dedup, "_CROWD", 4)
    boilerplate = " ".join(words(0, 100))
    texts = [f"{boilerplate} {' '.join(words(seed, 100))}" for seed in range(1, 400)]
    seen = Deduplicator(tmp_path / "kept", 0.8)
    assert set(check(seen, texts[:200]) + check(seen, texts[200:])) == {""}
    assert check(seen, [text + " end" for text in texts]) == ["near"] * 399


def test_what_was_kept_is_known_after_a_restart(tmp_path: Path) -> None:
    texts = [" ".join(words(seed)) for seed in range(300)]
    seen = Deduplicator(tmp_path / "kept", 0.8)
    check(seen, texts[:200])
    seen.sync()
    kept = seen.kept
    check(seen, texts[200:])  # and then it was killed
    again = Deduplicator(tmp_path / "kept", 0.8, kept)
    assert check(again, texts) == ["exact"] * 200 + [""] * 100


def test_signatures_are_the_same_in_every_process() -> None:
    program = "from llmscale.data.dedup import minima; print(minima('the same words in every process').tolist())"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == minima("the same words in every process").tolist()


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """100 documents, 40 exact copies, 30 near ones, and two long ones that differ at the end."""
    monkeypatch.setattr("llmscale.data.encode._JOB_BYTES", 1 << 14)
    texts = [words(seed) for seed in range(100)]
    rows = [*texts, *texts[:40], *(edited(text, 1) for text in texts[40:70])]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(row)}) + "\n" for row in rows))
    return path


def test_a_build_leaves_copies_out_and_says_so(copies: Path, tokenizer_json: Path, tmp_path: Path) -> None:
    counts = {}
    for method in ("none", "exact", "near"):
        summary = build([str(copies)], tokenizer_json, tmp_path / method, validation_fraction=0.2, dedup=method)
        counts[method] = sum(card.documents for card in summary.splits.values())
        assert verify(tmp_path / method) == []
        if method == "none":
            assert summary.splits["train"].deduplication is None
    assert counts == {"none": 170, "exact": 130, "near": 100}
    about = summary.splits["validation"].deduplication
    assert about
    assert (about.method, about.exact_removed, about.near_removed) == ("near", 40, 30)
    assert (about.threshold, about.shingle_words, about.permutations, about.bands) == (0.8, 5, 128, 18)


def test_any_number_of_workers_leaves_the_same_out(copies: Path, tokenizer_json: Path, tmp_path: Path) -> None:
    for workers in (1, 2):
        build([str(copies)], tokenizer_json, tmp_path / f"w{workers}", workers=workers, dedup="near")
    assert content(tmp_path / "w1") == content(tmp_path / "w2")


def test_long_documents_are_compared_whole(
    tokenizer_json: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmscale.data.documents.PIECE_BYTES", 1 << 12)
    monkeypatch.setattr("llmscale.data.build._HELD_BYTES", 1 << 11)  # the rest waits on disk
    long = "\n".join(" ".join(words(seed, 12)) for seed in range(300))
    for name, text in (("a", long), ("b", long + "\nanother end"), ("c", long), ("d", " ".join(words(999)))):
        (tmp_path / f"{name}.txt").write_text(text)
    inputs = [str(tmp_path / f"{name}.txt") for name in "abcd"]
    exact = build(inputs, tokenizer_json, tmp_path / "exact", validation_fraction=0, dedup="exact")
    assert (exact.splits["train"].documents, exact.exact_duplicates) == (3, 1)
    near = build(inputs, tokenizer_json, tmp_path / "near", validation_fraction=0, dedup="near")
    assert (near.splits["train"].documents, near.exact_duplicates, near.near_duplicates) == (2, 1, 1)
    plain = build([inputs[0], inputs[3]], tokenizer_json, tmp_path / "plain", validation_fraction=0)
    assert plain.splits["train"].index_sha256 == near.splits["train"].index_sha256
