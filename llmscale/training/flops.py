"""FLOPs of training, by formula, and the peak of the devices they run on. No torch.

Forward, for one token: 2 × (weights of all matrix products: the layers' and the output layer's, which a tied model has
too; not the embeddings, which are looked up), and in each layer's attention two products of s × head_dim for every head
(scores and values): 4 × s × heads × head_dim. The backward pass takes twice the forward one. That is 6 N + 12 L H Q T
of PaLM (Chowdhery et al., 2022, appendix B), with N taken exactly.

Attention is counted in full, as PaLM and torch's FlopCounterMode do, though a causal kernel skips about half of it,
and one that stays inside documents (`data.mask_documents`) skips more, the more the shorter they are: compare runs
with and without masks by tokens/s. `without_attention` leaves attention out altogether. What recomputation runs again
is not counted: these are the model's FLOPs, so the MFU says how much of the device's peak goes into the model. Norms,
activations, softmax and the optimizer are left out: under 1 % at any size that matters.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmscale.config.schema import Model
from llmscale.models.family import Family

OUTPUT = "output_layer.weight"
EMBEDDINGS = "embedding."
TRAINING_PER_FORWARD = 3
"""Forward once, backward twice: the gradient of the inputs and that of the weights."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of forward and backward for one token, over the whole model."""

    with_attention: float
    without_attention: float


def flops_per_token(model: Model, family: Family, vocab_size: int, sequence_length: int) -> Flops:
    """Training FLOPs of one token. vocab_size: token ids, without padding."""
    weights = vocab_size * model.hidden_size  # the output layer, tied or not
    for weight in family.parameters(model, vocab_size):
        if len(weight.shape) == 2 and weight.name != OUTPUT and not weight.name.startswith(EMBEDDINGS):
            weights += weight.numel
    attention = 4 * sequence_length * model.num_attention_heads * model.head_size * model.num_layers
    products = 2 * weights
    return Flops(
        with_attention=float(TRAINING_PER_FORWARD * (products + attention)),
        without_attention=float(TRAINING_PER_FORWARD * products),
    )


PEAKS: tuple[tuple[str, float | None, float], ...] = (
    ("GB200", 2500.0, 80.0),
    ("B300", 2250.0, 75.0),
    ("B200", 2250.0, 75.0),
    ("GH200", 989.4, 66.9),
    ("H200 NVL", 835.5, 60.3),
    ("H200", 989.4, 66.9),
    ("H100 NVL", 835.5, 60.3),
    ("H100 PCIe", 756.5, 51.2),
    ("H100", 989.4, 66.9),
    ("H800 PCIe", 756.5, 51.2),
    ("H800", 989.4, 66.9),
    ("H20", 148.0, 44.0),
    ("A100", 312.0, 19.5),
    ("A800", 312.0, 19.5),
    ("A40", 149.7, 37.4),
    ("A30", 165.0, 10.3),
    ("A10G", 70.0, 31.5),
    ("A10", 125.0, 31.2),
    ("L40S", 362.05, 91.6),
    ("L40", 181.05, 90.5),
    ("L4", 121.0, 30.3),
    ("RTX 6000 Ada", 364.2, 91.1),
    ("RTX A6000", 154.8, 38.7),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71.0, 35.6),
    ("V100", None, 15.7),
    ("T4", None, 8.1),
    ("MI300X", 1307.4, 163.4),
)
"""Part of the device's name -> dense peak in TFLOP/s with bf16 and with fp32 inputs, from the makers' data sheets; the
first that fits counts. bf16: tensor cores, fp32 accumulation, no sparsity; None where the device has none. fp32:
without TF32, which llmscale leaves off."""


def peak_tflops(device_name: str | None, precision: str) -> float | None:
    """Dense peak of one device in TFLOP/s; None on a CPU (no name) and on devices that the table does not know.

    device_name: as `torch.cuda.get_device_name` gives it. precision: bf16 or fp32.
    """
    if device_name is None:
        return None
    words = device_name.replace("-", " ").split()
    for name, bf16, fp32 in PEAKS:
        wanted = name.split()
        if any(words[at : at + len(wanted)] == wanted for at in range(len(words))):
            return bf16 if precision == "bf16" else fp32
    return None
