"""What the rivals that stand behind FastAPI share: routes, threads, start. Ids in, the 10 likeliest next tokens out.

    POST /next      {"ids": [1, 2, 3]}                     -> {"ids": [10], "probabilities": [10]}
    POST /generate  {"prompts": [[1, 2]], "tokens": 64}    -> {"tokens": [[64]]}    where the engine generates
    GET  /health    200 once the model is loaded and has run

Written as one would for speed: async routes, no schema between JSON and engine, uvloop and httptools, and as many
threads as the engine computes prompts at once, so that the event loop reads the next request meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response

TOP = 10

Answer = tuple[list[int], list[float]]  # ids and probabilities, the likeliest first


def arguments() -> argparse.Namespace:
    """What every rival is started with."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="File or folder in the engine's own format.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--streams", type=int, default=1, help="Prompts computed at once.")
    parser.add_argument("--threads", type=int, default=1, help="Cores of each of them.")
    return parser.parse_args()


def top_of(logits: np.ndarray) -> Answer:
    """[V] logits of engines that do not give the top themselves."""
    ids = np.argpartition(logits, -TOP)[-TOP:]
    ids = ids[np.argsort(-logits[ids])]
    highest = logits[ids[0]]
    probabilities = np.exp(logits[ids] - highest) / np.exp(logits - highest).sum()
    return ids.tolist(), probabilities.tolist()


def serve(
    next_token: Callable[[list[int]], Answer],
    given: argparse.Namespace,
    generate: Callable[[list[list[int]], int], list[list[int]]] | None = None,
) -> None:
    """Runs until SIGTERM; `next_token` is called by `given.streams` threads."""
    pool = ThreadPoolExecutor(given.streams)
    app = FastAPI(openapi_url=None)
    next_token([1, 2, 3])

    @app.post("/next")
    async def _next(request: Request) -> Response:
        ids = json.loads(await request.body())["ids"]
        top, probabilities = await asyncio.get_running_loop().run_in_executor(pool, next_token, ids)
        return Response(json.dumps({"ids": top, "probabilities": probabilities}), media_type="application/json")

    if generate:

        @app.post("/generate")
        async def _generate(request: Request) -> Response:
            asked = json.loads(await request.body())
            loop = asyncio.get_running_loop()
            tokens = await loop.run_in_executor(pool, generate, asked["prompts"], asked["tokens"])
            return Response(json.dumps({"tokens": tokens}), media_type="application/json")

    @app.get("/health")
    async def _health() -> Response:
        return Response()

    uvicorn.run(app, host="127.0.0.1", port=given.port, loop="uvloop", http="httptools", log_level="warning")
