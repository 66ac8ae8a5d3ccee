"""The model against an independent implementation (transformers' Qwen3), and what its parts promise."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from actuary import BadInput
from models.activations import registry
from models.gpt import ActuaryConfig, ActuaryGPT, default_heads, head_loss, hidden_width, log_probabilities

B, T, V = 3, 17, 300


def small(activation: str = "gelu", **shape) -> ActuaryGPT:
    torch.manual_seed(1)
    model = ActuaryGPT(
        ActuaryConfig(activation, **{"vocab_size": V, "context": 32, "layers": 2, "dim": 32, "heads": 2, **shape})
    ).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
        elif parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(2))


def test_equals_transformers_qwen3_with_the_same_weights():
    """Qwen3 is this architecture with SwiGLU, but for our normed embedding and the bias of our head."""
    ours = small("swiglu")
    config = Qwen3Config(
        vocab_size=V, hidden_size=32, intermediate_size=ours.config.hidden, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=32, rms_norm_eps=1e-6, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    theirs = Qwen3ForCausalLM(config).eval()
    normed = F.rms_norm(ours.embed.weight, (32,), eps=1e-6)
    weights = {
        "model.embed_tokens.weight": normed,
        "lm_head.weight": ours.embed.weight,
        "model.norm.weight": ours.norm.weight,
    }
    for i, block in enumerate(ours.blocks):
        q, k, v = block.attention.qkv.weight.chunk(3)
        gate, up = block.ffn.up.weight.chunk(2)
        weights |= {
            f"model.layers.{i}.{name}.weight": weight
            for name, weight in {
                "input_layernorm": block.attention_norm.weight,
                "self_attn.q_proj": q,
                "self_attn.k_proj": k,
                "self_attn.v_proj": v,
                "self_attn.q_norm": block.attention.q_norm.weight,
                "self_attn.k_norm": block.attention.k_norm.weight,
                "self_attn.o_proj": block.attention.out.weight,
                "post_attention_layernorm": block.ffn_norm.weight,
                "mlp.gate_proj": gate,
                "mlp.up_proj": up,
                "mlp.down_proj": block.ffn.down.weight,
            }.items()
        }
    theirs.load_state_dict(weights)
    with torch.no_grad():
        got, expected = ours.double()(ids(B, T)).logits, theirs.double()(ids(B, T)).logits + ours.head_bias
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)  # Qwen3 keeps RoPE's tables in float32


@pytest.mark.parametrize("name", registry())
def test_gated_and_pointwise_hold_as_many_parameters(name: str):
    def parameters(activation: str) -> int:
        return sum(p.numel() for p in ActuaryGPT(ActuaryConfig(activation)).parameters())

    assert parameters(name) == pytest.approx(parameters("gelu"), rel=0.01)


def test_heads_where_nobody_chose():
    assert [default_heads(dim) for dim in (768, 384, 128, 32, 200, 100, 6)] == [12, 6, 2, 1, 4, 2, 1]


def test_hidden_widths():
    assert hidden_width(128, gated=False) == 512
    assert hidden_width(128, gated=True) == 344  # 8/3 * 128 = 341.3, in whole vectors of 8
    assert hidden_width(128, gated=True, gated_width="full") == 512
    assert small("swiglu", gated_width="full").config.hidden == 128


def test_a_position_sees_only_what_stands_before_it():
    model, prompt = small(), ids(1, T)
    changed = prompt.clone()
    changed[0, 9:] = (changed[0, 9:] + 1) % V
    with torch.no_grad():
        before, after = model(prompt).logits, model(changed).logits
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert (before[:, 9] - after[:, 9]).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_with_a_mask_changes_no_row_that_counts(side: str):
    model, prompt = small(), ids(1, 9)
    pad = torch.zeros(1, 4, dtype=torch.long)
    row = torch.cat([pad, prompt], 1) if side == "left" else torch.cat([prompt, pad], 1)
    mask = torch.ones_like(row)
    mask[:, slice(None, 4) if side == "left" else slice(9, None)] = 0
    kept = slice(4, None) if side == "left" else slice(0, 9)
    with torch.no_grad():
        alone, padded = model(prompt).logits, model(row, attention_mask=mask).logits
    assert padded.isfinite().all()
    torch.testing.assert_close(padded[:, kept], alone, rtol=1e-4, atol=1e-4)


def test_saved_without_pickle_and_read_by_the_auto_classes(tmp_path):
    model = small("swish")
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    assert AutoConfig.from_pretrained(tmp_path).activation == "swish"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, ActuaryGPT)
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), name


def test_generates_like_any_transformers_model():
    model, prompt = small(), ids(1, 5)
    with torch.no_grad():
        first = int(model(prompt).logits[0, -1].argmax())
    assert model.generate(prompt, max_new_tokens=3, do_sample=False)[0, 5] == first


def test_loss_of_each_head_is_torch_s_own():
    logits, targets = torch.randn(B, T, V, generator=torch.Generator().manual_seed(3)), ids(B, T)
    chosen = F.log_softmax(logits, dim=-1).gather(-1, targets[..., None])
    torch.testing.assert_close(head_loss(logits, targets, "softmax"), -chosen.mean())
    one_hot = F.one_hot(targets, V).float()
    each = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none").sum(-1)
    torch.testing.assert_close(head_loss(logits, targets, "sigmoid"), each.mean())
    ignored = targets.clone()
    ignored[0] = -100
    torch.testing.assert_close(head_loss(logits, ignored, "sigmoid"), each[1:].mean())


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_labels_are_shifted_as_everywhere_in_transformers(head: str):
    model, prompt = small(head=head), ids(B, T)
    with torch.no_grad():
        loss = model(prompt, labels=prompt).loss
        expected = head_loss(model(prompt).logits[:, :-1], prompt[:, 1:], head)
    torch.testing.assert_close(loss, expected)


def test_binary_cross_entropy_holds_at_extreme_logits():
    logits = torch.tensor([[[1000.0, -1000.0, 500.0]]], requires_grad=True)
    loss = head_loss(logits, torch.tensor([[0]]), "sigmoid")
    loss.backward()
    assert loss.item() == pytest.approx(500.0)
    assert logits.grad.isfinite().all()


def test_log_probabilities_of_each_head_sum_to_one():
    logits = torch.tensor([[2.0, -1.0, 0.5, -1e4]])
    for head in ("softmax", "sigmoid"):
        assert log_probabilities(logits, head).exp().sum().item() == pytest.approx(1.0)
    # sigmoid(l) / sum of sigmoids, by hand
    s = [1 / (1 + math.exp(-z)) for z in (2.0, -1.0, 0.5)]
    assert log_probabilities(logits, "sigmoid").exp()[0, 0].item() == pytest.approx(s[0] / sum(s), rel=1e-5)


def test_every_weight_starts_as_the_recipe_says(tmp_path):
    """transformers passes over modules without parameters of their own, and torch's defaults would stand unseen."""
    torch.manual_seed(0)
    model = ActuaryGPT(ActuaryConfig("swish", dim=128))
    for block in model.blocks:
        assert block.ffn.learned["beta"].item() == 1.0
        assert not block.ffn.down.weight.any()
        assert not block.attention.out.weight.any()
        for reads in (block.ffn.up, block.attention.qkv):
            assert reads.weight.std().item() == pytest.approx(128**-0.5, rel=0.02)
    assert model.embed.weight.std().item() == pytest.approx(0.05, rel=0.02)
    assert not model.head_bias.any()
    assert all((m.weight == 1).all() for m in model.modules() if isinstance(m, torch.nn.RMSNorm))
    torch.nn.init.constant_(model.blocks[0].ffn.learned["beta"], 3.0)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)  # and reading a checkpoint starts nothing anew
    assert [block.ffn.learned["beta"].item() for block in again.blocks] == [3.0, 1.0]


