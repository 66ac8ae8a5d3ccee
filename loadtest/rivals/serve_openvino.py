"""OpenVINO: the exported graph, compiled for latency where prompts are computed one by one, else for throughput."""

from __future__ import annotations

import threading

import http_app
import numpy as np
import openvino

given = http_app.arguments()
settings = {
    "PERFORMANCE_HINT": "LATENCY" if given.streams == 1 else "THROUGHPUT",
    "NUM_STREAMS": str(given.streams),
    "INFERENCE_NUM_THREADS": given.streams * given.threads,
    "INFERENCE_PRECISION_HINT": "f32",
}
model = openvino.Core().compile_model(given.model, "CPU", settings)
mine = threading.local()  # an infer request for each thread


def next_token(ids: list[int]) -> http_app.Answer:
    if not hasattr(mine, "request"):
        mine.request = model.create_infer_request()
    feeds = {"input_ids": np.array([ids], np.int64), "last": np.array([len(ids) - 1], np.int64)}
    answer = mine.request.infer(feeds, share_inputs=True)
    return answer["ids"][0].tolist(), answer["probabilities"][0].tolist()


http_app.serve(next_token, given)
