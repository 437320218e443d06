"""The FLOP formula against torch's own count of transformers' models, and the table of peaks."""

from __future__ import annotations

import pytest

from llmscale.config.schema import Model
from llmscale.models.family import families
from llmscale.training.flops import PEAKS, flops_per_token, peak_tflops

VOCAB, LENGTH, BATCH = 160, 96, 2


def counted(network: object) -> int:
    """FLOPs of a forward and a backward pass, as torch counts them. The maths kernel of attention is the one that the
    counter sees on a CPU; it does both products in full, like the formula."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    tokens = torch.randint(VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()  # type: ignore[operator]
    return int(counter.get_total_flops())


def check(model: Model, network: object) -> None:
    flops = flops_per_token(model, families()[model.family], VOCAB, LENGTH)
    assert flops.with_attention * BATCH * LENGTH == pytest.approx(counted(network), rel=0.01)
    # The attention term is large enough here that a wrong one would be seen.
    assert flops.with_attention > 1.1 * flops.without_attention


def test_gpt2_equals_torchs_count() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = Model(family="gpt2", num_layers=3, hidden_size=64, num_attention_heads=4, max_position_embeddings=128)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=128, n_embd=64, n_layer=3, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        attn_implementation="sdpa",
    )  # fmt: skip
    check(model, GPT2LMHeadModel(config))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head_dim", [16, 24])
def test_llama_equals_torchs_count(tied: bool, head_dim: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = Model(
        family="llama", num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2, head_dim=head_dim,
        ffn_hidden_size=112, tie_embeddings=tied,
    )  # fmt: skip
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=head_dim, tie_word_embeddings=tied, attn_implementation="sdpa",
    )  # fmt: skip
    check(model, LlamaForCausalLM(config))


def test_a_large_model_takes_about_six_flops_a_parameter() -> None:
    model = Model(family="gpt2", num_layers=96, hidden_size=12288, num_attention_heads=96)
    flops = flops_per_token(model, families()["gpt2"], 50257, 2048)
    assert flops.without_attention == pytest.approx(6 * 174.6e9, rel=0.01)
    assert flops.with_attention - flops.without_attention == 12 * 96 * 12288 * 2048


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA A10", "bf16", 125.0),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA B200", "bf16", 2250.0),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA L4", "bf16", 121.0),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("Tesla V100-SXM2-32GB", "fp32", 15.7),
        ("NVIDIA RTX 6000 Ada Generation", "bf16", 364.2),
        ("Unheard-of Device", "bf16", None),
        (None, "bf16", None),
    ],
)
def test_the_peak_follows_from_the_devices_name(name: str | None, precision: str, peak: float | None) -> None:
    assert peak_tflops(name, precision) == peak


def test_no_row_of_the_table_hides_a_later_one() -> None:
    for name, bf16, fp32 in PEAKS:
        assert peak_tflops(name, "bf16") == bf16
        assert peak_tflops(name, "fp32") == fp32
