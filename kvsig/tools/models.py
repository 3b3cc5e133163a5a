"""Cache shapes of well-known models, for the demo and the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MODELS", "Model"]

#: Bytes of one element: all of them are served in bf16.
ITEM_BYTES = 2


@dataclass(frozen=True, slots=True)
class Model:
    """Shape of the KV cache of one model, as one GPU holds it."""

    #: On the command line.
    name: str
    #: One line for people.
    title: str
    layers: int
    #: Per layer: 2 for K and V, 1 for a latent (MLA).
    tensors: int
    #: KV heads per layer on one GPU; 1 where the cache is one latent.
    heads: int
    #: Elements per head and token (of K, and of V), or the width of the latent.
    width: int

    @property
    def plane_token_bytes(self) -> int:
        """Bytes of one token in one tensor of one layer."""
        return self.heads * self.width * ITEM_BYTES

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers."""
        return self.layers * self.tensors * self.plane_token_bytes


_MODELS = (
    # config.json of Meta-Llama-3-8B: num_hidden_layers 32, num_key_value_heads 8,
    # hidden_size 4096 / num_attention_heads 32.
    Model(
        "llama3-8b",
        "Llama 3 8B: 32 layers, 8 KV heads x 128, K and V, bf16",
        layers=32, tensors=2, heads=8, width=128,
    ),
    # config.json of Meta-Llama-3-70B: num_hidden_layers 80, num_key_value_heads 8 over 8 ranks,
    # hidden_size 8192 / num_attention_heads 64.
    Model(
        "llama3-70b-tp8",
        "Llama 3 70B, one of 8 tensor-parallel ranks: 80 layers, 1 KV head x 128, bf16",
        layers=80, tensors=2, heads=1, width=128,
    ),
    # config.json of DeepSeek-V3: num_hidden_layers 61, kv_lora_rank 512 + qk_rope_head_dim 64.
    Model(
        "deepseek-v3",
        "DeepSeek-V3: 61 layers, one latent of 576, bf16",
        layers=61, tensors=1, heads=1, width=576,
    ),
)  # fmt: skip
MODELS = {model.name: model for model in _MODELS}
