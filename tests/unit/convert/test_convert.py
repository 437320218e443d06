"""Hugging Face in and out: every family against transformers, the same bytes there and back, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llmscale.checkpoint.format import Checkpoint
from llmscale.cli.convert import command
from llmscale.convert import parity
from llmscale.convert.from_hf import Import, from_hf
from llmscale.convert.to_hf import Export, to_hf
from llmscale.data import tokenizer
from llmscale.errors import ConversionError, UsageError
from llmscale.models.family import families

BASE: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 331, "max_position_embeddings": 96,
    "bos_token_id": 5, "eos_token_id": [6, 40], "pad_token_id": 7,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip
NEOX = {key: value for key, value in BASE.items() if key != "num_key_value_heads"} | {"num_attention_heads": 3}
GPT2 = {
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "vocab_size": 331,
    "n_positions": 96,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
CASES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**BASE),
    "llama-wide-heads": lambda: transformers.LlamaConfig(**{**BASE, "num_key_value_heads": 1, "head_dim": 16}),
    "llama-3-tied": lambda: transformers.LlamaConfig(**BASE, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "mistral": lambda: transformers.MistralConfig(**BASE, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**{**BASE, "num_key_value_heads": 6}),
    "qwen2-tied": lambda: transformers.Qwen2Config(**BASE, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**BASE, head_dim=16),
    "gemma": lambda: transformers.GemmaConfig(**BASE, head_dim=16),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "gpt2-untied": lambda: transformers.GPT2Config(**GPT2, tie_word_embeddings=False, n_inner=100),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**NEOX),
    "gpt_neox-whole-heads": lambda: transformers.GPTNeoXConfig(
        **NEOX, rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 1.0}
    ),
}  # fmt: skip


def save_random(config: Any, folder: Path, dtype: torch.dtype, max_shard_size: str = "5GB") -> None:
    """A model of random weights, norms and biases too, as transformers writes it."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_random(CASES["llama"](), tmp_path / "llama", torch.float32)
    return tmp_path / "llama"


def export(source: Import, output: Path, **options: Any) -> Export:
    return to_hf(Checkpoint(source.checkpoint), output, **options)


