"""GPT-2 and GPT-3: LayerNorm, GELU, learned positions, biases everywhere, tied embeddings."""

from llmscale.models.family import Family

FAMILY = Family(name="gpt2", norm="layernorm", activation="gelu", positions="learned", bias=True, tie_embeddings=True)
