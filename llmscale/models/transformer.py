"""A run's config as Megatron-core's: its TransformerConfig and the spec of one layer.

What is set here beyond the sizes is either speed (fusions, on a GPU only: they compile) or silently wrong otherwise;
see the comments, the traps in docs/design.md, and tests/distributed/test_upstream.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from llmscale.config.schema import Model, Training
from llmscale.distributed.layout import Layout
from llmscale.models.attention import CausalAttention
from llmscale.models.family import Family
from llmscale.models.norms import NORMS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _leave(weight: torch.Tensor) -> None:
    """Megatron's initialisation marks weights as cut or not; the values come from `init.py`."""


def transformer_config(model: Model, family: Family, training: Training, layout: Layout) -> TransformerConfig:
    """Megatron-core's config of this model on this layout."""
    dtype = DTYPES[training.precision]
    on_gpu = torch.cuda.is_available()
    interleaved = layout.virtual_pipeline > 1
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_size,
        ffn_hidden_size=family.ffn_hidden_size(model),
        normalization="LayerNorm" if family.norm == "layernorm" else "RMSNorm",
        layernorm_epsilon=model.norm_eps,
        add_bias_linear=family.bias,
        add_qkv_bias=family.bias or family.qkv_bias,
        qk_layernorm=family.qk_norm,
        gated_linear_unit=family.gated,
        activation_func=_activation(family),
        hidden_dropout=model.dropout,
        attention_dropout=model.dropout,
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        # False would leave weights without their tensor_model_parallel marks, and the gradient norm wrong.
        perform_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=training.precision == "bf16",
        bias_activation_fusion=_fuses(family),
        bias_dropout_fusion=on_gpu,
        # Writes to main_grad, which DeepSpeed never reads.
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if interleaved else None,
        pipeline_model_parallel_layout=_pipeline_layout(layout) if layout.pipeline > 1 else None,
        sequence_parallel=layout.sequence_parallel,
        # Two stages, interleaved: batched messages of one pair of ranks are matched in order, and swapped silently.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # With overlapping messages or ZeRO-3 an output may be freed while it is still sent or needed.
        deallocate_pipeline_outputs=on_gpu and not interleaved and layout.zero_stage < 3,
        **_recompute(training),
    )
    return config


def layer_spec(family: Family) -> ModuleSpec:
    """One Transformer layer from Megatron-core's parallel linear layers, torch's attention and own norms."""
    norm = NORMS[family.norm]
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=CausalAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=norm if family.qk_norm else IdentityOp,
            k_layernorm=norm if family.qk_norm else IdentityOp,
        ),
    )
    mlp = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    return ModuleSpec(
        module=ParallelLayer if family.parallel_residual else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


class ParallelLayer(TransformerLayer):
    """x + attention(norm(x)) + mlp(norm'(x)): GPT-NeoX's layer. Megatron-core's takes one after the other."""

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states: [sequence, batch, hidden], and of that shape what comes back."""
        attended, context = self._forward_attention(hidden_states, *args, **kwargs)
        output_and_bias = self.mlp(self.pre_mlp_layernorm(hidden_states))
        add = self.mlp_bda(self.training, self.config.bias_dropout_fusion)
        with self.bias_dropout_add_exec_handler():
            return add(output_and_bias, attended, self.hidden_dropout), context


def _fuses(family: Family) -> bool:
    """Whether Megatron's fused kernel computes the activation. Its GELU is the tanh form; not gated it wants a bias."""
    return torch.cuda.is_available() and family.activation != "gelu"


def _activation(family: Family) -> object:
    if family.activation == "swiglu":
        return F.silu
    if family.activation == "gelu" or _fuses(family):  # the fused kernel of the tanh form wants to be asked for F.gelu
        return F.gelu
    return partial(F.gelu, approximate="tanh")


def _pipeline_layout(layout: Layout) -> list[list[str]]:
    stages = [["decoder"] * layers for layers in layout.layers]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def _recompute(training: Training) -> dict[str, object]:
    if training.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if training.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}
