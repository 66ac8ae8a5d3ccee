"""Opens ONNX Runtime sessions: on which provider, with how many threads."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any, Literal

import onnxruntime

from actuary import BadInput

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
FATAL = 4  # what goes wrong with a bundle is raised and reported by us; ONNX Runtime's own log repeats it


class ProviderMissing(BadInput):
    """CUDA was asked for by name and does not run here."""


class Runtime:
    """One provider and one thread budget for all sessions.

    The budget is kept by running one batch at a time (service/engine.py) on `threads` threads. ONNX
    Runtime's process-wide pool (`set_global_thread_pool_sizes`) would be the obvious way, but it spins
    and cannot be told not to: with 2 threads and a 0.3 ms batch every 3 ms it took 3.5 ms of processor
    time per batch, which is a core of two, where a session's own pool without spinning took 0.27 ms
    (onnxruntime 1.31.1; 300 batches). Pools that wait cost a blocked thread each and nothing else.
    """

    def __init__(self, provider: Literal["auto", "cpu", "cuda"], threads: int) -> None:
        self._threads = threads
        self._asked = provider
        self._cuda = provider != "cpu"
        self.no_cuda = ""  # why `auto` runs on the CPU; empty where it does not
        self._preload_said = ""
        onnxruntime.set_default_logger_severity(FATAL)
        if self._cuda:
            self._preload()

    def open(self, model: Path) -> Any:
        """An InferenceSession of `model`; raises what ONNX Runtime raises where it is not a good one."""
        if not self._cuda:
            return self._session(model, [CPU])
        try:
            session = self._session(model, [CUDA, CPU])
            if CUDA in session.get_providers():
                return session
            reason = self._preload_said or "its libraries do not load"
        except Exception as error:
            reason = str(error)
        session = self._session(model, [CPU])  # a model that fails here too is itself bad
        self._without_cuda(reason)
        return session

    def _preload(self) -> None:
        if CUDA not in onnxruntime.get_available_providers():
            return self._without_cuda("the installed onnxruntime was built without it")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            onnxruntime.preload_dlls()  # CUDA and cuDNN from site-packages, where actuary[cuda] puts them
        self._preload_said = said.getvalue().partition("\n")[0]
        return None

    def _without_cuda(self, reason: str) -> None:
        if self._asked == "cuda":
            raise ProviderMissing(
                f"--provider cuda: CUDA does not run here ({reason}); install its libraries with "
                "pip install -e '.[cuda]' in Actuary's folder "
                "and check the driver with nvidia-smi, or use --provider cpu"
            )
        self._cuda, self.no_cuda = False, reason.partition(": ")[0]  # what follows names the same file again

    def _session(self, model: Path, providers: list[str]) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = FATAL
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return onnxruntime.InferenceSession(str(model), options, providers=providers, enable_fallback=0)
