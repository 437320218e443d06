"""Work-arounds for Megatron-core, DeepSpeed and torch, each test named after the symptom that it keeps away.

Versions that need them: megatron-core 0.16.1 and 0.19.2, deepspeed 0.19.8, torch 2.11 and 2.13 on CPUs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.distributed.layouts import Case
from tests.distributed.processes import command, in_processes
from tests.distributed.test_matrix import run_config


def _norm_of_a_long_gradient() -> tuple[float, float]:
    """llmscale's norm and torch's fp64 norm of one gradient of 2^23 numbers."""
    from llmscale.distributed import cpu
    from llmscale.distributed.groups import form_groups
    from llmscale.distributed.launch import Launch, device_of, leave, start
    from llmscale.distributed.layout import Layout
    from llmscale.training.gradients import GradientBuffers, complete

    launch = Launch.from_environment()
    start(launch, device_of(launch))
    cpu.redirect()
    gradient = torch.randn(1 << 23, generator=torch.Generator().manual_seed(0))
    exact = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
    with form_groups(Layout(1, 1, 1, 1, False, (1,), 1), seed=0) as groups:
        norm = complete([GradientBuffers("cut", [gradient])], groups, clip=0.0)
    leave()
    return norm, exact


def test_torchs_fp32_norm_on_a_cpu_is_off_over_long_gradients() -> None:
    (outcome,) = in_processes(1, _norm_of_a_long_gradient)
    norm, exact = outcome.result
    assert norm == pytest.approx(exact, rel=1e-7)
    # What the work-around is for: when torch mends this, it can go.
    gradient = torch.randn(1 << 23, generator=torch.Generator().manual_seed(0))
    assert float(torch.linalg.vector_norm(gradient)) != pytest.approx(exact, rel=1e-6)


def _flags(config: dict[str, Any], zero_stage: int) -> tuple[bool, bool, bool]:
    from llmscale.config.schema import RunConfig
    from llmscale.distributed import cpu
    from llmscale.distributed.layout import Layout
    from llmscale.models.family import families
    from llmscale.models.transformer import transformer_config

    cpu.redirect()
    parsed = RunConfig.model_validate(config)
    layout = Layout.of(parsed, 4, zero_stage)
    megatron = transformer_config(parsed.model, families()[parsed.model.family], parsed.training, layout)
    return megatron.overlap_p2p_comm, megatron.batch_p2p_comm, megatron.deallocate_pipeline_outputs


def test_batched_messages_swap_activations_between_two_interleaved_stages(tmp_path: Path) -> None:
    config = run_config(Case(1, False, 2, 2, 2), tmp_path, tmp_path / "run", "fp32")
    (outcome,) = in_processes(1, _flags, config, 1)
    assert outcome.result == (True, False, False)


def test_zero3_needs_pipeline_outputs_that_are_kept(tmp_path: Path) -> None:
    config = run_config(Case(1, False, 2, 1, 2, zero=3), tmp_path, tmp_path / "run", "fp32")
    (outcome,) = in_processes(1, _flags, config, 3)
    assert outcome.result[2] is False


def test_deepspeed_compiles_an_operator_at_start_up(corpus: Path, tmp_path: Path) -> None:
    """On a machine without a C++ compiler the run starts all the same, and nothing is built."""
    config = run_config(Case(), corpus, tmp_path / "run", "bf16")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    built = tmp_path / "extensions"
    variables = {"TORCH_EXTENSIONS_DIR": str(built), "PATH": os.devnull, "CXX": "/nonexistent"}
    (outcome,) = in_processes(1, command, "pretrain", str(tmp_path / "run.yaml"), environment=lambda rank: variables)
    assert outcome.exit_code == 0, outcome.output
    assert not built.exists()
    assert "built successfully" not in outcome.output


def test_mpi_discovery_is_never_tried(corpus: Path, tmp_path: Path) -> None:
    """Without RANK and WORLD_SIZE DeepSpeed asks mpi4py, which is not there."""
    config = run_config(Case(), corpus, tmp_path / "run", "fp32")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    (outcome,) = in_processes(1, _without_launcher, str(tmp_path / "run.yaml"))
    assert outcome.exit_code == 0, outcome.output
    assert "started by single" in outcome.output


def _without_launcher(path: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)
    command("pretrain", path)
