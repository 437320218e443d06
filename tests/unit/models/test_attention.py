"""Attention inside documents is attention under the dense mask that it does not build."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch._subclasses.fake_tensor import FakeTensorMode

from llmscale.models import attention
from llmscale.models.attention import CausalAttention, varlen_fits
from llmscale.models.packing import Packing

END, SEQUENCE, BATCH, HEADS = 0, 48, 3, 4


def tokens() -> torch.Tensor:
    """Documents of all lengths from 1 on, and a sequence that is one."""
    found = torch.randint(1, 50, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(1))
    for row, place in ((0, 0), (0, 1), (0, 4), (0, 30), (1, 17), (1, SEQUENCE - 1)):
        found[row, place] = END
    return found


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The same by its definition, in fp64."""
    ended = (ids == END).long()
    document = ended.cumsum(1) - ended
    mask = (document[:, :, None] == document[:, None, :]).tril()[:, None]
    parts = [part.double().permute(1, 2, 0, 3) for part in (query, key, value)]
    context = F.scaled_dot_product_attention(*parts, attn_mask=mask.to(query.device), enable_gqa=True)
    return context.permute(2, 0, 1, 3).flatten(2)


def core_attention(head_dim: int, dropout: float = 0.0) -> CausalAttention:
    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * head_dim, num_attention_heads=HEADS, attention_dropout=dropout
    )
    return CausalAttention(config, 1, AttnMaskType.causal)


def check(device: torch.device, dtype: torch.dtype, groups: int, head_dim: int, tolerance: float) -> None:
    """Outputs and gradients of attention inside documents against the dense mask."""
    draw = torch.Generator().manual_seed(2)
    shapes = [(SEQUENCE, BATCH, heads, head_dim) for heads in (HEADS, groups, groups)]
    parts = [torch.randn(shape, generator=draw).to(device, dtype).requires_grad_() for shape in shapes]
    weight = torch.randn(SEQUENCE, BATCH, HEADS * head_dim, generator=draw).to(device)
    ids = tokens()
    wanted = dense(*parts, ids)
    expected = [wanted, *torch.autograd.grad((wanted * weight).sum(), parts)]
    output = core_attention(head_dim)(*parts, packed_seq_params=Packing.of(ids, END, device))
    found = [output, *torch.autograd.grad((output * weight).sum(), parts)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("groups", [HEADS, 2, 1])
def test_attention_inside_documents_is_the_dense_mask(groups: int) -> None:
    check(torch.device("cpu"), torch.float32, groups, 16, 2e-6)


def test_bf16_attention_inside_documents_is_the_dense_mask() -> None:
    check(torch.device("cpu"), torch.bfloat16, 2, 16, 6e-2)


def test_one_document_a_sequence_is_plain_causal_attention() -> None:
    parts = [torch.randn(SEQUENCE, BATCH, HEADS, 16) for _ in range(3)]
    packing = Packing.of(torch.ones(BATCH, SEQUENCE, dtype=torch.int64), END, torch.device("cpu"))
    layer = core_attention(16)
    torch.testing.assert_close(layer(*parts, packed_seq_params=packing), layer(*parts), rtol=0, atol=1e-6)


def test_the_varlen_kernel_runs_where_it_can() -> None:
    cpu = torch.device("cpu")
    assert not varlen_fits(cpu, torch.bfloat16, 64, 0.0)
    if "window_size" not in attention._VARLEN:
        pytest.skip(f"torch {torch.__version__} has no varlen_attn that can be causal")
    # Shapes only, the kernel is the GPU's: torch takes what it is handed, and gives gradients of grouped queries.
    packing = Packing.of(tokens(), END, cpu)
    with FakeTensorMode() as mode:
        query, key, value = (
            torch.empty(BATCH * SEQUENCE, heads, 64, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)
        )
        fake = Packing(packing.positions, packing.lengths, mode.from_tensor(packing.boundaries))
        output = attention._varlen(query, key, value, fake)
        assert output.shape == query.shape
        output.sum().backward()
    assert key.grad is not None and key.grad.shape == key.shape
