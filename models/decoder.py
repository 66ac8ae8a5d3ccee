"""A decoder-only transformer as plain arrays: what export/graph.py writes, whichever checkpoint it came from.

One `Decoder` holds a shape and named weights; a reader per family (ours here, transformers' in
models/checkpoints.py) fills it. Nothing after this module knows where a model came from.

    embed (+ position) -> [ x + out(attention(qkv(norm(x)))) -> x + down(activation(up(norm(x)))) ] * L -> norm -> head
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from models import activations
from models.activations import Activation
from models.gpt import NORM_EPS, ActuaryGPT, Head, rope_tables

Weights = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Decoder:
    """Shape and weights of one model.

    Args:
        name: of the checkpoint, for messages.
        family: `actuary_gpt`, or transformers' `model_type`.
        activation: the feed-forward activation's record.
        head: how logits become probabilities.
        vocab_size, context, layers, dim, hidden: V, longest T, L, C, H.
        heads, kv_heads, head_dim: query heads, key and value heads (a divisor of `heads`), D.
        norm: `rms`, x / sqrt(mean(x^2) + eps) * weight; `layer`, centred first, with a bias.
        score_scales: [L], what q k^T is multiplied with in each block.
        rope: cos and sin [context, D / 2] of the angles that turn channel i with channel i + D / 2; None where
            positions are embedded.
        weights: float32, products as torch has them, [out, in]:
            embed [V, C]; position [context, C] where `rope` is None;
            blocks.I.attention_norm, blocks.I.ffn_norm, norm: .weight [C], .bias [C] when `layer`;
            blocks.I.qkv [(heads + 2 kv_heads) D, C]; blocks.I.q_norm, .k_norm: .weight [D] where there are;
            blocks.I.out [C, heads D]; blocks.I.up [H, C], packed gate then up [2H, C] when gated; blocks.I.down [C, H];
            blocks.I.learned.NAME [1]; head [V, C]. A product's .bias stands beside its .weight where it has one.
    """

    name: str
    family: str
    activation: Activation
    head: Head
    vocab_size: int
    context: int
    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    norm: Literal["rms", "layer"]
    norm_eps: float
    score_scales: tuple[float, ...]
    rope: tuple[NDArray[np.float32], NDArray[np.float32]] | None
    weights: Weights
    parameters: int

    def block(self, i: int) -> Weights:
        """Block i's weights, by their names inside the block."""
        prefix = f"blocks.{i}."
        return {name.removeprefix(prefix): array for name, array in self.weights.items() if name.startswith(prefix)}


def from_actuary(model: ActuaryGPT, name: str) -> Decoder:
    """One of our own."""
    config = model.config
    own = {key: tensor.detach().float().cpu().numpy() for key, tensor in model.state_dict().items()}
    weights: dict[str, NDArray[Any]] = {
        # Norm and lookup commute: the table is normed once, here, in float64.
        "embed": _normed(own["embed.weight"]),
        "norm.weight": own["norm.weight"],
        "head.weight": own["embed.weight"],
        "head.bias": own["head_bias"],
    }
    for key, array in own.items():
        if key.startswith("blocks."):
            weights[key.replace(".attention.", ".").replace(".ffn.", ".")] = array
    cos, sin = (table.float().numpy() for table in rope_tables(config.context, config.dim // config.heads))
    return Decoder(
        name=name,
        family=config.model_type,
        activation=activations.get(config.activation),
        head=config.head,
        vocab_size=config.vocab_size,
        context=config.context,
        layers=config.layers,
        dim=config.dim,
        heads=config.heads,
        kv_heads=config.heads,
        head_dim=config.dim // config.heads,
        hidden=config.hidden,
        norm="rms",
        norm_eps=NORM_EPS,
        score_scales=((config.dim // config.heads) ** -0.5,) * config.layers,
        rope=(cos, sin),
        weights=weights,
        parameters=sum(array.size for array in own.values()),
    )


def _normed(table: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows [V, C] over their root mean square."""
    exact = table.astype(np.float64)
    return np.asarray(exact / np.sqrt((exact**2).mean(-1, keepdims=True) + NORM_EPS), dtype=np.float32)
