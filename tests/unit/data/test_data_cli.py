from __future__ import annotations

import io
import json
import tarfile
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from click.testing import CliRunner, Result

from llmscale.cli.data import command
from llmscale.data.tokenizer import Tokenizer, check_special
from llmscale.errors import LlmscaleError, UsageError


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def done(*arguments: object) -> str:
    """Standard output of a command that must work."""
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def test_from_text_to_a_verified_dataset(corpus: Path, tmp_path: Path) -> None:
    tokenizer, output = tmp_path / "made/tok.json", tmp_path / "out"
    assert "400 tokens, from 120 documents" in done(
        "tokenizer", "--input", corpus, "--vocab-size", 400, "--output", tokenizer
    )
    text = done("build", "--input", corpus, "--tokenizer", tokenizer, "--output", output, "--validation-fraction", 0.2)
    assert "train: " in text
    assert "validation: " in text
    shown = done("inspect", output)
    assert "documents, " in shown
    assert "█" in shown
    assert "document 1 of 3" in shown
    assert "whole, " in done("verify", output)


def test_results_are_json_where_asked(corpus: Path, tmp_path: Path) -> None:
    tokenizer, output = tmp_path / "tok.json", tmp_path / "out"
    made = json.loads(
        done(
            "tokenizer",
            "--input",
            corpus,
            "--vocab-size",
            300,
            "--output",
            tokenizer,
            "--special-token",
            "<x>",
            "--json",
        )
    )
    assert (made["vocab_size"], made["special_tokens"]) == (300, ["<|endoftext|>", "<x>"])
    built = json.loads(
        done("build", "--input", corpus / "part0", corpus / "part1", "--tokenizer", tokenizer, "--output", output,
             "--workers", 1, "--shard-size", "4K", "--json")
    )  # fmt: skip
    assert built["files"] == 80
    assert built["splits"]["train"]["shards"] > 1
    splits = json.loads(done("inspect", output, "--documents", 1, "--json"))
    assert [Path(split["folder"]).name for split in splits] == ["train", "validation"]
    assert len(splits[0]["examples"]) == 1
    assert json.loads(done("verify", output, "--json"))["whole"] is True


def test_the_tokenizer_says_what_it_left_out_and_replaces_only_what_it_is_told_to(corpus: Path, tmp_path: Path) -> None:
    (corpus / "binary.dat").write_bytes(bytes(100))
    (corpus / "latin.txt").write_bytes("überall".encode("latin-1"))
    words = ["tokenizer", "--input", corpus, "--vocab-size", 300, "--output", tmp_path / "tok.json"]
    said = done(*words)
    assert "1 binary file(s) left out, which hold NUL bytes: " in said and "binary.dat" in said
    assert "1 character(s) that are not UTF-8 replaced" in said
    refused = run(*words).exception
    assert isinstance(refused, UsageError) and "tok.json: is there; name another file, or replace it" in str(refused)
    assert json.loads(done(*words, "--overwrite", "--json"))["replaced_characters"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "tok.json"]


@pytest.mark.parametrize("token", ["", "a", "the", "Ġthe", "###"])
def test_a_special_token_that_text_gives_is_refused(token: str, corpus: Path, tmp_path: Path) -> None:
    result = run(
        "tokenizer", "--input", corpus, "--vocab-size", 300, "--output", tmp_path / "k", "--special-token", token
    )
    assert isinstance(result.exception, UsageError)
    assert "is empty" in str(result.exception) or "is a word that text may hold; use one" in str(result.exception)


def test_a_tokenizer_that_cannot_be_written_is_not_trained(corpus: Path, tokenizer_json: Path) -> None:
    (corpus / "z.jsonl").write_text("read")
    result = run("tokenizer", "--input", corpus, "--vocab-size", 300, "--output", tokenizer_json / "k")
    assert "cannot be written" in str(result.exception)


@pytest.mark.parametrize("token", ["<x>", "[PAD]", "<|im_start|>", "</s>", "two words", "<｜end｜>"])
def test_a_special_token_that_no_text_gives_is_taken(token: str) -> None:
    check_special([token])