def test_every_family_has_a_case() -> None:
    assert {name.partition("-")[0] for name in CASES} == set(families())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_there_and_back_gives_the_same_bytes_and_the_same_logits(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_random(CASES[case](), tmp_path / "theirs", dtype, "40KB")
    found = from_hf(tmp_path / "theirs", tmp_path / "ours")
    result = export(found, tmp_path / "again", max_shard_bytes=40_000)
    assert result.shards > 1
    assert result.parity is not None and result.parity.difference < 1e-5 < result.parity.largest
    before, after = tensors(tmp_path / "theirs"), tensors(tmp_path / "again")
    assert set(after) == set(before)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    # transformers' own choice of a config says the same of both.
    one, two = (transformers.AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("theirs", "again"))
    unsaid = {
        "_name_or_path",
        "transformers_version",
        "dtype",
        "n_inner",
    }
    same = {key for key in one if key in two and key not in unsaid}
    assert {key: one[key] for key in same if "dropout" not in key} == {
        key: two[key] for key in same if "dropout" not in key
    }


def test_every_tensor_comes_back_in_the_type_that_it_had(llama: Path, tmp_path: Path) -> None:
    before = {name: tensor.half() for name, tensor in tensors(llama).items()}
    before["model.layers.0.self_attn.q_proj.weight"] = before["model.layers.0.self_attn.q_proj.weight"].bfloat16()
    before["model.norm.weight"] = tensors(llama)["model.norm.weight"]
    save_file(before, llama / "model.safetensors")
    found = from_hf(llama, tmp_path / "ours")
    result = export(found, tmp_path / "again")
    assert result.dtype == "fp16" and result.parity is not None and result.parity.difference < 1e-5
    after = tensors(tmp_path / "again")
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    export(found, tmp_path / "asked", dtype="bf16", verify=False)
    assert {tensor.dtype for tensor in tensors(tmp_path / "asked").values()} == {torch.bfloat16}


def test_the_proof_finds_a_wrong_weight_and_a_wrong_key(llama: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(from_hf(llama, tmp_path / "ours").checkpoint)
    good = tmp_path / "good"
    to_hf(checkpoint, good, verify=False)
    assert parity.compare(checkpoint, good, torch.float32).equal
    for number, damage in enumerate((_swap_heads, _other_theta)):
        bad = Path(shutil.copytree(good, tmp_path / f"bad{number}"))
        damage(bad)
        found = parity.compare(checkpoint, bad, torch.float32)
        assert not found.equal and found.difference > 1e-3


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("llama", "model.embed_tokens.weight"),
        ("gpt2-untied", "transformer.wte.weight"),
        ("gpt2-untied", "transformer.wpe.weight"),
    ],
)
def test_the_proof_finds_a_row_that_its_tokens_do_not_visit(case: str, name: str, tmp_path: Path) -> None:
    config = CASES[case]()
    config.max_position_embeddings, config.vocab_size = 200, 1000
    save_random(config, tmp_path / "theirs", torch.bfloat16)
    checkpoint = Checkpoint(from_hf(tmp_path / "theirs", tmp_path / "ours").checkpoint)
    assert to_hf(checkpoint, tmp_path / "out").failed is False
    generator = torch.Generator().manual_seed(parity.SEED)
    seen = torch.randint(0, 1000, (parity.SEQUENCES, parity.LENGTH), generator=generator)
    found = tensors(tmp_path / "out")
    row = 199 if "wpe" in name else next(row for row in range(1000) if row not in seen)
    found[name][row, 3] += 1
    save_file(found, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    proof = parity.compare(checkpoint, tmp_path / "out", torch.bfloat16)
    assert not proof.same_embeddings and not proof.equal and proof.difference < 1e-5


def test_the_proof_finds_another_stretch_of_far_positions(tmp_path: Path) -> None:
    rope = {**LLAMA3, "original_max_position_embeddings": 8192}
    keys = {**BASE, "hidden_size": 128, "head_dim": 32, "max_position_embeddings": 131072, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**keys, rope_parameters=rope)
    torch.manual_seed(3)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "theirs")  # as a run begins
    checkpoint = Checkpoint(from_hf(tmp_path / "theirs", tmp_path / "ours").checkpoint)
    proof = to_hf(checkpoint, tmp_path / "out").parity
    assert proof is not None and proof.difference < 1e-5
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    edit(rope_scaling={**written["rope_scaling"], "factor": 32.0})(tmp_path / "out")
    assert not parity.compare(checkpoint, tmp_path / "out", torch.float32).equal


@pytest.mark.parametrize("case", CASES)
def test_the_proof_is_the_same_where_memory_holds_one_layer(case: str, tmp_path: Path) -> None:
    save_random(CASES[case](), tmp_path / "theirs", torch.bfloat16, "40KB")
    checkpoint = Checkpoint(from_hf(tmp_path / "theirs", tmp_path / "ours").checkpoint)
    to_hf(checkpoint, tmp_path / "out", verify=False, max_shard_bytes=40_000)
    by_layer = parity.compare(checkpoint, tmp_path / "out", torch.bfloat16, most_bytes=1)
    assert by_layer.equal and by_layer == parity.compare(checkpoint, tmp_path / "out", torch.bfloat16)
    (first,) = [path for path in (tmp_path / "out").glob("model-00002-*.safetensors")]
    save_file({name: tensor * 1.5 for name, tensor in load_file(first).items()}, first, {"format": "pt"})
    assert not parity.compare(checkpoint, tmp_path / "out", torch.bfloat16, most_bytes=1).equal


def _swap_heads(folder: Path) -> None:
    found = tensors(folder)
    name = "model.layers.1.self_attn.q_proj.weight"
    found[name] = found[name].roll(8, 0)
    save_file(found, folder / "model.safetensors", {"format": "pt"})


def _other_theta(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 500.0}))


