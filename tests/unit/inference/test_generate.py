"""Text from a checkpoint and from an export: what transformers' generate gives, in batches, in pieces, to a stop."""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, processors

from llmscale.cli.generate import command
from llmscale.convert.from_hf import from_hf
from llmscale.data import tokenizer
from llmscale.errors import ConversionError, LlmscaleError, UsageError
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
    words = tokenizer.Tokenizer(export / "tokenizer.json")
    for prompt in PROMPTS:
        ids = torch.tensor([words.encode(prompt).astype("int64").tolist() or [words.end_of_document]])
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        tokens = found[0, ids.shape[1] :].tolist()
        tokens = tokens[: tokens.index(0)] if 0 in tokens else tokens
        assert opened.generate([prompt], GREEDY) == [words.decode(tokens)]


def theirs(folder: Path, prompt: str, **options: Any) -> str:
    """What transformers' own tokenizer and generate give of a folder."""
    words = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = words(prompt, return_tensors="pt")["input_ids"]
    torch.manual_seed(7)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, **options)
    tokens = found[0, ids.shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    return str(words.decode([token for token in tokens if token not in ends]))


@pytest.fixture(scope="module")
def llama_like(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a tokenizer that begins texts with a token, two ids that end one, and a penalty."""
    folder = Path(shutil.copytree(export, tmp_path_factory.mktemp("llama") / "model"))
    words = Tokenizer.from_str(tokenizer.train([TEXT * 3, TEXT], 290, ("[BOS]", "[EOS]")))
    words.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 0)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="[BOS]", eos_token="[EOS]").save_pretrained(
        folder
    )
    config = {"bos_token_id": 0, "eos_token_id": [1, 40], "repetition_penalty": 1.7, "top_k": 7, "top_p": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(config))
    return folder


def test_the_tokenizer_and_the_generation_config_are_the_models_own(llama_like: Path, tmp_path: Path) -> None:
    model = TextModel(llama_like)
    assert model.ends == (1, 40)
    for prompt in PROMPTS:
        assert model.generate([prompt], GREEDY) == [theirs(llama_like, prompt, do_sample=False)]
    second = from_hf(llama_like, tmp_path / "ours").output
    with open_text_model(second, None) as (_, again):
        assert again.generate(PROMPTS, GREEDY) == model.generate(PROMPTS, GREEDY)
    assert TextModel(llama_like, end_of_document="e").ends == (1, 40, model.tokenizer.get_vocab()["e"])
    with pytest.raises(UsageError, match=r"--end-of-document 'nothing': is no token"):
        TextModel(llama_like, end_of_document="nothing")


def test_padding_does_not_count_as_said(llama_like: Path) -> None:
    """repetition_penalty looks at all tokens before; transformers 5 leaves the padding out."""
    model = TextModel(llama_like)
    model.model.generation_config.repetition_penalty = 9.0
    alone = [model.generate([prompt], GREEDY)[0] for prompt in PROMPTS]
    ids = model.tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    first = int(model.model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1])
    model.model.generation_config.pad_token_id = first  # which the penalty would then fall upon
    assert model.generate(PROMPTS, GREEDY) == alone


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.4), (3.0, 50, 1.0), (0.3, 0, 1.0)]
)
def test_sampled_text_is_that_of_transformers(llama_like: Path, temperature: float, top_k: int, top_p: float) -> None:
    text = theirs(llama_like, "the", do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p)
    assert TextModel(llama_like).generate(["the"], Sampling(24, temperature, top_k, top_p, 7)) == [text]


def test_text_goes_on_with_the_space_that_a_decoder_leaves_out_at_the_beginning(
    export: Path, opened: TextModel, tmp_path: Path
) -> None:
    words = Tokenizer.from_str((export / "tokenizer.json").read_text())
    words.decoder = decoders.Sequence([words.decoder, decoders.Strip(" ", 1, 0)])
    words.save(str(tmp_path / "tokenizer.json"))
    other = TextModel(export, tmp_path / "tokenizer.json")
    found = [
        [model.generate(["the stream"], Sampling(4, 2.0, seed=seed))[0] for seed in range(40)]
        for model in (opened, other)
    ]
    assert found[0] == found[1] and any(text.startswith(" ") for text in found[0])


def test_a_long_prompt_does_not_shorten_the_others(opened: TextModel) -> None:
    prompts = ["the stream", TEXT[:80], "", TEXT[:75], "read"]
    lengths = [len(opened.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    assert max(lengths) > 24
    sampling = Sampling(40, 0)
    alone = [opened.generate([prompt], sampling)[0] for prompt in prompts]
    for size in (1, 2, 8):
        assert opened.generate(prompts, sampling, batch_size=size) == alone
    assert opened.generate(prompts[:1], Sampling(39, 0))[0] != alone[0]


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


@pytest.mark.parametrize("seed", [3, 4])
def test_no_part_of_a_stop_text_is_streamed(opened: TextModel, seed: int) -> None:
    sampling = Sampling(24, 1.0, seed=seed)
    (whole,) = opened.generate(["the stream"], sampling)
    for begin in range(1, len(whole) - 6):
        stop = whole[begin : begin + 6]
        pieces: list[str] = []
        (text,) = opened.generate(["the stream"], replace(sampling, stop=(stop,)), pieces.append)
        assert text == whole[: whole.index(stop)] == "".join(pieces), stop


def test_a_seed_is_a_text(opened: TextModel) -> None:
    one, two, three = (opened.generate(["the"], Sampling(24, 1.5, seed=seed))[0] for seed in (1, 1, 2))
    assert one == two != three
    assert opened.generate(["the"], Sampling(24, 1.0, top_k=1)) == opened.generate(["the"], GREEDY)


def test_the_longest_sequence_ends_it(opened: TextModel) -> None:
    prompt = TEXT[:60]
    length = len(opened.tokenizer(prompt)["input_ids"])
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
    (tmp_path / "prompts").write_text(f"read\n\n{TEXT * 5}\n")
    error = run.invoke(command, [*arguments, "--prompts", str(tmp_path / "prompts")]).exception
    assert isinstance(error, UsageError)
    assert re.search(r"prompts: line 3: has \d+ tokens, and the model takes 64", str(error))
    (tmp_path / "prompts").write_text("read\n\n")
    result = run.invoke(command, [*arguments, "--prompts", str(tmp_path / "prompts"), "--json"])
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["prompt"], row["text"]) for row in rows] == [
        (prompt, opened.generate([prompt], GREEDY)[0]) for prompt in ("read", "")
    ]
    for wrong in (["--temperature", "nan"], ["--top-p", "nan"], ["--seed", "9" * 20]):
        result = run.invoke(command, [str(export), *wrong])
        assert result.exit_code == 2 and wrong[0] in result.output
    for wrong, message in (
        ([str(tmp_path)], "no whole checkpoint there"),
        ([str(export), "--tokenizer", "none.json"], "no tokenizer there"),
        ([*arguments, "--prompts", str(tmp_path / "none")], "cannot be read"),
        ([*arguments, "--prompt", "a", "--prompts", str(tmp_path / "prompts")], "give one of them"),
    ):
        error = run.invoke(command, wrong).exception
        assert isinstance(error, UsageError) and message in str(error)


def test_a_stop_text_may_be_typed_with_backslashes(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        TextModel, "generate", lambda self, prompts, sampling, *_, **__: given.append(sampling.stop) or [""]
    )
    result = CliRunner().invoke(command, [str(export), "--stop", r"\n\n", "--stop", r"a\\n\x", "--stop", "\n"])
    assert result.exit_code == 0, result.output
    assert given == [("\n\n", "a\\n\\x", "\n")]


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def leave_out(folder: Path) -> None:
    found = load_file(folder / "model.safetensors")
    del found["model.norm.weight"]
    save_file(found, folder / "model.safetensors", {"format": "pt"})


def pick_apart(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "transformers cannot load it"),
        (lambda folder: (folder / "model.safetensors").unlink(), "transformers cannot load it"),
        (lambda folder: (folder / "config.json").write_text("{"), "no tokenizer there|transformers cannot load it"),
        (leave_out, r"1 tensor\(s\) missing, such as model\.norm\.weight"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer there.*--tokenizer"),
        (pick_apart, "no tokenizer there that can be read"),
    ],
)
def test_a_broken_folder_is_said_in_a_line(
    damage: Callable[[Path], object], message: str, export: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(export, tmp_path / "broken"))
    damage(folder)
    error = CliRunner().invoke(command, [str(folder)]).exception
    assert isinstance(error, LlmscaleError) and "\n" not in str(error)
    assert re.search(message, str(error)), error


def test_a_temporary_folder_without_room_is_named_as_that(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = from_hf(export, tmp_path / "ours").output
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))  # below the model's file
    try:
        with pytest.raises(ConversionError, match=r"cannot be written there: File too large; set TMPDIR"):
            open_text_model(found, None).__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
