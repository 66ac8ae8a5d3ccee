"""What the tests share: a small corpus, tiny bundles with random weights, and a running service on them."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

# By itself an example may take 200 ms, and drawing ten a second, which a busy machine exceeds by chance.
hypothesis.settings.register_profile(
    "busy machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy machine")

# Of torch, before it is imported, here and in what the tests start: two threads of each of two test processes on two
# cores wait for each other actively. 61 steps of a tiny model took 59 s, 14 of them of the processor; now 1.9 and 1.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A process of `make test` takes a file at a time. Those of half a minute and more come first, the longest before the
# others, so that at the end no core waits long for the other; by itself xdist leaves those of few tests to the end.
LONG_FIRST = [
    f"test_{name}.py"
    for name in (
        *("compare", "make_up", "stock_clients", "comparisons", "page_places", "half", "bench_serve", "train"),
        *("compare_kinds", "ops_build", "page_compare", "studies_language", "inference_protocol", "swap", "export"),
        *("compose", "real_checkpoints", "every_activation", "fallback", "cpp_functor", "loadtest", "plugin"),
    )
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG_FIRST.index(name) if (name := item.path.name) in LONG_FIRST else len(LONG_FIRST))


ACTUARY = [sys.executable, "-m", "actuary"]
HANG_S = 300  # a hang, not two busy cores, on which a start took 60; alone a warm one takes about two
TINY = {"vocab_size": 300, "context": 32, "layers": 2, "dim": 32, "heads": 2}
TINY_VARIANTS = (("gelu", "softmax"), ("swiglu", "softmax"), ("gelu", "sigmoid"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory):
    """The json package's sources: small, on every machine, and cached in a folder of its own."""
    import json

    from models.corpus import Corpus

    return Corpus.read([Path(json.__file__).parent], cache=tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def tiny_checkpoint(corpus) -> Callable:
    """`tiny_checkpoint(activation, head)`: a checkpoint in memory, random weights, no zeros."""
    from export.exporter import random_checkpoint
    from models.gpt import ActuaryConfig

    def make(activation: str, head: str = "softmax", **shape):
        config = ActuaryConfig(activation=activation, head=head, **{**TINY, **shape})
        return random_checkpoint(config.name, config, corpus)

    return make


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable) -> Path:
    """A folder of bundles: gelu, swiglu, gelu-sigmoid-head; context 32, vocabulary 300. Not to be changed."""
    from export.exporter import export_bundle

    out = tmp_path_factory.mktemp("bundles")
    for activation, head in TINY_VARIANTS:
        export_bundle(tiny_checkpoint(activation, head), out)
    return out


@pytest.fixture(scope="session")
def comparable(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable) -> Path:
    """The same with a context of 128, which takes all prompts of `actuary compare`. Not to be changed."""
    from export.exporter import export_bundle

    out = tmp_path_factory.mktemp("comparable")
    for activation, head in TINY_VARIANTS:
        export_bundle(tiny_checkpoint(activation, head, context=128), out)
    return out


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable) -> Path:
    """A folder of a bundle of each kind (bundle_kinds.py). Not to be changed."""
    from bundle_kinds import write_kinds

    out = tmp_path_factory.mktemp("kinds")
    write_kinds(out, tiny_checkpoint)
    return out


@pytest.fixture(scope="session")
def fused(tmp_path_factory: pytest.TempPathFactory):
    """The library of fused operators, built once for all test processes; skips where there is no C++ compiler."""
    import fcntl

    from actuary import BadInput
    from export.ops.build import build

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (shared / "fused.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return build(shared / "fused", cuda=False, strict=True)[0]
        except BadInput as error:
            pytest.skip(str(error))


@pytest.fixture
def isa(request: pytest.FixtureRequest, fused):
    """Runs one instruction set's loops, and puts back what ran before; None leaves all as it is."""
    from actuary import BadInput
    from export.ops import library

    before = library.running_isa(fused)
    try:
        library.use_isa(fused, request.param or before)
    except BadInput as error:
        pytest.skip(str(error))
    yield request.param
    library.use_isa(fused, before)


@pytest.fixture
def actuary_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`actuary_here("train", ...)`: the program in this process, in `tmp_path`, for what ends before it does much.

    In a process of its own it takes six seconds of the processor to import torch and transformers.
    """
    from actuary import main
    from models.corpus import Corpus

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        Corpus._cached.cache_clear()  # of folders that are relative to where the program runs
        capsys.readouterr()
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as ended:
                main([*arguments])
        finally:
            signal.signal(signal.SIGTERM, before)
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return subprocess.CompletedProcess(arguments, ended.value.code, said.out, said.err)

    return run


def _ports() -> Iterator[int]:
    """Below those that a system gives to whoever asks for any, which another process might get before it is used."""
    begin, end = 20_000, 32_000
    while True:
        yield from range(random.SystemRandom().randrange(begin, end), end)


_next_port = _ports()


def free_port() -> int:
    for port in _next_port:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("there is always another one")


def counted_batches(engine) -> list[int]:
    """How many sequences each batch of a service's engine had, growing as it runs."""
    batches, run_batch = [], engine._run_batch

    def counted(batch, wide):
        batches.append(len(batch))
        run_batch(batch, wide)

    engine._run_batch = counted
    return batches


@contextlib.contextmanager
def serving(bundles: Path, *arguments: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """A real `actuary serve` on a free port: (its URL, its process). Ended by SIGTERM, as a supervisor would."""
    port = free_port()
    command = [*ACTUARY, "serve", "--bundles", str(bundles), "--port", str(port), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "NO_COLOR": "1"})
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + HANG_S
        while True:
            try:
                urllib.request.urlopen(f"{url}/health/ready", timeout=2)
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    process.kill()
                    raise RuntimeError(f"the service did not start: {process.communicate()[1]}") from None
                time.sleep(0.05)
        yield url, process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="session")
