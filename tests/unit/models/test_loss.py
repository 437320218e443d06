"""The blockwise cross entropy against torch's, on one process and several that each hold part of the vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F

from llmscale.models import loss
from llmscale.models.loss import cross_entropy

SEQUENCE, BATCH = 7, 3


def case(vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels and the gradient of the losses."""
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(SEQUENCE, BATCH, vocab, generator=generator) * 5).to(dtype)
    labels = torch.randint(vocab, (SEQUENCE, BATCH), generator=generator)
    labels[0], labels[1] = 0, vocab - 1
    return logits, labels, torch.rand(SEQUENCE, BATCH, generator=generator)


def expected(logits: torch.Tensor, labels: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and the gradient of the logits, by torch in fp64."""
    leaf = logits.double().requires_grad_()
    losses = F.cross_entropy(leaf.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    losses.backward(gradient)
    assert leaf.grad is not None
    return losses.detach(), leaf.grad


def computed(
    logits: torch.Tensor, labels: torch.Tensor, gradient: torch.Tensor, group: dist.ProcessGroup | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by `cross_entropy`, over an output that autograd made, as a linear layer's is."""
    leaf = logits.clone().requires_grad_()
    losses = cross_entropy(leaf * 1, labels, group)
    losses.backward(gradient)
    assert leaf.grad is not None
    return losses.detach(), leaf.grad


# A rounding of bf16 is 2^-9 relative; gradients are below 1.
TOLERANCES = {torch.float32: (1e-6, 1e-6), torch.bfloat16: (1e-6, 2**-9)}


@pytest.mark.parametrize("block", [1, 64, 1 << 17], ids=lambda size: f"block{size}")
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_equals_torch(dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.BLOCK, "cpu", block)
    logits, labels, gradient = case(33, dtype)
    ours, theirs = computed(logits, labels, gradient), expected(logits, labels, gradient)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    for mine, true, tolerance in zip(ours, theirs, TOLERANCES[dtype], strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=tolerance, atol=tolerance)


def test_padding_takes_no_part() -> None:
    logits, labels, gradient = case(33, torch.float32)
    padded = F.pad(logits, (0, 15), value=-torch.inf)
    losses, slope = computed(padded, labels, gradient)
    whole = computed(logits, labels, gradient)
    torch.testing.assert_close(losses, whole[0])
    torch.testing.assert_close(slope[..., :33], whole[1])
    assert (slope[..., 33:] == 0).all()


def test_large_logits_stay_finite() -> None:
    logits, labels, gradient = case(33, torch.float32)
    losses, slope = computed(logits * 1e4, labels, gradient)
    assert losses.isfinite().all() and slope.isfinite().all()


def test_labels_may_be_a_transposed_view() -> None:
    logits, labels, gradient = case(33, torch.float32)
    view = labels.t().contiguous().t()
    assert not view.is_contiguous()
    torch.testing.assert_close(computed(logits, view, gradient), computed(logits, labels, gradient))


def test_evaluation_leaves_the_logits_alone() -> None:
    logits, labels, _ = case(33, torch.float32)
    before = logits.clone()
    with torch.no_grad():
        cross_entropy(logits, labels, None)
    assert torch.equal(logits, before)


# The vocabulary 33 over ranks of 16: with three the last rank holds one id and 15 columns of padding; with four the
# last one holds padding alone.
@pytest.mark.parametrize("ranks", [3, 4])
def test_over_ranks(ranks: int, tmp_path: Path) -> None:
    multiprocessing.spawn(_on_rank, (ranks, str(tmp_path / "store")), nprocs=ranks)


def _on_rank(rank: int, ranks: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    assert dist.group.WORLD is not None
    for dtype, (loss_tolerance, tolerance) in TOLERANCES.items():
        logits, labels, gradient = case(33, dtype)
        padded = F.pad(logits, (0, 16 * ranks - 33), value=-torch.inf)
        mine = slice(16 * rank, 16 * rank + 16)
        losses, slope = computed(padded[..., mine].contiguous(), labels, gradient, dist.group.WORLD)
        true_losses, true_slope = expected(logits, labels, gradient)
        true_slope = F.pad(true_slope, (0, 16 * ranks - 33))[..., mine]
        torch.testing.assert_close(losses.double(), true_losses, rtol=loss_tolerance, atol=loss_tolerance)
        torch.testing.assert_close(slope.double(), true_slope, rtol=tolerance, atol=tolerance)
    dist.destroy_process_group()
