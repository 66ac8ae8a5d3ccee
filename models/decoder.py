"""A decoder-only transformer as plain arrays: what export/graph.py writes, whichever checkpoint it came from.

One `Decoder` holds a shape and named weights; a reader per family, `READERS` at the end, fills it from the torch
model that models/checkpoints.py loads. Nothing after this module knows where a model came from.

    embed (+ position) -> [ x + out(attention(qkv(norm(x)))) -> x + down(activation(up(norm(x)))) ] * L -> norm -> head
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from actuary import BadInput
from models import activations
from models.activations import Activation
from models.gpt import NORM_EPS, ActuaryConfig, ActuaryGPT, Head, rope_tables
from models.swap import recorded_activation

Weights = Mapping[str, NDArray[np.float32]]

# transformers' name of a feed-forward activation (its ACT2FN) -> ours, where it stands alone and where it gates.
POINTWISE = MappingProxyType(
    {
        "gelu": "gelu",
        "gelu_python": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "gelu_accurate": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_python_tanh": "gelu_tanh",
        "quick_gelu": "quick_gelu",
        "silu": "silu",
        "swish": "silu",
        "relu": "relu",
        "relu2": "relu2",
        "relu6": "relu6",
        "leaky_relu": "leaky_relu",
        "mish": "mish",
        "tanh": "tanh",
        "sigmoid": "sigmoid",
    }
)
GATED = MappingProxyType(
    {
        "silu": "swiglu",
        "swish": "swiglu",
        "gelu": "geglu",
        "gelu_python": "geglu",
        "relu": "reglu",
        "sigmoid": "glu",
        "linear": "bilinear",
    }
)


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


def from_gpt2(model: PreTrainedModel, name: str) -> Decoder:
    """transformers' `gpt2`: positions embedded, LayerNorm, biases everywhere, weights stored [in, out]."""
    config = model.config
    own = _arrays(model)
    if config.add_cross_attention:
        raise BadInput(f"checkpoint {name!r} attends to an encoder (add_cross_attention); we read decoders alone")
    weights: dict[str, NDArray[Any]] = {
        "embed": own["transformer.wte.weight"],
        "position": own["transformer.wpe.weight"],
        "head.weight": own["lm_head.weight"],
    }
    norms = {"norm": "transformer.ln_f"}
    for i in range(config.n_layer):
        block, theirs = f"blocks.{i}", f"transformer.h.{i}"
        norms |= {f"{block}.attention_norm": f"{theirs}.ln_1", f"{block}.ffn_norm": f"{theirs}.ln_2"}
        for ours, product in (
            ("qkv", "attn.c_attn"),
            ("out", "attn.c_proj"),
            ("up", "mlp.c_fc"),
            ("down", "mlp.c_proj"),
        ):
            if f"{theirs}.{product}.weight" in own:  # else it was swapped
                weights[f"{block}.{ours}.weight"] = own[f"{theirs}.{product}.weight"].T
                weights[f"{block}.{ours}.bias"] = own[f"{theirs}.{product}.bias"]
        weights |= _swapped(own, f"{theirs}.mlp.", f"{block}.")
    for ours, norm in norms.items():
        weights |= {f"{ours}.{part}": own[f"{norm}.{part}"] for part in ("weight", "bias")}
    return Decoder(
        name=name,
        family=config.model_type,
        activation=activation_of(config, name),
        head="softmax",
        vocab_size=config.vocab_size,
        context=config.n_positions,
        layers=config.n_layer,
        dim=config.n_embd,
        heads=config.n_head,
        kv_heads=config.n_head,
        head_dim=config.n_embd // config.n_head,
        hidden=weights["blocks.0.down.weight"].shape[1],
        norm="layer",
        norm_eps=config.layer_norm_epsilon,
        score_scales=tuple(float(block.attn.scaling) for block in model.transformer.h),
        rope=None,
        weights=weights,
        parameters=model.num_parameters(),
    )


def from_llama(model: PreTrainedModel, name: str) -> Decoder:
    """transformers' `llama` and what was made from it (`mistral`, `qwen2`, `qwen3`): RMSNorm, RoPE, a gated FFN.

    Biases (of q, k, v in Qwen2) and the norms of q and k (Qwen3) are read where the model has them.
    """
    config = model.config
    own = _arrays(model)
    weights: dict[str, NDArray[Any]] = {
        "embed": own["model.embed_tokens.weight"],
        "norm.weight": own["model.norm.weight"],
        "head.weight": own["lm_head.weight"],
    }
    packed = {
        "attention_norm": ["input_layernorm"],
        "ffn_norm": ["post_attention_layernorm"],
        "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "q_norm": ["self_attn.q_norm"],
        "k_norm": ["self_attn.k_norm"],
        "out": ["self_attn.o_proj"],
        "up": ["mlp.gate_proj", "mlp.up_proj"],
        "down": ["mlp.down_proj"],
    }
    for i in range(config.num_hidden_layers):
        for ours, theirs in packed.items():
            for part in ("weight", "bias"):
                rows = [own[key] for one in theirs if (key := f"model.layers.{i}.{one}.{part}") in own]
                if rows:
                    weights[f"blocks.{i}.{ours}.{part}"] = rows[0] if len(rows) == 1 else np.concatenate(rows)
        weights |= _swapped(own, f"model.layers.{i}.mlp.", f"blocks.{i}.")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Decoder(
        name=name,
        family=config.model_type,
        activation=activation_of(config, name),
        head="softmax",
        vocab_size=config.vocab_size,
        context=config.max_position_embeddings,
        layers=config.num_hidden_layers,
        dim=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        hidden=weights["blocks.0.down.weight"].shape[1],
        norm="rms",
        norm_eps=config.rms_norm_eps,
        score_scales=tuple(float(layer.self_attn.scaling) for layer in model.model.layers),
        rope=_rope(model.model.rotary_emb, config.max_position_embeddings, head_dim, name),
        weights=weights,
        parameters=model.num_parameters(),
    )


