"""Modules between a decoder and a mean: latent attention (NV-Embed), and a plain control with as many parameters.

Latent attention lets each final state look up what it is to say in a table that is trained:

    y = x + W_o attention(query = W_q norm(x), keys = W_k L, values = W_v L)        L: 512 latents, 8 heads
    z = y + W_2 gelu(W_1 norm(y))

and the embedding is the mean of z (arXiv 2405.17428, section 3.1, whose latents are keys and values alike). W_o and W_2
start at 0, so that it starts as the mean of the states. The control is a stack of sentence-transformers' own `Dense`
layers with residuals, which start at 0 too. Both treat each state by itself, so that neither padding nor other texts
matter to them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers.base.modules.dense import Dense
from sentence_transformers.base.modules.module import Module
from torch import Tensor, nn

from anchorvec.errors import AnchorvecError

LATENTS, HEADS = 512, 8
"""The source's."""


class LatentAttention(Module):
    """Replaces the final states of all tokens, of `dim` numbers, by what they find among so many `latents`.

    A module of sentence-transformers, which reads and writes `token_embeddings` (texts, tokens, dim). Raises
    AnchorvecError where `dim` cannot be split among so many `heads`.
    """

    config_keys: list[str] = ["dim", "latents", "heads"]  # noqa: RUF012 - the library's

    def __init__(self, dim: int, latents: int = LATENTS, heads: int = HEADS) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if dim % heads:
            raise AnchorvecError(
                f"model.pooling: latent_attention splits a state among {heads} heads, and this model's has {dim} "
                "numbers; take mean, or dense_mean"
            )
        self.dim, self.latents, self.heads = dim, latents, heads
        self.table = nn.Parameter(torch.randn(latents, dim) * dim**-0.5)
        self.norm, self.norm_of_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        last: Any = self.mlp[2]
        for layer in (self.out, last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        """`features` with other `token_embeddings`: (texts, tokens, dim)."""
        features["token_embeddings"] = self.transform(features["token_embeddings"])
        return features

    def transform(self, states: Tensor) -> Tensor:
        """What takes the place of each of `states`: (..., dim)."""
        parts = self.query(self.norm(states)), self.key(self.table), self.value(self.table)
        by_head = (part.reshape(1, -1, self.heads, self.dim // self.heads).transpose(1, 2) for part in parts)
        found = F.scaled_dot_product_attention(*by_head).transpose(1, 2).reshape(states.shape)
        states = states + self.out(found)
        changed: Tensor = states + self.mlp(self.norm_of_mlp(states))
        return changed

    def get_embedding_dimension(self) -> int:
        """The numbers of a state, which stay as many."""
        return self.dim

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write configuration and weights into the folder `output_path`.

        `args` and `kwargs` are not used; without `safe_serialization` the weights are a pickle.
        """
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path: str, **options: Any) -> "LatentAttention":  # type: ignore[override]
        """The module in a folder or repository, `model_name_or_path`; `options` are those of the library."""
        names = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        where = {name: options[name] for name in names if name in options}
        module = cls(**cls.load_config(model_name_or_path, **where))
        loaded: LatentAttention = cls.load_torch_weights(model_name_or_path, model=module, **where)
        return loaded


def dense_layers(dim: int) -> list[Dense]:
    """Layers of the library, one after another, with about as many parameters as latent attention for `dim` numbers.

    Each gives x + gelu(W x + b) for each final state x, and starts as x.
    """
    with torch.device("meta"):
        wanted = sum(p.numel() for p in LatentAttention(dim, heads=1).parameters())
    return [
        Dense(
            dim,
            dim,
            activation_function=nn.GELU(),
            init_weight=torch.zeros(dim, dim),
            init_bias=torch.zeros(dim),
            module_input_name="token_embeddings",
            use_residual=True,
        )
        for _ in range(round(wanted / (dim * dim + dim)))
    ]


def is_of_tokens(module: object) -> bool:
    """Whether `module` gives other states for tokens, of each token's state alone."""
    return isinstance(module, LatentAttention) or (
        isinstance(module, Dense) and module.module_input_name == module.module_output_name == "token_embeddings"
    )
