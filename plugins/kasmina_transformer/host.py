"""A small causal language model that can grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
import torch.nn.functional as F
from kasmina_layers.sizes import require_at_least
from torch import Tensor, nn

from kasmina_core import ContextReader, EveryPosition, HookedHost, InjectionPoint, Topology
from kasmina_transformer.layers import merge_heads, split_heads
from kasmina_transformer.sizes import require_divisor

INIT_STD: Final = 0.02


class TransformerLayer(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``; attention is causal.

    Args:
        dim: Number of features ``d``.
        n_heads: Number of heads, a divisor of ``dim``.
        expansion: How many times wider than ``dim`` the network is inside.

    Shape:
        ``(b, t, d)`` to the same.
    """

    def __init__(self, dim: int, n_heads: int, expansion: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, expansion * dim)
        self.contract = nn.Linear(expansion * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's features."""
        q, k, v = split_heads(self.qkv(self.attention_norm(x)), self.n_heads)  # (b, heads, t, d / heads)
        x = x + self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True)))
        branch: Tensor = self.contract(F.gelu(self.expand(self.mlp_norm(x))))
        return x + branch


class TransformerHost(HookedHost, nn.Module):
    """A small causal language model in the manner of GPT-2, without dropout; a slot after every layer.

    The head shares its weight with the token embedding. The points are ``layer1``, ``layer2``, … , all of width
    ``dim`` and causal.

    Args:
        vocab_size: Number of tokens; 256 takes bytes.
        dim: Number of features.
        n_layers: Number of layers.
        n_heads: Number of attention heads, a divisor of ``dim``.
        max_len: Longest sequence, in tokens.
        expansion: How many times wider than ``dim`` a layer's feed-forward network is inside.

    Shape:
        Token indices ``(b, t)``, dtype long, ``t <= max_len``, to logits ``(b, t, vocab_size)``.

    Raises:
        ValueError: If a number is below 1, or ``n_heads`` does not divide ``dim``.

    Source: Radford et al. 2019, https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf

    >>> host = TransformerHost(vocab_size=65, dim=32, n_layers=2)
    >>> [(point.name, point.dim, point.causal) for point in host.injection_points()]
    [('layer1', 32, True), ('layer2', 32, True)]
    """

    def __init__(
        self,
        vocab_size: int = 256,
        dim: int = 64,
        *,
        n_layers: int = 2,
        n_heads: int = 4,
        max_len: int = 128,
        expansion: int = 4,
    ) -> None:
        super().__init__()
        owner = "TransformerHost"
        self.vocab_size = require_at_least(owner, "vocab_size", vocab_size, 1)
        self.dim = require_at_least(owner, "dim", dim, 1)
        self.max_len = require_at_least(owner, "max_len", max_len, 1)
        require_at_least(owner, "n_layers", n_layers, 1)
        require_divisor(owner, "n_heads", n_heads, dim)
        require_at_least(owner, "expansion", expansion, 1)
        self.tok_emb = nn.Embedding(vocab_size, dim)
        self.pos_emb = nn.Embedding(max_len, dim)
        self.layers = nn.ModuleList(TransformerLayer(dim, n_heads, expansion) for _ in range(n_layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self._tie_weights()
        self._init_weights(n_layers)
        self.register_load_state_dict_post_hook(_tied_again)

    def _tie_weights(self) -> None:
        self.head.weight = self.tok_emb.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TransformerHost:
        super()._apply(fn, recurse)
        self._tie_weights()  # `to_empty` parts them when it leaves the meta device
        return self

    def _init_weights(self, n_layers: int) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith(("out.weight", "contract.weight")):
                # 2 n_layers branches add up; this keeps the variance of their sum
                nn.init.normal_(parameter, std=INIT_STD / (2 * n_layers) ** 0.5)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def injection_points(self) -> Sequence[InjectionPoint]:
        """Return ``layer1``, ``layer2``, …, each at the output of its layer."""
        return [
            InjectionPoint(f"layer{i + 1}", f"layers.{i}", self.dim, Topology.TRANSFORMER, causal=True)
            for i in range(len(self.layers))
        ]

    def example_inputs(self) -> tuple[Tensor]:
        """Return two sequences of up to 8 tokens on the model's device, always the same ones."""
        t = min(8, self.max_len)
        tokens = torch.arange(2 * t, device=self.tok_emb.weight.device) % self.vocab_size
        return (tokens.view(2, t),)

    def context_reader(self) -> ContextReader:
        """Return that every position is real: this host knows no padding, no packed documents and no cache."""
        return EveryPosition()

    def forward(self, idx: Tensor) -> Tensor:
        """Return the logits of the next token at each position of ``idx``.

        Raises:
            ValueError: If the sequences are longer than ``max_len``.
        """
        t = idx.shape[1]
        if t > self.max_len:
            raise ValueError(
                "The sequences are longer than this TransformerHost takes.\n"
                f"  tokens:  {t}\n"
                f"  max_len: {self.max_len}\n"
                "Cut them, or build the host with a larger max_len."
            )
        x = self.tok_emb(idx) + self.pos_emb(torch.arange(t, device=idx.device))  # (b, t, d)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def _tied_again(host: TransformerHost, _keys: object) -> None:
    """A load with ``assign=True`` gives each its own tensor."""
    host._tie_weights()
