"""The proof of an export: transformers' logits of it against llmscale's own of the checkpoint, on the same tokens.

Both compute in fp32 on this process's device, with the weights rounded to the type of the export: what is compared is
the mapping of every weight and the meaning of every key of config.json, not the rounding. One model is in memory at a
time, with 4 bytes a parameter; where that is more than there is, one layer of it.
"""

from __future__ import annotations

import gc
import tempfile
import warnings
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path

import torch

from llmscale.checkpoint.format import Checkpoint
from llmscale.convert.whole_model import open_model
from llmscale.distributed.memory import available_bytes

TOLERANCE = 1e-4
SEED = 1234
SEQUENCES, LENGTH = 2, 128


@dataclass(frozen=True)
class Parity:
    """difference: the largest of any two logits. largest: the largest logit, for scale. equal: within the tolerance."""

    difference: float
    largest: float
    tolerance: float
    sequences: int
    length: int
    seed: int
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

    with open_model(model, whole, "fp32", most_bytes) as (stage, device), torch.no_grad():
        ours = stage(tokens.to(device))[..., :vocab_size].transpose(0, 1).float().cpu()
        del stage
    gc.collect()
    theirs = _theirs(export, tokens, most_bytes)
    difference = float((ours - theirs).abs().max())
    # Not "above the tolerance": a NaN is not equal either.
    equal = difference <= tolerance
    return Parity(difference, float(theirs.abs().max()), tolerance, SEQUENCES, length, SEED, equal)


@torch.no_grad()
def _theirs(export: Path, tokens: torch.Tensor, most_bytes: int | None) -> torch.Tensor:
    """transformers' logits, fp32 [batch, sequence, vocab].

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
        logits: torch.Tensor = model(tokens.to(device), use_cache=False).logits
    return logits.float().cpu()


def _room(most_bytes: int | None) -> dict[int | str, int]:
    """Bytes that transformers' model may take, by device."""
    found: dict[int | str, int] = {}
    if torch.cuda.is_available():
        found[0] = available_bytes(torch.device("cuda", 0)) * 7 // 8
    found["cpu"] = available_bytes(torch.device("cpu")) * 7 // 8
    return {device: room if most_bytes is None else min(room, most_bytes) for device, room in found.items()}
