"""Attention inside documents on a GPU: the kernels are right, the fast one runs, and none builds an s × s mask."""

from __future__ import annotations

import pytest
import torch

from llmscale.models.attention import varlen_fits
from llmscale.models.packing import Packing
from tests.unit.models.test_attention import END, HEADS, check, core_attention


@pytest.mark.parametrize("groups", [HEADS, 2])
@pytest.mark.parametrize("head_dim", [64, 12], ids=["varlen", "one-by-one"])
def test_bf16_attention_inside_documents_is_the_dense_mask(groups: int, head_dim: int) -> None:
    device = torch.device("cuda", 0)
    if torch.cuda.get_device_capability(device) >= (8, 0):
        assert varlen_fits(device, torch.bfloat16, head_dim, 0.0) == (head_dim == 64)
    check(device, torch.bfloat16, groups, head_dim, 6e-2)


@pytest.mark.parametrize("groups", [HEADS, 2])
def test_fp32_attention_inside_documents_is_the_dense_mask(groups: int) -> None:
    check(torch.device("cuda", 0), torch.float32, groups, 64, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_memory_grows_with_the_sequence_and_not_with_its_square(dtype: torch.dtype) -> None:
    device, sequence, head_dim = torch.device("cuda", 0), 16384, 64
    ids = torch.ones(1, sequence, dtype=torch.int64)
    ids[:, 1000::1000] = END
    parts = [torch.randn(sequence, 1, HEADS, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in "qkv"]
    packing = Packing.of(ids, END, device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    core_attention(head_dim)(*parts, packed_seq_params=packing).float().sum().backward()
    # Its mask alone, a byte an entry, would be 256 MiB.
    assert torch.cuda.max_memory_allocated(device) - before < sequence * sequence / 2
