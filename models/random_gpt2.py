"""A GPT-2 with random weights, as transformers' save_pretrained writes one: what every engine of a benchmark converts.

    python -m models.random_gpt2 --out DIR

Latency needs no training, but a comparison of engines needs probabilities that differ: with transformers' own scale of
0.02 the softmax over 8192 tokens is flat (0.0006 at its highest), and an engine that drops a block would pass. At
SCALE the highest probability of a prompt of 64 tokens is 0.02 to 0.2, and the blocks make nearly all of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from models.corpus import CACHE, END_OF_TEXT, Corpus, padded_tokenizer
from models.files import new_folder

SCALE = 0.1
SEED = 0
SHAPE = {"n_layer": 6, "n_embd": 384, "n_head": 6, "n_positions": 512, "vocab_size": 8192}  # 14M parameters


def write(out: Path, corpus: Corpus, **shape: Any) -> None:
    """Fills the folder `out` with config, safetensors and a byte-level BPE trained on `corpus`.

    Args:
        shape: fields of GPT2Config in the place of SHAPE's.
    """
    config = GPT2Config(**{**SHAPE, **shape}, initializer_range=SCALE, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(SEED)
    model = GPT2LMHeadModel(config)
    tokenizer = padded_tokenizer(corpus.tokenizer(config.vocab_size), config.vocab_size)
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT
        ).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Folder to write, or to write anew.")
    parser.add_argument("--cache", type=Path, default=CACHE, help="Folder of tokenizers.")
    given = parser.parse_args()
    write(given.out, Corpus.read(cache=given.cache))
