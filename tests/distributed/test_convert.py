"""Between layouts by way of Hugging Face's format: the same weights, and training that goes on from them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

from llmscale.checkpoint.format import Checkpoint
from llmscale.convert.from_hf import from_hf
from llmscale.convert.to_hf import to_hf
from llmscale.data.stream import Stream
from tests.distributed.layouts import Case
from tests.distributed.test_matrix import BATCH, SEQUENCE, run_config, train


def test_from_two_by_two_through_the_other_format_to_four_stages(corpus: Path, tmp_path: Path) -> None:
    case = Case(2, True, 2, 1, 1, zero=1, tied=True)
    _, trained = train(run_config(case, corpus, tmp_path / "trained", "fp32"), case.world_size, tmp_path)
    (tmp_path / "trained" / "tokenizer.json").unlink()  # the tests' data has an empty one
    export = to_hf(trained, tmp_path / "export")
    assert export.parity is not None and export.parity.difference < 1e-5 < export.parity.largest
    end = Stream([(str(corpus), 1.0)], SEQUENCE, 7).end_of_document
    assert json.loads((tmp_path / "export" / "generation_config.json").read_text())["eos_token_id"] == end
    found = from_hf(tmp_path / "export", tmp_path / "imported")
    other = Case(1, False, 4, 1, 1, zero=1, tied=True)
    config = run_config(other, corpus, tmp_path / "other", "fp32")
    config["model"] = {"preset": str(found.output / "model.yaml")}
    config["training"]["steps"] = 0
    config["schedule"]["warmup_steps"] = 0
    config["checkpoint"] = {"interval": 1, "start_from": str(found.output)}
    _, again = train(config, other.world_size, tmp_path)
    assert set(again.weights) == set(trained.weights)
    for name in trained.weights:
        assert torch.equal(again.whole(name), trained.whole(name)), name


def test_a_model_of_two_key_value_heads_on_four_tensor_parallel_ranks(corpus: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    keys = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 12,
        "num_key_value_heads": 2, "vocab_size": 101, "max_position_embeddings": SEQUENCE, "bos_token_id": 0,
    }  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**keys, eos_token_id=0))
    model.save_pretrained(tmp_path / "theirs")
    found = from_hf(tmp_path / "theirs", tmp_path / "imported")
    case = Case(4, True, 1, 1, 1, zero=1)
    config = run_config(case, corpus, tmp_path / "run", "fp32")
    config["model"] = {"preset": str(found.output / "model.yaml")}
    config["training"]["steps"] = config["schedule"]["warmup_steps"] = 0
    config["checkpoint"] = {"interval": 1, "start_from": str(found.output)}
    _, saved = train(config, case.world_size, tmp_path)
    (tmp_path / "run" / "tokenizer.json").unlink()
    export = to_hf(saved, tmp_path / "export")
    assert export.parity is not None and export.parity.equal
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_a_run_begins_with_the_loss_of_the_imported_model_and_resumes_its_own(corpus: Path, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=101, max_position_embeddings=SEQUENCE, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.mul_(4.0)
    model.save_pretrained(tmp_path / "theirs")
    rows = torch.from_numpy(Stream([(str(corpus), 1.0)], SEQUENCE, 7).read(range(BATCH)))
    # One sequence is one micro-batch: the mean over sequences is the mean over tokens.
    logits = model(rows[:, :-1]).logits
    loss = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
    found = from_hf(tmp_path / "theirs", tmp_path / "imported")
    case = Case(2, False, 1, 1, 1, zero=3)
    run = run_config(case, corpus, tmp_path / "run", "fp32")
    run["model"] = {"preset": str(found.output / "model.yaml")}
    run["training"]["steps"] = 2
    run["checkpoint"] = {"interval": 2, "start_from": str(found.output)}
    figures, saved = train(run, case.world_size, tmp_path)
    assert abs(figures[0]["loss"] / loss - 1) < 1e-5
    assert not torch.equal(
        saved.whole("output_layer.weight"), Checkpoint(found.checkpoint).whole("output_layer.weight")
    )
    # Started again it goes on from its own checkpoint, not from the import.
    run["training"]["steps"] = 3
    train(run, case.world_size, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines] == [1, 2, 3]
    assert lines[:2] == figures
