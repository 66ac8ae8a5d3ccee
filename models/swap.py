"""Gives a transformers checkpoint another feed-forward activation, and tunes it to live with it: `actuary swap`.

    checkpoint -> each block's mlp becomes ours, keeping what its weights can -> fine-tune (and distil) -> checkpoint

What is kept depends on both forms, pointwise (p) or gated (g):

    p -> p   every weight: only the function between them changes
    g -> g   every weight
    p -> g   gate = up, and up = 0 x + 1, so that act(gate) * up starts as act(gate); at matched width the
             units whose weights are largest, |up row| * |down column|, so that three matrices hold what two did
    g -> p   up = gate; at matched width further units join, random going in and zero coming out

Bits per byte are measured three times on the same held-out tokens: before, after the swap, and after tuning.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from actuary import ActuaryError, BadInput
from models import activations
from models.activations import Activation
from models.corpus import Corpus
from models.gpt import WIDTH_STEP
from models.resume import load_state, save_state
from models.train import REPORT_EVERY, SAVE_EVERY_S, Stopped

Width = Literal["matched", "full"]
OF_SWAP = "actuary_swap_"  # before the family in config.json's model_type, so that transformers alone does not read it
SWAP = "actuary_swap"  # in config.json: what was put in place of the family's own feed-forward block
BATCH_OF_WINDOWS = 4  # held-out windows at once


@dataclass(frozen=True)
class Tuning:
    """How a swapped checkpoint is tuned. steps 0 leaves it as swapped.

    Args:
        distil: share of the loss that is the distance from the original's predictions (KL divergence, Hinton et
            al. 2015, at temperature 1); the rest is cross-entropy on the text.
        window: tokens of one training example; at most the checkpoint's context.
        held_out_tokens: how much of the held-out text is measured.
    """

    steps: int = 200
    batch: int = 4
    window: int = 128
    rate: float = 3e-4
    warm_up: float = 0.1
    distil: float = 0.0
    held_out_tokens: int = 32768
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.distil <= 1:
            raise BadInput(f"distil must be a share from 0 to 1, not {self.distil}")

    def rate_at(self, step: int) -> float:
        """Linear up, then a cosine down to zero."""
        done = (step + 1) / self.steps
        if done < self.warm_up:
            return self.rate * done / self.warm_up
        return self.rate * 0.5 * (1 + math.cos(math.pi * (done - self.warm_up) / (1 - self.warm_up)))


class SwappedFeedForward(nn.Module):
    """down(activation(up(x))): [B, T, C] -> [B, T, C], in the place of the family's own block."""

    def __init__(self, activation: Activation, dim: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(dim, hidden * (2 if activation.gated else 1), bias=True)
        self.down = nn.Linear(hidden, dim, bias=bias)
        self.learned = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor([start])) for name, start in activation.learned.items()}
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x), **self.learned))


@dataclass(frozen=True)
class _Block:
    """A family's own feed-forward block as matrices: up [H, C] or packed [2H, C], down [C, H], biases or None."""

    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    gated: bool


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer blocks, each with its feed-forward block as `mlp`."""
    return list(model.transformer.h if hasattr(model, "transformer") else model.model.layers)


def _read(mlp: nn.Module) -> _Block:
    if isinstance(mlp, SwappedFeedForward):
        return _Block(mlp.up.weight, mlp.up.bias, mlp.down.weight, mlp.down.bias, mlp.activation.gated)
    if hasattr(mlp, "c_fc"):  # GPT-2 stores [in, out]
        return _Block(mlp.c_fc.weight.T, mlp.c_fc.bias, mlp.c_proj.weight.T, mlp.c_proj.bias, gated=False)
    up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    biased = mlp.gate_proj.bias is not None
    bias = torch.cat([mlp.gate_proj.bias, mlp.up_proj.bias]) if biased else None
    return _Block(up, bias, mlp.down_proj.weight, mlp.down_proj.bias, gated=True)


def replace_blocks(model: PreTrainedModel, activation: Activation, hidden: int, bias: bool) -> None:
    """Puts our block, its weights not yet set, in the place of each of the model's own."""
    dim = model.config.hidden_size
    for block in blocks_of(model):
        block.mlp = SwappedFeedForward(activation, dim, hidden, bias)
    setattr(model.config, SWAP, {"activation": activation.name, "hidden": hidden, "bias": bias})


def swapped_width(hidden: int, before: bool, after: bool, width: Width) -> int:
    """H after the swap; `before` and `after` say whether each form is gated."""
    if before == after or width == "full":
        return hidden
    share = 2 / 3 if after else 3 / 2
    matched = max(WIDTH_STEP, round(share * hidden / WIDTH_STEP) * WIDTH_STEP)
    return min(matched, hidden) if after else matched  # a gated form keeps units, and has no others


@torch.no_grad()
def swap_activation(model: PreTrainedModel, activation: Activation, width: Width = "matched", seed: int = 0) -> None:
    """Changes the model in place; what is kept stands at the top of this file."""
    torch.manual_seed(seed)
    own = [_read(block.mlp) for block in blocks_of(model)]
    first = own[0]
    hidden = swapped_width(first.down.shape[1], first.gated, activation.gated, width)
    replace_blocks(model, activation, hidden, bias=first.down_bias is not None)
    for block, old in zip(blocks_of(model), own, strict=True):
        _carry(old, block.mlp, hidden)


