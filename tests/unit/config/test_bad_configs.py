"""Bad configs, and what each must say: where, why, and the nearest right value; all of a config's errors at once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmscale.cli.main import main
from llmscale.config.load import load
from llmscale.distributed.rules import problems
from llmscale.errors import ConfigError
from llmscale.models.family import families

GOOD = """\
model: {preset: tiny-llama, vocab_size: 100}
data: {train: [{path: data}], sequence_length: 64}
training: {steps: 10, global_batch_size: 8}
"""
FAMILIES = ", ".join(families())
PRESETS = "gemma-7b, gpt2-large, gpt2-medium, gpt2-small, gpt2-xl, gpt3-13b, gpt3-175b, "
PRESETS += "llama-13b, llama-1b, llama-3-8b, llama-3.1-8b, llama-70b, llama-7b, mistral-7b, pythia-160m, pythia-6.9b, "
PRESETS += "qwen2.5-0.5b, qwen2.5-7b, qwen3-0.6b, qwen3-8b, tiny-gpt2, tiny-llama"
SHIPPED = "zero0.json, zero1.json, zero2.json, zero2_offload.json, zero3.json, zero3_offload.json"
SECTIONS = "run, model, data, parallel, training, optimizer, schedule, deepspeed, checkpoint, logging, slurm"


def messages(
    folder: Path, text: str | bytes = GOOD, overrides: tuple[str, ...] = (), world_size: int | None = 2
) -> list[str]:
    """The messages of a config, without the file's name that each begins with."""
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        load(path, overrides, world_size, problems)
    lines = str(error.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines), lines
    return [line.removeprefix(f"{path}: ") for line in lines]