def _swapped(own: Weights, theirs: str, ours: str) -> dict[str, NDArray[Any]]:
    """The weights of a block that `actuary swap` put in (models/swap.py), which has our own names."""
    parts = ("up.", "down.", "learned.")
    return {
        key.replace(theirs, ours, 1): array
        for key, array in own.items()
        if key.startswith(theirs) and key.removeprefix(theirs).startswith(parts)
    }


def _arrays(model: PreTrainedModel) -> dict[str, NDArray[Any]]:
    """The state dict in float32; a view of the model's own memory where it is float32 already."""
    return {key: tensor.detach().float().cpu().numpy() for key, tensor in model.state_dict().items()}


def activation_of(config: Any, name: str) -> Activation:
    """Our record of a transformers configuration's activation; BadInput lists those that we have."""
    swapped = recorded_activation(config)
    if swapped is not None:
        return swapped
    gated = not hasattr(config, "activation_function")  # of our families GPT-2 alone is not
    table, theirs = (GATED, config.hidden_act) if gated else (POINTWISE, config.activation_function)
    if theirs not in table:
        form = "a gated feed-forward block" if gated else "a feed-forward block"
        raise BadInput(
            f"checkpoint {name!r} has the activation {theirs!r} in {form}; read there are: {', '.join(sorted(table))}"
        )
    return activations.get(table[theirs])


def _refuse_sliding_window(config: Any, context: int, name: str) -> None:
    """BadInput where some block sees less than the whole context."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if window is not None and window < context and (kinds is None or "sliding_attention" in kinds):
        raise BadInput(
            f"checkpoint {name!r} attends to a sliding window of {window} tokens, shorter than its context of "
            f"{context}; export reads full attention: give it a context of {window} at most (--context {window})"
        )


def _rope(rotary: nn.Module, context: int, head_dim: int, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """cos and sin [context, D / 2] from transformers' own module, so that any scaling is what it computes.

    BadInput where the angles of a position change with the prompt's length: one table cannot say that.
    """

    def table(T: int) -> tuple[NDArray[Any], ...]:
        """[T, D] each; transformers repeats the D / 2 angles."""
        with torch.no_grad():
            return tuple(t[0].numpy().copy() for t in rotary(torch.zeros(1), torch.arange(T)[None]))

    whole, kind = table(context), rotary.rope_type
    if any(t.shape[-1] != head_dim for t in whole):
        raise BadInput(
            f"checkpoint {name!r} turns {whole[0].shape[-1]} of {head_dim} channels of a head by position (partial "
            "RoPE); export reads RoPE over the whole head"
        )
    if kind == "longrope" or any(
        not np.array_equal(a[:T], b) for T in (1, max(1, context // 2)) for a, b in zip(whole, table(T), strict=True)
    ):
        raise BadInput(
            f"checkpoint {name!r} has RoPE of type {kind!r}, whose angles depend on the prompt's length within the "
            f"context of {context}; export reads those that do not: default, linear, dynamic, yarn, llama3"
        )
    cos, sin = (np.ascontiguousarray(t[:, : head_dim // 2]) for t in whole)
    return cos, sin


# model_type -> what turns a model of it into a Decoder; models/checkpoints.py reads these from transformers' folders.
READERS: Mapping[str, Callable[[PreTrainedModel, str], Decoder]] = MappingProxyType(
    {
        ActuaryConfig.model_type: from_actuary,
        "gpt2": from_gpt2,
        "llama": from_llama,
        "mistral": from_llama,
        "qwen2": from_llama,
        "qwen3": from_llama,
    }
)


def decoder_of(model: PreTrainedModel, name: str, context: int | None = None) -> Decoder:
    """The model as plain arrays.

    Args:
        context: longest prompt in tokens, where it shall be shorter than the model's own.

    BadInput where no reader knows its `model_type`, or the context does not fit.
    """
    family, longest = model.config.model_type, model.config.max_position_embeddings
    if family not in READERS:
        raise BadInput(f"checkpoint {name!r} is a {family!r}; read are: {', '.join(READERS)}")
    context = longest if context is None else context
    if not 1 <= context <= longest:
        raise BadInput(f"context {context} does not fit checkpoint {name!r}, which knows 1 to {longest} positions")
    _refuse_sliding_window(model.config, context, name)
    decoder = READERS[family](model, name)
    if context == longest:
        return decoder
    position = {"position": decoder.weights["position"][:context]} if decoder.rope is None else {}
    rope = decoder.rope and (decoder.rope[0][:context], decoder.rope[1][:context])
    return replace(decoder, context=context, rope=rope, weights={**decoder.weights, **position})
