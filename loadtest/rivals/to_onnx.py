"""A transformers folder -> fp32.onnx and int8.onnx, as PyTorch's and ONNX Runtime's documents say to do it.

    python loadtest/rivals/to_onnx.py MODEL OUT

Run by the project's own Python, which has torch. Inputs: input_ids int64 [B, T], right-padded, and last int64 [B],
each prompt's last position. Outputs: the 10 likeliest next tokens, ids int64 [B, 10] and probabilities float32
[B, 10]. Only the last position is multiplied with the vocabulary, which every engine here is given alike.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers import AutoModelForCausalLM

TOP = 10
OPSET = 20


class NextToken(torch.nn.Module):
    """Ids to the likeliest next tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.body = model.transformer
        # A copy: quantize_dynamic transposes the matrix of a product, and the embedding reads the same one.
        self.head = torch.nn.Parameter(model.lm_head.weight.detach().T.contiguous())  # [C, V]

    def forward(self, input_ids: torch.Tensor, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.body(input_ids, use_cache=False).last_hidden_state  # [B, T, C]
        rows = hidden[torch.arange(input_ids.shape[0]), last]  # [B, C]
        probabilities, ids = torch.topk(torch.softmax(rows @ self.head, -1), TOP)  # [B, TOP]
        return ids, probabilities


def main(model: Path, out: Path) -> None:
    network = NextToken(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)).eval()
    example = torch.zeros(2, 7, dtype=torch.int64), torch.tensor([6, 3])
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time")
    program = torch.onnx.export(
        network,
        example,
        dynamo=True,
        opset_version=OPSET,
        input_names=["input_ids", "last"],
        output_names=["ids", "probabilities"],
        dynamic_shapes={"input_ids": {0: batch, 1: time}, "last": {0: batch}},
    )
    assert program is not None
    program.save(str(out / "fp32.onnx"))
    # The quantiser's shape inference refuses initialisers that are also listed as values.
    file = onnx.load(out / "fp32.onnx")
    named = {tensor.name for tensor in file.graph.initializer}
    kept = [value for value in file.graph.value_info if value.name not in named]
    del file.graph.value_info[:]
    file.graph.value_info.extend(kept)
    quantize_dynamic(
        file, out / "int8.onnx", weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul", "Gemm"]
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
