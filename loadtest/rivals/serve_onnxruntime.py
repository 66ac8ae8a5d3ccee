"""Bare ONNX Runtime: one session of the exported graph, whose runs may be parallel."""

from __future__ import annotations

import http_app
import numpy as np
import onnxruntime

given = http_app.arguments()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = given.threads
session = onnxruntime.InferenceSession(given.model, options, providers=["CPUExecutionProvider"])


def next_token(ids: list[int]) -> http_app.Answer:
    feeds = {"input_ids": np.array([ids], np.int64), "last": np.array([len(ids) - 1], np.int64)}
    top, probabilities = session.run(["ids", "probabilities"], feeds)
    return top[0].tolist(), probabilities[0].tolist()


http_app.serve(next_token, given)
