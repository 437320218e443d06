"""The layout matrix: every layout of the table trains as one process of plain PyTorch does.

Through the public path: a YAML file and the command line in, metrics.jsonl and a checkpoint out. Tolerances are those
of docs/design.md: fp32 loss and gradient norm 1e-5 relative, weights 5e-5; bf16 see BF16_TOLERANCE.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from llmscale.checkpoint.format import Checkpoint
from llmscale.config.schema import RunConfig
from llmscale.data.stream import Stream
from tests.distributed import reference
from tests.distributed.layouts import BF16, FP32, Case
from tests.distributed.processes import command, in_processes

STEPS, BATCH, SEQUENCE, VOCAB = 5, 8, 16, 100


def run_config(case: Case, data: Path, output: Path, precision: str, batch: int = BATCH) -> dict[str, Any]:
    zero = f"zero{case.zero}{'_offload' if case.offload else ''}.json"
    if case.offload and case.zero == 1:
        # DeepSpeed offloads under stage 1 too; no such file is shipped, so this is a user's own.
        own = output.parent / f"own-{output.name}.json"
        own.write_text(json.dumps({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}))
        zero = str(own)
    return {
        "run": {"output_dir": str(output), "seed": 7},
        "model": {
            "family": case.family, "num_layers": 9 if case.pipeline * case.virtual_pipeline == 8 else 5,
            "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64,
            # Grouped queries for the Llama-like, as far as tensor parallelism can share the groups.
            "num_query_groups": max(2, case.tensor) if case.family == "llama" else 4,
            "vocab_size": VOCAB, "max_position_embeddings": SEQUENCE, "tie_embeddings": case.tied, "init_std": 0.1,
        },
        "data": {"train": [{"path": str(data)}], "sequence_length": SEQUENCE, "mask_documents": case.mask},
        "parallel": {
            "tensor": case.tensor, "sequence_parallel": case.sequence_parallel,
            "pipeline": case.pipeline, "virtual_pipeline": case.virtual_pipeline,
        },
        "training": {
            "steps": STEPS, "global_batch_size": batch, "micro_batch_size": 2 if case.mask else 1,
            "precision": precision, "gradient_clipping": 0.5, "recompute": case.recompute,
        },
        # The gradient of a key's bias is zero (softmax does not see it): what is left is rounding, 1e-9, which Adam
        # would blow up to a whole step with its usual epsilon of 1e-8.
        "optimizer": {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-5},
        "schedule": {"name": "cosine", "warmup_steps": 2},
        "deepspeed": zero,
        "checkpoint": {"interval": STEPS},
        "logging": {"tensorboard": False},
    }  # fmt: skip


def train(config: dict[str, Any], world_size: int, folder: Path) -> tuple[list[dict[str, Any]], Checkpoint]:
    """Run a config through the command line. Returns its rows of metrics, and its last checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{Path(config['run']['output_dir']).name}.yaml"
    path.write_text(yaml.safe_dump(config))
    outcomes = in_processes(world_size, command, "pretrain", str(path))
    assert [outcome.exit_code for outcome in outcomes] == [0] * world_size, outcomes[0].output[-3000:]
    output = Path(config["run"]["output_dir"])
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return rows, Checkpoint(output / "checkpoints" / f"step_{config['training']['steps']:08d}")


def batches(config: RunConfig) -> Iterator[torch.Tensor]:
    stream = Stream([(config.data.train[0].path, 1.0)], config.data.sequence_length, config.run.seed)
    size = config.training.global_batch_size
    for step in range(config.training.steps):
        yield torch.from_numpy(np.asarray(stream.read(range(step * size, (step + 1) * size))))


@cache
def expected(text: str) -> tuple[list[reference.ReferenceStep], reference.Weights]:
    config = RunConfig.model_validate(json.loads(text))
    return reference.train(config, batches(config))


def reference_of(config: dict[str, Any]) -> tuple[list[reference.ReferenceStep], reference.Weights]:
    """The reference of a config: what the layout, the DeepSpeed file and the output folder cannot change."""
    left_out = {key: value for key, value in config.items() if key not in ("parallel", "deepspeed", "run")}
    left_out["training"] = {**config["training"], "recompute": "none"}
    return expected(json.dumps({**left_out, "run": {"seed": config["run"]["seed"]}}, sort_keys=True))


