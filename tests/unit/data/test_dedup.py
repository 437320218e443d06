"""Which documents are taken for copies: against the true Jaccard similarity of real sets of shingles."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmscale.data import dedup
from llmscale.data.build import build
from llmscale.data.dedup import PERMUTATIONS, SHINGLE_WORDS, Deduplicator, minima, rows_per_band
from llmscale.data.encode import digest
from llmscale.data.split import Split
from tests.unit.data.conftest import content, sentence


def words(rng: np.random.Generator, count: int) -> list[str]:
    return [f"w{number}" for number in rng.integers(0, 1 << 40, count)]


def pair(rng: np.random.Generator, shingles: int, shared: int) -> tuple[str, str, float]:
    """Two texts of so many shingles each that share the first ones, and their Jaccard similarity."""
    common = words(rng, shared + SHINGLE_WORDS - 1) if shared else []
    size = shingles + SHINGLE_WORDS - 1 - len(common)
    one, other = (" ".join(common + words(rng, size)) for _ in range(2))
    return one, other, shared / (2 * shingles - shared)


def check(found: Deduplicator, texts: list[str]) -> list[str]:
    smallest = np.stack([minima(text) for text in texts]) if found.near else None
    return found.check([digest(text.encode()) for text in texts], smallest)


@pytest.mark.parametrize("shingles", [6, 40, 3000])
def test_minima_agree_as_often_as_the_sets_are_similar(shingles: int) -> None:
    rng = np.random.default_rng(0)
    for share in (0.3, 0.6, 0.9):
        pairs = [pair(rng, shingles, round(share * shingles)) for _ in range(30)]
        similarity = pairs[0][2]
        found = np.mean([minima(one) == minima(other) for one, other, _ in pairs])
        deviation = (similarity * (1 - similarity) / (PERMUTATIONS * len(pairs))) ** 0.5
        assert abs(found - similarity) < 4 * deviation, (similarity, found)


def test_what_is_clearly_above_the_threshold_goes_and_what_is_clearly_below_stays(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    above = [pair(rng, 100, 97) for _ in range(60)]
    below = [pair(rng, 100, 75) for _ in range(60)]
    assert (round(above[0][2], 2), round(below[0][2], 2)) == (0.94, 0.6)
    found = Deduplicator(tmp_path / "kept", 0.8)
    for pairs, verdict in ((above, "near"), (below, "")):
        assert check(found, [one for one, _, _ in pairs]) == [""] * 60
        assert check(found, [other for _, other, _ in pairs]) == [verdict] * 60


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_a_pair_at_the_threshold_shares_a_band_in_19_of_20_cases(threshold: float) -> None:
    rows = rows_per_band(threshold)
    assert 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= 0.95


def test_copies_are_found_within_and_across_calls_and_after_going_on(tmp_path: Path) -> None:
    texts = [sentence(number) * 8 for number in range(400)]
    rng = np.random.default_rng(2)
    long = " ".join(words(rng, 300))
    rows = [texts[3], long, "short", texts[3], f"{long} and more", "short ", "Short", "+ -", "- +", "", texts[4]]
    expected = ["", "", "", "exact", "near", "near", "near", "", "", "", ""]
    for cut in range(len(rows) + 1):
        found = Deduplicator(tmp_path / "kept", 0.8)
        verdicts = check(found, rows[:cut]) if cut else []
        found.sync()
        found = Deduplicator(tmp_path / "kept", 0.8, found.kept)
        verdicts += check(found, rows[cut:]) if cut < len(rows) else []
        assert verdicts == expected, cut
        assert found.kept == expected.count("")


def test_tables_that_grow_forget_nothing(tmp_path: Path) -> None:
    texts = [f"document number {number}" for number in range(20_000)]
    found = Deduplicator(tmp_path / "kept", None)
    for start in range(0, len(texts), 1000):
        assert check(found, texts[start : start + 1000]) == [""] * 1000
    for start in range(0, len(texts), 1000):
        assert check(found, texts[start : start + 1000]) == ["exact"] * 1000
    assert found.kept == 20_000


def test_the_disk_has_room_for_what_is_mapped(tmp_path: Path) -> None:
    """Else a full disk kills the process by a signal."""
    found = Deduplicator(tmp_path / "kept", 0.8)
    for count in (1, 5_000):
        check(found, [f"document number {number}" for number in range(count)])
        status = (tmp_path / "kept").stat()
        assert status.st_size <= status.st_blocks * 512


def test_a_script_without_spaces_is_compared_by_its_characters() -> None:
    one = "深度学习模型需要大量的训练数据才能取得良好的效果"
    agree = (minima(one) == minima(one + "。再见")).mean()
    assert 0.7 < agree < 1
    assert (minima(one) == minima("今天的天气非常好我们一起去公园散步吧朋友们")).mean() < 0.05


@pytest.mark.parametrize("method", ["exact", "near"])
def test_a_build_removes_copies_the_same_for_any_number_of_workers(
    tokenizer_json: Path, tmp_path: Path, method: str
) -> None:
    rng = np.random.default_rng(3)
    firsts = [" ".join(words(rng, 60)) for _ in range(40)]
    rows = [*firsts, *firsts[:7], *(f"{text} changed" for text in firsts[20:25]), "long line\n" * 110_000]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (tmp_path / "long.txt").write_text("long line\n" * 110_000)  # of two pieces, a copy of the last row
    (tmp_path / "longer.txt").write_text("long line\n" * 110_000 + "with another end")
    names = [str(tmp_path / name) for name in ("rows.jsonl", "long.txt", "longer.txt")]
    for workers in (1, 2):
        summary = build(
            names, tokenizer_json, tmp_path / f"out{workers}", workers=workers, validation_fraction=0.2, dedup=method
        )
    assert content(tmp_path / "out1") == content(tmp_path / "out2")
    near = method == "near"
    assert summary.exact_duplicates == 8
    assert summary.near_duplicates == (5 if near else 0)
    assert sum(card.documents for card in summary.splits.values()) == len(rows) + 2 - 8 - summary.near_duplicates
    about = Split(tmp_path / "out1/train").card.deduplication
    assert about
    assert (about.method, about.exact_removed, about.near_removed) == (method, 8, summary.near_duplicates)
    assert (about.threshold, about.permutations) == ((0.8, 128) if near else (None, None))


def test_white_space_around_a_text_makes_no_other_document(tokenizer_json: Path, tmp_path: Path) -> None:
    firsts = [sentence(number) for number in range(200)]
    long = "long line\n" * 110_000 + "end"
    rows = [*firsts, long, *(f"\n {text}\u3000\n" for text in firsts), f"  {long}\n"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    files = [str(tmp_path / "rows.jsonl"), str(tmp_path / "long.txt")]
    (tmp_path / "long.txt").write_text(f"\ufeff{long}\n\n")
    plain = build(files, tokenizer_json, tmp_path / "out", validation_fraction=0.3)
    exact = build(files, tokenizer_json, tmp_path / "exact", validation_fraction=0.3, dedup="exact")
    assert exact.exact_duplicates == 202
    for split, card in exact.splits.items():
        assert plain.splits[split].documents in (2 * card.documents, 2 * card.documents + 1)
        assert card.documents > 30


def test_boilerplate_that_thousands_share_removes_nothing_and_fills_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dedup, "_CROWD", 4)
    rng = np.random.default_rng(4)
    boilerplate = " ".join(words(rng, 100))
    texts = [f"{boilerplate} {' '.join(words(rng, 100))}" for _ in range(399)]
    seen = Deduplicator(tmp_path / "kept", 0.8)
    assert set(check(seen, texts[:200]) + check(seen, texts[200:])) == {""}
    assert check(seen, [text + " end" for text in texts]) == ["near"] * 399


def test_signatures_are_the_same_in_every_process() -> None:
    program = "from llmscale.data.dedup import minima; print(minima('the same words in every process').tolist())"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == minima("the same words in every process").tolist()


def test_long_documents_are_compared_whole(
    tokenizer_json: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmscale.data.documents.PIECE_BYTES", 1 << 12)
    monkeypatch.setattr("llmscale.data.held_document._HELD_BYTES", 1 << 11)  # the rest waits on disk
    rng = np.random.default_rng(5)
    long = "\n".join(" ".join(words(rng, 12)) for _ in range(300))
    for name, text in (("a", long), ("b", long + "\nanother end"), ("c", long), ("d", "short")):
        (tmp_path / f"{name}.txt").write_text(text)
    inputs = [str(tmp_path / f"{name}.txt") for name in "abcd"]
    exact = build(inputs, tokenizer_json, tmp_path / "exact", validation_fraction=0, dedup="exact")
    assert (exact.splits["train"].documents, exact.exact_duplicates) == (3, 1)
    near = build(inputs, tokenizer_json, tmp_path / "near", validation_fraction=0, dedup="near")
    assert (near.splits["train"].documents, near.exact_duplicates, near.near_duplicates) == (2, 1, 1)
    plain = build([inputs[0], inputs[3]], tokenizer_json, tmp_path / "plain", validation_fraction=0)
    assert plain.splits["train"].index_sha256 == near.splits["train"].index_sha256
