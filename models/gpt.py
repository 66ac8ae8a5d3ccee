"""A small GPT whose feed-forward activation comes from the registry: ids [B, T] -> logits [B, T, V].

Pre-norm RMSNorm, normed embeddings tied to the head, QK-norm, RoPE, and a head bias that starts at the log
unigram frequency: the recipe that learned most per second on two CPU cores (docs/log.md). It is a transformers model
like any other (`AutoModelForCausalLM.from_pretrained` reads a checkpoint once this module is imported).

    ids -> norm(embed) -> [ x + attention(norm(x)) -> x + down(activation(up(norm(x)))) ] * L -> norm -> embed^T + bias
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

from actuary import BadInput
from models import activations

Head = Literal["softmax", "sigmoid"]
HEADS = ("softmax", "sigmoid")
GATED_WIDTHS = ("matched", "full")
HEAD_DIM = 64  # where nobody chose
SIGMOID_HEAD = "-sigmoid-head"
NORM_EPS = 1e-6
ROPE_BASE = 10000.0
WIDTH_STEP = 8  # hidden widths are whole vectors of 8 floats


def hidden_width(dim: int, gated: bool, gated_width: str = "matched") -> int:
    """H. Pointwise 4C; gated 8C/3, so that its three matrices hold as much as the other's two
    (Shazeer 2020, section 2), or 4C where `gated_width` is "full"."""
    if not gated or gated_width == "full":
        return 4 * dim
    return max(WIDTH_STEP, round(8 * dim / 3 / WIDTH_STEP) * WIDTH_STEP)


def default_heads(dim: int) -> int:
    """As many heads as bring head_dim nearest to 64, each with an even number of channels."""
    fitting = [heads for heads in range(1, dim // 2 + 1) if dim % (2 * heads) == 0]
    return min(fitting, key=lambda heads: abs(dim / heads - HEAD_DIM), default=1)


def variant_name(activation: str, head: Head, seed: int = 0) -> str:
    """The name of a variant's checkpoint and bundle."""
    return activation + (SIGMOID_HEAD if head == "sigmoid" else "") + (f"-seed{seed}" if seed else "")


class ActuaryConfig(PreTrainedConfig):
    """The shape of one variant.

    Args:
        activation: a name of the registry.
        head: how logits become probabilities in training: `softmax` (cross-entropy) or `sigmoid`
            (binary cross-entropy per vocabulary entry).
        vocab_size, context, layers, dim, heads: V, longest T, L, C, and attention heads.
        hidden: H; by default `hidden_width(dim, gated, gated_width)`.
        gated_width: `matched` or `full`.
    """

    model_type = "actuary_gpt"
    attribute_map = {  # noqa: RUF012  (transformers' own way to say it)
        "hidden_size": "dim",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "max_position_embeddings": "context",
        "intermediate_size": "hidden",
    }

    def __init__(
        self,
        activation: str = "gelu",
        head: Head = "softmax",
        vocab_size: int = 2048,
        context: int = 128,
        layers: int = 2,
        dim: int = 128,
        heads: int = 2,
        hidden: int | None = None,
        gated_width: Literal["matched", "full"] = "matched",
        **kwargs: Any,
    ) -> None:
        if not isinstance(activation, str):
            raise BadInput(f"activation must be a name of the registry, not {activation!r}")
        whole = {"vocab": vocab_size, "context": context, "layers": layers, "dim": dim, "heads": heads}
        if hidden is not None:
            whole["hidden"] = hidden
        for name, value in whole.items():
            if type(value) is not int or value < 1:
                raise BadInput(f"{name} must be a whole number of at least 1, not {value!r}")
        for name, value, allowed in (("head", head, HEADS), ("gated_width", gated_width, GATED_WIDTHS)):
            if value not in allowed:
                raise BadInput(f"{name} must be {' or '.join(allowed)}, not {value!r}")
        if dim % heads or (dim // heads) % 2:
            raise BadInput(
                f"dim {dim} must be a multiple of 2 * heads, heads is {heads}: "
                "each head turns pairs of channels by position"
            )
        self.activation = activation
        self.head = head
        self.vocab_size = vocab_size
        self.context = context
        self.layers = layers
        self.dim = dim
        self.heads = heads
        self.gated_width = gated_width
        self.hidden = hidden or hidden_width(dim, activations.get(activation).gated, gated_width)
        kwargs.setdefault("tie_word_embeddings", False)  # one matrix by construction, not two that are tied
        kwargs.setdefault("use_cache", False)
        super().__init__(**kwargs)

    @property
    def name(self) -> str:
        return variant_name(self.activation, self.head)


def rope_tables(T: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE's angles (Su et al. 2021), each [T, head_dim / 2], in float64 on the CPU."""
    inverse = ROPE_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(T, dtype=torch.float64), inverse)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on [B, heads, T, head_dim]; channel i turns with channel i + head_dim / 2, as in Llama."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: ActuaryConfig) -> None:
        super().__init__()
        self.heads = config.heads
        head_dim = config.dim // config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps=NORM_EPS)
        self.k_norm = nn.RMSNorm(head_dim, eps=NORM_EPS)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, head_dim]
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    """down(activation(up(x))): [B, T, C] -> [B, T, C]. A gated form's gate and up are one packed matrix."""

    def __init__(self, config: ActuaryConfig) -> None:
        super().__init__()
        self.activation = activations.get(config.activation)
        width = config.hidden * (2 if self.activation.gated else 1)
        self.up = nn.Linear(config.dim, width, bias=False)
        self.down = nn.Linear(config.hidden, config.dim, bias=False)
        self.learned = nn.ParameterDict({name: nn.Parameter(torch.empty(1)) for name in self.activation.learned})

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x), **self.learned))


