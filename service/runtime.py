"""Opens ONNX Runtime sessions: on which provider, with how many threads, with which fused operators."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any, Literal

import onnxruntime

from actuary import BadInput
from export.audit import CPU, CUDA, RECORD, cannot_run, check_precision
from export.bundle import ActivationInfo
from export.ops import library
from export.ops.library import Library

FATAL = 4  # what goes wrong with a bundle is raised and reported by us; ONNX Runtime's own log repeats it


class ProviderMissing(BadInput):
    """CUDA was asked for by name and does not run here."""


class Runtime:
    """One provider and one thread budget for all sessions.

    The budget is kept by as many lanes as there are threads, each a run on one core (service/engine.py), or one run
    on all of them. ONNX Runtime's process-wide pool (`set_global_thread_pool_sizes`) would be the obvious way, but it
    spins and cannot be told not to: with 2 threads and a 0.3 ms batch every 3 ms it took 3.5 ms of processor
    time per batch, which is a core of two, where a session's own pool without spinning took 0.27 ms
    (onnxruntime 1.31.1; 300 batches). Pools that wait cost a blocked thread each and nothing else.
    """

    def __init__(self, provider: Literal["auto", "cpu", "cuda"], threads: int, ops: Path | None = None) -> None:
        """BadInput where `ops` holds a library of fused operators that is damaged or of another kind."""
        self.threads = threads
        self.ops: Library | None = library.find(ops) if ops else None
        self.no_ops = "" if self.ops else "fused operators were never built; actuary ops build makes them"
        self._asked = provider
        self._cuda = provider != "cpu"
        # By layers, C, V, context and precision: for how many tokens all cores are faster than one. Timed once for all
        # models of a shape: timed apart, a busy moment could give one of two equal ones all cores, and not the other.
        self.wide_at: dict[tuple[int, int, int, int, str], tuple[int, ...]] = {}
        self.no_cuda = ""  # why `auto` runs on the CPU; empty where it does not
        self._preload_said = ""
        onnxruntime.set_default_logger_severity(FATAL)
        if self._cuda:
            self._preload()

    @property
    def strict(self) -> bool:
        """Whether CUDA was asked for by name, so that nothing may quietly run elsewhere."""
        return self._asked == "cuda"

    def why_cpu(self, precision: str) -> str:
        """Why a graph of that precision runs on the CPU though CUDA is here; empty where it does not."""
        return cannot_run(precision, CUDA) if self._cuda and not self.strict else ""

    def unfused(self, activation: ActivationInfo, precision: str = "fp32") -> str:
        """Why sessions of a graph with that activation run it unfused; empty where they run our kernel."""
        if not self.ops:
            return self.no_ops
        cuda = self._cuda and not self.why_cpu(precision)
        return self.ops.why_not(activation.name, activation.digest, cuda=cuda)

    @property
    def lanes(self) -> int:
        """How many batches run at a time: one a core on the CPU, one on a device."""
        return 1 if self._cuda else self.threads

    def open(
        self, model: Path, activation: ActivationInfo | None = None, precision: str = "fp32", wide: bool = False
    ) -> Any:
        """An InferenceSession of `model`; raises what ONNX Runtime raises where it is not a good one.

        Args:
            activation: of the graph; with it, the fused operators are used where `unfused` says nothing against it.
            precision: of the graph; BadInput where the provider has no kernels for it.
            wide: on the CPU, with all threads; else with one.
        """
        if not self._cuda or self.why_cpu(precision):
            check_precision(precision, CPU)
            return self._session(model, [CPU], activation, wide)
        check_precision(precision, CUDA)
        try:
            session = self._session(model, [CUDA, CPU], activation, wide)
            if CUDA in session.get_providers():
                return session
            reason = self._preload_said or "its libraries do not load"
        except Exception as error:
            reason = str(error)
        if cannot_run(precision, CPU):
            raise BadInput(
                f"CUDA does not open it ({reason}), and the CPU has no kernels for {precision}; "
                "check the driver with nvidia-smi, or export it again with --precision fp32"
            )
        session = self._session(model, [CPU], activation, wide)  # a model that fails here too is itself bad
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

    def _session(self, model: Path, providers: list[str], activation: ActivationInfo | None, wide: bool) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = FATAL
        options.intra_op_num_threads = self.threads if wide or CUDA in providers else 1
        options.inter_op_num_threads = 1
        # Within a run of all cores they wait for each other some tens of times, by spinning; at its end that stops.
        # Waking a core instead took 64 tokens of 14M parameters from 4.3 to 5.3 ms in int8, 4 from 3.5 to 4.8 in fp32.
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if wide else "0")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry(RECORD, "1")
        cuda = CUDA in providers
        if self.ops and activation and self.ops.fits(activation.name, activation.digest, cuda):
            library.register(options, self.ops, cuda)
        return onnxruntime.InferenceSession(str(model), options, providers=providers, enable_fallback=0)
