"""Parts that an array of jobs builds, and a source that is all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from llmscale.cli.data import command
from llmscale.data.parts import expanded, is_pattern
from llmscale.errors import UsageError


def card(folder: Path, tokens: int) -> None:
    folder.mkdir(parents=True)
    (folder / "card.json").write_text(json.dumps({"tokens": tokens}))


def test_weights_follow_the_tokens_and_empty_parts_are_left_out(tmp_path: Path) -> None:
    for number, tokens in enumerate((30, 0, 10)):
        card(tmp_path / f"part-{number:05d}" / "train", tokens)
    found = expanded(str(tmp_path / "part-*" / "train"), 4.0)
    assert [(Path(path).parent.name, weight) for path, weight in found] == [("part-00000", 3.0), ("part-00002", 1.0)]


def test_what_is_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "a[1]").mkdir()
    assert is_pattern("data/part-*/train") and is_pattern(str(tmp_path / "a?1?"))
    for name in (str(tmp_path / "a[1]"), "s3://bucket/a*", "pipe:cat *", "data/train"):
        assert not is_pattern(name)


def test_patterns_that_name_no_tokens(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the pattern names no folder"):
        expanded(str(tmp_path / "part-*"), 1.0)
    (tmp_path / "part-0").mkdir()
    with pytest.raises(UsageError, match="holds no token shards"):
        expanded(str(tmp_path / "part-*"), 1.0)
    card(tmp_path / "empty-0", 0)
    with pytest.raises(UsageError, match="hold no tokens"):
        expanded(str(tmp_path / "empty-*"), 1.0)


@pytest.mark.parametrize("part", ["3/3", "1", "a/b", "-1/2", "1/0"])
def test_a_part_that_there_is_not(part: str, tmp_path: Path) -> None:
    arguments = ["build", "--input", str(tmp_path), "--tokenizer", __file__, "--output", "o", "--part", part]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 2 and "is not a part" in result.output


def test_more_parts_than_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    arguments = ["build", "--input", str(tmp_path / "a.txt"), "--tokenizer", __file__, "--output", "o", "--part", "0/2"]
    result = CliRunner().invoke(command, arguments)
    assert isinstance(result.exception, UsageError) and "the input has 1 file(s)" in str(result.exception)