def server_url(bundles: Path) -> Iterator[str]:
    """The URL of a running service on the tiny bundles."""
    with serving(bundles) as (url, _):
        yield url


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL, but for the database's name, of a PostgreSQL of our own on loopback; skips where it is not installed.

    It refuses to run as root, so there its own user runs it, whom Debian's package makes.
    """
    import pwd
    import shutil
    import tempfile

    pg_ctl = shutil.which("pg_ctl") or next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))[-1:]), None)
    if pg_ctl is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    folder, port = Path(tempfile.mkdtemp(prefix="actuary-postgres-")), free_port()
    as_user: list[str] = []
    if os.geteuid() == 0:
        if not any(user.pw_name == "postgres" for user in pwd.getpwall()):
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        shutil.chown(folder, "postgres")
        as_user = ["runuser", "-u", "postgres", "--"]

    def control(*arguments: str) -> None:
        command = [*as_user, str(Path(pg_ctl).resolve()), "-D", str(folder / "data"), *arguments]
        # Not through a pipe: the server that it starts would keep it open.
        with (folder.parent / f"{folder.name}.log").open("w+") as said:
            if subprocess.run(command, stdout=said, stderr=said, cwd="/").returncode:
                said.seek(0)
                raise RuntimeError(f"{' '.join(command)}: {said.read()}")

    try:
        control("initdb", "-o", "-A trust -U actuary --no-sync")
        settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        control("-w", "-t", "60", "-o", settings, "start")
        try:
            yield f"postgresql://actuary@127.0.0.1:{port}/"
        finally:
            control("-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)
        (folder.parent / f"{folder.name}.log").unlink(missing_ok=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new database for experiments, as --database takes it: of SQLite, and of PostgreSQL where that is installed."""
    if request.param == "sqlite":
        return str(tmp_path / "experiments.db")
    import uuid

    import psycopg

    url, name = request.getfixturevalue("postgres"), f"test_{uuid.uuid4().hex}"
    with psycopg.connect(f"{url}postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{url}{name}"


@pytest.fixture(scope="session")
def client_python(pytestconfig: pytest.Config) -> Callable[..., Path]:
    """`client_python("kserve==1.2.3")`: the Python of an environment that holds these packages and nothing of ours.

    With `torch=True` it sees the packages of this environment beneath its own, since what needs torch would download
    another of up to 3 GB. It is kept in pytest's cache. Skips where the package registry does not answer.
    """
    import fcntl
    import hashlib
    import shutil
    import sysconfig
    import venv

    cache = pytestconfig.cache.mkdir("client_python")

    def make(*requirements: str, torch: bool = False) -> Path:
        key = f"{sys.version} {sys.prefix} {torch} {' '.join(requirements)}"
        folder = cache / hashlib.sha256(key.encode()).hexdigest()[:16]
        python, complete = folder / "bin" / "python", folder / "complete"
        with (cache / f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not complete.exists():
                shutil.rmtree(folder, ignore_errors=True)
                venv.create(folder, symlinks=True)
                if torch:  # pip finds what is there, and where it wants another version installs it in `folder`
                    [packages] = folder.glob("lib/*/site-packages")
                    (packages / "beneath.pth").write_text(sysconfig.get_path("purelib") + "\n")
                # Not compiling what is never imported halves the time.
                install = ["-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile", *requirements]
                done = subprocess.run([sys.executable, *install], capture_output=True, text=True, timeout=600)
                if done.returncode and "Retrying (" in done.stderr:
                    pytest.skip(f"no package registry: {done.stderr.strip().splitlines()[-1]}")
                assert done.returncode == 0, done.stderr
                complete.touch()
        return python

    return make
