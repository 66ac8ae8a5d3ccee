"""LitServe with its batching, around ONNX Runtime: the faster of its backends here (torch eager is the other).

A batch is right-padded to its longest prompt, which a causal model does not see.
"""

from __future__ import annotations

import argparse
from typing import Any

import litserve
import numpy as np
import onnxruntime

MAX_BATCH = 8
# How long a first request waits for others. Anything above 0 is paid in full by a caller who is alone.
BATCH_TIMEOUT_S = 0.001


class NextToken(litserve.LitAPI):
    """Ids to the 10 likeliest next tokens."""

    def __init__(self, model: str, threads: int) -> None:
        super().__init__(api_path="/next", max_batch_size=MAX_BATCH, batch_timeout=BATCH_TIMEOUT_S)
        self.model, self.threads = model, threads

    def setup(self, device: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        self.session = onnxruntime.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])
        self.predict([[1, 2, 3]])

    def decode_request(self, request) -> list[int]:  # an annotation of it would be taken for a schema
        return request["ids"]

    def batch(self, inputs: list[list[int]]) -> list[list[int]]:
        return inputs

    def predict(self, prompts: list[list[int]]) -> list[dict[str, Any]]:
        lengths = np.array([len(ids) for ids in prompts], np.int64)
        padded = np.zeros((len(prompts), lengths.max()), np.int64)
        for row, ids in zip(padded, prompts, strict=True):
            row[: len(ids)] = ids
        top, probabilities = self.session.run(["ids", "probabilities"], {"input_ids": padded, "last": lengths - 1})
        pairs = zip(top.tolist(), probabilities.tolist(), strict=True)
        return [{"ids": ids, "probabilities": each} for ids, each in pairs]

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--streams", type=int, default=1, help="Workers.")
    parser.add_argument("--threads", type=int, default=1, help="Cores of each of them.")
    given = parser.parse_args()
    server = litserve.LitServer(
        NextToken(given.model, given.threads), accelerator="cpu", workers_per_device=given.streams, fast_queue=True
    )
    server.run(host="127.0.0.1", port=given.port, log_level="warning", num_api_servers=1, generate_client_file=False)
