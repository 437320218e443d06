"""The proof of an export: transformers' logits of it against llmscale's own of the checkpoint, on the same tokens.

Both compute in fp32 on this process's device, with the weights rounded to the type of the export: what is compared is
the mapping of every weight and the meaning of every key of config.json, not the rounding. One model is in memory at a
time, with 4 bytes a parameter; where that is more than there is, one layer of it.

Rotary positions are one after another in the first half of a sequence, and spread as far as SPREAD in the second: what
rope_scaling does shows between tokens that are far apart. Of embeddings, which such few tokens and positions do not
visit, every row is compared.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path

import torch

from llmscale.checkpoint.format import Checkpoint
from llmscale.convert.source import Source
from llmscale.convert.transforms import pairs, to_theirs
from llmscale.convert.whole_model import open_model
from llmscale.distributed.memory import available_bytes, give_back
from llmscale.models.family import families

TOLERANCE = 1e-4
SEED = 1234
SEQUENCES, LENGTH = 2, 128
SPREAD = 8192
"""The original length of Llama 3. Farther out angles, of which fp32 holds 7 digits, differ by what counts."""


@dataclass(frozen=True)
class Parity:
    """difference: the largest of any two logits. largest: the largest logit, for scale. same_embeddings: every row, of
    positions too. equal: these, and the logits within the tolerance."""

    difference: float
    largest: float
    tolerance: float
    sequences: int
    length: int
    seed: int
    same_embeddings: bool
    equal: bool


def compare(
    checkpoint: Checkpoint,
    export: Path,
    dtype: torch.dtype | None,
    tolerance: float = TOLERANCE,
    most_bytes: int | None = None,
) -> Parity:
    """Compare an export with the checkpoint that it was made of.

    dtype: what its weights were rounded to; None: they were not. most_bytes: see open_model.
    """
    model = checkpoint.model
    length = min(LENGTH, model.max_position_embeddings)
    vocab_size = model.vocab_size or 0
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(0, vocab_size, (SEQUENCES, length), generator=generator)

    def whole(name: str) -> torch.Tensor:
        return checkpoint.whole(name).to(dtype or torch.float32).float()

    places = _places(length, model.max_position_embeddings)
    with open_model(model, whole, "fp32", most_bytes) as (stage, device), torch.no_grad():
        if stage.rotary_pos_emb is None:
            places = torch.arange(length)
        else:
            stage.rotary_pos_emb = _At(stage.rotary_pos_emb, places)
        ours = stage(tokens.to(device))[..., :vocab_size].transpose(0, 1).float().cpu()
        del stage
    give_back()
    theirs = _theirs(export, tokens, places, most_bytes)
    difference = float((ours - theirs).abs().max())
    same = _same_embeddings(checkpoint, export, dtype)
    # Not "above the tolerance": a NaN is not equal either.
    equal = same and difference <= tolerance
    return Parity(difference, float(theirs.abs().max()), tolerance, SEQUENCES, length, SEED, same, equal)


def _places(length: int, longest: int) -> torch.Tensor:
    """Positions, [length]: the first half from 0 up, the second spread over the rest."""
    half = length // 2
    last = max(length, min(longest, SPREAD)) - 1
    return torch.cat([torch.arange(half), torch.linspace(half, last, length - half, dtype=torch.float64).long()])


class _At(torch.nn.Module):
    """Rotary angles of chosen positions, for a sequence of as many tokens."""

    def __init__(self, rotary: torch.nn.Module, places: torch.Tensor) -> None:
        super().__init__()
        self.rotary, self.places = rotary, places

    def forward(self, sequence: int) -> torch.Tensor:
        """[sequence, 1, 1, head_dim]."""
        angles: torch.Tensor = self.rotary(int(self.places[-1]) + 1)
        return angles[self.places.to(angles.device)]


def _same_embeddings(checkpoint: Checkpoint, export: Path, dtype: torch.dtype | None) -> bool:
    """Whether every value is what the checkpoint holds, rounded."""
    model, source = checkpoint.model, Source(export)
    for pair in pairs(families()[model.family], model, model.vocab_size or 0):
        if pair.weight.name.startswith("embedding."):
            whole = checkpoint.whole(pair.weight.name)
            for name, part in zip(pair.names, to_theirs(whole, pair.rule, model), strict=True):
                if not torch.equal(source.read(name), part.to(dtype or source.about(name)[0])):
                    return False
    return True


@torch.no_grad()
def _theirs(export: Path, tokens: torch.Tensor, places: torch.Tensor, most_bytes: int | None) -> torch.Tensor:
    """transformers' logits, fp32 [batch, sequence, vocab]. places: the tokens' positions, [sequence].

    What does not fit on the device, or into memory, is read from the export's own files, layer by layer.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("accelerate").setLevel("ERROR")  # says that some weights stay in their files
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        # Weights that do not fit are read from the export's files when they are used; nothing is written to the folder
        # that transformers wants to be named.
        model = AutoModelForCausalLM.from_pretrained(
            export, dtype=torch.float32, trust_remote_code=False, device_map="auto", max_memory=_room(most_bytes),
            offload_folder=folder,
        ).eval()  # fmt: skip
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tokens = tokens.to(device)
        # The mask says that all is one document: positions with gaps are taken for several without it.
        logits: torch.Tensor = model(
            tokens,
            attention_mask=torch.ones_like(tokens),
            position_ids=places.to(device).expand_as(tokens),
            use_cache=False,
        ).logits
    return logits.float().cpu()


def _room(most_bytes: int | None) -> dict[int | str, int]:
    """Bytes that transformers' model may take, by device."""
    found: dict[int | str, int] = {}
    if torch.cuda.is_available():
        found[0] = available_bytes(torch.device("cuda", 0)) * 7 // 8
    found["cpu"] = available_bytes(torch.device("cpu")) * 7 // 8
    return {device: room if most_bytes is None else min(room, most_bytes) for device, room in found.items()}
