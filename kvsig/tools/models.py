"""Cache shapes of well-known models, for the demo and the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MODELS", "Model"]


@dataclass(frozen=True, slots=True)
class Model:
    """Shape of the KV cache of one model, as one GPU holds it.

    Parameters
    ----------
    name : str
        Name on the command line.
    title : str
        One line for people.
    layers : int
        Number of layers.
    heads : int
        KV heads per layer on one GPU; 1 where the cache is one latent.
    width : int
        Elements per head and token (of K, and of V), or the width of the latent.
    latent : bool
        Whether the cache is one latent per layer (MLA) in place of K and V.
    source : str
        Where the numbers come from.
    itemsize : int
        Bytes of one element: 2 for bf16, which all of them are served in.
    """

    name: str
    title: str
    layers: int
    heads: int
    width: int
    latent: bool
    source: str
    itemsize: int = 2

    @property
    def tensors(self) -> int:
        """Tensors per layer: 2 for K and V, 1 for a latent."""
        return 1 if self.latent else 2

    @property
    def plane_token_bytes(self) -> int:
        """Bytes of one token in one tensor of one layer."""
        return self.heads * self.width * self.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers."""
        return self.layers * self.tensors * self.plane_token_bytes


MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model(
            name="llama3-8b",
            title="Llama 3 8B: 32 layers, 8 KV heads x 128, K and V, bf16",
            layers=32,
            heads=8,
            width=128,
            latent=False,
            source="config.json of Meta-Llama-3-8B: num_hidden_layers 32, "
            "num_key_value_heads 8, hidden_size 4096 / num_attention_heads 32",
        ),
        Model(
            name="llama3-70b-tp8",
            title="Llama 3 70B, one of 8 tensor-parallel ranks: 80 layers, 1 KV head x 128, bf16",
            layers=80,
            heads=1,
            width=128,
            latent=False,
            source="config.json of Meta-Llama-3-70B: num_hidden_layers 80, "
            "num_key_value_heads 8 over 8 ranks, hidden_size 8192 / num_attention_heads 64",
        ),
        Model(
            name="deepseek-v3",
            title="DeepSeek-V3: 61 layers, one latent of 576, bf16",
            layers=61,
            heads=1,
            width=576,
            latent=True,
            source="config.json of DeepSeek-V3: num_hidden_layers 61, "
            "kv_lora_rank 512 + qk_rope_head_dim 64",
        ),
    )
}
