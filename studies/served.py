"""Bundles -> a running service of its own -> answers, for studies that measure what is served."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from actuary import ActuaryError

START_S, POLL_S = 300.0, 0.05
ANSWER_S = 60.0
END_S = 40.0  # what is queued is finished first; the service's own limit is 35 s
LISTENS = re.compile(r"on (http://127\.0\.0\.1:\d+)/ \(the page\)")

# A model of random weights that is exported and served within seconds.
TINY: dict[str, Any] = {"vocab_size": 300, "context": 32, "layers": 2, "dim": 32, "heads": 2}

Ask = Callable[[str, dict[str, Any]], Any]


@contextlib.contextmanager
def serving(bundles: Path, kept: Path, ops: Path | None = None) -> Iterator[Ask]:
    """`actuary serve` on a free port, ended with the block: `ask("/v1/next-token", body)` is its answer.

    Args:
        kept: folder of its log, server.log.
        ops: of fused operators; None for none.
    """
    log = kept / "server.log"
    command = [sys.executable, "-m", "actuary", "serve", "--bundles", str(bundles), "--port", "0"]
    command += ["--ops", str(ops or kept / "no-ops"), "--database", str(kept / "experiments.db")]
    # Its settings are the defaults and these, not those of another service.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACTUARY_")}
    root = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )
    try:
        url = _listens(process, log)
        yield lambda path, body: ask(url + path, body)
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _listens(process: subprocess.Popen[bytes], log: Path) -> str:
    """Its URL, once it listens."""
    until = time.monotonic() + START_S
    while True:
        text = log.read_text(encoding="utf-8", errors="replace")
        if found := LISTENS.search(text):
            return found[1]
        if process.poll() is not None or time.monotonic() > until:
            tail = "\n".join(text.splitlines()[-8:])
            raise ActuaryError(f"`actuary serve` did not start; {log} ends with:\n{tail}")
        time.sleep(POLL_S)


def ask(url: str, body: dict[str, Any]) -> Any:
    """The answer's JSON, in which NaN and infinity are refused; ActuaryError with the service's own words otherwise."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with opener.open(request, timeout=ANSWER_S) as answer:
            return json.loads(answer.read(), parse_constant=_refused)
    except urllib.error.HTTPError as error:
        raise ActuaryError(f"{url} answered {error.code}: {error.read().decode(errors='replace')[:500]}") from error


def _refused(constant: str) -> float:
    raise ActuaryError(f"an answer of the service holds {constant}, which is no JSON")