def assert_fp32(
    rows: list[dict[str, Any]], checkpoint: Checkpoint, steps: list[reference.ReferenceStep], weights: reference.Weights
) -> None:
    assert len(rows) == len(steps)
    for row, step in zip(rows, steps, strict=True):
        assert row["loss"] == pytest.approx(step.loss, rel=1e-5)
        assert row["grad_norm"] == pytest.approx(step.grad_norm, rel=1e-5)
        assert step.grad_norm > 0.5, "clipping must be at work"
    assert set(checkpoint.index) == set(weights)
    for name, weight in weights.items():
        torch.testing.assert_close(checkpoint.whole(name), weight, rtol=0, atol=5e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", FP32, ids=str)
def test_fp32_layout_trains_as_the_reference(case: Case, corpus: Path, short_documents: Path, tmp_path: Path) -> None:
    config = run_config(case, short_documents if case.mask else corpus, tmp_path / "run", "fp32")
    rows, checkpoint = train(config, case.world_size, tmp_path)
    assert_fp32(rows, checkpoint, *reference_of(config))


# bf16: one flipped bit of a bf16 weight is 4e-3 of it, and Adam makes much of it a step later, so weights are
# compared by the size of the whole update, ||w - w_ref|| / ||w_ref - w_0||. Until the first bit flips the arithmetic
# is the reference's own: without tensor parallelism, which rounds partial sums to bf16 before they are added, the
# first step's gradient must agree to fp32 rounding, ||g - g_ref|| / ||g_ref||; Adam's first moment of a checkpoint
# shows it. Gradients added in bf16 would be far off that, see the test below.
BF16_TOLERANCE = {"loss": 1e-3, "norm": 4e-2, "update": 6e-2, "first gradient": 1e-5, "first gradient, cut": 3e-2}


def assert_bf16(config: dict[str, Any], case: Case, folder: Path) -> None:
    config["checkpoint"]["interval"] = 1
    rows, checkpoint = train(config, case.world_size, folder)
    steps, weights = reference_of(config)
    for row, step in zip(rows, steps, strict=True):
        assert row["loss"] == pytest.approx(step.loss, rel=BF16_TOLERANCE["loss"])
        assert row["grad_norm"] == pytest.approx(step.grad_norm, rel=BF16_TOLERANCE["norm"])
    first, decay = Checkpoint(checkpoint.path.with_name("step_00000001")), RunConfig.model_validate(config).optimizer
    found = {name: first.whole(name, "exp_avg") / (1 - decay.betas[0]) for name in weights}
    tolerance = BF16_TOLERANCE["first gradient" if case.tensor == 1 else "first gradient, cut"]
    assert distance(found, steps[0].gradients) < tolerance
    initial = reference.initial_weights(RunConfig.model_validate(config))
    error = sum((checkpoint.whole(name) - weight).square().sum() for name, weight in weights.items())
    update = sum((weight - initial[name].bfloat16()).square().sum() for name, weight in weights.items())
    assert float(error / update) ** 0.5 < BF16_TOLERANCE["update"]


def distance(found: reference.Weights, wanted: reference.Weights) -> float:
    """||found - wanted|| / ||wanted||, over all weights together."""
    error = sum(float((found[name].double() - part).square().sum()) for name, part in wanted.items())
    return (error / sum(float(part.double().square().sum()) for part in wanted.values())) ** 0.5


@pytest.mark.parametrize("case", BF16, ids=str)
def test_bf16_layout_trains_as_the_reference(case: Case, corpus: Path, short_documents: Path, tmp_path: Path) -> None:
    data = short_documents if case.mask else corpus
    assert_bf16(run_config(case, data, tmp_path / "run", "bf16"), case, tmp_path)


@pytest.mark.parametrize("case", [Case(1, False, 1, 1, 1, zero=1), Case(1, False, 2, 1, 1, zero=2)], ids=str)
def test_bf16_gradients_of_64_micro_batches_add_up_in_fp32(case: Case, corpus: Path, tmp_path: Path) -> None:
    assert_bf16(run_config(case, corpus, tmp_path / "run", "bf16", batch=64), case, tmp_path)


@pytest.mark.parametrize("batch", [BATCH, 64])
def test_the_bf16_reference_can_tell_in_what_type_gradients_are_added(batch: int, corpus: Path, tmp_path: Path) -> None:
    config = RunConfig.model_validate(run_config(Case(), corpus, tmp_path / "run", "bf16", batch=batch))
    config = config.model_copy(update={"training": config.training.model_copy(update={"steps": 2})})
    fp32, bf16 = (reference.train(config, batches(config), kind)[0][0] for kind in (torch.float32, torch.bfloat16))
    assert distance(bf16.gradients, fp32.gradients) > 100 * BF16_TOLERANCE["first gradient"]


def test_initial_weights_are_equal_on_every_layout(corpus: Path, tmp_path: Path) -> None:
    cases = [Case(), Case(2, True, 2), Case(1, False, 2, 2, 1, zero=3), Case(4), Case(1, False, 1, 1, 2, zero=2)]
    found = []
    for number, case in enumerate(cases):
        config = run_config(replace(case, family="gpt2"), corpus, tmp_path / f"run{number}", "fp32")
        config["training"]["steps"] = 0
        config["schedule"]["warmup_steps"] = 0
        _, checkpoint = train(config, case.world_size, tmp_path)
        found.append({name: checkpoint.whole(name) for name in checkpoint.weights})
    drawn = reference.initial_weights(RunConfig.model_validate(config))
    for weights in found:
        assert weights.keys() == drawn.keys()
        assert all(torch.equal(weights[name], drawn[name]) for name in drawn)


def test_two_runs_of_one_config_are_equal_bit_for_bit(corpus: Path, tmp_path: Path) -> None:
    config = run_config(Case(2, True, 1, 1, 2, zero=2), corpus, tmp_path / "one", "bf16")
    config["model"]["dropout"] = 0.1
    first, one = train(config, 4, tmp_path)
    config["run"]["output_dir"] = str(tmp_path / "two")
    second, two = train(config, 4, tmp_path)
    assert [(r["loss"], r["grad_norm"]) for r in first] == [(r["loss"], r["grad_norm"]) for r in second]
    assert all(torch.equal(one.whole(name), two.whole(name)) for name in one.weights)
