"""What transformers itself says after a few prompts: every engine must say the same before it is measured.

    python loadtest/rivals/reference.py MODEL OUT.JSON

Writes [{"ids": [T], "top": [10], "probabilities": [10]}].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

LENGTHS = (1, 7, 16, 64, 200, 256)
TOP = 10

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float64).eval()
context, vocab_size = model.config.n_positions, model.config.vocab_size
draw = torch.Generator().manual_seed(7)
prompts = [torch.randint(vocab_size, (1, n), generator=draw) for n in LENGTHS if n <= context]
answers = []
with torch.inference_mode():
    for ids in prompts:
        top = torch.topk(torch.softmax(model(ids).logits[0, -1], -1), TOP)
        answers.append({"ids": ids[0].tolist(), "top": top.indices.tolist(), "probabilities": top.values.tolist()})
Path(sys.argv[2]).write_text(json.dumps(answers), encoding="utf-8")
