"""Sampling of text, one token after the other, each from a forward pass over all that came before (no cache)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from llmscale.models.stage import Stage


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_k 0 and top_p 1 leave nothing out."""

    max_tokens: int = 100
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0


@torch.no_grad()
def sample(
    stage: Stage,
    prompt: Sequence[int],
    settings: Sampling,
    context: int,
    vocab_size: int,
    end: int | None,
    device: torch.device,
) -> Iterator[int]:
    """Token ids that follow a prompt of at least one token, up to max_tokens or the end-of-document id.

    context: the longest sequence that the model takes; earlier tokens are forgotten.
    """
    generator = torch.Generator(device).manual_seed(settings.seed)
    tokens = list(prompt)
    for _ in range(settings.max_tokens):
        batch = torch.tensor([tokens[-context:]], device=device)
        logits = stage(batch)[-1, 0, :vocab_size].float()
        token = choose(logits, settings, generator)
        if token == end:
            return
        tokens.append(token)
        yield token


def choose(logits: torch.Tensor, settings: Sampling, generator: torch.Generator) -> int:
    """One token id from logits [vocab]: temperature, then top-k, then nucleus sampling (Holtzman et al., 2020)."""
    if settings.temperature == 0:
        return int(logits.argmax())
    ordered, ids = (logits / settings.temperature).sort(descending=True)
    if settings.top_k:
        ordered = ordered[: settings.top_k]
    probabilities = ordered.softmax(-1)
    if settings.top_p < 1.0:
        # Keep the smallest set that reaches top_p: a token stays if what comes before it does not.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= settings.top_p, 0.0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