def test_the_config_that_the_others_spoil_is_good(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    load(path, [], 2, problems)


OVERRIDES: list[tuple[str, str]] = [
    # Overrides that are none.
    ("", "override '': key=value is wanted; e.g. training.steps=50"),
    ("=3", "override '=3': key=value is wanted; e.g. training.steps=50"),
    ("training.steps", "override 'training.steps': key=value is wanted; e.g. training.steps=50"),
    ("training..steps=3", "override 'training..steps=3': key=value is wanted; e.g. training.steps=50"),
    (
        "training.steps=[3",
        "override 'training.steps=[3': the value is not valid YAML: expected ',' or ']', but got '<stream end>'; "
        "put it in quotes",
    ),
    (
        "training.steps=!!int x",
        "override 'training.steps=!!int x': the value is not valid YAML: invalid literal for int() with base 10: 'x'; "
        "put it in quotes",
    ),
    (
        "training.steps.x=1",
        "override 'training.steps.x=1': training.steps is not a section; set it whole: training.steps=...",
    ),
    ("data.train.0.path=x", "override 'data.train.0.path=x': data.train is a list; give all of it: data.train=[...]"),
    # Keys that do not exist.
    ("paralel.tensor=2", "paralel: is not a key of the config; did you mean parallel?"),
    ("Training.steps=2", "Training: is not a key of the config; did you mean training?"),
    ("a.b.c.d=1", f"a: is not a key of the config; there are {SECTIONS}"),
    ("tensor=2", "tensor: is not a key of the config; did you mean parallel.tensor?"),
    ("parallel.tp=2", "parallel.tp: is not a key of the config; did you mean parallel.tensor?"),
    (
        "parallel.tensor_parallel_size=2",
        "parallel.tensor_parallel_size: is not a key of the config; did you mean parallel.tensor?",
    ),
    ("model.num_layer=2", "model.num_layer: is not a key of the config; did you mean model.num_layers?"),
    ("checkpoint.resume=atuo", "checkpoint.resume: there is nothing at 'atuo'; did you mean auto?"),
    ("schedule.lr=3", "schedule.lr: is not a key of the config; did you mean optimizer.lr?"),
    (
        "optimizer.learning_rate=3",
        "optimizer.learning_rate: is not a key of the config; did you mean optimizer.lr?",
    ),
    (
        "interval=3",
        "interval: is not a key of the config; did you mean checkpoint.interval or logging.interval?",
    ),
    (
        "data.train=[{path: a, wieght: 1}]",
        "data.train[0].wieght: is not a key of the config; did you mean data.train[0].weight?",
    ),
    ("run={3: 1}", "run.3: is not a key of the config; there are name, output_dir, seed"),
    # Wrong types.
    ("training=1", "training: a section with keys is wanted, not 1; indent its keys below it"),
    ("model=llama-7b", "model: a section with keys is wanted, not 'llama-7b'; write {preset: llama-7b}"),
    ("training.steps=", "training.steps: a whole number is wanted, not nothing; e.g. 1000"),
    ("training.steps=1.5", "training.steps: a whole number is wanted, not 1.5; use 1 or 2"),
    ("training.steps=true", "training.steps: a whole number is wanted, not true; e.g. 1000"),
    ("training.steps='5'", "training.steps: a whole number is wanted, not '5'; write 5 without quotes"),
    ("training.steps=0x10", "training.steps: a whole number is wanted, not '0x10'; e.g. 1000"),
    ("training.steps=1:30", "training.steps: a whole number is wanted, not '1:30'; e.g. 1000"),
    ("parallel.tensor=two", "parallel.tensor: a whole number is wanted, not 'two'; e.g. 1"),
    ("parallel.stage_layers=2", "parallel.stage_layers: a list is wanted, not 2; write [2]"),
    (
        "parallel.stage_layers=[1,x]",
        "parallel.stage_layers[1]: a whole number is wanted, not 'x'; give a whole number",
    ),
    ("optimizer.lr=[1,2]", "optimizer.lr: a number is wanted, not a list; e.g. 0.0003"),
    ("optimizer.lr='1e-3'", "optimizer.lr: a number is wanted, not '1e-3'; write 1e-3 without quotes"),
    ("optimizer.lr=inf", "optimizer.lr: a number is wanted, not 'inf'; e.g. 0.0003"),
    ("optimizer.lr=.nan", "optimizer.lr: nan is not a finite number; e.g. 0.0003"),
    ("optimizer.lr=1e999", "optimizer.lr: inf is not a finite number; e.g. 0.0003"),
    ("optimizer.betas=0.9", "optimizer.betas: a list is wanted, not 0.9; write [0.9]"),
    ("optimizer.betas=[0.9]", "optimizer.betas[1]: is missing; give a number"),
    ("optimizer.betas=[0.9,0.95,0.99]", "optimizer.betas: has 3 items; give 2"),
    ("logging.tensorboard='yes'", "logging.tensorboard: true or false is wanted, not 'yes'; write true or false"),
    ("logging.wandb=true", "logging.wandb: text is wanted, not true; write it in quotes, or null"),
    ("checkpoint.resume=no", "checkpoint.resume: text is wanted, not false; write it in quotes"),
    ("run.name=5", 'run.name: text is wanted, not 5; write it in quotes: "5"'),
    ("run.output_dir=''", "run.output_dir: is empty; give text"),
    ("data.train=corpus", "data.train: a list is wanted, not 'corpus'; write [{path: corpus}]"),
    ("data.train={path: a}", "data.train: a list is wanted, not a mapping; begin each of its items with a dash"),
    ("data.train=[]", "data.train: is empty; e.g. train: [{path: data/train}]"),
    ("data.train=[{weight: 1}]", "data.train[0].path: is missing; e.g. path: data/train"),
    # Out of range, or none of the choices.
    ("training.steps=-1", "training.steps: -1 is out of range; use a value at least 0"),
    (
        "training.steps=99999999999999999999999",
        "training.steps: 99999999999999999999999 is out of range; use a value at most 2147483647",
    ),
    ("parallel.tensor=0", "parallel.tensor: 0 is out of range; use a value at least 1"),
    ("run.seed=-1", "run.seed: -1 is out of range; use a value at least 0"),
    ("run.seed=1e30", "run.seed: a whole number is wanted, not 1e+30; e.g. 1234"),
    ("optimizer.eps=0", "optimizer.eps: 0 is out of range; use a value above 0"),
    ("optimizer.betas=[0.9,1.0]", "optimizer.betas[1]: 1.0 is out of range; use a value below 1"),
    ("training.precision=fp16", "training.precision: 'fp16' is none of bf16, fp32; did you mean bf16?"),
    (
        "training.precision=",
        "training.precision: one of bf16, fp32 is wanted, not nothing; e.g. bf16, or leave the key out",
    ),
    ("training.recompute=no", "training.recompute: false is none of none, selective, full; e.g. none"),
    ("optimizer.name=AdamW", "optimizer.name: 'AdamW' is none of adamw, adam, sgd, lion; did you mean adamw?"),
    ("optimizer.name=muon", "optimizer.name: 'muon' is none of adamw, adam, sgd, lion; e.g. adamw"),
    ("schedule.name=cosin", "schedule.name: 'cosin' is none of cosine, linear, wsd, constant; did you mean cosine?"),
    (
        "model.preset=tiny-lama",
        f"model.preset: there is no preset 'tiny-lama'; did you mean tiny-llama? (presets: {PRESETS})",
    ),
    ("model.preset=[a]", f"model.preset: a name is wanted, not a list; presets: {PRESETS}"),
    (
        "model.family=lama",
        "model.family: there is no family 'lama'; use one of gemma, gpt2, gpt_neox, llama, mistral, qwen2, qwen3",
    ),
    (
        "model.rope_scaling={factor: 8, low_freq: 2}",
        "model.rope_scaling.low_freq: is not a key of the config; did you mean model.rope_scaling.low_freq_factor?",
    ),
    (
        "model.rope_scaling={original_max_position_embeddings: 64}",
        "model.rope_scaling.factor: is missing; e.g. factor: 8.0",
    ),
    (
        "model.rope_scaling={factor: 8, low_freq_factor: 4}",
        "model.rope_scaling.high_freq_factor: 4.0 is out of range; use a value above 4",
    ),
    # Keys that contradict each other.
    (
        "schedule.warmup_steps=50",
        "schedule.warmup_steps: 50 is longer than the run, training.steps 10; use at most 10",
    ),
    (
        "training.validation_interval=5",
        "training.validation_interval: 5, but data.validation names no source; name one, or use 0",
    ),
    # Sizes and layouts that cannot be; test_layout.py has one for every rule.
    (
        "model.num_query_groups=3",
        "model.num_query_groups: 3 groups do not divide 4 heads; use 2 or 4",
    ),
    (
        "training.global_batch_size=7",
        "training.global_batch_size: 7 is not a multiple of micro_batch_size 1 × 2 data-parallel rank(s); use 6 or 8",
    ),
    (
        "data.sequence_length=1000",
        "data.sequence_length: 1000 is longer than model.max_position_embeddings 256; "
        "use at most 256, or raise model.max_position_embeddings",
    ),
    # DeepSpeed's file, before it is read.
    ("deepspeed=", "deepspeed: the path of a DeepSpeed JSON file is wanted, not nothing; e.g. zero1.json"),
    ("deepspeed.stage=3", "deepspeed: the path of a DeepSpeed JSON file is wanted, not a mapping; e.g. zero1.json"),
    (
        "deepspeed=zero_3.json",
        'deepspeed: no file "zero_3.json" beside the config, in the working folder or among the packaged files; '
        f"did you mean zero3.json? (packaged: {SHIPPED})",
    ),
    ("deepspeed=/nowhere/x", f'deepspeed: no file "/nowhere/x"; packaged: {SHIPPED}'),
    ("deepspeed=/", "deepspeed: '/' is a folder; name a JSON file in it"),
]


@pytest.mark.parametrize(("override", "message"), OVERRIDES, ids=[override for override, _ in OVERRIDES])
def test_a_bad_value_says_where_why_and_what_instead(override: str, message: str, tmp_path: Path) -> None:
    assert messages(tmp_path, overrides=(override,)) == [message]


def with_line(line: str) -> str:
    return GOOD + line + "\n"


FILES: list[tuple[str, str | bytes, list[str]]] = [
    ("empty", "", ["file: it is empty; it needs at least the sections model, data and training"]),
    (
        "a list",
        "- model\n",
        ["file: a mapping of sections is wanted, not a list; it needs at least the sections model, data and training"],
    ),
    (
        "text",
        "hello\n",
        ["file: a mapping of sections is wanted, not 'hello'; it needs at least the sections model, data and training"],
    ),
    ("tab", "model:\n\tpreset: x\n", [
        "line 2, column 1: not valid YAML: a tab; YAML is indented with spaces; mend it there"
    ]),
    ("UTF-16", GOOD.encode("utf-16"), ["file: it is not UTF-8 text (byte 0); save it as UTF-8"]),
    ("Latin-1", with_line("run: {name: caf\xe9}").encode("latin-1"), [
        "file: it is not UTF-8 text (byte 155); save it as UTF-8"
    ]),
    (
        "zero byte",
        GOOD.encode() + b"\0",
        ["file: not valid YAML: unacceptable character #x0000: special characters are not allowed; mend it"],
    ),
    ("key twice", with_line("run: {seed: 1, seed: 2}"), [
        "line 4, column 16: not valid YAML: the key 'seed' is given twice; mend it there"
    ]),
    ("section twice", GOOD + GOOD, ["line 4, column 1: not valid YAML: the key 'model' is given twice; mend it there"]),
    ("two documents", f"{GOOD}---\n{GOOD}", [
        "line 4, column 1: not valid YAML: a second document begins here; mend it there"
    ]),
    (
        "a Python object",
        with_line("run: !!python/object:os.system {}"),
        [
            "line 4, column 6: not valid YAML: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object:os.system'; mend it there"
        ],
    ),
    ("unknown alias", with_line("run: *other"), [
        "line 4, column 6: not valid YAML: found undefined alias 'other'; mend it there"
    ]),
    ("very deep", "a: " + "[" * 1000, ["file: not valid YAML: it is nested too deeply; mend it"]),
    ("itself inside itself", with_line("run: &run {name: *run}"), [
        "run.name: text is wanted, not a mapping; e.g. run"
    ]),
    (
        "one section only",
        "model:\n",
        [
            "model: the section is empty; it needs family, num_layers, hidden_size, num_attention_heads; or a preset",
            "data: the section is missing; it needs train, sequence_length",
            "training: the section is missing; it needs steps, global_batch_size",
        ],
    ),
    (
        "every section wrong",
        """\
run: {name: 1, sed: 3}
model: {preset: llama-1b, num_layers: none, hiden_size: 64}
data: {train: [a, {path: b, weight: 0}], sequence_length: -1}
parallel: {tensor: 2.5, pipline: 2}
training: {steps: ten, global_batch_size: 0}
optimizer: [adamw]
schedule: {name: warm}
deepspeed: zero9.json
checkpoint: {keep: true}
logging: {interval: 0}
zzz: 1
""",
        [
            f"zzz: is not a key of the config; there are {SECTIONS}",
            "run.name: text is wanted, not 1; write it in quotes: \"1\"",
            "run.sed: is not a key of the config; did you mean run.seed?",
            "model.hiden_size: is not a key of the config; did you mean model.hidden_size?",
            "model.num_layers: a whole number is wanted, not 'none'; e.g. 16",
            "data.sequence_length: -1 is out of range; use a value at least 1",
            "data.train[0]: a section with keys is wanted, not 'a'; write {path: a}",
            "data.train[1].weight: 0 is out of range; use a value above 0",
            "parallel.pipline: is not a key of the config; did you mean parallel.pipeline?",
            "parallel.tensor: a whole number is wanted, not 2.5; use 2 or 3",
            "training.global_batch_size: 0 is out of range; use a value at least 1",
            "training.steps: a whole number is wanted, not 'ten'; e.g. 1000",
            "optimizer: a section with keys is wanted, not a list; indent its keys below it",
            "schedule.name: 'warm' is none of cosine, linear, wsd, constant; e.g. cosine",
            'deepspeed: no file "zero9.json" beside the config, in the working folder or among the packaged files; '
            f"did you mean zero3.json? (packaged: {SHIPPED})",
            "checkpoint.keep: a whole number is wanted, not true; e.g. 0",
            "logging.interval: 0 is out of range; use a value at least 1",
        ],
    ),
    (
        "rules of every kind",
        """\
model: {family: gtp, num_layers: 2, hidden_size: 64, num_attention_heads: 6}
data: {train: [{path: a}], sequence_length: 4096}
parallel: {sequence_parallel: true, pipeline: 4, context: 2, stage_layers: [1, 1]}
training: {steps: 10, global_batch_size: 8, validation_interval: 1}
schedule: {warmup_steps: 11}
""",
        [
            f"model.family: there is no family 'gtp'; use one of {FAMILIES}",
            "model.num_attention_heads: 6 heads do not divide hidden_size 64; use 4 or 8, or set model.head_dim",
            "data.sequence_length: 4096 is longer than model.max_position_embeddings 2048; "
            "use at most 2048, or raise model.max_position_embeddings",
            "parallel.context: context parallelism is not built yet; use 1",
            "parallel.sequence_parallel: it cuts the sequence over the tensor-parallel group, which has one rank; "
            "use false, or set parallel.tensor to 2 or more",
            "parallel.stage_layers: 2 numbers for 4 stages; use e.g. [0, 1, 1, 0]",
            "parallel.tensor: tensor 1 × pipeline 4 = 4 does not divide 2 rank(s); "
            "start a multiple of 4 ranks (4), or use a product of 2",
            "training.validation_interval: 1, but data.validation names no source; name one, or use 0",
            "schedule.warmup_steps: 11 is longer than the run, training.steps 10; use at most 10",
        ],
    ),
    (
        "a wrong preset hides nothing else of its section",
        GOOD.replace("tiny-llama", "none-such").replace("vocab_size: 100", "vocab_size: 1, heads: 3"),
        [
            "model.heads: is not a key of the config; did you mean model.num_attention_heads?",
            f"model.preset: there is no preset 'none-such'; presets: {PRESETS}",
            "model.vocab_size: 1 is out of range; use a value at least 2",
        ],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), [row[1:] for row in FILES], ids=[row[0] for row in FILES])
def test_a_bad_file_says_all_that_is_wrong_with_it(text: str | bytes, expected: list[str], tmp_path: Path) -> None:
    assert messages(tmp_path, text) == expected


def test_a_huge_number_is_refused_at_once(tmp_path: Path) -> None:
    huge = 2**31 - 1
    overrides = (f"model.hidden_size={huge}", f"parallel.pipeline={huge}", "parallel.stage_layers=[2]")
    found = messages(tmp_path, overrides=overrides)
    assert f"parallel.stage_layers: 1 numbers for {huge} stages; give {huge} numbers that add up to 2" in found
    assert max(map(len, found)) < 300


ZERO = {"stage": 2}
DEEPSPEED: list[tuple[str, Any, list[str]]] = [
    ("empty", "", ['{path}: it is empty; e.g. {"zero_optimization": {"stage": 1}}']),
    ("not JSON", "{stage: 1}", [
        "{path}: not valid JSON at line 1, column 2: Expecting property name enclosed in double quotes; mend it there"
    ]),
    ("a list", [1], ['{path}: a JSON object is wanted, not [1]; e.g. {"zero_optimization": {"stage": 1}}']),
    ("NaN", '{"gradient_clipping": NaN}', ["{path}: not valid JSON: NaN is no JSON number; mend it"]),
    ("key twice", '{"a": 1, "a": 2}', ["{path}: not valid JSON: the key 'a' is given twice; mend it"]),
    ("very deep", "[" * 100_000, ["{path}: not valid JSON: it is nested too deeply; mend it"]),
    ("unknown key", {"zero_optimisation": ZERO}, [
        "ds.json: zero_optimisation: is not a DeepSpeed key that llmscale knows; did you mean zero_optimization?"
    ]),
    ("unknown inner key", {"zero_optimization": {"stages": 2}}, [
        "ds.json: zero_optimization.stages: is not a DeepSpeed key that llmscale knows; did you mean stage?"
    ]),
    ("unknown innermost key", {"zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}}, [
        "ds.json: zero_optimization.offload_optimizer.devise: is not a DeepSpeed key that llmscale knows; "
        "did you mean device?"
    ]),
    ("a section that is none", {"zero_optimization": 2}, [
        'ds.json: zero_optimization: a JSON object is wanted, not 2; e.g. {"stage": ...}'
    ]),
    ("wrong types", {"zero_optimization": {
        "stage": "2", "overlap_comm": True, "contiguous_gradients": "yes", "reduce_bucket_size": 1.5
    }}, [
        "ds.json: zero_optimization.contiguous_gradients: true or false is wanted, not \"yes\"; change it",
        "ds.json: zero_optimization.reduce_bucket_size: a whole number is wanted, not 1.5; change it",
        "ds.json: zero_optimization.stage: a whole number is wanted, not \"2\"; change it",
    ]),
    ("no stage", {"zero_optimization": {"stage": 4}}, [
        "ds.json: zero_optimization.stage: 4 is no ZeRO stage; use 0, 1, 2 or 3"
    ]),
    ("overlap", {"zero_optimization": {"stage": 1, "overlap_comm": True}}, [
        "ds.json: zero_optimization.overlap_comm: cannot be true under stage 1; use false, or stage 2 or 3"
    ]),
    ("offload to nvme", {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, [
        "ds.json: zero_optimization.offload_optimizer.device: NVMe is not supported: what lies there cannot be saved "
        "in llmscale's checkpoints; use cpu"
    ]),
    ("offload to nowhere", {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "disk"}}}, [
        "ds.json: zero_optimization.offload_optimizer.device: 'disk' is no device to offload to; use none or cpu"
    ]),
    ("offload of parameters", {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, [
        "ds.json: zero_optimization.offload_param: parameters on the CPU are not supported: Megatron's layers want "
        "them on the device; remove it; offload_optimizer works"
    ]),
    ("offload without partitions", {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, [
        "ds.json: zero_optimization.offload_optimizer: needs stage 1 or higher; use stage 1, 2 or 3, or remove it"
    ]),
    ("fp16", {"fp16": {"enabled": True}}, [
        "ds.json: fp16.enabled: true, and llmscale needs false: fp16 with loss scaling is not built; "
        'use training.precision bf16; use "auto" or false'
    ]),
    ("accumulation", {"gradient_accumulation_steps": 4}, [
        "ds.json: gradient_accumulation_steps: 4, and llmscale needs 1: Megatron's schedule accumulates, and divides "
        'by the micro-batches; use "auto" or 1'
    ]),
    ("a scheduler", {"scheduler": {"type": "WarmupLR"}}, [
        "ds.json: scheduler: llmscale does not use it: the learning rate is the run's: see the section schedule; "
        "remove it"
    ]),
    ("contradictions", {
        "train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.5,
        "bf16": {"enabled": False}, "optimizer": {"type": "Adam", "params": {"lr": 1e-4, "betas": [0.9, 0.999]}},
    }, [
        "ds.json: bf16.enabled: false, but training.precision is bf16; use \"auto\", or change training.precision",
        "ds.json: gradient_clipping: 0.5, but training.gradient_clipping is 1.0; "
        "use \"auto\", or change training.gradient_clipping",
        "ds.json: optimizer.params.betas: [0.9, 0.999], but optimizer.betas is [0.9, 0.95]; "
        "use \"auto\", or change optimizer.betas",
        "ds.json: optimizer.params.lr: 0.0001, but optimizer.lr is 0.0003; use \"auto\", or change optimizer.lr",
        "ds.json: optimizer.type: \"Adam\", but optimizer.name is adamw; use \"auto\", or change optimizer.name",
        "ds.json: train_batch_size: 16, but training.global_batch_size is 8; "
        "use \"auto\", or change training.global_batch_size",
        "ds.json: train_micro_batch_size_per_gpu: 4, but training.micro_batch_size is 1; "
        "use \"auto\", or change training.micro_batch_size",
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), [row[1:] for row in DEEPSPEED], ids=[row[0] for row in DEEPSPEED])
def test_a_bad_deepspeed_file_says_all_that_is_wrong_with_it(content: Any, expected: list[str], tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    found = messages(tmp_path, overrides=("deepspeed=ds.json",))
    assert sorted(found) == [f"deepspeed: {message.replace('{path}', str(path))}" for message in expected]


def test_deepspeeds_errors_stand_beside_those_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"train_batch_size": 16, "zero_optimization": {"stage": 7}}')
    found = messages(tmp_path, overrides=("deepspeed=ds.json", "optimizer.lr=-1", "parallel.tensor=3"))
    assert [message.split(":")[0] for message in found] == [
        "parallel.tensor", "parallel.tensor", "parallel.tensor", "optimizer.lr", "deepspeed", "deepspeed"
    ]  # fmt: skip


class TestFilesThatCannotBeRead:
    """What a shell hands over in place of a config."""

    def message(self, path: Path) -> str:
        with pytest.raises(ConfigError) as error:
            load(path)
        return str(error.value)

    def test_no_such_file(self, tmp_path: Path) -> None:
        (tmp_path / "run.yaml").write_text(GOOD)
        near = self.message(tmp_path / "run.yml")
        assert near == f"{tmp_path}/run.yml: file: there is no such file; did you mean {tmp_path}/run.yaml?"
        far = self.message(tmp_path / "gone" / "x.yaml")
        assert far == f"{tmp_path}/gone/x.yaml: file: there is no such file; check the path"

    def test_a_folder(self, tmp_path: Path) -> None:
        assert self.message(tmp_path).endswith(": file: it cannot be read: Is a directory; name a readable YAML file")

    def test_a_file_in_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "run.yaml").write_text(GOOD)
        assert ": file: it cannot be read: Not a directory; " in self.message(tmp_path / "run.yaml" / "x")

    def test_a_link_to_itself(self, tmp_path: Path) -> None:
        link = tmp_path / "run.yaml"
        link.symlink_to(link)
        assert ": file: it cannot be read: Too many levels of symbolic links; " in self.message(link)
        (tmp_path / "ds.json").symlink_to(tmp_path / "ds.json")
        (tmp_path / "good.yaml").write_text(with_line("deepspeed: ds.json"))
        assert 'deepspeed: no file "ds.json"' in self.message(tmp_path / "good.yaml")

    def test_a_name_longer_than_names_may_be(self, tmp_path: Path) -> None:
        assert ": file: it cannot be read: File name too long; " in self.message(tmp_path / ("x" * 300))
        (tmp_path / "good.yaml").write_text(with_line(f"deepspeed: {'x' * 300}"))
        assert 'deepspeed: no file "xxx' in self.message(tmp_path / "good.yaml")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_a_file_of_another(self, tmp_path: Path) -> None:
        path = tmp_path / "run.yaml"
        path.write_text(GOOD)
        path.chmod(0)
        assert ": file: it cannot be read: Permission denied; " in self.message(path)


class TestCommandLine:
    def test_prints_every_problem_and_no_traceback_and_leaves_nothing(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("bad.yaml").write_text(with_line("run: {output_dir: out, nme: x}"))
        with pytest.raises(SystemExit) as end:
            main(["pretrain", "bad.yaml", "parallel.tensor=3", "training.steps=ten"])
        printed = capfd.readouterr()
        assert end.value.code == 2
        assert printed.out == ""
        assert printed.err.splitlines() == [
            "error: bad.yaml: run.nme: is not a key of the config; did you mean run.name?",
            "error: bad.yaml: training.steps: a whole number is wanted, not 'ten'; e.g. 1000",
        ]
        assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]

    @pytest.mark.parametrize("arguments", [["gone.yaml"], ["."], ["bad.yaml", "x"], ["bad.yaml", ""], []])
    def test_wrong_use_is_exit_code_2_and_one_line(
        self, arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("bad.yaml").write_text(GOOD)
        with pytest.raises(SystemExit) as end:
            main(["pretrain", *arguments])
        assert end.value.code == 2
        assert [line[:7] for line in capfd.readouterr().err.splitlines()] == ["error: "]


def test_odd_but_good_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    odd = {
        "Windows": GOOD.replace("\n", "\r\n").encode(),
        "byte order mark": b"\xef\xbb\xbf" + GOOD.encode(),
        "JSON": json.dumps(yaml.safe_load(GOOD)).encode(),
        "sections without keys": (GOOD + "run:\nlogging:\n").encode(),
        "merge key": GOOD.replace("{preset", "{<<: {preset: llama-7b, num_layers: 2}, preset").encode(),
    }
    for name, content in odd.items():
        path.write_bytes(content)
        assert load(path, [], 2, problems).model.num_layers == 2, name