def _carry(old: _Block, new: SwappedFeedForward, hidden: int) -> None:
    gated = new.activation.gated
    up_bias = old.up.new_zeros(len(old.up)) if old.up_bias is None else old.up_bias
    if old.gated == gated:
        new.up.weight.copy_(old.up)
        new.up.bias.copy_(up_bias)
        new.down.weight.copy_(old.down)
    elif gated:
        importance = old.up.norm(dim=1) * old.down.norm(dim=0)
        kept = importance.topk(hidden).indices.sort().values
        new.up.weight.zero_()
        new.up.weight[:hidden] = old.up[kept]
        new.up.bias.fill_(1.0)
        new.up.bias[:hidden] = up_bias[kept]
        new.down.weight.copy_(old.down[:, kept])
    else:
        H = old.down.shape[1]
        nn.init.normal_(new.up.weight, std=float(old.up.std()))
        new.up.weight[:H] = old.up[:H]
        new.up.bias.zero_()
        new.up.bias[:H] = up_bias[:H]
        new.down.weight.zero_()
        new.down.weight[:, :H] = old.down
    if old.down_bias is not None:
        new.down.bias.copy_(old.down_bias)


@dataclass(frozen=True)
class Text:
    """Ids of both parts under the checkpoint's own tokenizer; `held_out_bytes` are those of the measured ids."""

    train: NDArray[np.int32]  # [N]
    held_out: NDArray[np.int32]  # [M]
    held_out_bytes: int


def tokenized(corpus: Corpus, tokenizer: Tokenizer, tuning: Tuning) -> Text:
    """The corpus as ids; BadInput where it is too short for one window of each part."""

    def encode(texts: tuple[str, ...]) -> NDArray[np.int32]:
        encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return np.concatenate([np.array(encoding.ids, dtype=np.int32) for encoding in encodings])

    train, held_out = encode(corpus.train), encode(corpus.held_out)
    measured = held_out[: tuning.held_out_tokens + 1]
    for name, ids in (("training", train), ("held-out", measured)):
        if len(ids) <= tuning.window:
            raise BadInput(
                f"the corpus has {len(ids)} {name} tokens; a window of {tuning.window} takes more: name more text with "
                "--corpus, or a shorter --window"
            )
    share = (len(measured) - 1) / len(held_out)
    return Text(train, measured, round(share * corpus.held_out_bytes))


@torch.inference_mode()
def bits_per_byte(model: PreTrainedModel, text: Text, window: int) -> float:
    """Of the held-out ids, each predicted once, from the window that it stands in."""
    model.eval()
    nats = 0.0
    pieces = [text.held_out[at : at + window + 1] for at in range(0, len(text.held_out) - 1, window)]
    whole = [piece for piece in pieces if len(piece) == window + 1]
    groups = [whole[i : i + BATCH_OF_WINDOWS] for i in range(0, len(whole), BATCH_OF_WINDOWS)]
    groups += [[piece] for piece in pieces[len(whole) :]]
    for group in groups:
        batch = torch.from_numpy(np.stack(group)).long()
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        nats += float(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    return nats / math.log(2) / text.held_out_bytes


def tune(
    model: PreTrainedModel,
    original: PreTrainedModel | None,
    text: Text,
    tuning: Tuning,
    state: Path,
    mark: dict[str, Any],
    report: Callable[[int, float], None],
    should_stop: Callable[[], bool],
) -> None:
    """Fine-tunes every weight in place, from where `state` stands.

    Args:
        original: the teacher; needed where `tuning.distil` is above 0.
        mark: what must be equal for a stopped state to count as this one's.
        report: told the step and the loss in nats per token.
        should_stop: asked after each step; when true the state is saved and Stopped is raised.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=tuning.rate, betas=(0.9, 0.95), weight_decay=0.0)
    mark = {**mark, **asdict(tuning)}
    first, seconds = load_state(state, mark, model, optimizer)  # type: ignore[arg-type]
    started = saved = time.monotonic()
    model.train()
    for step in range(first, tuning.steps):
        for group in optimizer.param_groups:
            group["lr"] = tuning.rate_at(step)
        rng = np.random.default_rng([tuning.seed, step])
        starts = rng.integers(0, len(text.train) - tuning.window, size=tuning.batch)
        batch = torch.from_numpy(np.stack([text.train[at : at + tuning.window + 1] for at in starts])).long()
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = (1 - tuning.distil) * F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        if tuning.distil and original is not None:
            with torch.no_grad():
                target = original(input_ids=batch[:, :-1], use_cache=False).logits.log_softmax(-1)
            distance = F.kl_div(logits.log_softmax(-1), target, reduction="none", log_target=True).sum(-1).mean()
            loss = loss + tuning.distil * distance
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % REPORT_EVERY == 0 or step + 1 == tuning.steps:
            nats = float(loss.detach())
            if not math.isfinite(nats):
                raise ActuaryError(f"tuning diverged: loss {nats} at step {step + 1}; try a smaller --rate")
            report(step + 1, nats)
        stop = should_stop()
        if step + 1 < tuning.steps and (stop or time.monotonic() - saved > SAVE_EVERY_S):
            saved = time.monotonic()
            save_state(state, step + 1, seconds + saved - started, mark, model, optimizer)  # type: ignore[arg-type]
            if stop:
                raise Stopped(f"stopped after {step + 1} of {tuning.steps} steps; the same command goes on from there")
    model.eval()
    state.unlink(missing_ok=True)


def recorded_activation(config: Any) -> Activation | None:
    """The activation that a checkpoint was swapped to; None where it still has its own. BadInput: it is damaged."""
    swap = getattr(config, SWAP, None)
    if swap is None:
        return None
    if not isinstance(swap, dict) or not isinstance(swap.get("hidden"), int) or swap["hidden"] < 1:
        raise BadInput(f"config.json has {SWAP} = {swap!r}; swap the checkpoint again with: actuary swap")
    return activations.get(str(swap.get("activation")))
