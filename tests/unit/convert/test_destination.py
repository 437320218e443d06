"""What a conversion replaces: what a conversion wrote, and only once there is something better; never what it reads."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner

from llmscale.checkpoint.format import Checkpoint
from llmscale.cli.convert import command
from llmscale.convert.destination import destination
from llmscale.convert.from_hf import from_hf
from llmscale.convert.to_hf import to_hf
from llmscale.data import tokenizer
from llmscale.errors import ConversionError, UsageError


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """theirs/hf, a model; ours, its import; out, its export."""
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=300,
        max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "theirs" / "hf")
    words = tokenizer.train(["some words of some text"] * 9, 270)
    tokenizer.write(words, tmp_path / "theirs" / "hf" / "tokenizer.json")
    found = from_hf(tmp_path / "theirs" / "hf", tmp_path / "ours")
    to_hf(Checkpoint(found.checkpoint), tmp_path / "out", verify=False)
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def keep_notes(folder: Path) -> None:
    (folder / "notes").mkdir()
    (folder / "notes" / "thesis.txt").write_text("the only copy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("to-hf ours ours", "holds ours/checkpoints/step_00000000, which is read"),
        ("to-hf ours ours/checkpoints", "holds"),
        ("to-hf ours ours/checkpoints/step_00000000", "is"),
        ("to-hf ours ours/checkpoints/step_00000000/hf", "lies in"),
        ("to-hf ours link", "holds"),
        ("to-hf ours out --tokenizer out/tokenizer.json", "holds out/tokenizer.json"),
        ("to-hf ours .", "holds"),
        ("to-hf ours notes", "was not written by `llmscale convert`"),
        ("from-hf theirs/hf theirs/hf", "is theirs/hf, which is read"),
        ("from-hf theirs/hf theirs", "holds"),
        ("from-hf theirs/hf theirs/hf/ours", "lies in"),
        ("from-hf theirs/hf notes", "was not written by `llmscale convert`"),
        ("from-hf theirs/hf notes/thesis.txt", "was not written by `llmscale convert`"),
    ],
)
def test_overwrite_leaves_what_is_read_and_what_no_conversion_wrote(
    arguments: str, message: str, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_notes(parts)
    (parts / "link").symlink_to(parts / "ours")
    monkeypatch.chdir(parts)
    before = content(parts)
    found = CliRunner().invoke(command, [*arguments.split(), "--overwrite"])
    assert isinstance(found.exception, UsageError) and message in str(found.exception), found.exception
    assert content(parts) == before


def test_an_import_in_which_a_run_has_trained_is_left(parts: Path) -> None:
    (parts / "ours" / "checkpoints" / "step_00000100").mkdir()
    with pytest.raises(UsageError, match=r"more is in it now"):
        from_hf(parts / "theirs" / "hf", parts / "ours", overwrite=True)


def test_conversions_are_replaced_by_new_ones(parts: Path) -> None:
    checkpoint = Checkpoint(parts / "ours" / "checkpoints" / "step_00000000")
    (parts / "out" / "old").write_text("")
    (parts / "empty").mkdir()
    for output in (parts / "out", parts / "empty"):
        to_hf(checkpoint, output, verify=False, overwrite=True)
        assert (output / "config.json").is_file() and not (output / "old").exists()
    from_hf(parts / "theirs" / "hf", parts / "ours", overwrite=True)
    assert {path.name for path in parts.iterdir()} == {"theirs", "ours", "out", "empty"}


def test_an_export_that_fails_its_proof_replaces_nothing(parts: Path) -> None:
    before = content(parts / "out")
    for _ in range(2):  # the second replaces the first one's failed
        arguments = ["to-hf", str(parts / "ours"), str(parts / "out"), "--overwrite", "--tolerance", "1e-12"]
        found = CliRunner().invoke(command, arguments)
        assert isinstance(found.exception, ConversionError) and "out.failed: FAILED" in str(found.exception)
    assert content(parts / "out") == before
    assert json.loads((parts / "out.failed" / "llmscale.json").read_text())["failed"] is True


def test_a_conversion_that_ends_early_leaves_what_was_there(parts: Path) -> None:
    before = content(parts)
    for error in (OSError("full"), KeyboardInterrupt()):
        with pytest.raises((ConversionError, KeyboardInterrupt)), destination(parts / "out", overwrite=True) as place:
            (place.work / "half").write_text("")
            raise error
    assert content(parts) == before


def test_a_file_that_cannot_be_read_is_named_as_that(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"gone\.json: cannot be read or written: No such file"):  # noqa: SIM117
        with destination(tmp_path / "out"):
            (tmp_path / "gone.json").read_bytes()
    with pytest.raises(ConversionError, match=r"out: cannot be written: No space left on device; name another folder"):  # noqa: SIM117
        with destination(tmp_path / "out") as place:
            raise OSError(28, os.strerror(28), str(place.work / "model.safetensors"))
