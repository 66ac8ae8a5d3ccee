"""fp32.onnx -> OpenVINO's int8: products of int8 with static steps, by NNCF's post-training quantisation.

    python loadtest/rivals/to_openvino.py FP32.ONNX OUT.XML VOCABULARY

Faster here than compressed weights with activations quantised as they come (16 prompts of 64 tokens: 44 ms against
56). OpenVINO reads fp32.onnx itself. Calibrated on random ids, as the weights are random too.
"""

from __future__ import annotations

import sys

import nncf
import numpy as np
import openvino

PROMPTS, TOKENS = 64, 64

source, target, vocab_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
draw = np.random.default_rng(1)
prompts = [
    {"input_ids": draw.integers(0, vocab_size, (1, TOKENS)), "last": np.array([TOKENS - 1])} for _ in range(PROMPTS)
]
quantised = nncf.quantize(
    openvino.Core().read_model(source),
    nncf.Dataset(prompts),
    model_type=nncf.ModelType.TRANSFORMER,
    preset=nncf.QuantizationPreset.PERFORMANCE,
    subset_size=PROMPTS,
)
openvino.save_model(quantised, target, compress_to_fp16=False)
