"""Text from a checkpoint and from an export: what transformers' generate gives, in batches, in pieces, to a stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner

from llmscale.cli.generate import command
from llmscale.convert.from_hf import from_hf
from llmscale.data import tokenizer
from llmscale.errors import UsageError
from llmscale.inference.generate import Sampling, TextModel, open_text_model

TEXT = "the stream gives every token of a shard once an epoch and no rank reads what another one has read "
GREEDY = Sampling(max_tokens=24, temperature=0)
PROMPTS = ["the stream", "once an epoch and no rank", "", "read"]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    tokenizer.write(tokenizer.train([TEXT * 3, TEXT], 290), folder / "tokenizer.json")
    config = transformers.LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.mul_(3.0)  # so that the text is not one token over and over
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def opened(export: Path) -> TextModel:
    return TextModel(export, export / "tokenizer.json")


def test_greedy_text_is_that_of_transformers(export: Path, opened: TextModel) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(export).eval()
    words = opened.words
    for prompt in PROMPTS:
        ids = torch.tensor([words.encode(prompt).astype("int64").tolist() or [words.end_of_document]])
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        tokens = found[0, ids.shape[1] :].tolist()
        tokens = tokens[: tokens.index(0)] if 0 in tokens else tokens
        assert opened.generate([prompt], GREEDY) == [words.decode(tokens)]


def test_a_batch_gives_what_each_prompt_gives_alone(opened: TextModel) -> None:
    assert opened.generate(PROMPTS, GREEDY) == [opened.generate([prompt], GREEDY)[0] for prompt in PROMPTS]


def test_pieces_join_to_the_text_and_end_before_the_stop(opened: TextModel) -> None:
    whole = opened.generate(["the stream"], GREEDY)[0]
    stop = whole[len(whole) // 2 :][:3]
    for sampling in (GREEDY, Sampling(24, 0, stop=(stop, "never said")), Sampling(24, 1.0, 0, 0.9, 7)):
        pieces: list[str] = []
        (text,) = opened.generate(["the stream"], sampling, pieces.append)
        assert "".join(pieces) == text
    text = opened.generate(["the stream"], Sampling(24, 0, stop=(stop,)))[0]
    assert text == whole[: whole.index(stop)]


def test_a_seed_is_a_text(opened: TextModel) -> None:
    one, two, three = (opened.generate(["the"], Sampling(24, 1.5, seed=seed))[0] for seed in (1, 1, 2))
    assert one == two != three
    assert opened.generate(["the"], Sampling(24, 1.0, top_k=1)) == opened.generate(["the"], GREEDY)


def test_the_longest_sequence_ends_it(opened: TextModel) -> None:
    prompt = TEXT[:60]
    length = len(opened.words.encode(prompt))
    assert opened.generate([prompt], Sampling(10_000, 0)) == opened.generate([prompt], Sampling(64 - length, 0))
    with pytest.raises(UsageError, match=r"--prompt: has \d+ tokens, and the model takes 64 with the text"):
        opened.generate([TEXT * 5], GREEDY)


def test_a_checkpoint_gives_the_text_of_its_export(export: Path, opened: TextModel, tmp_path: Path) -> None:
    found = from_hf(export, tmp_path / "ours")
    for place in (found.output, found.checkpoint):
        with open_text_model(place, None) as (checkpoint, model):
            assert checkpoint == found.checkpoint
            assert model.generate(PROMPTS, GREEDY) == opened.generate(PROMPTS, GREEDY)


def test_the_command(export: Path, opened: TextModel, tmp_path: Path) -> None:
    run = CliRunner()
    arguments = [str(export), "--temperature", "0", "--max-tokens", "24"]
    result = run.invoke(command, [*arguments, "--prompt", "read"])
    assert result.stdout == f"read{opened.generate(['read'], GREEDY)[0]}\n"
    (tmp_path / "prompts").write_text("read\nonce an epoch and no rank\n")
    result = run.invoke(command, [*arguments, "--prompts", str(tmp_path / "prompts"), "--json"])
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["text"] for row in rows] == opened.generate(["read", "once an epoch and no rank"], GREEDY)
    for wrong, message in (
        ([str(tmp_path)], "no whole checkpoint there"),
        ([str(export), "--tokenizer", "none.json"], "no tokenizer there"),
        ([*arguments, "--prompts", str(tmp_path / "none")], "cannot be read"),
        ([*arguments, "--prompt", "a", "--prompts", str(tmp_path / "prompts")], "give one of them"),
    ):
        error = run.invoke(command, wrong).exception
        assert isinstance(error, UsageError) and message in str(error)
