"""transformers, eager: logits of the last position alone, scaled dot product attention, inference mode.

Its modules share no state between calls, but torch's own threads already fill the cores, so prompts are computed
one after the other.
"""

from __future__ import annotations

import http_app
import torch
from transformers import AutoModelForCausalLM

given = http_app.arguments()
torch.set_num_threads(given.threads)
model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
model.generation_config.eos_token_id = None  # as many tokens as were asked for


@torch.inference_mode()
def next_token(ids: list[int]) -> http_app.Answer:
    logits = model(torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1]
    probabilities, top = torch.topk(torch.softmax(logits, -1), http_app.TOP)
    return top.tolist(), probabilities.tolist()


@torch.inference_mode()
def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
    ids = torch.tensor(prompts)  # of one length
    everything = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return everything[:, ids.shape[1] :].tolist()


http_app.serve(next_token, given, generate)
