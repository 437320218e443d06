"""One pipeline stage (or, interleaved, one model chunk) of a language model, from Megatron-core's parts.

Not GPTModel: Megatron-core 0.19 deprecates it, and here the parts are few: embedding, rotary positions, layers,
output layer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from llmscale.config.derive import padded_vocab_size
from llmscale.config.schema import Model, Training
from llmscale.distributed.groups import Groups
from llmscale.models.family import Family, Weight
from llmscale.models.init import initialize
from llmscale.models.loss import cross_entropy
from llmscale.models.norms import NORMS
from llmscale.models.packing import Packing
from llmscale.models.rotary import stretched
from llmscale.models.transformer import layer_spec, transformer_config

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


class Stage(MegatronModule):
    """The layers `layers` of a model; with the embedding on the first stage, the output layer and loss on the last."""

    def __init__(
        self,
        config: TransformerConfig,
        model: Model,
        family: Family,
        vocab_size: int,
        groups: Groups,
        layers: range,
        chunk: int,
    ) -> None:
        super().__init__(config=config)
        layout = groups.layout
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = chunk if layout.virtual_pipeline > 1 else None
        self.pre_process = groups.position.pipeline == 0 and chunk == 0
        self.post_process = groups.position.pipeline == layout.pipeline - 1 and chunk == layout.virtual_pipeline - 1
        self.layers = layers
        self.tied = family.tied(model)
        # Rounded to the weights' type, as transformers' Gemma has it.
        scale = torch.tensor(model.hidden_size**0.5, dtype=config.params_dtype).item()
        self._embedding_scale = scale if family.scaled_embeddings else 1.0
        self.rotary_pos_emb: RotaryEmbedding | None = None
        self._table = {weight.name: weight for weight in family.parameters(model, vocab_size)}
        padded = padded_vocab_size(vocab_size, layout.tensor)
        rows = padded // layout.tensor
        self._vocab_held = max(0, min(rows, vocab_size - groups.position.tensor * rows))
        self._vocab_rows = rows
        self._loss_group = groups.tensor if layout.tensor > 1 else None
        collection = groups.collection
        if self.pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=padded,
                max_sequence_length=model.max_position_embeddings,
                position_embedding_type="rope" if family.positions == "rope" else "learned_absolute",
                tp_group=collection.tp,
            )
        if family.positions == "rope":
            self.rotary_pos_emb = RotaryEmbedding(
                kv_channels=model.head_size,
                rotary_percent=model.rotary_fraction,
                rotary_base=model.rope_theta,
                cp_group=collection.cp,
            )
            if model.rope_scaling is not None:
                self.rotary_pos_emb.inv_freq = stretched(self.rotary_pos_emb.inv_freq, model.rope_scaling)
        block = TransformerBlockSubmodules(
            layer_specs=[layer_spec(family)] * len(layers),
            layer_norm=NORMS[family.norm] if self.post_process else None,
        )
        self.decoder = TransformerBlock(
            config=config,
            spec=block,
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=collection,
            vp_stage=self.vp_stage,
        )
        if self.post_process:
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                padded,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_weight_param_allocation=self.tied and self.pre_process,
                tp_group=collection.tp,
            )

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor]) -> None:
        """Called by Megatron's schedule with the previous stage's output, [sequence, micro_batch, hidden]."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self, tokens: torch.Tensor, labels: torch.Tensor | None = None, packing: Packing | None = None
    ) -> torch.Tensor:
        """tokens and labels: [micro_batch, sequence]. packing: keeps attention inside the documents, and counts
        positions from each one's first token; without it a sequence is one document.

        Returns what the next stage needs, [sequence, micro_batch, hidden] (under sequence parallelism this rank's
        part of the sequence); on the last stage the loss of each token in nats, fp32 [micro_batch, sequence], or
        without labels this rank's part of the logits, [sequence, micro_batch, padded_vocab / tensor], padding at
        minus infinity.
        """
        hidden = None
        if self.pre_process:
            places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            hidden = self.embedding(input_ids=tokens, position_ids=places if packing is None else packing.positions)
            if self._embedding_scale != 1.0:
                hidden = hidden * self._embedding_scale
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=self._rotary_angles(tokens.shape[1], packing),
            packed_seq_params=packing,
        )
        if not self.post_process:
            return hidden
        weight = self.embedding.word_embeddings.weight if self.tied and self.pre_process else None
        logits, _ = self.output_layer(hidden, weight=weight)
        self._hide_padding(logits)
        if labels is None:
            return logits
        return cross_entropy(logits, labels.transpose(0, 1), self._loss_group).transpose(0, 1)

    def _rotary_angles(self, sequence: int, packing: Packing | None) -> torch.Tensor | None:
        """[sequence, 1, 1, head_dim], or with a packing [sequence, micro_batch, 1, head_dim]."""
        if self.rotary_pos_emb is None:
            return None
        angles: torch.Tensor = self.rotary_pos_emb(sequence)
        return angles if packing is None else angles.squeeze(1)[packing.positions.t()]

    def _hide_padding(self, logits: torch.Tensor) -> None:
        """Take the padding out of the softmax, in place; its gradient is then zero by itself (exp(-inf))."""
        if self._vocab_held < self._vocab_rows:
            with torch.no_grad():
                logits[..., self._vocab_held :] = -torch.inf

    def weights(self) -> Iterator[tuple[Weight, torch.nn.Parameter]]:
        """This stage's parameters with their global names and shapes."""
        for name, parameter in self.named_parameters():
            yield self._table[self._global_name(name)], parameter

    def _global_name(self, name: str) -> str:
        if name == OUTPUT and self.tied:
            return EMBEDDING
        head, prefix, rest = name.partition("decoder.layers.")
        if not prefix:
            return name
        local, _, tail = rest.partition(".")
        return f"{head}{prefix}{self.layers[int(local)]}.{tail}"


def build_stages(model: Model, family: Family, training: Training, groups: Groups, seed: int | None) -> list[Stage]:
    """This rank's stages (one, or virtual_pipeline chunks), with initial weights. model.vocab_size must be set.

    seed: of the initial weights; None leaves them as memory was, which a CPU does not hold before it is written to.
    """
    if model.vocab_size is None:
        raise ValueError("model.vocab_size is null: it must be settled from the data before the model is built")
    config = transformer_config(model, family, training, groups.layout)
    stages = [
        Stage(config, model, family, model.vocab_size, groups, layers, chunk)
        for chunk, layers in enumerate(groups.layout.chunk_layers(groups.position.pipeline))
    ]
    for stage in stages:
        # Megatron leaves a few parts in torch's default type and on the CPU: the learned positions.
        stage.to(device=torch.cuda.current_device(), dtype=config.params_dtype)
        if seed is not None:
            initialize(stage.weights(), model, seed, groups.position.tensor, groups.layout.tensor)
    return stages