def test_a_failed_proof_is_said_everywhere(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from_hf(llama, tmp_path / "ours")
    arguments = ["to-hf", str(tmp_path / "ours"), str(tmp_path / "out")]
    result = CliRunner().invoke(command, [*arguments, "--tolerance", "1e-12", "--json"])
    assert isinstance(result.exception, ConversionError) and result.exception.exit_code == 1
    assert "FAILED" in str(result.exception)
    assert "FAILED" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "llmscale.json").read_text())["failed"] is True
    result = CliRunner().invoke(command, [*arguments, "--overwrite", "--no-verify", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["parity"] is None
    assert "Not verified" in (tmp_path / "out" / "README.md").read_text()


def test_the_tokenizer_and_its_end_of_document_come_along(llama: Path, tmp_path: Path) -> None:
    tokenizer.write(tokenizer.train(["some words of some text"] * 9, 270), llama / "tokenizer.json")
    edit(bos_token_id=0, eos_token_id=0)(llama)
    (llama / "generation_config.json").write_text('{"eos_token_id": 0}')
    found = from_hf(llama, tmp_path / "ours")
    export(found, tmp_path / "out", verify=False)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words.eos_token == "<|endoftext|>"
    assert words.decode(words("some words")["input_ids"]) == "some words"
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == words.eos_token_id
    with pytest.raises(UsageError, match=r"no tokenizer there"):
        export(found, tmp_path / "other", verify=False, tokenizer=tmp_path / "none.json")


def test_what_is_there_is_not_overwritten_unasked(llama: Path, tmp_path: Path) -> None:
    found = from_hf(llama, tmp_path / "ours")
    for call in (lambda: from_hf(llama, tmp_path / "ours"), lambda: export(found, llama)):
        with pytest.raises(UsageError, match=r"is there already.*--overwrite"):
            call()
    assert not list(tmp_path.glob(".*"))


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def rename_a_tensor(folder: Path) -> None:
    found = tensors(folder)
    found["model.layers.0.mlp.down_proj.scale"] = found.pop("model.layers.0.mlp.down_proj.weight")
    save_file(found, folder / "model.safetensors")


def add_a_tensor(folder: Path) -> None:
    save_file(
        {**tensors(folder), "model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}, folder / "model.safetensors"
    )


def map_to_numbers(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": 5}}))


def quantise(folder: Path) -> None:
    found = tensors(folder)
    name = "model.layers.0.mlp.down_proj.weight"
    save_file({**found, name: found[name].to(torch.int8)}, folder / "model.safetensors")


def pickle_it(folder: Path) -> None:
    torch.save(tensors(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            edit(model_type="mixtral"),
            r"model_type 'mixtral': mixture-of-experts layers are not built; supported: gemma, gpt2",
        ),
        (edit(model_type="strange"), r"model_type 'strange': is not among the families"),
        (edit(auto_map={"AutoModelForCausalLM": "modeling.Mine"}), r"auto_map names code .* never run"),
        (edit(quantization_config={"bits": 4}), r"quantised"),
        (edit(architectures=["LlamaForSequenceClassification"]), r"supported is LlamaForCausalLM"),
        (edit(hidden_act="gelu"), r'hidden_act is "gelu"; supported is "silu"'),
        (edit(attention_bias=True), r"attention_bias is true; supported is false"),
        (edit(rope_parameters={"rope_type": "yarn", "factor": 2.0}), r"rope_type is 'yarn'; supported is"),
        (edit(intermediate_size=96), r"mlp\.gate_proj\.weight is \[80, 48\], and by config\.json \[96, 48\]"),
        (edit(num_hidden_layers=4), r"9 tensor\(s\) missing, such as model\.layers\.3"),
        (edit(vocab_size=None), r"config\.json: no vocab_size"),
        (edit(num_attention_heads=0), r"num_attention_heads|division"),
        (edit(model_type=["llama"]), r"model_type \['llama'\]: is not among the families"),
        (edit(rope_parameters=[1]), r"config\.json: rope_parameters is \[1\]; an object is wanted"),
        (edit(rope_scaling="linear"), r'config\.json: rope_scaling is "linear"; an object is wanted'),
        (edit(rope_parameters=None, rope_theta="abc"), r'rope_theta is "abc"; a number above 0 is wanted'),
        (edit(tie_word_embeddings="false"), r'tie_word_embeddings is "false"; true or false is wanted'),
        (edit(head_dim=0), r"head_dim is 0; a whole number above 0 is wanted"),
        (edit(num_key_value_heads="2"), r'num_key_value_heads is "2"; a whole number above 0 is wanted'),
        (
            edit(tie_word_embeddings=True),
            r"lm_head\.weight is not model\.embed_tokens\.weight, to which config.json ties",
        ),
        (map_to_numbers, r"index\.json: no weight_map of tensors to files"),
        (rename_a_tensor, r"1 tensor\(s\) missing, such as model\.layers\.0\.mlp\.down_proj\.weight"),
        (add_a_tensor, r"1 tensor\(s\) that config\.json does not speak of, such as .*q_proj\.bias"),
        (quantise, r"down_proj\.weight is of type I8: a quantised model"),
        (pickle_it, r"holds pytorch_model\.bin, a pickle, which can run any code"),
        (cut, r"model\.safetensors: cannot be read"),
    ],
)
def test_what_cannot_be_imported_is_refused_by_name(
    damage: Callable[[Path], None], message: str, llama: Path, tmp_path: Path
) -> None:
    damage(llama)
    with pytest.raises(ConversionError, match=message):
        from_hf(llama, tmp_path / "ours")
    assert not (tmp_path / "ours").exists() and not list(tmp_path.glob(".*"))


def test_code_in_the_folder_is_not_run(llama: Path, tmp_path: Path) -> None:
    (llama / "modeling_llama.py").write_text("raise SystemExit(9)\n")
    assert from_hf(llama, tmp_path / "ours").parameters > 0


def test_a_model_that_is_there_in_another_form_too_is_read_as_transformers_reads_it(
    llama: Path, tmp_path: Path
) -> None:
    save_file({"tok_embeddings.weight": torch.zeros(3)}, llama / "consolidated.safetensors")
    result = export(from_hf(llama, tmp_path / "ours"), tmp_path / "again")
    assert tensors(tmp_path / "again").keys() == load_file(llama / "model.safetensors").keys()
    assert result.parity is not None and result.parity.equal


def test_a_tied_output_that_is_written_out_is_taken(tmp_path: Path) -> None:
    save_random(CASES["llama-3-tied"](), tmp_path / "theirs", torch.float32)
    found = tensors(tmp_path / "theirs")
    save_file(
        {**found, "lm_head.weight": found["model.embed_tokens.weight"].clone()}, tmp_path / "theirs/model.safetensors"
    )
    assert from_hf(tmp_path / "theirs", tmp_path / "ours").parameters > 0


def test_an_older_files_names_without_prefix_and_its_buffers_are_taken(tmp_path: Path) -> None:
    save_random(CASES["gpt2"](), tmp_path / "theirs", torch.float32)
    found = {name.removeprefix("transformer."): tensor for name, tensor in tensors(tmp_path / "theirs").items()}
    save_file({**found, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}, tmp_path / "theirs" / "model.safetensors")
    result = export(from_hf(tmp_path / "theirs", tmp_path / "ours"), tmp_path / "again")
    assert result.parity is not None and result.parity.equal


def test_numbers_that_the_type_cannot_hold_are_refused(llama: Path, tmp_path: Path) -> None:
    found = tensors(llama)
    found["model.norm.weight"][3] = 1e6
    save_file(found, llama / "model.safetensors")
    with pytest.raises(ConversionError, match=r"model\.norm\.weight: holds numbers that are not finite"):
        export(from_hf(llama, tmp_path / "ours"), tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()


def test_the_files_are_ordinary_ones(llama: Path, tmp_path: Path) -> None:
    export(from_hf(llama, tmp_path / "ours"), tmp_path / "out", dtype="bf16", verify=False)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
