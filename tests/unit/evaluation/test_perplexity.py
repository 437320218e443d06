"""Perplexity: every token counted once, the value that transformers gives token by token."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner

from llmscale.cli.evaluate import command
from llmscale.convert.from_hf import from_hf
from llmscale.data import tokenizer
from llmscale.data.build import build
from llmscale.data.split import Split
from llmscale.errors import UsageError
from llmscale.evaluation.perplexity import score, together

TEXT = "the stream gives every token of a shard once an epoch and no rank reads what another one has read "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and two splits."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "model").mkdir()
    tokenizer.write(tokenizer.train([TEXT * 3], 280), folder / "model" / "tokenizer.json")
    for name, count in (("a", 7), ("b", 3)):
        (folder / name).mkdir()
        for number in range(count):
            (folder / name / f"{number}.txt").write_text(TEXT[number * 3 :] * (number + 1))
        build(
            [str(folder / name)], folder / "model" / "tokenizer.json", folder / f"data-{name}", validation_fraction=0.0
        )
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=280,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()


def tokens_of(split: Split) -> np.ndarray:
    (shard,) = split.shards
    return np.concatenate(
        [split.read_sample(shard, number, split.sample_length(number))[0] for number in range(len(shard.offsets))]
    ).astype(np.int64)


@torch.no_grad()
def one_by_one(model: Any, row: np.ndarray, context: int, stride: int) -> float:
    """The mean loss, each token predicted by the first window that holds it."""
    losses = []
    for target in range(1, len(row)):
        number = max(0, -(-(target - context) // stride))
        begin = number * stride
        ids = torch.from_numpy(row[begin : begin + context])[None, : target - begin]
        losses.append(-float(model(ids).logits[0, -1].log_softmax(-1)[row[target]]))
    return float(np.mean(losses))


@pytest.mark.parametrize(("context", "stride", "batch"), [(16, 16, 3), (16, 5, 1), (64, 32, 8), (11, 1, 4)])
def test_the_value_is_that_of_every_token_alone(
    folder: Path, model: Any, context: int, stride: int, batch: int
) -> None:
    split = Split(folder / "data-a" / "train")
    row = tokens_of(split)[:300]
    found = score(model, split, context, stride, batch, most=300)
    assert found.tokens == 299
    assert found.loss == pytest.approx(one_by_one(model, row, context, stride), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_batches_and_samples_do_not_matter(folder: Path, model: Any) -> None:
    split = Split(folder / "data-a" / "train")
    one, two = (score(model, split, 32, 16, batch) for batch in (1, 7))
    assert one.tokens == two.tokens == split.card.tokens - 1
    assert one.loss == pytest.approx(two.loss, rel=1e-6)


def test_sources_are_weighted_by_their_tokens(folder: Path, tmp_path: Path) -> None:
    found = from_hf(folder / "model", tmp_path / "ours")
    places = [str(folder / f"data-{name}" / "train") for name in "ab"]
    results = []
    for place in (folder / "model", found.output):
        arguments = ["perplexity", str(place), "--data", places[0], "--data", places[1], "--stride", "32", "--json"]
        result = CliRunner().invoke(command, arguments)
        assert result.exit_code == 0, result.output
        results.append(json.loads(result.stdout))
    theirs, ours = results
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert [source["source"] for source in theirs["sources"]] == places
    tokens = [source["tokens"] for source in theirs["sources"]]
    assert theirs["tokens"] == sum(tokens) == sum(Split(place).card.tokens - 1 for place in places)
    assert theirs["loss"] == pytest.approx(np.average([source["loss"] for source in theirs["sources"]], weights=tokens))
    assert (theirs["context"], theirs["stride"]) == (64, 32)


def test_what_cannot_be_compared_is_refused(folder: Path, tmp_path: Path) -> None:
    place = str(folder / "data-a" / "train")
    other = tmp_path / "tokenizer.json"
    tokenizer.write(tokenizer.train([TEXT * 3], 270), other)
    for arguments, message in (
        (["--context", "65"], "--context 65: the model takes 64"),
        (["--context", "8", "--stride", "9"], "--stride 9: leaves out tokens"),
        (["--tokenizer", str(other)], "another tokenizer than the model's"),
    ):
        result = CliRunner().invoke(command, ["perplexity", str(folder / "model"), "--data", place, *arguments])
        assert isinstance(result.exception, UsageError) and message in str(result.exception)


def test_documents_end_as_the_model_knows_them(folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(folder / "model", tmp_path / "model"))
    tokenizer.write(tokenizer.train([TEXT * 3], 280, ("[PAD]", "[EOS]")), model / "tokenizer.json")
    words, output = model / "tokenizer.json", tmp_path / "data"
    build([str(folder / "a")], words, output, end_of_document="[EOS]", validation_fraction=0.0)
    arguments = ["perplexity", str(model), "--data", str(tmp_path / "data" / "train")]
    refused = CliRunner().invoke(command, arguments).exception
    assert isinstance(refused, UsageError) and "documents end with the id 1, the model's with 0" in str(refused)
    assert CliRunner().invoke(command, [*arguments, "--end-of-document", "[EOS]"]).exit_code == 0
    (model / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert CliRunner().invoke(command, arguments).exit_code == 0


def test_scores_add_up(folder: Path, model: Any) -> None:
    scores = [score(model, Split(folder / f"data-{name}" / "train"), 32, 32, 4) for name in "ab"]
    total = together(scores)
    assert total.tokens == sum(one.tokens for one in scores)
    assert min(one.loss for one in scores) <= total.loss <= max(one.loss for one in scores)
