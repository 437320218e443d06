"""Llama: RMSNorm, SwiGLU, rotary positions, no biases, grouped queries where the config asks for them."""

from llmscale.models.family import Family

FAMILY = Family(name="llama", norm="rmsnorm", activation="swiglu", positions="rope", bias=False, tie_embeddings=False)
