"""lm-evaluation-harness on tasks of local files: its figures are those that the model's own logits give."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner

from llmscale.cli.evaluate import command
from llmscale.convert.from_hf import from_hf
from llmscale.data import tokenizer
from llmscale.errors import ConversionError, DataError, UsageError

TEXT = "the stream gives every token of a shard once an epoch and no rank reads what another one has read "
QUESTIONS = [
    {"question": "the stream gives", "choices": [" every token", " no rank", " what"], "answer": 0},
    {"question": "and no rank", "choices": [" once", " reads what"], "answer": 1},
    {"question": "of a shard", "choices": [" once an epoch", " has read", " the"], "answer": 0},
    {"question": "what another", "choices": [" one has read", " stream"], "answer": 0},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, in Hugging Face's format with its tokenizer; tasks/, two tasks with documents of their own."""
    folder = tmp_path_factory.mktemp("harness")
    (folder / "model").mkdir()
    tokenizer.write(tokenizer.train([TEXT * 3], 280), folder / "model" / "tokenizer.json")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=280,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "model" / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    words.save_pretrained(folder / "model")
    tasks = folder / "tasks"
    tasks.mkdir()
    documents = tasks / "questions.jsonl"
    documents.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tasks / "stream_choice.yaml").write_text(f"""\
task: stream_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {documents}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
""")
    (tasks / "stream_lost.yaml").write_text(
        (tasks / "stream_choice.yaml")
        .read_text()
        .replace("stream_choice", "stream_lost")
        .replace("questions", "absent")
    )
    return folder


@torch.no_grad()
def accuracy(model: Path, limit: int) -> float:
    """The share of questions whose right choice is the likeliest continuation."""
    network = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    words = tokenizer.Tokenizer(model / "tokenizer.json")
    right = 0
    for question in QUESTIONS[:limit]:
        scores = []
        begin = len(words.encode(str(question["question"])))
        for choice in question["choices"]:  # type: ignore[attr-defined]
            row = torch.from_numpy(words.encode(f"{question['question']}{choice}").astype("int64"))
            logs = network(row[None]).logits[0].log_softmax(-1)
            scores.append(float(logs[begin - 1 : -1].gather(1, row[begin:, None]).sum()))
        right += scores.index(max(scores)) == question["answer"]
    return right / limit


def run(folder: Path, *arguments: str) -> dict:
    include = ["--tasks", "stream_choice", "--include", str(folder / "tasks"), "--json"]
    result = CliRunner().invoke(command, ["harness", *arguments, *include])
    if result.exception:
        raise result.exception
    return dict(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize("limit", [1, 3, 4])
def test_the_accuracy_is_that_of_the_logits(folder: Path, limit: int, tmp_path: Path) -> None:
    found = run(folder, str(folder / "model"), "--limit", str(limit), "--output", str(tmp_path / "all" / "found.json"))
    assert found["results"]["stream_choice"]["acc,none"] == pytest.approx(accuracy(folder / "model", limit))
    assert found["n-shot"] == {"stream_choice": 0}
    written = json.loads((tmp_path / "all" / "found.json").read_text())
    assert written["results"] == found["results"] and "config" in written


def test_a_checkpoint_scores_as_its_origin(folder: Path, tmp_path: Path) -> None:
    ours = from_hf(folder / "model", tmp_path / "ours").output
    assert run(folder, str(ours))["results"] == run(folder, str(folder / "model"))["results"]


def test_what_cannot_be_evaluated_is_said(folder: Path, tmp_path: Path) -> None:
    model = str(folder / "model")
    include = ["--include", str(folder / "tasks")]
    for arguments, kind, message in (
        (["--tasks", "stream_choise", *include], UsageError, "--tasks stream_choise: neither lm-eval's own nor"),
        (["--tasks", " , ", *include], UsageError, "--tasks: names no task"),
        (["--tasks", "stream_lost", *include], DataError, "absent.jsonl"),
        (["--tasks", "stream_choice", "--tokenizer", "t.json", *include], UsageError, "t.json"),
    ):
        result = CliRunner().invoke(command, ["harness", model, *arguments])
        assert type(result.exception) is kind and message in str(result.exception), result.exception


def test_a_broken_model_is_said_in_a_line(folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folder / "model", tmp_path / "model"))
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ConversionError, match=r"model: lm-eval cannot load it: [^\n]+$"):
        run(folder, str(broken))


def test_without_the_extra_its_name_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = CliRunner().invoke(command, ["harness", str(folder / "model"), "--tasks", "stream_choice"])
    assert isinstance(result.exception, UsageError) and "llmscale[harness]" in str(result.exception)
