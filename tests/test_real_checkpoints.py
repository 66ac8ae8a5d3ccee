"""Checkpoints of transformers' families: read, exported, held against transformers itself, and refused with reasons."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.activations import ACT2FN

from actuary import BadInput
from export import bundle
from export.graph import build
from export.parity import model_bound
from models import activations
from models.decoder import GATED, POINTWISE, decoder_of

V, CONTEXT = 300, 48
LENGTHS = (1, 2, 3, 17, CONTEXT - 1, CONTEXT)
GPT2 = {"vocab_size": V, "n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 4}
LLAMA = {
    "vocab_size": V,
    "max_position_embeddings": CONTEXT,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def rope(kind: str, **more: float) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


CONFIGS: dict[str, Callable] = {
    "gpt2": lambda: GPT2Config(**GPT2),
    "gpt2-relu-narrow": lambda: GPT2Config(**GPT2, activation_function="relu", n_inner=40),
    "gpt2-scales": lambda: GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True, activation_function="gelu"),
    "gpt2-unscaled": lambda: GPT2Config(**GPT2, scale_attn_weights=False, reorder_and_upcast_attn=True),
    "llama": lambda: LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "llama-biases": lambda: LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True, hidden_act="gelu"),
    "llama-head-dim": lambda: LlamaConfig(**LLAMA, head_dim=12, rms_norm_eps=1e-5),
    "llama-linear": lambda: LlamaConfig(**LLAMA, **rope("linear", factor=4.0)),
    "llama-dynamic": lambda: LlamaConfig(**LLAMA, **rope("dynamic", factor=2.0)),
    "llama-yarn": lambda: LlamaConfig(**LLAMA, **rope("yarn", factor=4.0, original_max_position_embeddings=12)),
    "llama3": lambda: LlamaConfig(
        **LLAMA,
        **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=12),
    ),
    "mistral": lambda: MistralConfig(**LLAMA, sliding_window=None),
    "mistral-wide-window": lambda: MistralConfig(**LLAMA, sliding_window=CONTEXT),
    "qwen2": lambda: Qwen2Config(**LLAMA, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**LLAMA, head_dim=16),
}


def random_model(name: str) -> PreTrainedModel:
    """Weights that matter everywhere: none zero, no gain 1, no bias 0, attention far from uniform."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.copy_((1.0 if "norm" in key or "ln_" in key else 0.0) + 0.3 * torch.randn_like(weight))
            else:
                weight.normal_(std=1.5 * min(weight.shape) ** -0.5)
    return model


def run(session: onnxruntime.InferenceSession, prompt: np.ndarray) -> np.ndarray:
    """Logits [V] after the prompt."""
    feed = {"input_ids": prompt[None], "lengths": np.array([len(prompt)]), "top_k": np.array([0])}
    return session.run([bundle.LOGITS], feed)[0][0]


def worst_error(model: PreTrainedModel, session: onnxruntime.InferenceSession) -> float:
    """Largest |error| of a logit over its row's largest |logit|, against transformers in float32, at LENGTHS."""
    rng = np.random.default_rng(1)
    worst = 0.0
    for length in LENGTHS:
        prompt = rng.integers(0, V, size=length)
        with torch.inference_mode():
            expected = model(input_ids=torch.from_numpy(prompt)[None]).logits[0, -1].numpy()
        worst = max(worst, float(np.abs(run(session, prompt) - expected).max() / np.abs(expected).max()))
    return worst


@pytest.mark.parametrize("name", CONFIGS)
def test_the_graph_gives_transformers_own_logits(name: str):
    model = random_model(name)
    decoder = decoder_of(model, name)
    session = onnxruntime.InferenceSession(build(decoder).SerializeToString(), providers=["CPUExecutionProvider"])
    # Each of the two is within the gate's bound of the exact logits.
    assert worst_error(model, session) <= min(1e-4, 2 * model_bound(decoder))


@pytest.mark.parametrize(("table", "theirs"), [(t, n) for t in (POINTWISE, GATED) for n in t])
def test_each_activation_is_transformers_own(table, theirs: str):
    x = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    ours = activations.get(table[theirs])
    got = ours.expression(x, torch.full_like(x, 1.5)) / 1.5 if ours.gated else ours.expression(x)
    torch.testing.assert_close(got, ACT2FN[theirs](x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: LlamaConfig(**LLAMA, hidden_act="gelu_new"), ["gelu_new", "gated", "silu"]),
        (lambda: GPT2Config(**GPT2, activation_function="sqrtsoftplus"), ["sqrtsoftplus", "gelu_new, gelu_python"]),
        (lambda: MistralConfig(**LLAMA, sliding_window=8), ["window of 8", "context of 48"]),
        (lambda: Qwen2Config(**LLAMA, use_sliding_window=True, sliding_window=8, max_window_layers=1), ["window of 8"]),
        (
            lambda: LlamaConfig(
                **LLAMA,
                **rope("longrope", long_factor=[2.0] * 4, short_factor=[1.0] * 4, original_max_position_embeddings=12),
            ),
            ["longrope", "llama3"],
        ),
    ],
)
def test_what_one_table_or_node_cannot_say_is_refused_by_name(config: Callable, words: list[str]):
    with pytest.raises(BadInput) as refused:
        decoder_of(AutoModelForCausalLM.from_config(config()), "mine")
    assert all(word in str(refused.value) for word in words), refused.value
