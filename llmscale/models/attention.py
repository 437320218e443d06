"""Causal attention through torch's own kernels, as Megatron-core's `core_attention`.

Megatron-core's own DotProductAttention builds the s × s matrix; scaled_dot_product_attention picks torch's flash
kernel on a CPU and the cuDNN, flash or memory-efficient one on a GPU. With it a CPU step takes 1.0 times as long as
transformers' Llama, without it 1.6 times.

Inside documents (`data.mask_documents`) no s × s mask is built either. On a GPU, in bf16 and without dropout, torch's
varlen_attn takes all documents of a micro-batch in one flash kernel; everywhere else each document has a call of its
own. On a CPU that makes masks a gain: forward and backward over 4,096 packed tokens, fp32, take 0.33 of the time of one
causal call with documents of 512 tokens on average and 0.13 with 64 (bf16: 0.32 and 0.17), a call with a dense mask
2 times as long as that call; a whole step of a small model with masks takes 0.88 to 0.99 of one without
(`python -m benchmarks.document_masks`, one core). The varlen kernel's own speed has not been measured.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from llmscale.models.packing import Packing

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None  # type: ignore[assignment]

_VARLEN = inspect.signature(varlen_attn).parameters if varlen_attn is not None else {}
"""What varlen_attn takes here. `window_size` is how one says causal in torch 2.11 and 2.13; grouped queries want
`enable_gqa` in 2.13, which 2.11 does not know: there the kernel sees it from the shapes."""
_CAUSAL = (-1, 0)


class CausalAttention(MegatronModule):
    """softmax(q kᵀ / sqrt(head_dim) + causal mask) v, with grouped key/value heads."""

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: Any, **_: Any) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.dropout = config.attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        packed_seq_params: Packing | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """query [sequence, batch, heads, head_dim], key and value [sequence, batch, groups, head_dim]
        -> [sequence, batch, heads × head_dim]; heads and groups are this rank's.

        packed_seq_params: where the documents lie that attention must not leave; None: each sequence is one.
        """
        if self.dropout == 0.0 or not self.training:
            return _attend(query, key, value, 0.0, packed_seq_params)
        # Heads are cut over the tensor-parallel group: each rank drops its own. Under sequence parallelism the whole
        # block draws from the rank's own generator already; a second fork would be recomputed with a stale state.
        fork = contextlib.nullcontext() if self.config.sequence_parallel else get_cuda_rng_tracker().fork()
        with fork:
            return _attend(query, key, value, self.dropout, packed_seq_params)


def varlen_fits(device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float) -> bool:
    """Whether torch's varlen_attn can do it: there are no other than flash kernels behind it, and no dropout."""
    return (
        "window_size" in _VARLEN
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and dropout == 0.0
    )


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, packing: Packing | None
) -> torch.Tensor:
    sequence, batch, heads, head_dim = query.shape
    if packing is None:
        context = _causal(query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3), dropout)
        return context.permute(2, 0, 1, 3).reshape(sequence, batch, heads * head_dim)
    # [sequence × batch, heads, head_dim], sequence after sequence: then a document lies in one piece.
    query, key, value = (part.transpose(0, 1).flatten(0, 1) for part in (query, key, value))
    if varlen_fits(query.device, query.dtype, head_dim, dropout):
        context = _varlen(query, key, value, packing)
    else:
        context = _one_by_one(query, key, value, packing, dropout)
    return context.view(batch, sequence, heads * head_dim).transpose(0, 1)


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> torch.Tensor:
    """Of [batch, heads, sequence, head_dim]."""
    grouped = key.shape[1] != query.shape[1]
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, enable_gqa=grouped)


def _one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, dropout: float
) -> torch.Tensor:
    """One call for each document. split, not slices: its backward pass joins the gradients once, where that of each
    slice would fill a whole tensor."""
    documents = zip(*(part.transpose(0, 1).split(packing.lengths, 1) for part in (query, key, value)), strict=True)
    return torch.cat([_causal(q[None], k[None], v[None], dropout)[0].transpose(0, 1) for q, k, v in documents])


def _varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing) -> torch.Tensor:
    longest, boundaries = max(packing.lengths), packing.boundaries
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _VARLEN else {}
    context = varlen_attn(query, key, value, boundaries, boundaries, longest, longest, window_size=_CAUSAL, **grouped)
    return cast(torch.Tensor, context)
