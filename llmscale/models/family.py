"""What a model family is: its parts, and every weight of a model by its global name. No torch.

A family is a value in one file of `families/`, found by its name. Stage building, initial weights, checkpoints,
conversion and planning all read the one table that `parameters(model)` gives: global name, global shape, and how
tensor parallelism cuts it. Names follow Megatron-core's modules, with the global layer number.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from llmscale.config.schema import Model
from llmscale.models.hugging_face import HuggingFace

Cut = Literal["replicated", "rows", "gated_rows", "columns", "vocab"]
"""How a weight is cut over the tensor-parallel group.

replicated: every rank holds all of it. rows: along dimension 0. gated_rows: dimension 0 is [gate; up], each half is
cut. columns: along dimension 1. vocab: along dimension 0, which is padded.
"""
Init = Literal["normal", "residual", "ones", "zeros"]
"""normal: N(0, init_std). residual: N(0, init_std / sqrt(2 × num_layers)), GPT-2's rule for the residual stream."""

EMBEDDING = "embedding.word_embeddings.weight"
"""The weight that every family has, and that its output layer may be tied to."""


@dataclass(frozen=True)
class Weight:
    """One weight of the whole model. layer: its 0-based layer, None outside the layers."""

    name: str
    shape: tuple[int, ...]
    cut: Cut
    init: Init
    layer: int | None = None
    per_head: bool = False
    """Shared by all heads: a tensor-parallel rank's gradient is that of its own heads alone."""

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: matrices and embeddings, not norms and biases."""
        return len(self.shape) > 1

    @property
    def numel(self) -> int:
        """Number of elements, without padding."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Family:
    """The parts of a family's layers."""

    name: str
    norm: Literal["layernorm", "rmsnorm", "rmsnorm_plus_one"]
    """rmsnorm_plus_one: by 1 + weight in place of weight."""
    activation: Literal["gelu", "gelu_tanh", "swiglu", "geglu"]
    """gelu is the exact one, geglu's the tanh form."""
    positions: Literal["learned", "rope"]
    bias: bool
    """Biases on all linear layers of the Transformer's blocks."""
    tie_embeddings: bool
    """What `model.tie_embeddings: null` means."""
    hugging_face: HuggingFace
    qkv_bias: bool = False
    """Biases on query, key and value, whatever `bias` says."""
    qk_norm: bool = False
    """The family's norm on each head's query and key, before the rotary positions."""
    parallel_residual: bool = False
    """x + attention(norm(x)) + mlp(norm'(x)) in place of one after the other."""
    scaled_embeddings: bool = False
    """Embeddings times sqrt(hidden_size) before the first layer."""

    @property
    def gated(self) -> bool:
        """Whether the MLP is activation(gate) × up."""
        return self.activation in ("swiglu", "geglu")

    def tied(self, model: Model) -> bool:
        """Whether the output layer is the embedding."""
        return self.tie_embeddings if model.tie_embeddings is None else model.tie_embeddings

    def ffn_hidden_size(self, model: Model) -> int:
        """Width of the MLP: as given, else 4 × hidden; for SwiGLU 8/3 × hidden, rounded up to 256 (Llama's rule)."""
        if model.ffn_hidden_size is not None:
            return model.ffn_hidden_size
        if self.activation == "swiglu":
            return -(-(8 * model.hidden_size // 3) // 256) * 256
        return 4 * model.hidden_size

    def settled(self, model: Model) -> Model:
        """The model with what the family decides where the config says null."""
        sizes = {
            "num_query_groups": model.query_groups,
            "head_dim": model.head_size,
            "ffn_hidden_size": self.ffn_hidden_size(model),
            "tie_embeddings": self.tied(model),
        }
        return model.model_copy(update=sizes)

    def parameters(self, model: Model, vocab_size: int) -> Iterator[Weight]:
        """Every weight of the model, in the model's order. vocab_size: token ids, unpadded."""
        hidden, ffn = model.hidden_size, self.ffn_hidden_size(model)
        heads_width = model.num_attention_heads * model.head_size
        qkv_width = heads_width + 2 * model.query_groups * model.head_size
        yield Weight(EMBEDDING, (vocab_size, hidden), "vocab", "normal")
        if self.positions == "learned":
            shape = (model.max_position_embeddings, hidden)
            yield Weight("embedding.position_embeddings.weight", shape, "replicated", "normal")
        up: Cut = "gated_rows" if self.gated else "rows"
        for layer in range(model.num_layers):
            at = f"decoder.layers.{layer}"
            yield from self._norm(f"{at}.input_layernorm", hidden, layer)
            yield from self._linear(
                f"{at}.self_attention.linear_proj", (hidden, heads_width), "columns", layer, self.bias
            )
            yield from self._linear(
                f"{at}.self_attention.linear_qkv", (qkv_width, hidden), "rows", layer, self.bias or self.qkv_bias
            )
            if self.qk_norm:
                for part in ("q_layernorm", "k_layernorm"):
                    yield from self._norm(f"{at}.self_attention.{part}", model.head_size, layer, per_head=True)
            yield from self._norm(f"{at}.pre_mlp_layernorm", hidden, layer)
            width = ffn * (2 if self.gated else 1)
            yield from self._linear(f"{at}.mlp.linear_fc1", (width, hidden), up, layer, self.bias)
            yield from self._linear(f"{at}.mlp.linear_fc2", (hidden, ffn), "columns", layer, self.bias)
        yield from self._norm("decoder.final_layernorm", hidden, None)
        if not self.tied(model):
            yield Weight("output_layer.weight", (vocab_size, hidden), "vocab", "normal")

    def _norm(self, name: str, size: int, layer: int | None, per_head: bool = False) -> Iterator[Weight]:
        init: Init = "zeros" if self.norm == "rmsnorm_plus_one" else "ones"
        yield Weight(f"{name}.weight", (size,), "replicated", init, layer, per_head)
        if self.norm == "layernorm":
            yield Weight(f"{name}.bias", (size,), "replicated", "zeros", layer, per_head)

    def _linear(self, name: str, shape: tuple[int, int], cut: Cut, layer: int, bias: bool) -> Iterator[Weight]:
        yield Weight(f"{name}.weight", shape, cut, "residual" if cut == "columns" else "normal", layer)
        if bias:
            yield Weight(f"{name}.bias", (shape[0],), "replicated" if cut == "columns" else cut, "zeros", layer)


@cache
def families() -> dict[str, Family]:
    """All families, by name: the attribute FAMILY of every file in `families/`."""
    package = importlib.import_module("llmscale.models.families")
    found = {}
    for module in pkgutil.iter_modules(package.__path__):
        family: Family = importlib.import_module(f"{package.__name__}.{module.name}").FAMILY
        found[family.name] = family
    return found