def test_a_build_that_was_stopped_goes_on_and_copies_are_left_out(
    corpus: Path, tokenizer_json: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    texts = [path.read_text() for path in sorted(corpus.rglob("*.txt"))]
    good = "".join(json.dumps({"text": text}) + "\n" for text in [*texts, texts[0], texts[1] * 300])
    rows.write_text(good * 20 + "bad\n")
    command = ["build", "--input", rows, "--tokenizer", tokenizer_json, "--output", tmp_path / "out", "--workers", 1]
    command += ["--dedup", "exact", "--shard-size", "4K"]
    stopped = run(*command)
    assert "what was built is kept: the same command goes on" in str(stopped.exception)
    rows.write_text(good * 20)
    text = done(*command)
    assert "were there from the build that was gone on with" in text
    assert f"{20 * 122 - 121:,} exact and 0 near duplicate(s) left out" in text
    assert "whole, " in done("verify", tmp_path / "out")


def test_verify_exits_with_1_and_names_what_is_broken(corpus: Path, tokenizer_json: Path, tmp_path: Path) -> None:
    done("build", "--input", corpus, "--tokenizer", tokenizer_json, "--output", tmp_path / "out", "--workers", 1)
    shard = tmp_path / "out/train/shard-00000.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 4
    shard.write_bytes(data)
    result = run("verify", tmp_path / "out")
    assert isinstance(result.exception, LlmscaleError)
    assert result.exception.exit_code == 1
    assert "shard-00000.tar: sample 000000000: its checksum differs" in str(result.exception)
    result = run("verify", tmp_path / "out", "--json")
    assert result.exit_code == 1
    assert len(json.loads(result.stdout)["problems"]) == 2


Arguments = Callable[[Path, Path, Path], list[object]]


@pytest.mark.parametrize(
    ("arguments", "message", "exit_code"),
    [
        (lambda c, k, t: ["build", "--input", t / "no*", "--tokenizer", k, "--output", t / "o"], "matches no file", 2),
        (lambda c, k, t: ["build", "--input", c, "--suffix", ".rs", "--tokenizer", k, "--output", t / "o"], ".rs", 2),
        (lambda c, k, t: ["build", "--input", c, "--tokenizer", c / "part0/000.txt", "--output", t / "o"], "not a", 1),
        (lambda c, k, t: ["build", "--input", c, "--tokenizer", k, "--output", c / "o"], "lies inside", 2),
        (lambda c, k, t: ["build", "--input", c, "--tokenizer", k, "--output", k.parent], "not empty", 2),
        (lambda c, k, t: ["build", "--input", c, "--tokenizer", k, "--output", t, "--end-of-document", "#"], "#", 2),
        (lambda c, k, t: ["build", "--input", c, "--tokenizer", k, "--output", t / "o", "--near-threshold", "0.7"],
         "does nothing without --dedup near", 2),
        (lambda c, k, t: ["build", "--input", c, "--tokenizer", k, "--output", t / "o", "--max-skipped", "7"],
         "does nothing without --on-error skip", 2),
        (lambda c, k, t: ["tokenizer", "--input", c, "--vocab-size", 99, "--output", t / "k"], "at least 257", 2),
        (lambda c, k, t: ["tokenizer", "--input", c, "--vocab-size", 99999, "--output", t / "k"], "more than", 1),
        (lambda c, k, t: ["tokenizer", "--input", c, "--vocab-size", 300, "--output", t], "is a folder", 2),
        (lambda c, k, t: ["tokenizer", "--input", c, "--vocab-size", 300, "--output", k / "x"], "cannot be written", 1),
        (lambda c, k, t: ["inspect", t / "none"], "no such folder", 2),
        (lambda c, k, t: ["verify", c], "not a dataset", 2),
    ],
)  # fmt: skip
def test_a_mistake_gives_one_clear_line(
    arguments: Arguments, message: str, exit_code: int, corpus: Path, tokenizer_json: Path, tmp_path: Path
) -> None:
    result = run(*arguments(corpus, tokenizer_json, tmp_path))
    assert isinstance(result.exception, LlmscaleError), result.output
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert result.exception.exit_code == exit_code


@pytest.mark.parametrize(
    "arguments",
    [
        ["build", "--input", "x"],
        ["build", "--input", "x", "--tokenizer", __file__, "--output", "o", "--validation-fraction", "1"],
        ["build", "--input", "x", "--tokenizer", __file__, "--output", "o", "--workers", "0"],
        ["build", "--input", "x", "--tokenizer", __file__, "--output", "o", "--shard-size", "big"],
        ["build", "--input", __file__, "--tokenizer", "no.json", "--output", "o"],
        ["tokenizer", "--input", "x", "--output", "k"],
        ["tokenizer", "--input", "x", "--output", "k", "--vocab-size", "999999999999"],
        ["tokenizer", "--input", "x", "--output", "k", "--vocab-size", "1" + "0" * 22],
        ["tokenizer", "--input", "x", "--output", "s3://bucket/k.json", "--vocab-size", "300"],
        ["describe", "--input", "x", "--tokenizer", __file__, "--output", "s3://bucket/text"],
        ["inspect", "x", "--plot", "s3://bucket/lengths.png"],
        ["inspect"],
        ["verify", "a", "--fast"],
    ],
)
def test_wrong_usage_is_click_s_error(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize("name", ["tokenizer", "build", "inspect", "verify"])
def test_help_shows_an_example(name: str) -> None:
    assert f"llmscale data {name}" in done(name, "--help")


@pytest.mark.parametrize("kind", ["tiktoken", "sentencepiece", "folder"])
def test_a_tokenizer_of_another_kind_is_written_beside_the_shards_as_tokenizer_json(
    kind: str, corpus: Path, tokenizer_json: Path, tmp_path: Path
) -> None:
    options: list[object] = []
    if kind == "tiktoken":
        tokenizer = tmp_path / "own.tiktoken"
        tokenizer.write_text("".join(f"{b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)))
        options = ["--pattern", "gpt2"]
    elif kind == "sentencepiece":
        tokenizer = tmp_path / "own.model"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(path.read_text() for path in sorted(corpus.rglob("*.txt"))),
            model_prefix=str(tokenizer.with_suffix("")), vocab_size=300, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    else:
        tokenizer = tmp_path / "model"
        tokenizer.mkdir()
        (tokenizer / "tokenizer.json").write_bytes(tokenizer_json.read_bytes())
    output = tmp_path / "out"
    done("build", "--input", corpus, "--tokenizer", tokenizer, "--output", output, "--workers", 2, *options)
    assert "whole, " in done("verify", output)
    beside = Tokenizer(output / "train/tokenizer.json")
    shown = json.loads(done("inspect", output, "--documents", 1, "--json"))
    train = next(row for row in shown if row["folder"].endswith("train"))
    assert (train["tokenizer_sha256"], train["vocab_size"]) == (beside.sha256, beside.vocab_size)
    texts = [" ".join(path.read_text().split()) for path in corpus.rglob("*.txt")]
    assert any(text.startswith(" ".join(train["examples"][0].split()[:-1])) for text in texts)


def test_a_tokenizer_that_tells_not_enough_is_refused_before_anything_is_read(corpus: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "own.tiktoken"
    tokenizer.write_text("".join(f"{b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)))
    result = run("build", "--input", corpus, "--tokenizer", tokenizer, "--output", tmp_path / "out")
    assert isinstance(result.exception, UsageError)
    assert "say so with --pattern gpt2 or cl100k or llama3 or o200k" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_picture_of_what_has_no_lengths_is_refused(tokenizer_json: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("0.txt")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"text"))
    done("describe", "--input", tmp_path / "a.tar", "--tokenizer", tokenizer_json, "--output", tmp_path / "text")
    result = run("inspect", tmp_path / "text", "--plot", tmp_path / "x.png")
    assert isinstance(result.exception, UsageError)
    assert "x.png: " in str(result.exception) and "describes text" in str(result.exception)
