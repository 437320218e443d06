"""Tokenizers and special tokens: what came with a model goes out with it; a run's export ends documents as its data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from click.testing import CliRunner
from tokenizers import models, processors

from llmscale.checkpoint.format import Checkpoint
from llmscale.checkpoint.save import write_records
from llmscale.cli.convert import command
from llmscale.convert.from_hf import from_hf
from llmscale.convert.to_hf import to_hf
from llmscale.data import tokenizer
from llmscale.errors import UsageError

WORDS = "the stream gives every token of a shard once an epoch and no rank reads what another one has read "
IDS = {"bos_token_id": 5, "eos_token_id": [6, 40], "pad_token_id": 7}


def save_model(folder: Path, **ids: Any) -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=300,
        max_position_embeddings=32, **ids,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def llama_like(special: tuple[str, ...], post: bool = True) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer that begins every text with its first special token."""
    words = tokenizers.Tokenizer.from_str(tokenizer.train([WORDS] * 9, 290, special))
    if post:
        begin = special[0]
        words.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=special[0], eos_token=special[1], pad_token=special[-1]
    )


def there_and_back(folder: Path) -> tuple[Path, Path]:
    found = from_hf(folder / "theirs", folder / "ours")
    to_hf(Checkpoint(found.checkpoint), folder / "again", verify=False)
    return folder / "theirs", folder / "again"


def special_ids(folder: Path) -> list[Any]:
    """As transformers takes them: of the config, and of generation."""
    config = transformers.AutoConfig.from_pretrained(folder)
    generation = transformers.AutoModelForCausalLM.from_pretrained(folder).generation_config
    return [getattr(part, name) for part in (config, generation) for name in IDS]


def test_every_file_and_id_of_an_import_comes_back(tmp_path: Path) -> None:
    save_model(tmp_path / "theirs", **IDS)
    words = llama_like(("<s>", "</s>", "<pad>"))
    words.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    words.save_pretrained(tmp_path / "theirs")
    generation = tmp_path / "theirs" / "generation_config.json"
    generation.write_text(json.dumps({**IDS, "repetition_penalty": 1.3}))
    theirs, again = there_and_back(tmp_path)
    files = {path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file()}
    files -= {Path("config.json"), Path("model.safetensors")}
    assert {str(path) for path in files} > {"chat_template.jinja", "additional_chat_templates/tools.jinja"}
    for path in files:
        assert (again / path).read_bytes() == (theirs / path).read_bytes(), path
    assert special_ids(again) == special_ids(theirs) == [*IDS.values()] * 2


@pytest.mark.parametrize("ids", [IDS, {"bos_token_id": None, "eos_token_id": 9}, {}], ids=["all", "null", "none"])
def test_ids_are_those_of_the_config_where_there_is_no_tokenizer(ids: dict[str, Any], tmp_path: Path) -> None:
    save_model(tmp_path / "theirs", **ids)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    said = {key: value for key, value in config.items() if not key.endswith("_token_id")}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({**said, **ids}))
    (tmp_path / "theirs" / "generation_config.json").unlink()
    theirs, again = there_and_back(tmp_path)
    assert special_ids(again) == special_ids(theirs)


def test_a_tokenizer_of_older_files_comes_back(tmp_path: Path) -> None:
    save_model(tmp_path / "theirs")
    words = tokenizers.Tokenizer.from_str(tokenizer.train([WORDS] * 9, 290))
    assert isinstance(words.model, models.BPE)
    words.model.save(str(tmp_path / "theirs"))
    (tmp_path / "theirs" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    theirs, again = (transformers.AutoTokenizer.from_pretrained(path) for path in there_and_back(tmp_path))
    assert again("the stream")["input_ids"] == theirs("the stream")["input_ids"] != []


def test_an_import_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    save_model(tmp_path / "theirs")
    run = CliRunner()
    result = run.invoke(command, ["from-hf", str(tmp_path / "theirs"), str(tmp_path / "ours")])
    assert "no file of a tokenizer came with it" in result.stdout
    llama_like(("<s>", "</s>")).save_pretrained(tmp_path / "theirs")
    result = run.invoke(command, ["from-hf", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--overwrite"])
    assert result.exit_code == 0 and "no file of a tokenizer" not in result.stdout


def test_a_tokenizer_that_is_given_gets_the_models_own_ids(tmp_path: Path) -> None:
    save_model(tmp_path / "theirs", bos_token_id=0, eos_token_id=1)
    llama_like(("[BOS]", "[EOS]")).save_pretrained(tmp_path / "words")
    found = from_hf(tmp_path / "theirs", tmp_path / "ours")
    to_hf(Checkpoint(found.checkpoint), tmp_path / "out", tokenizer=tmp_path / "words", verify=False)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (words.bos_token, words.eos_token) == ("[BOS]", "[EOS]")
    assert special_ids(tmp_path / "out")[:2] == [0, 1]


def trained(folder: Path, **facts: Any) -> Checkpoint:
    """The checkpoint of a run, as far as conversion knows: with what a run's manifest says."""
    step = folder / "checkpoints" / "step_00000000"
    manifest = json.loads((step / "manifest.json").read_text())
    index = json.loads((step / "index.json").read_text())
    manifest = {key: value for key, value in manifest.items() if key not in ("imported", "end_of_document")}
    write_records(step, {**manifest, **facts}, index, manifest["files"])
    return Checkpoint(step)


def test_a_runs_export_ends_documents_as_its_data_did(tmp_path: Path) -> None:
    save_model(tmp_path / "theirs")
    ours = from_hf(tmp_path / "theirs", tmp_path / "ours").output
    tokenizer.write(tokenizer.train([WORDS] * 9, 290, ("<|endoftext|>", "<|eod|>", "[EOS]")), ours / "tokenizer.json")
    for facts, asked, end in (
        ({"end_of_document": 1}, None, (1, "<|eod|>")),
        ({}, None, (0, "<|endoftext|>")),
        ({}, "[EOS]", (2, "[EOS]")),
        ({"end_of_document": 1}, "[EOS]", (2, "[EOS]")),
    ):
        to_hf(trained(ours, **facts), tmp_path / "out", end_of_document=asked, verify=False, overwrite=True)
        words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        assert (words.eos_token_id, words.eos_token) == end
        assert special_ids(tmp_path / "out") == [end[0], end[0], None] * 2
    tokenizer.write(tokenizer.train([WORDS] * 9, 290, ("[EOS]",)), ours / "tokenizer.json")
    to_hf(trained(ours, end_of_document=0), tmp_path / "out", verify=False, overwrite=True)
    assert special_ids(tmp_path / "out") == [0, 0, None] * 2
    with pytest.raises(UsageError, match=r"no special token .* name one with --end-of-document \(there are: \[EOS\]\)"):
        to_hf(trained(ours, end_of_document=None), tmp_path / "out", verify=False, overwrite=True)
