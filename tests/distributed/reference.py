"""The reference of the layout matrix: one process, plain PyTorch, nothing of Megatron-core or DeepSpeed.

GPT-2-like and Llama-like models written out from their definitions, torch's AdamW in fp32 with clipping. In bf16 it
computes with a bf16 copy of fp32 master weights, and adds the gradients of micro-batches in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from llmscale.config.schema import RunConfig
from llmscale.models.family import families
from llmscale.models.init import initial_tensor

Weights = dict[str, torch.Tensor]
END_OF_DOCUMENT = 0
"""The id that ends a document in the tests' token shards."""


@dataclass(frozen=True)
class ReferenceStep:
    """grad_norm: before clipping. gradients: after it."""

    loss: float
    grad_norm: float
    gradients: Weights


def initial_weights(config: RunConfig) -> Weights:
    model = config.model
    assert model.vocab_size is not None
    table = families()[model.family].parameters(model, model.vocab_size)
    return {w.name: initial_tensor(w, model, config.run.seed, torch.device("cpu")) for w in table}


def inside_documents(tokens: torch.Tensor) -> torch.Tensor:
    """What each token of [batch, sequence] sees, itself and what its document has before it: [batch, 1, sequence,
    sequence], true or false."""
    ended = (tokens == END_OF_DOCUMENT).long()
    document = ended.cumsum(1) - ended  # documents that ended before this token
    same = document[:, :, None] == document[:, None, :]
    return same.tril()[:, None]


def forward(weights: Weights, config: RunConfig, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [batch, sequence, vocab] of tokens [batch, sequence]."""
    model, family = config.model, families()[config.model.family]
    batch, sequence = tokens.shape
    heads, groups, size = model.num_attention_heads, model.query_groups, model.head_size
    per_group = heads // groups

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        if family.norm == "layernorm":
            return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], model.norm_eps)
        return F.rms_norm(x, x.shape[-1:], weights[f"{name}.weight"], model.norm_eps)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def rotate(x: torch.Tensor) -> torch.Tensor:  # [batch, heads, sequence, size]
        frequency = model.rope_theta ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
        angle = place[:, None, :, None].float() * frequency
        cos, sin = (torch.cat([part, part], -1).to(x.dtype) for part in (angle.cos(), angle.sin()))
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    mask = inside_documents(tokens) if config.data.mask_documents else None
    place = torch.arange(sequence).expand(batch, sequence) if mask is None else mask[:, 0].sum(2) - 1
    x = weights["embedding.word_embeddings.weight"][tokens]
    if family.positions == "learned":
        x = x + weights["embedding.position_embeddings.weight"][place]
    for layer in range(model.num_layers):
        at = f"decoder.layers.{layer}"
        # Rows of linear_qkv go group by group: the group's queries, its key, its value.
        qkv = linear(norm(x, f"{at}.input_layernorm"), f"{at}.self_attention.linear_qkv")
        qkv = qkv.view(batch, sequence, groups, per_group + 2, size).permute(0, 2, 3, 1, 4)
        q = qkv[:, :, :per_group].reshape(batch, heads, sequence, size)
        k, v = qkv[:, :, per_group], qkv[:, :, per_group + 1]
        if family.positions == "rope":
            q, k = rotate(q), rotate(k)
        context = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        context = context.transpose(1, 2).reshape(batch, sequence, heads * size)
        x = x + linear(context, f"{at}.self_attention.linear_proj")
        hidden = linear(norm(x, f"{at}.pre_mlp_layernorm"), f"{at}.mlp.linear_fc1")
        if family.activation == "swiglu":
            gate, up = hidden.chunk(2, -1)
            hidden = F.silu(gate) * up
        else:
            hidden = F.gelu(hidden, approximate="tanh")
        x = x + linear(hidden, f"{at}.mlp.linear_fc2")
    x = norm(x, "decoder.final_layernorm")
    return x @ weights.get("output_layer.weight", weights["embedding.word_embeddings.weight"]).t()


def _rate(config: RunConfig, step: int) -> float:
    """Linear warm-up, then cosine down to min_lr_ratio at the last step."""
    schedule, steps, peak = config.schedule, config.training.steps, config.optimizer.lr
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    done = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
    low = schedule.min_lr_ratio
    return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))


def train(
    config: RunConfig,
    batches: Iterator[torch.Tensor],
    accumulation: torch.dtype = torch.float32,
    logits_of: Callable[[Weights, RunConfig, torch.Tensor], torch.Tensor] = forward,
) -> tuple[list[ReferenceStep], Weights]:
    """Train on batches of int64 [global_batch, sequence + 1]. Returns every step, and the last fp32 weights.

    accumulation: the type in which micro-batches' gradients are added; another than fp32 shows what a test can see.
    logits_of: the model, as `forward`.
    """
    bf16, micro = config.training.precision == "bf16", config.training.micro_batch_size
    initial = initial_weights(config)
    masters = {n: torch.nn.Parameter(w.bfloat16().float() if bf16 else w) for n, w in initial.items()}
    decay = [p for p in masters.values() if p.dim() > 1]
    plain = [p for p in masters.values() if p.dim() == 1]
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        betas=settings.betas,
        eps=settings.eps,
    )
    steps = []
    for step in range(1, config.training.steps + 1):
        batch, losses = next(batches), []
        parts = batch.split(micro)
        sums = {name: torch.zeros_like(parameter, dtype=accumulation) for name, parameter in masters.items()}
        for part in parts:
            compute = {n: (p.detach().bfloat16() if bf16 else p.detach()).requires_grad_() for n, p in masters.items()}
            logits = logits_of(compute, config, part[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten())
            losses.append(loss.item())
            gradients = torch.autograd.grad(loss / len(parts), list(compute.values()))
            for total, gradient in zip(sums.values(), gradients, strict=True):
                total += gradient.to(accumulation)
        for name, parameter in masters.items():
            parameter.grad = sums[name].float()
        gradients = [parameter.grad for parameter in masters.values() if parameter.grad is not None]
        norm = torch.stack([gradient.double().norm() for gradient in gradients]).norm()
        torch.nn.utils.clip_grads_with_norm_(masters.values(), config.training.gradient_clipping, norm.float())
        clipped = {name: p.grad.clone() for name, p in masters.items() if p.grad is not None}
        for group in optimizer.param_groups:
            group["lr"] = _rate(config, step)
        optimizer.step()
        steps.append(ReferenceStep(sum(losses) / len(losses), norm.item(), clipped))
    return steps, {name: parameter.detach() for name, parameter in masters.items()}