@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_a_fresh_model_says_the_unigram(head: str):
    """Blocks write zeros at the start; a small embedding leaves the prior standing."""
    frequency = torch.arange(1.0, V + 1) / torch.arange(1.0, V + 1).sum()
    model = ActuaryGPT(ActuaryConfig("gelu", head, vocab_size=V, layers=1, dim=32, heads=1))
    model.start_head_at(frequency)
    with torch.no_grad():
        model.embed.weight.zero_()
        logits = model(ids(1, 3)).logits[0, -1]
    probability = torch.softmax(logits, -1) if head == "softmax" else torch.sigmoid(logits)
    torch.testing.assert_close(probability, frequency)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"dim": 30, "heads": 4}, "dim 30 must be a multiple of 2 \\* heads"),
        ({"dim": 6, "heads": 2}, "must be a multiple of 2 \\* heads"),
        ({"layers": 0}, "layers must be a whole number of at least 1, not 0"),
        ({"hidden": -8}, "hidden must be a whole number of at least 1, not -8"),
        ({"head": "tanh"}, "head must be softmax or sigmoid, not 'tanh'"),
        ({"activation": "geul"}, "did you mean 'gelu'"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(shape: dict, message: str):
    with pytest.raises(BadInput, match=message):
        ActuaryConfig(**shape)
