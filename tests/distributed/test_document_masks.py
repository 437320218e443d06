"""With `mask_documents` a document is read as if it stood alone: whatever is packed beside it, on whatever layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from llmscale.config.schema import RunConfig
from llmscale.data.stream import Stream
from tests.distributed import reference
from tests.distributed.layouts import Case
from tests.distributed.processes import command, in_processes
from tests.distributed.reference import END_OF_DOCUMENT
from tests.distributed.test_matrix import VOCAB, run_config, train
from tests.distributed.test_validation import rows_of

A = [17, 4, 81, 81, 5, 33, 60, END_OF_DOCUMENT]
B = [9, 2, END_OF_DOCUMENT]
C = [50, 51, 52, 53, END_OF_DOCUMENT]


def _logits(config: dict[str, Any], batches: list[list[list[int]]], masked: bool) -> list[np.ndarray] | None:
    """This rank's part of the logits of each batch, [micro_batch, sequence, padded_vocab / tensor]; None where the
    model does not end."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from llmscale.distributed import cpu
    from llmscale.distributed.groups import form_groups
    from llmscale.distributed.launch import Launch, device_of, leave, start
    from llmscale.distributed.layout import Layout
    from llmscale.models.family import families
    from llmscale.models.packing import Packing
    from llmscale.models.stage import build_stages

    launch = Launch.from_environment()
    device = device_of(launch)
    start(launch, device)
    cpu.redirect()
    run = RunConfig.model_validate(config)
    found = []
    with form_groups(Layout.of(run, launch.world_size, 1), run.run.seed) as groups, torch.no_grad():
        (stage,) = build_stages(run.model, families()[run.model.family], run.training, groups, run.run.seed)
        stage.eval()
        for rows in batches:
            tokens = torch.tensor(rows)
            packing = Packing.of(tokens, END_OF_DOCUMENT, device) if masked else None
            found += get_forward_backward_func()(
                forward_step_func=_forward_step,
                data_iterator=iter([(tokens, packing)]),
                model=stage,
                num_microbatches=1,
                seq_length=tokens.shape[1],
                micro_batch_size=tokens.shape[0],
                forward_only=True,
                collect_non_loss_data=True,
            )
    leave()
    return [logits.transpose(0, 1).numpy() for logits in found] or None


def _forward_step(batches: Any, model: Any) -> Any:
    tokens, packing = next(batches)
    return model(tokens, packing=packing), lambda output, non_loss_data: output


def logits(case: Case, folder: Path, batches: list[list[list[int]]], masked: bool) -> list[torch.Tensor]:
    """Of the whole vocabulary, [micro_batch, sequence, vocab], of each batch."""
    config = run_config(case, folder, folder / "run", "fp32")
    config["model"]["max_position_embeddings"] = 32
    ranks = [outcome.result for outcome in in_processes(case.world_size, _logits, config, batches, masked)]
    parts = [result for result in ranks if result is not None]
    assert len(parts) == case.tensor
    return [torch.from_numpy(np.concatenate(part, -1)[..., :VOCAB]) for part in zip(*parts, strict=True)]


@pytest.mark.parametrize(
    "case", [Case(), Case(family="gpt2"), Case(2, True, 2), Case(2, True, 2, family="gpt2")], ids=str
)
def test_what_is_packed_beside_a_document_does_not_change_its_logits(case: Case, tmp_path: Path) -> None:
    packed = [[*B, *C, *A], [*A, *C, *B], [*C, *A, *B], [*B, *B, *B, 1, 2, 3, 4, 5, 6, 7]]
    places = [8, 0, 5]
    together, alone = logits(case, tmp_path, [packed, [A]], masked=True)
    (plain,) = logits(case, tmp_path, [[A]], masked=False)
    for row, place in enumerate(places):
        torch.testing.assert_close(together[row, place : place + len(A)], plain[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(alone, plain, rtol=0, atol=2e-6)
    # The test can fail: without masks the neighbours are seen, but for a document at the start.
    (mixed,) = logits(case, tmp_path, [packed], masked=False)
    changes = [float((mixed[row, place : place + len(A)] - plain[0]).abs().max()) for row, place in enumerate(places)]
    assert changes[0] > 1e-2 and changes[1] < 2e-6 and changes[2] > 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_validation_reads_inside_documents_too(family: str, short_documents: Path, tmp_path: Path) -> None:
    config = run_config(Case(1, False, 2, family=family, mask=True), short_documents, tmp_path / "run", "fp32")
    config["data"]["validation"] = [{"path": str(short_documents)}]
    config["training"] |= {"validation_interval": 5, "validation_batches": 1}
    _, checkpoint = train(config, 2, tmp_path)
    ((_, found),) = rows_of(config, "validation_loss")
    run = RunConfig.model_validate(config)
    stream = Stream([(str(short_documents), 1.0)], run.data.sequence_length, run.run.seed)
    tokens = torch.from_numpy(np.asarray(stream.read(range(run.training.global_batch_size))))
    scores = reference.forward({name: checkpoint.whole(name) for name in checkpoint.index}, run, tokens[:, :-1])
    assert found == pytest.approx(float(F.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten())), rel=1e-5)


def test_the_start_report_names_the_kernel(short_documents: Path, tmp_path: Path) -> None:
    config = run_config(Case(mask=True), short_documents, tmp_path / "run", "bf16")
    config["training"]["steps"], config["schedule"]["warmup_steps"] = 1, 0
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    (outcome,) = in_processes(1, command, "pretrain", str(path))
    assert outcome.exit_code == 0, outcome.output
    assert "inside documents: torch scaled_dot_product_attention" in outcome.output