class Block(nn.Module):
    def __init__(self, config: ActuaryConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        return x + self.ffn(self.ffn_norm(x))


class ActuaryGPT(PreTrainedModel, GenerationMixin):
    config_class = ActuaryConfig
    base_model_prefix = ""
    _supports_sdpa = True

    def __init__(self, config: ActuaryConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
        self.head_bias = nn.Parameter(torch.empty(config.vocab_size))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Products that read the residual stream start at C^-0.5, those that write to it at zero.

        All at once, for the whole model: transformers passes over a module of ours that holds no parameter itself.
        """
        if module is not self:
            return
        nn.init.normal_(self.embed.weight, std=0.05)
        nn.init.zeros_(self.head_bias)
        for norm in self.modules():
            if isinstance(norm, nn.RMSNorm):
                nn.init.ones_(norm.weight)
        for block in self.blocks:
            for reads in (block.attention.qkv, block.ffn.up):
                nn.init.normal_(reads.weight, std=self.config.dim**-0.5)
            for writes in (block.attention.out, block.ffn.down):
                nn.init.zeros_(writes.weight)
            for name, start in block.ffn.activation.learned.items():
                nn.init.constant_(block.ffn.learned[name], start)

    @torch.no_grad()
    def start_head_at(self, frequency: Tensor) -> None:
        """Start the head bias at the unigram frequencies [V]: their log for softmax, their logit for sigmoid."""
        prior = frequency.to(self.head_bias)
        self.head_bias.copy_(prior.log() if self.config.head == "softmax" else torch.logit(prior))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, T] -> [B, T, C], after the last norm. `attention_mask` [B, T] is 0 where padded."""
        T = input_ids.shape[1]
        x = F.rms_norm(self.embed(input_ids), (self.config.dim,), eps=NORM_EPS)
        cos, sin = (table.to(x.dtype).to(x.device) for table in rope_tables(T, self.config.dim // self.config.heads))
        mask = None
        if attention_mask is not None and not bool(attention_mask.all()):
            causal = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
            own = torch.eye(T, dtype=torch.bool, device=x.device)  # a padded row still sees itself: no NaN
            mask = (causal & attention_mask.bool()[:, None, None, :]) | own
        for block in self.blocks:
            x = block(x, cos, sin, mask)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., C] -> [..., V]."""
        return F.linear(hidden, self.embed.weight, self.head_bias)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutput:
        """ids [B, T] -> logits [B, T, V]; `labels` [B, T], as everywhere in transformers, are the ids themselves
        and -100 where they do not count; `logits_to_keep` asks for the last positions only, 0 for all."""
        logits = self.logits(self.hidden_states(input_ids, attention_mask)[:, -logits_to_keep:])
        loss = None if labels is None else head_loss(logits[:, :-1], labels[:, 1:], self.config.head)
        return CausalLMOutput(loss=loss, logits=logits)


def head_loss(logits: Tensor, targets: Tensor, head: Head) -> Tensor:
    """Mean nats per target; logits [B, T, V], targets [B, T], -100 where they do not count.

    softmax: cross-entropy. sigmoid: binary cross-entropy summed over the vocabulary, in its stable form
    sum_v softplus(l_v) - l_target.
    """
    if head == "softmax":
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    counted = targets != -100
    chosen = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (F.softplus(logits).sum(-1) - chosen)[counted].mean()


def log_probabilities(logits: Tensor, head: Head) -> Tensor:
    """[..., V] -> [..., V]: log softmax, or the log of the sigmoids divided by their sum."""
    return F.log_softmax(logits if head == "softmax" else F.logsigmoid(logits), dim=-1)


AutoConfig.register(ActuaryConfig.model_type, ActuaryConfig, exist_ok=True)
AutoModelForCausalLM.register(ActuaryConfig, ActuaryGPT, exist_ok=True)
